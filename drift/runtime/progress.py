"""`logs.jsonl`: how far a run has come, a JSON object per line; `drift watch` shows the last ones."""

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from drift.runtime.files import naming


class ProgressLog:
    """Appends lines to the `logs.jsonl` of one run.

    A line has `step`, how many of `steps` are done, in `unit` (where that is "step", the number of the step
    that was done last, from 0); what else is known; `steps_per_s`, the mean since this run's first line; and
    `time`, in Unix seconds.
    """

    def __init__(self, path: str | Path, *, steps: int, unit: str, every_s: float = 5.0):
        """At most a line every `every_s` seconds, unless one is forced."""
        self.path, self.steps, self.unit, self.every_s = Path(path), steps, unit, every_s
        self._first: tuple[int, float] | None = None
        self._written = 0.0
        if _is_cut(self.path):
            self._append("\n")  # so that a line which a kill cut short does not spoil the next

    def reached(self, step: int, values: Mapping[str, Any] | None = None, force: bool = False) -> None:
        """Append a line for `step`, with `values`, unless the last one is too recent and `force` is false."""
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        elif not force and now - self._written < self.every_s:
            return
        self._written = now
        line = {"step": step, "steps": self.steps, "unit": self.unit, **(values or {})}
        first_step, began = self._first
        if now > began:
            line["steps_per_s"] = round((step - first_step) / (now - began), 3)
        self._append(json.dumps({**line, "time": round(time.time(), 3)}) + "\n")

    def _append(self, text: str) -> None:
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(text)


def done(line: Mapping[str, Any]) -> int:
    """How many of the `steps` of a line are done."""
    return line["step"] + 1 if line["unit"] == "step" else line["step"]


def read_log(path: str | Path, last: int | None = None) -> list[dict]:
    """The lines of a `logs.jsonl`, or those that lie whole in its `last` bytes; none without a file.

    Lines that a kill cut short are left out, whether or not a later run has gone on after them.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = []
    with path.open("rb") as file:
        begin = 0 if last is None else max(0, file.seek(0, os.SEEK_END) - last)
        file.seek(max(0, begin - 1))
        if begin:
            file.readline()  # what is left of a line; its newline alone if the next one begins here
        for text in file:
            with suppress(ValueError):
                lines.append(json.loads(text))
    return lines


def _is_cut(path: Path) -> bool:
    """Whether the last line has no newline at its end."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"
