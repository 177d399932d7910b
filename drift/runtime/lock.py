"""One process at a time at a place, on all machines that see it, and which process that is."""

import errno
import fcntl
import json
import os
import platform
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import psutil

from drift.runtime.files import write_json

_NO_FLOCK = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL}


@dataclass(frozen=True)
class Holder:
    """The process that works in a folder, as the file `FOLDER.run` names it.

    Reading this file does not touch the lock, so looking never keeps a stage from starting.
    """

    host: str
    pid: int
    since: float
    """Unix seconds."""

    @classmethod
    def of(cls, folder: Path) -> "Holder | None":
        """None if no process is named, or its name is just being written."""
        try:
            return cls(**json.loads(folder.with_suffix(".run").read_text()))
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def at_work(self) -> bool | None:
        """Whether the process is alive; None if that cannot be seen from this machine."""
        if self.host != platform.node():
            return None
        try:  # a process that began later has the number of one that was killed
            return psutil.Process(self.pid).create_time() <= self.since + 1
        except psutil.NoSuchProcess:
            return False


class Lock:
    """The lock of `folder`: `flock` on the file `FOLDER.lock`.

    Where the filesystem has no `flock`, `FOLDER.run` is the lock: it exists for as long as the lock is held.
    Only the same machine notices then that its holder was killed.
    """

    def __init__(self, folder: Path):
        self._file_name, self._run = folder.with_suffix(".lock"), folder.with_suffix(".run")
        self.folder = folder
        self._file: IO[bytes] | None = None  # open for as long as the lock is held
        self._without_flock = False

    def acquire(self) -> bool:
        """Take the lock if nobody has it; whether this process has it now."""
        self._file, taken = self._file_name.open("ab"), False
        try:
            taken = self._take(self._file, asdict(Holder(platform.node(), os.getpid(), time.time())))
        finally:
            if not taken:
                self._file.close()
                self._file = None
        return taken

    def _take(self, file: IO[bytes], this: dict) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            self._without_flock = True
            return self._create(this)
        write_json(self._run, this)
        return True

    def _create(self, this: dict) -> bool:
        holder = Holder.of(self.folder)
        if holder is not None and holder.at_work() is False:
            self._run.unlink(missing_ok=True)
        try:
            with self._run.open("x") as file:
                json.dump(this, file)
        except FileExistsError:
            return False
        return True

    def release(self) -> None:
        if self._file is not None:
            self._run.unlink(missing_ok=True)
            with suppress(OSError):  # there is no flock
                fcntl.flock(self._file, fcntl.LOCK_UN)  # forked helpers have the file open as well
            self._file.close()
            self._file = None

    def holder(self) -> str:
        """Who has the lock, for a message, with the way out if that process is gone."""
        holder = Holder.of(self.folder)
        who = "a process without a name"
        if holder is not None:
            since = time.strftime("%Y-%m-%d %H:%M", time.localtime(holder.since))
            who = f"process {holder.pid} on {holder.host}, since {since}"
        return who + (f"; if that process is gone, delete {self._run}" if self._without_flock else "")
