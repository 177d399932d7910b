"""Finished work whose result DVC has stored: what `drift clean` removes."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from drift.runtime.errors import UserError
from drift.runtime.files import remove
from drift.runtime.lock import Holder, Lock
from drift.runtime.work import read_note, size_of

if TYPE_CHECKING:
    from dvc.output import Output


@dataclass(frozen=True)
class WorkFolder:
    """A work folder, and whether its result is stored elsewhere."""

    folder: Path
    stored: bool
    why: str
    """In a few words."""
    size: int
    """Bytes that removing it frees."""


def find_work(root: Path) -> list[WorkFolder]:
    """The work folders in `root`, each with what DVC says of its result.

    Raises `UserError` with DVC's reason if there is no DVC project here, or none that DVC can read.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    found = []
    try:
        with Repo() as repo:
            outs = [out for stage in repo.index.stages for out in stage.outs]
            outputs = {out.hash_info.value: out for out in outs if out.hash_info}
            for note in sorted(root.glob("*/*/work.json")):
                stored, why = _judge(note.parent, outputs)
                found.append(WorkFolder(note.parent, stored, why, size_of(note.parent)))
    except DvcException as error:
        reason = " ".join(str(error).split())
        raise UserError(f"DVC does not say what it has stored ({reason}); run this in the project") from None
    return found


def remove_work(work: WorkFolder) -> bool:
    """Remove the folder if its result is stored and no process works there; whether it is gone."""
    lock = Lock(work.folder)
    if not work.stored or not lock.acquire():
        return False
    try:
        remove(work.folder)
    finally:
        lock.release()
    return True


def _judge(folder: Path, outputs: "dict[str | None, Output]") -> tuple[bool, str]:
    note, holder = read_note(folder), Holder.of(folder)
    if holder is not None and holder.at_work() is not False:
        return False, f"process {holder.pid} on {holder.host} is at work"
    if note is None or not note["finished"]:
        return False, "not finished"
    out = outputs.get(note.get("result"))
    if out is None:
        return False, "dvc.lock has no such result"
    if out.use_cache:
        stored = not out.changed_cache()
        return stored, f"{out}, which DVC's cache {'has' if stored else 'lacks'}"
    stored = not out.changed_checksum()  # in git
    return stored, f"{out}, which {'is' if stored else 'has changed'}"
