"""The repository as a whole: rooms and layers, sizes of functions and files, dvc.yaml against the sources."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from imports import ROOT, all_imports, direct_imports

from drift.settings import OUTPUTS, Settings, load_settings

LAYERS = [
    {"runtime"},
    {"models", "field", "data"},
    {"features", "autoencoders"},
    {"settings"},
    {"training", "evaluation", "interop", "sharing"},
    {"cli"},
]
"""From the bottom up; rooms of one layer may use each other, but for `field`, which knows tensors only."""
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
LIBRARY = sorted(path.relative_to(ROOT) for path in (ROOT / "drift").rglob("*.py"))
SOURCES = [
    path.relative_to(ROOT)
    for room in ("drift", "stages", "experiments")
    for path in sorted((ROOT / room).rglob("*.py"))
]

LINES_OF_A_FUNCTION, LINES_OF_A_FILE, PARAMETERS = 60, 400, 8
LARGER = {
    ("drift/field/loss.py", "drifting_loss"),
    ("drift/models/generator.py", "__init__"),
}
"""The field's public entry, whose docstring is the reference of all that it takes; and the sizes of the
generator, which diffusers reads from the signature."""


def room(path: Path) -> str:
    """`data` for drift/data/x.py."""
    return path.parts[1].removesuffix(".py")


def test_imports_point_downwards():
    for path in LIBRARY:
        for other in direct_imports(path):
            assert other.parts[0] == "drift", f"{path} imports {other}"
            here, there = room(path), room(other)
            if "__init__" not in (here, there):
                assert LEVEL[there] <= LEVEL[here], f"{path} imports {other}"
                assert here != "field" or there in ("field", "runtime"), f"{path} imports {other}"


def test_every_file_is_in_a_room():
    assert {path.name for path in LIBRARY if len(path.parts) == 2} == {"__init__.py"}
    assert {room(path) for path in LIBRARY} - {"__init__"} <= LEVEL.keys()


def too_large() -> Iterator[str]:
    for path in SOURCES:
        source = (ROOT / path).read_text(encoding="utf-8")
        if (lines := len(source.splitlines())) > LINES_OF_A_FILE:
            yield f"{path}: {lines} lines"
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef) or (path.as_posix(), node.name) in LARGER:
                continue
            if (lines := node.end_lineno - node.lineno + 1) > LINES_OF_A_FUNCTION:
                yield f"{path}: {node.name}: {lines} lines"
            arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            if (count := len(arguments) - (arguments[:1] in (["self"], ["cls"]))) > PARAMETERS:
                yield f"{path}: {node.name}: {count} parameters"


def test_functions_and_files_fit_a_page():
    assert list(too_large()) == []


DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())
STAGES = DVC["stages"]
SECTIONS = {"data", "encode", "mae", "drift", "fid"}
UNHASHED = {
    "drift/training/inputs.py",
    "drift/training/log.py",
    "drift/training/tensorboard.py",
    "drift/evaluation/report.py",
    "drift/evaluation/while_training.py",
}
"""With all of `runtime` but the seeds: they move files, read settings and talk, or measure what is trained in
its course; no number of a result depends on them."""


def counts(path: Path) -> bool:
    """Whether numbers may depend on a module; through `settings` and `runtime` imports are not followed."""
    name = path.as_posix()
    plumbing = name.startswith(("drift/runtime/", "drift/settings/")) and name != "drift/runtime/seeds.py"
    return not plumbing and name not in UNHASHED and path.name != "__init__.py"


def imported(stage: str) -> set[Path]:
    """What a stage imports. What settings read from the registries is no dependency of every stage."""
    packages = {"runtime", "settings"}
    plumbing = [
        path
        for path in LIBRARY
        if not counts(path) and (path.name != "__init__.py" or room(path) in packages)
    ]
    return {path for path in all_imports(Path(f"stages/{stage}.py"), without=plumbing) if counts(path)}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_modules_that_it_imports(stage):
    """Named one by one, or by their room, of which then something is imported."""
    needed, named = imported(stage), set()
    for dep in STAGES[stage]["deps"]:
        if dep.startswith(("drift/", "stages/")):
            path = ROOT / dep
            assert path.exists(), f"{dep} is gone"
            files = [f.relative_to(ROOT) for f in (path.rglob("*.py") if path.is_dir() else [path])]
            files = {file for file in files if file.suffix == ".py" and counts(file)}
            assert not files or files & needed, f"{dep} is not imported"
            named |= files
    assert needed <= named


def test_encode_does_not_depend_on_the_mae_nor_mae_on_the_field():
    assert Path("drift/models/mae.py") not in imported("encode")
    assert not any(room(path) == "field" for path in imported("mae") if path.parts[0] == "drift")


@pytest.mark.parametrize("stage", STAGES)
def test_commands_run_the_stage_as_a_module(stage):
    assert STAGES[stage]["cmd"].split()[:4] == ["exec", "python", "-m", f"stages.{stage}"]


def params(stage: str) -> set[str]:
    return set(STAGES[stage]["params"])


def test_params_are_what_a_stage_reads():
    """`mae` and `drift` compare `data` and `encode` only with what the latents say of themselves."""
    for stage in STAGES:
        assert {"seed", stage} <= params(stage) <= Settings.model_fields.keys() - {"hardware"}, stage
        sources = [f"stages/{stage}.py", *(["drift/evaluation/evaluate.py"] if stage == "fid" else [])]
        text = "".join((ROOT / source).read_text() for source in sources)
        read = set(re.findall(r"settings\.(\w+)", text)) & SECTIONS
        of_others = {"data", "encode"} if stage in ("mae", "drift") else set()
        assert params(stage) & SECTIONS == read - of_others | {stage}, stage
    of_the_field = Settings.model_fields.keys() - SECTIONS - {"views", "hardware"}
    assert of_the_field <= params("drift")


@pytest.mark.parametrize("preset", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_are_valid_and_have_the_keys_that_dvc_demands(preset):
    """DVC refuses to run where a key that dvc.yaml lists is missing at the top level, or one of a command."""
    load_settings(preset)
    content = yaml.safe_load(preset.read_text())
    assert set().union(*map(params, STAGES)) <= content.keys()
    for section, key in re.findall(r"\$\{(\w+)\.(\w+)\}", yaml.safe_dump(STAGES)):
        assert section == "item" or key in content[section], f"{section}.{key}"


def outputs(kind: str) -> dict[str, dict]:
    """Path -> options of all stages' outs, metrics or plots."""
    entries = [entry for stage in STAGES.values() for entry in stage.get(kind, ())]
    return {path: o for e in entries for path, o in (e.items() if isinstance(e, dict) else [(e, {})])}


