"""dvc.yaml against the sources: a stage depends on the modules that it imports, and on its settings."""

import re
from pathlib import Path

import pytest
from imports import ROOT, all_imports
from project import copy_project
from ruamel.yaml import YAML

from drift.runtime.work import PLUMBING
from drift.settings import FIELD_KEYS, OUTPUTS, Settings

DVC = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")
STAGES = DVC["stages"]


def code_deps(stage: str) -> set[Path]:
    files = set()
    for dep in STAGES[stage]["deps"]:
        if dep.startswith(("drift/", "stages/")):
            path = ROOT / dep
            assert path.exists(), f"{stage}: {dep} is gone"
            found = path.rglob("*.py") if path.is_dir() else [path] if path.suffix == ".py" else []
            files |= {file.relative_to(ROOT) for file in found}
    return files


@pytest.mark.parametrize("stage", ["encode", "mae", "drift", "fid"])
def test_deps_are_the_imported_modules(stage):
    needed = {
        path
        for path in all_imports(Path("stages", f"{stage}.py"), without={Path(name) for name in PLUMBING})
        if path.name != "__init__.py"
    }
    assert code_deps(stage) == needed


@pytest.mark.parametrize("setting", ["core.autocrlf=true", "core.eol=crlf"])
def test_every_checkout_has_the_same_bytes(tmp_path, setting):
    """DVC hashes them: what Git rewrites counts as changed, and so does all that was made from it."""
    project = copy_project(tmp_path / "project")
    project.run("git", "clone", "--quiet", "--config", setting, ".", str(tmp_path / "clone"))
    names = project.run("git", "ls-files", "-z").stdout.split("\0")[:-1]
    deps = {dep for stage in STAGES.values() for dep in stage["deps"] if not dep.startswith("artifacts/")}
    assert all(any(name == dep or name.startswith(f"{dep}/") for name in names) for dep in deps)
    changed = [n for n in names if (tmp_path / "clone" / n).read_bytes() != (project.folder / n).read_bytes()]
    assert changed == []


def test_encode_does_not_depend_on_the_mae_and_mae_not_on_the_field():
    assert Path("drift/models/mae.py") not in code_deps("encode")
    assert not any(path.is_relative_to("drift/field") for path in code_deps("mae"))


@pytest.mark.parametrize("stage", ["encode", "mae", "drift", "fid"])
def test_commands_run_the_stage_as_a_module(stage):
    assert STAGES[stage]["cmd"].split()[:4] == ["exec", "python", "-m", f"stages.{stage}"]


@pytest.mark.parametrize("stage", ["encode", "mae", "drift", "fid"])
def test_params_are_the_sections_that_the_stage_reads(stage):
    readers = ["drift/evaluation/evaluate.py"] if stage == "fid" else []
    source = "".join((ROOT / path).read_text() for path in (f"stages/{stage}.py", *readers))
    read = set(re.findall(r"settings\.(\w+)", source)) & {*Settings.model_fields, "field"}
    if "field" in read:
        read = read - {"field"} | set(FIELD_KEYS)
    if stage in ("mae", "drift"):
        read -= {"data", "encode"}  # only compared with what the latents say of themselves
    assert set(STAGES[stage]["params"]) == read - {"hardware"}


def outputs(kind: str) -> dict[str, dict]:
    """Path -> options of all stages' outs, metrics or plots."""
    entries = [entry for stage in STAGES.values() for entry in stage.get(kind, ())]
    return {path: o for e in entries for path, o in (e.items() if isinstance(e, dict) else [(e, {})])}


def test_metrics_and_plots_are_in_git_and_artifacts_in_the_cache():
    assert set(outputs("metrics")) == {"metrics/fid.json"}
    assert set(outputs("plots")) == {
        "plots/drift_training.csv",
        "plots/fid_sweep.csv",
        "plots/fid_sweep.json",
        "plots/mae_held_out.csv",
        "plots/mae_training.csv",
        "plots/omega.png",
        "plots/samples.png",
    }
    in_git = outputs("metrics") | outputs("plots")
    assert all(options["cache"] is False for options in in_git.values())
    assert all("cache" not in options for options in outputs("outs").values())


def test_settings_know_the_folders_that_stages_write():
    written = {path.removesuffix("/${item.view}") for path in outputs("outs")}
    assert written == set(OUTPUTS)


def test_every_further_plot_is_of_a_file_that_a_stage_writes():
    for plot in DVC["plots"]:
        for options in plot.values():
            assert options["y"].keys() <= outputs("plots").keys()
