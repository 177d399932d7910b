"""What a training run says: a progress bar, `logs.jsonl`, and the columns of it that go into DVC's plots."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
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
        self._bar.set_postfix({k: f"{values[k]:.4g}" for k in list(values)[:2]}, refresh=False)

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
"""Tensors by name, grouped at will."""


def to_numbers(values: Tree) -> dict:
    """Tensors of one device as numbers or lists of numbers, in one transfer; in groups to four digits."""
    numbers = iter(torch.cat([leaf.detach().float().reshape(-1) for leaf in _leaves(values)]).tolist())

    def read(value: torch.Tensor | Tree, grouped: bool) -> float | list | dict:
        if isinstance(value, Mapping):
            return {name: read(part, True) for name, part in value.items()}
        taken = [float(f"{x:.4g}") if grouped else x for x in islice(numbers, value.numel())]
        return taken if value.ndim else taken[0]

    return {name: read(value, False) for name, value in values.items()}


def _leaves(tree: Tree) -> Iterator[torch.Tensor]:
    for value in tree.values():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        else:
            yield value