def test_metrics_and_plots_are_in_git_and_artifacts_in_the_cache():
    in_git = outputs("metrics") | outputs("plots")
    assert {Path(path).parts[0] for path in in_git} == {"metrics", "plots"}
    assert all(options["cache"] is False for options in in_git.values())
    assert all("cache" not in options for options in outputs("outs").values())
    assert {path.removesuffix("/${item.view}") for path in outputs("outs")} == set(OUTPUTS)
    for plot in DVC["plots"]:
        for options in plot.values():
            assert options["y"].keys() <= outputs("plots").keys()


@pytest.mark.parametrize("setting", ["core.autocrlf=true", "core.eol=crlf"])
def test_every_checkout_has_the_same_bytes(tmp_path, setting):
    """DVC hashes them: what Git rewrites counts as changed, and so does all that was made from it."""

    def git(*command: str, **options) -> str:
        return subprocess.run(["git", *command], capture_output=True, text=True, check=True, **options).stdout

    git("clone", "--quiet", "--config", setting, str(ROOT), str(tmp_path))
    listing = [line.split(maxsplit=3) for line in git("ls-files", "--stage", cwd=tmp_path).splitlines()]
    stored = {name: digest for _, digest, _, name in listing}
    found = git("hash-object", "--no-filters", "--stdin-paths", input="\n".join(stored), cwd=tmp_path)
    assert found.split() == list(stored.values())
    deps = {dep for stage in STAGES.values() for dep in stage["deps"] if not dep.startswith("artifacts/")}
    assert all(any(name == dep or name.startswith(f"{dep}/") for name in stored) for dep in deps)
