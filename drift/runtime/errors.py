"""How a run ends early: a mistake of the user, a signal. Everything else is a bug."""

import io
import sys
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """A wrong setting, a missing or damaged file, a path that cannot be written.

    The message is one line with the thing, its value and the way out. Entry points print it without a
    traceback and exit with code 2 (`drift.runtime.processes.run_stage`).
    """


class Stopped(Exception):
    """A signal ended the run, and the disk has everything needed to resume.

    Entry points print the message, which is empty on all processes but the first, and exit with `code`:
    128 and the signal's number, as a shell reports it.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.code = 128 + signal_number


def one_of(what: str, value: T, *allowed: T) -> T:
    """`value`, if it is one of `allowed`; otherwise raises ValueError. Guards a dispatch by name."""
    if value not in allowed:
        raise ValueError(f"{what} = {value!r}: allowed: {', '.join(map(str, allowed[:-1]))} or {allowed[-1]}")
    return value


def escape_output() -> None:
    """Escape on standard output what its encoding lacks, as standard error does: no file name ends a run."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # not of a notebook
        sys.stdout.reconfigure(errors="backslashreplace")
