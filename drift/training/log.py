"""What a training run says: a progress bar, `logs.jsonl`, and the columns of it that go into DVC's plots."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from drift.files import atomic_write


class RunLog:
    """Progress bar and `logs.jsonl` of one run; silent on every process but the first.

    A resumed run cuts off what an earlier one logged beyond the checkpoint, so that each step stands in
    the file once.
    """

    def __init__(self, path: Path, *, what: str, steps: int, start: int, active: bool):
        self.path, self.active, self._start = path, active, start
        self._began = time.monotonic()
        self._bar = tqdm(
            total=steps, initial=start, desc=what, unit="step", disable=not active, mininterval=1.0, ncols=100
        )
        if active:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [line for line in read_log(path) if line["step"] < start]
            with atomic_write(path) as file:
                file.write("".join(json.dumps(line) + "\n" for line in kept).encode())

    def step(self) -> None:
        """One more step is done."""
        self._bar.update()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line for `step`, with the steps per second so far."""
        if not self.active:
            return
        rate = (step + 1 - self._start) / (time.monotonic() - self._began)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values, "steps_per_s": round(rate, 3)}) + "\n")
        self._bar.set_postfix({k: f"{values[k]:.4g}" for k in list(values)[:2]}, refresh=False)

    def close(self) -> None:
        self._bar.close()


def read_log(path: Path) -> list[dict]:
    """The lines of a `logs.jsonl`; a last line that a kill cut short is left out."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines


def write_plot(log: Path, destination: Path, columns: Sequence[str]) -> None:
    """Copy `step` and `columns` of a `logs.jsonl` into a CSV: what is the same in every run."""
    rows = [["step", *columns]]
    rows += [[str(line["step"]), *(f"{line[c]:.6g}" for c in columns)] for line in read_log(log)]
    with atomic_write(destination) as file:
        file.write("".join(",".join(row) + "\n" for row in rows).encode())


def to_floats(values: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Scalars of one device as numbers, in one transfer."""
    numbers = torch.stack([value.detach().float().reshape(()) for value in values.values()])
    return dict(zip(values, numbers.tolist(), strict=True))
