"""How a run ends early: a mistake of the user, a signal, another process that is gone. The rest are bugs."""

import io
import sys
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """A wrong setting, a missing or damaged file, a path that cannot be written.

    The message is one line that names the thing, the value and the way out. Entry points print it without a
    traceback and exit with code 2 (see `drift.runtime.processes.run_stage`); anything else keeps its traceback.
    """


class Stopped(Exception):
    """A signal ended the run, and everything needed to go on is on the disk.

    Entry points print the message, which says how far the run came and is empty on all processes but the
    first, and exit with `code`: 128 and the signal's number, as a shell reports it.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.code = 128 + signal_number


class PeerLost(Exception):
    """Another process of the run is gone or does not answer; it tells why itself, if it can.

    Entry points print the message and exit with code 3.
    """


def one_of(what: str, value: T, *allowed: T) -> T:
    """`value`, which must be one of `allowed`: a dispatch by name takes no name for another.

    Raises ValueError that names it and them.
    """
    if value not in allowed:
        raise ValueError(f"{what} = {value!r}: allowed: {', '.join(map(str, allowed[:-1]))} or {allowed[-1]}")
    return value


def escape_output() -> None:
    """Let standard output show what its encoding cannot, such as names of files that are no UTF-8, escaped.

    Standard error does so by itself. Entry points call this first: no run ends because of a name.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # not of a notebook
        sys.stdout.reconfigure(errors="backslashreplace")
