"""What a training run tells: a progress bar, `logs.jsonl`, and columns of it for DVC's plots."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from drift.runtime.files import atomic_write
from drift.runtime.progress import ProgressLog, read_log
from drift.training.tensorboard import Events

SAMPLES = "samples"


class RunLog:
    """Progress bar, `logs.jsonl` and TensorBoard's events of one run; silent in every process but the first.

    A resumed run drops the lines that an earlier one logged beyond the checkpoint: each step stands in the
    file once, and once more if the run was evaluated after it.
    """

    def __init__(self, path: Path, *, what: str, steps: int, start: int, active: bool):
        self._bar = tqdm(
            total=steps, initial=start, desc=what, unit="step", disable=not active, mininterval=1.0, ncols=100
        )
        self._log = self._events = None
        self._samples = path.parent / SAMPLES
        self._trained = self._measured = ""  # what the bar shows
        self._evaluated: set[int] = set()
        if active:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [line for line in read_log(path) if line["step"] < start]
            with atomic_write(path) as file:
                file.write("".join(json.dumps(line) + "\n" for line in kept).encode())
            self._evaluated = {line["step"] for line in kept if "loss" not in line}
            self._log = ProgressLog(path, steps=steps, unit="step")
            self._events = Events(path.parent / "tensorboard", start)

    def step(self) -> None:
        """One more step is done."""
        self._bar.update()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line for `step`."""
        self._write(step, values)
        self._trained = _brief(values)
        self._show()

    def evaluated(self, step: int) -> bool:
        """Whether an earlier run has logged an evaluation after `step`; only the first process knows."""
        return step in self._evaluated

    def evaluation(self, step: int, values: Mapping[str, Any], picture: Image.Image | None) -> None:
        """Append a line for an evaluation after `step`, and write `samples/<steps done>.png`."""
        self._write(step, values)
        self._measured = _brief(values)
        self._show()
        if picture is not None and self._events is not None:
            self._samples.mkdir(exist_ok=True)
            with atomic_write(self._samples / f"{step + 1:08d}.png") as file:
                picture.save(file, format="PNG")
            self._events.image(step, SAMPLES, np.asarray(picture))

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        if self._log is not None and self._events is not None:
            self._log.reached(step, values, force=True)
            self._events.scalars(step, values)

    def _show(self) -> None:
        texts = filter(None, (self._trained, self._measured))
        self._bar.set_postfix_str(", ".join(texts), refresh=False)

    def close(self) -> None:
        self._bar.close()
        if self._events is not None:
            self._events.close()


def _brief(values: Mapping[str, Any]) -> str:
    """The first two numbers."""
    numbers = [f"{name}={value:.4g}" for name, value in values.items() if isinstance(value, float)]
    return ", ".join(numbers[:2])


def write_plot(log: Path, destination: Path, columns: Sequence[str]) -> None:
    """Write `step` and `columns` as CSV, from the lines of a `logs.jsonl` that have all of them."""
    rows = [["step", *columns]]
    for line in read_log(log):
        if line.keys() >= set(columns):
            rows.append([str(line["step"]), *(f"{line[c]:.6g}" for c in columns)])
    with atomic_write(destination) as file:
        file.write("".join(",".join(row) + "\n" for row in rows).encode())


Tree = Mapping[str, Any]
"""Tensors by name, in groups of any depth."""


def flattened(tree: Tree) -> torch.Tensor:
    """The numbers of all tensors of a tree in order, float32 and without a graph."""
    return torch.cat([leaf.detach().float().flatten() for leaf in _leaves(tree)])


def rebuilt(tree: Tree, numbers: torch.Tensor) -> dict[str, Any]:
    """A tree of the shape of `tree`, filled with `numbers` in the order of `flattened`."""
    pieces = iter(numbers.split([leaf.numel() for leaf in _leaves(tree)]))

    def fill(part: Tree) -> dict[str, Any]:
        return {k: fill(v) if isinstance(v, Mapping) else next(pieces).view(v.shape) for k, v in part.items()}

    return fill(tree)


def _leaves(tree: Tree) -> Iterator[torch.Tensor]:
    for value in tree.values():
        yield from _leaves(value) if isinstance(value, Mapping) else (value,)


def to_numbers(tree: Tree) -> dict[str, Any]:
    """Tensors as numbers and lists of numbers; in groups, of which there are many, to four digits."""
    return {name: _plain(value) for name, value in tree.items()}


def _plain(value: Any, digits: int = 17) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(part, 4) for name, part in value.items()}
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    return [_plain(one, digits) for one in value] if isinstance(value, list) else float(f"{value:.{digits}g}")
