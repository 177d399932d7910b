"""What the experiments share: settings, exact transport, tables of mean and spread, work done once."""

import argparse
import csv
import io
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import ot

from drift.runtime.files import atomic_write, check_writable, remove
from drift.runtime.work import fingerprint, without_words, work_root
from drift.runtime.yaml_files import read_settings
from drift.settings.sections import Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

S = TypeVar("S", bound=Section)
MOST_ITERATIONS = 500_000


def load_section(path: str | Path, kind: type[S]) -> S:
    """The settings of an experiment.

    Raises `UserError` with one line if the file is missing or not YAML, or a key or a value is wrong.
    """
    return read_settings(path, kind, "the folder of the experiment holds one", dotted_keys(kind), {})


def script_parser(description: str | None, experiment: str) -> argparse.ArgumentParser:
    """The command line that every script of an experiment has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", type=Path, default=Path("experiments", experiment, "params.yaml"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    return parser


def dotted_keys(kind: type[Section]) -> list[str]:
    """Those of a section and of the sections in it."""
    keys = []
    for name, field in kind.model_fields.items():
        keys.append(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys += [f"{name}.{key}" for key in dotted_keys(field.annotation)]
    return keys


def w2_squared(x: np.ndarray, y: np.ndarray) -> float:
    """W2^2 of two point clouds `[N, D]`, `[M, D]` of uniform weights, by POT's exact solver.

    W2^2 = min over plans of sum_ij plan_ij ||x_i - y_j||^2

    Raises ArithmeticError if the solver does not converge.
    """
    cost = ot.dist(x.astype(np.float64), y.astype(np.float64), metric="sqeuclidean")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # POT warns, and returns what it has
        try:
            return float(ot.emd2([], [], cost, numItermax=MOST_ITERATIONS))
        except UserWarning as warning:
            raise ArithmeticError(f"optimal transport of {cost.shape} points: {warning}") from None


def mean_and_std(
    rows: Iterable[Mapping[str, Any]], by: Sequence[str], values: Sequence[str]
) -> list[dict[str, Any]]:
    """One row for each group of rows that agree in `by`, in the order of the first of each.

    It holds `by`, `runs` (how many there are), and `<value>_mean` and `<value>_std` of each of `values`: the
    standard deviation of a sample (n - 1), 0 of a single run. Values that are None are left out.
    """
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in by), []).append(row)
    table = []
    for key, members in groups.items():
        line = dict(zip(by, key, strict=True)) | {"runs": len(members)}
        for name in values:
            numbers = [row[name] for row in members if row[name] is not None]
            line[f"{name}_mean"] = float(np.mean(numbers)) if numbers else None
            line[f"{name}_std"] = float(np.std(numbers, ddof=min(1, len(numbers) - 1))) if numbers else None
        table.append(line)
    return table


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows of the same keys, atomically; numbers to six digits, None as nothing."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
        for row in rows
    )
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def read_csv(path: str | Path) -> list[dict[str, Any]]:
    """What `write_csv` wrote, with numbers as numbers."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        return [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None


def save_figure(path: str | Path, figure: "Figure") -> None:
    """Write a matplotlib figure as PNG, without the version that would change its bytes."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=100, metadata={"Software": None})


def once(
    what: str,
    decides: Mapping[str, Any],
    code: Sequence[ModuleType],
    make: Callable[[Path, Path], None],
) -> Path:
    """The folder that `make(work, result)` fills, from now or from an earlier call.

    It is the same one as long as settings and inputs (`decides`, JSON-serialisable) are, and the sources of
    the modules `code` but for their comments; a package stands for all of its modules. `make` keeps in `work`
    what it needs to go on after a kill, such as checkpoints, which are removed at the end.
    """
    folder = work_root() / what / fingerprint({"decides": decides, "code": [*map(_source, code)]})
    result, draft = folder / "result", folder / "draft"
    if not result.is_dir():
        remove(draft)
        check_writable(draft)
        make(folder, draft)
        draft.rename(result)
        for path in set(folder.iterdir()) - {result}:
            remove(path)
    return result


@cache
def _source(module: ModuleType) -> str:
    path = Path(module.__file__)
    files = sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
    return fingerprint({file.name: without_words(file.read_text(encoding="utf-8")) for file in files})
