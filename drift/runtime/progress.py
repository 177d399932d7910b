"""`logs.jsonl`: how far a run has come, a JSON object per line; `drift watch` shows the last ones."""

import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from drift.runtime.files import naming

EVERY_S = 5.0  # at most a line in so many seconds, unless it is forced


class ProgressLog:
    """Appends lines to the `logs.jsonl` of one run.

    A line has `step`, how many of `steps` are done, in `unit` (where that is "step", the number of the last
    finished step, from 0); what else is known; and `time`, in Unix seconds.
    """

    def __init__(self, path: str | Path, *, steps: int, unit: str):
        self.path, self.steps, self.unit = Path(path), steps, unit
        self._written = -math.inf
        with self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":
                    file.write(b"\n")  # ends a line that a kill cut short, which would spoil the next

    def reached(self, step: int, values: Mapping[str, Any] | None = None, force: bool = False) -> None:
        """Append a line for `step`, with `values`, unless the last one is too recent and `force` is false."""
        now = time.monotonic()
        if not force and now - self._written < EVERY_S:
            return
        self._written = now
        position = {"step": step, "steps": self.steps, "unit": self.unit}
        line = {**position, **(values or {}), "time": round(time.time(), 3)}
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_log(path: str | Path, last: int | None = None) -> list[dict]:
    """The whole lines of a `logs.jsonl`, or of its `last` bytes; none without a file."""
    path, lines = Path(path), []
    if path.exists():
        with path.open("rb") as file:
            if last is not None and file.seek(0, os.SEEK_END) > last:
                file.seek(-last - 1, os.SEEK_END)
                file.readline()  # the rest of a line; its newline alone if a line begins here
            else:
                file.seek(0)
            for text in file:
                with suppress(ValueError):  # cut short by a kill
                    lines.append(json.loads(text))
    return lines
