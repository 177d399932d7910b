"""One process at a time at a place, on all machines that see it, and who that is."""

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

_UNKNOWN_CALL = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL}


@dataclass(frozen=True)
class Holder:
    """The process that works in a folder, as it says in a file beside the folder's lock.

    Whoever only wants to know leaves the lock alone: to try it is to hold it for a moment, in which a stage
    that starts would be refused.
    """

    host: str
    pid: int
    since: float
    """Unix seconds."""

    @classmethod
    def of(cls, folder: Path) -> "Holder | None":
        """None if nobody has said so, or has taken it back."""
        try:
            return cls(**json.loads(_holder_file(folder).read_text()))
        except (FileNotFoundError, json.JSONDecodeError):  # cut short, or just being written
            return None

    def at_work(self, folder: Path) -> bool | None:
        """Whether the process still has the lock; None if that cannot be seen from this machine.

        A process that was killed has taken nothing back, and its number may be another's by now.
        """
        if self.host != platform.node():
            return None
        lock = str(_lock_file(folder).resolve())
        try:
            process = psutil.Process(self.pid)
            if process.create_time() > self.since + 1:  # another, which may be at the lock just now
                return False
            return lock in (file.path for file in process.open_files())
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:  # of another user
            return None


class Lock:
    """The lock of `folder`: `flock` on a file beside it.

    A filesystem may have no `flock`. There the file that names the holder is the lock: it exists for as long
    as the lock is held. That its holder was killed is seen on the same machine alone.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._file: IO[bytes] | None = None  # open as long as the lock is held: see `Holder.at_work`
        self._by_existence = False

    def acquire(self) -> bool:
        """Take the lock if nobody has it; whether this process has it now."""
        file = _lock_file(self.folder).open("ab")
        try:
            taken = self._flock(file)
        except BaseException:
            file.close()
            raise
        if taken:
            self._file = file
        else:
            file.close()
        return taken

    def _flock(self, file: IO[bytes]) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            if error.errno not in _UNKNOWN_CALL:
                raise
            self._by_existence = True
            return self._create()
        write_json(_holder_file(self.folder), _this_process())
        return True

    def _create(self) -> bool:
        holder = Holder.of(self.folder)
        if holder is not None and holder.at_work(self.folder) is False:
            _holder_file(self.folder).unlink(missing_ok=True)
        try:
            with _holder_file(self.folder).open("x") as file:
                json.dump(_this_process(), file)
        except FileExistsError:
            return False
        return True

    def release(self) -> None:
        if self._file is not None:
            _holder_file(self.folder).unlink(missing_ok=True)
            with suppress(OSError):  # there is none
                fcntl.flock(self._file, fcntl.LOCK_UN)  # helpers that were forked have the file open as well
            self._file.close()
            self._file = None

    def holder(self) -> str:
        """Who has the lock, for a message, with the way out if that process is gone."""
        holder = Holder.of(self.folder)
        who = "a process without a name"
        if holder is not None:
            since = time.strftime("%Y-%m-%d %H:%M", time.localtime(holder.since))
            who = f"process {holder.pid} on {holder.host}, since {since}"
        if self._by_existence:
            who += f"; if that process is gone, delete {_holder_file(self.folder)}"
        return who


def _this_process() -> dict:
    return asdict(Holder(platform.node(), os.getpid(), time.time()))


def _lock_file(folder: Path) -> Path:
    return folder.with_suffix(".lock")


def _holder_file(folder: Path) -> Path:
    return folder.with_suffix(".run")
