"""Imports point downwards: stages -> training, evaluation -> models, field, data -> nothing of ours."""

from pathlib import Path

import pytest
from imports import ROOT, direct_imports

BASE = {
    "__init__",
    "errors",
    "seeds",
    "files",
    "hub",
    "lock",
    "progress",
    "signals",
    "sums",
    "torchvision_shim",
}
ALLOWED = {
    "data": set(),
    "field": set(),
    "models": set(),
    "params": {"field"},
    "launch": set(),
    "work": set(),
    "watch": {"work"},
    "clean": {"work"},
    "cli": {"commands"},
    "commands": {
        *("adopt", "clean", "evaluation", "inspection", "model_card", "models", "params", "pipeline"),
        *("release", "remote", "revisions", "watch", "work"),
    },
    "release": {"models"},
    "pipeline": {"evaluation", "models", "work"},
    "revisions": {"work"},
    "model_card": {"evaluation", "models", "pipeline", "work"},
    "remote": {"webdav"},
    "webdav": set(),
    "adopt": {"data", "models", "params", "release", "remote", "training", "work"},
    "encoding": {"data", "models"},
    "evaluation": {"data", "models"},
    "inspection": {"data", "evaluation", "field", "launch", "models", "params", "training"},
    "training": {"data", "field", "models", "launch", "params", "work"},
}
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "drift").rglob("*.py"))


def part(path: Path) -> str:
    """`data` for drift/data/x.py, `params` for drift/params.py."""
    return path.parts[1].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_downwards(path):
    here = part(path)
    if here in BASE:
        allowed = BASE
    else:
        allowed = BASE | {here} | ALLOWED[here]
    for other in direct_imports(path):
        assert other.parts[0] == "drift", f"{path} imports {other}"
        assert part(other) in allowed, f"{path} imports {other}"


def test_every_exception_is_still_needed():
    used = {(part(path), part(other)) for path in FILES for other in direct_imports(path)}
    for here, others in ALLOWED.items():
        for other in others:
            assert (here, other) in used, f"{here} does not import {other} any more"
