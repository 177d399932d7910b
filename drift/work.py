"""Work in progress of a stage: where it lives, whose it is, and whether it may go on.

DVC deletes a stage's outputs before it runs the stage, so unfinished work lives in
`.work/<stage>/<fingerprint>/` (`DRIFT_WORK_DIR` moves `.work`), where the fingerprint is a hash of the
settings and inputs that decide the result. Running the same command again goes on from there.
"""

import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from filelock import FileLock, Timeout
from ruamel.yaml import YAML

from drift.errors import UserError
from drift.files import atomic_write, check_writable, replace_folder, write_json

SETTINGS_FILE = "settings.yaml"


def fingerprint(decides: Mapping[str, Any]) -> str:
    """16 hex digits of a hash of everything that decides a result; `decides` is JSON-serialisable."""
    canonical = json.dumps(decides, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def code_digest() -> str:
    """16 hex digits of a hash of the project's modules that this process has imported."""
    root = Path(__file__).resolve().parent.parent
    files = {Path(m.__file__).resolve() for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
    ours = {f.relative_to(root).as_posix(): f for f in files if f.is_relative_to(root)}
    digest = hashlib.sha256()
    for name in sorted(ours):
        if name.startswith(("drift/", "stages/")) and name.endswith(".py"):
            digest.update(name.encode() + b"\0" + ours[name].read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def work_root() -> Path:
    """The folder of all stages' work."""
    return Path(os.environ.get("DRIFT_WORK_DIR") or ".work")


def read_note(folder: Path) -> dict | None:
    """What the `work.json` of a work folder says; None if it is missing or damaged."""
    try:
        return json.loads((folder / "work.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


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
        except FileNotFoundError:
            return None

    def at_work(self, folder: Path) -> bool | None:
        """Whether the process still has the lock; None if that cannot be seen from this machine.

        A process that was killed has taken nothing back, and its number may be another's by now.
        """
        if self.host != platform.node():
            return None
        lock = str(_lock_file(folder).resolve())
        try:
            return lock in (file.path for file in psutil.Process(self.pid).open_files())
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:  # of another user
            return None


class Work:
    """The work folder of one stage with one fingerprint, locked against a second run; a context manager.

    `folder` holds the stage's own files; `note` is what `work.json` says of the run: what decides it,
    and the digests of the code that has worked on it, oldest first.
    """

    def __init__(self, stage: str, decides: Mapping[str, Any], *, fresh: bool = False, first: bool = True):
        """`first`: whether this process manages the folder; other ranks only look up where it is.

        `fresh`: throw away what is there. Raises `UserError` if the folder cannot be written.
        """
        self.stage, self.decides, self.fresh, self.first = stage, dict(decides), fresh, first
        self.folder = work_root() / stage / fingerprint(decides)
        self.code: list[str] = []
        self._lock = FileLock(_lock_file(self.folder))

    def __enter__(self) -> "Work":
        if self.first:
            check_writable(self.folder.parent)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise UserError(
                    f"{self.folder}: another run of {self.stage} with the same settings and inputs is at "
                    "work there; wait for it, or end it"
                ) from None
            self._prepare()
            write_json(_holder_file(self.folder), asdict(Holder(platform.node(), os.getpid(), time.time())))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.first:
            _holder_file(self.folder).unlink(missing_ok=True)
        self._lock.release()

    def _prepare(self) -> None:
        now = code_digest()
        known = read_note(self.folder)
        if known is not None:
            self.code = known["code"]
            if self.fresh:
                self._discard("--fresh")
            elif self.code[-1] != now and known["finished"]:
                self._discard("it was finished by other code")
            elif known["finished"] and self._taken_by_dvc():
                self._discard("its result is in DVC already")
            elif self.code[-1] != now:
                print(
                    f"{self.stage}: the code has changed since {self.folder} was last worked on; going on "
                    "all the same, as the settings file will tell (--fresh starts over)",
                    flush=True,
                )
        self._discard_finished_siblings()
        if not self.code or self.code[-1] != now:
            self.code = [*self.code, now]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_note(finished=False)

    def _discard(self, reason: str) -> None:
        print(f"{self.stage}: starting over in {self.folder}: {reason}", flush=True)
        shutil.rmtree(self.folder)
        self.code = []

    def _discard_finished_siblings(self) -> None:
        for folder in self.folder.parent.iterdir():
            if folder.is_dir() and folder != self.folder and (read_note(folder) or {}).get("finished"):
                shutil.rmtree(folder)

    def _taken_by_dvc(self) -> bool:
        # DVC writes its lock file once it has the outputs of a stage. A finished run that is older than
        # the lock file has been taken over, so whoever runs the stage again wants it run again; a newer
        # one was cut off before DVC took it, and is exported once more.
        lock = Path("dvc.lock")
        return lock.exists() and lock.stat().st_mtime > (self.folder / "work.json").stat().st_mtime

    def _write_note(self, *, finished: bool) -> None:
        note = {"stage": self.stage, "decides": self.decides, "code": self.code, "finished": finished}
        write_json(self.folder / "work.json", note)

    def publish(self, source: Path, destination: Path) -> None:
        """Add the resolved settings to the finished folder `source` and rename it to `destination`.

        The settings file tells what decides the result and how it came about, and nothing that changes
        from run to run, so that equal results have equal bytes.
        """
        import torch  # here, as `drift watch` reads work folders and would wait for it

        how = {"code": list(self.code), "torch": str(torch.__version__)}
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        with atomic_write(source / SETTINGS_FILE) as file:
            yaml.dump({"stage": self.stage, "decides": self.decides, "how": how}, file)
        replace_folder(source, destination)
        self.finish()
        print(f"{self.stage}: wrote {destination}", flush=True)

    def finish(self) -> None:
        """Mark the run as finished; a later run with other settings may clear the folder away."""
        self._write_note(finished=True)


def _lock_file(folder: Path) -> Path:
    return folder.with_suffix(".lock")


def _holder_file(folder: Path) -> Path:
    return folder.with_suffix(".run")
