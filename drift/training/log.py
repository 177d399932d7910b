"""What a training run says: a progress bar, `logs.jsonl`, and the columns of it that go into DVC's plots."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from drift.runtime.files import atomic_write
from drift.runtime.progress import ProgressLog, read_log


class RunLog:
    """Progress bar and `logs.jsonl` of one run; silent on every process but the first.

    A resumed run cuts off what an earlier one logged beyond the checkpoint, so that each step stands in
    the file once.
    """

    def __init__(self, path: Path, *, what: str, steps: int, start: int, active: bool):
        self._bar = tqdm(
            total=steps, initial=start, desc=what, unit="step", disable=not active, mininterval=1.0, ncols=100
        )
        self._log = None
        if active:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [line for line in read_log(path) if line["step"] < start]
            with atomic_write(path) as file:
                file.write("".join(json.dumps(line) + "\n" for line in kept).encode())
            self._log = ProgressLog(path, steps=steps, unit="step")

    def step(self) -> None:
        """One more step is done."""
        self._bar.update()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line for `step`."""
        if self._log is None:
            return
        self._log.reached(step, values, force=True)
        numbers = [f"{name}={value:.4g}" for name, value in values.items() if isinstance(value, float)]
        self._bar.set_postfix_str(", ".join(numbers[:2]), refresh=False)

    def close(self) -> None:
        self._bar.close()


def write_plot(log: Path, destination: Path, columns: Sequence[str]) -> None:
    """Copy `step` and `columns` of the lines of a `logs.jsonl` that have them all into a CSV."""
    rows = [["step", *columns]]
    for line in read_log(log):
        if line.keys() >= set(columns):
            rows.append([str(line["step"]), *(f"{line[c]:.6g}" for c in columns)])
    with atomic_write(destination) as file:
        file.write("".join(",".join(row) + "\n" for row in rows).encode())


Tree = Mapping[str, "torch.Tensor | Tree"]
"""Tensors by name, in groups of any depth."""


def leaves(tree: Tree) -> Iterator[torch.Tensor]:
    """The tensors of a tree, in order."""
    for value in tree.values():
        yield from leaves(value) if isinstance(value, Mapping) else (value,)


def rebuilt(tree: Tree, numbers: torch.Tensor) -> dict:
    """A tree of the shape of `tree`, whose tensors are filled from `numbers`, one after the other."""
    parts = iter(numbers.split([leaf.numel() for leaf in leaves(tree)]))

    def fill(part: Tree) -> dict:
        return {k: fill(v) if isinstance(v, Mapping) else next(parts).view(v.shape) for k, v in part.items()}

    return fill(tree)


def to_numbers(values: Mapping[str, Any]) -> dict:
    """A tree on one device as numbers and lists of numbers, in one transfer; in groups to four digits.

    Numbers at its top stay what they are.
    """
    tree = {name: value for name, value in values.items() if not isinstance(value, float)}
    numbers = rebuilt(tree, torch.cat([leaf.detach().float().flatten() for leaf in leaves(tree)]).cpu())
    return {name: _plain(numbers.get(name, value)) for name, value in values.items()}


def _plain(value: Any, digits: int | None = None) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(part, 4) for name, part in value.items()}
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(number, digits) for number in value]
    return float(f"{value:.{digits}g}") if digits else value
