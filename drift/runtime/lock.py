"""Locks on folders: one process at a time, over all machines that see the folder, and which one it is."""

import errno
import fcntl
import json
import os
import platform
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

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

    Where the filesystem has no `flock`, `FOLDER.run` is the lock as long as it exists. Only the machine of a
    killed holder notices then that it is gone.
    """

    def __init__(self, folder: Path):
        self.folder, self._run = folder, folder.with_suffix(".run")
        self._without_flock = False
        self._held = ExitStack()
        """What ends with the lock."""

    def acquire(self) -> bool:
        """Take the lock if nobody has it; whether this process has it now."""
        with ExitStack() as taken:
            file = taken.enter_context(self.folder.with_suffix(".lock").open("ab"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                taken.callback(fcntl.flock, file, fcntl.LOCK_UN)  # forked helpers have the file open as well
            except (BlockingIOError, PermissionError):
                return False
            except OSError as error:
                if error.errno not in _NO_FLOCK:
                    raise
                self._without_flock = True
                if not self._create():
                    return False
            taken.callback(self._run.unlink, missing_ok=True)
            write_json(self._run, asdict(Holder(platform.node(), os.getpid(), time.time())))
            self._held = taken.pop_all()
        return True

    def _create(self) -> bool:
        """Create `FOLDER.run`, unless it names a process that may be alive."""
        holder = Holder.of(self.folder)
        if holder is not None and holder.at_work() is False:
            self._run.unlink(missing_ok=True)
        try:
            self._run.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def release(self) -> None:
        self._held.close()

    def holder(self) -> str:
        """Who has the lock, for a message, with the way out if that process is gone."""
        holder = Holder.of(self.folder)
        who = "a process without a name"
        if holder is not None:
            since = time.strftime("%Y-%m-%d %H:%M", time.localtime(holder.since))
            who = f"process {holder.pid} on {holder.host}, since {since}"
        return who + (f"; if that process is gone, delete {self._run}" if self._without_flock else "")
