"""Which modules of the project a module imports, directly or through others, read from the sources."""

import ast
from collections.abc import Collection
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]


def module_file(name: str) -> Path | None:
    """The file of a module of the project, relative to the root; None for anything else."""
    base = Path(*name.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if base.parts[0] in ("drift", "stages", "experiments") and (ROOT / path).is_file():
            return path
    return None


@cache
def direct_imports(path: Path) -> frozenset[Path]:
    """Files that one file imports, packages on the way included; not what a lazy `__getattr__` imports."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    tree.body = [n for n in tree.body if not (isinstance(n, ast.FunctionDef) and n.name == "__getattr__")]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in names]
    prefixes = {".".join(p[:n]) for p in parts for n in range(1, len(p) + 1)}
    return frozenset(file for name in prefixes if (file := module_file(name)))


def all_imports(path: Path, without: Collection[Path] = ()) -> set[Path]:
    """`direct_imports` to the end, with the file itself; not `without`, nor what only those import."""
    seen: set[Path] = set()
    todo = [path]
    while todo:
        file = todo.pop()
        if file not in seen and file not in without:
            seen.add(file)
            todo += direct_imports(file)
    return seen
