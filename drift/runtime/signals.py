"""Signals that a long run notices between two steps.

SIGTERM and SIGINT (Ctrl-C): finish the step, write a checkpoint, end with code 143 or 130.
SIGUSR1: write a checkpoint and go on.
"""

import ctypes
import signal
import sys
from types import FrameType
from typing import NamedTuple

STOP = (signal.SIGTERM, signal.SIGINT)
SAVE = signal.SIGUSR1
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Asked(NamedTuple):
    """What the signals since the last look ask for."""

    stop: int
    """Number of the signal, or 0."""
    save: bool


class Signals:
    """Remembers the signals above instead of dying of them; a context manager for the main thread."""

    def __enter__(self) -> "Signals":
        self._stop, self._save = 0, False
        self._before = {number: signal.signal(number, self._note) for number in (*STOP, SAVE)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == SAVE:
            self._save = True
        else:
            self._stop = number

    def look(self) -> Asked:
        """What has been asked for. A look ends a request to save, but not one to stop."""
        asked, self._save = Asked(self._stop, self._save), False
        return asked


def when_parent_ends(number: int = signal.SIGTERM) -> None:
    """Let the kernel send this process a signal when the process that started it ends (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
