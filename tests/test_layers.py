"""Imports point downwards: each room uses those below it and itself."""

from pathlib import Path

import pytest
from imports import ROOT, direct_imports

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
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "drift").rglob("*.py"))


def room(path: Path) -> str:
    """`data` for drift/data/x.py, `settings` for drift/settings.py."""
    return path.parts[1].removesuffix(".py")


@pytest.mark.parametrize("path", [path for path in FILES if room(path) != "__init__"], ids=str)
def test_imports_point_downwards(path):
    here = room(path)
    for other in direct_imports(path):
        assert other.parts[0] == "drift", f"{path} imports {other}"
        there = room(other)
        if there == "__init__":
            continue
        assert LEVEL[there] <= LEVEL[here], f"{path} imports {other}"
        if here == "field":
            assert there in ("field", "runtime"), f"{path} imports {other}"


def test_every_file_is_in_a_room():
    assert {path.name for path in FILES if len(path.parts) == 2} == {"__init__.py", "settings.py"}
    assert {room(path) for path in FILES} - {"__init__"} <= LEVEL.keys()
