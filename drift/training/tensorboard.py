"""TensorBoard event files of a training run, written where the package `tensorboard` is installed.

They are for looking at: nothing reads them back, and `logs.jsonl` stays the source of truth.
"""

import sys
import textwrap
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from drift.runtime.work import read_note

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

MOST_NUMBERS = 48  # of one group, such as that of the feature sets; a larger one is left out


class Events:
    """Event files in `folder` of a run that goes on from step `start`; without the package, nothing.

    Each call leaves its events on disk, whatever becomes of the process. TensorBoard drops what an earlier
    process wrote of `start` and later steps. The settings stand in the first file, as `work.json` in the
    folder above has them.
    """

    def __init__(self, folder: Path, start: int):
        self._folder, self._start = folder, start

    @cached_property
    def _writer(self) -> "SummaryWriter | None":
        """Opened when it is first needed: importing takes a moment."""
        # As TensorBoard has it: it then does without TensorFlow, which takes seconds where it is installed
        sys.modules.setdefault("tensorboard.compat.notf", ModuleType("notf"))
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        first = self._start == 0 or not any(self._folder.glob("events.*"))
        writer = SummaryWriter(str(self._folder), purge_step=self._start)
        if first and (note := read_note(self._folder.parent)):
            text = yaml.safe_dump(note["decides"], sort_keys=False)
            writer.add_text("settings", textwrap.indent(text, "    "), self._start)  # code, in Markdown
        return writer

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """The numbers of a line of `logs.jsonl`; those of groups and lists by path, as in `of/mean/0`."""
        if self._writer is None:
            return
        for name, value in values.items():
            numbers = list(_numbers(name, value))
            for path, number in numbers if len(numbers) <= MOST_NUMBERS else ():
                self._writer.add_scalar(path, number, step)
        self._writer.flush()

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture, uint8 `[H, W, 3]`."""
        if self._writer is not None:
            self._writer.add_image(name, image, step, dataformats="HWC")
            self._writer.flush()

    def close(self) -> None:
        if writer := vars(self).get("_writer"):
            writer.close()


def _numbers(path: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping | list):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _numbers(f"{path}/{key}", part)
    else:
        yield path, value
