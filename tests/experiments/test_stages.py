"""The experiments' dvc.yaml against the sources, as tests/test_repository.py has it for the pipeline."""

from pathlib import Path

import pytest
import yaml
from imports import ROOT, all_imports
from test_repository import counts

STAGES = {
    (path.parent.name, name): stage
    for path in (ROOT / "experiments" / which / "dvc.yaml" for which in ("toy", "mnist", "ffhq"))
    for name, stage in yaml.safe_load(path.read_text())["stages"].items()
}


def module(stage) -> Path:
    """The script that a stage runs."""
    words = stage["cmd"].split()
    assert words[:3] == ["exec", "python", "-m"] and stage["wdir"] == "../.."
    return Path(*words[3].split(".")).with_suffix(".py")


@pytest.mark.parametrize("which", STAGES, ids="-".join)
def test_a_stage_depends_on_the_modules_that_it_imports(which):
    """Settings are parameters, and no modules."""
    stage = STAGES[which]
    files = [path.relative_to(ROOT) for path in (ROOT / "drift").rglob("*.py")]
    plumbing = {path for path in files if not counts(path) and path.name != "__init__.py"}
    plumbing |= {path for path in files if path.parts[1] == "settings"}
    plumbing |= {Path("experiments", which[0], "settings.py")}
    imported = all_imports(module(stage), without=plumbing)
    needed = {path for path in imported if counts(path)}
    named = set()
    for dep in stage["deps"]:
        if dep.startswith(("drift/", "experiments/")):
            path = ROOT / dep
            assert path.exists(), f"{dep} is gone"
            named |= {f.relative_to(ROOT) for f in (path.rglob("*.py") if path.is_dir() else [path])}
    assert needed <= named, sorted(map(str, needed - named))


@pytest.mark.parametrize("which", STAGES, ids="-".join)
def test_its_parameters_are_in_params_yaml(which):
    """DVC refuses to run where a key is missing."""
    ((path, keys),) = STAGES[which]["params"][0].items()
    assert path == f"experiments/{which[0]}/params.yaml"
    assert set(keys) <= yaml.safe_load((ROOT / path).read_text()).keys()
