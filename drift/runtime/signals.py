"""Signals that ask a long run to stop or to save itself, noticed between two steps.

SIGTERM and SIGINT (Ctrl-C): finish the step, write a checkpoint, end with code 143 or 130.
SIGUSR1: write a checkpoint and go on.
"""

import ctypes
import signal
import sys
from types import FrameType, TracebackType
from typing import NamedTuple

STOP = (signal.SIGTERM, signal.SIGINT)
SAVE = signal.SIGUSR1
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Asked(NamedTuple):
    """What was asked for since the last look."""

    stop: int
    """Number of the signal, or 0."""
    save: bool


class Signals:
    """Remembers the signals above instead of dying of them; a context manager of the main thread."""

    def __init__(self):
        self._stop, self._save = 0, False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        self._before = {number: signal.signal(number, self._note) for number in (*STOP, SAVE)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == SAVE:
            self._save = True
        else:
            self._stop = number

    def look(self) -> Asked:
        """What has come in; a request to save is forgotten by being looked at, one to stop is not."""
        asked, self._save = Asked(self._stop, self._save), False
        return asked


def when_parent_ends(number: int = signal.SIGTERM) -> None:
    """Let the kernel send this process a signal once the one that has started it is gone (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
