"""Finished work that DVC has taken over: what `drift clean` removes."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML

from drift.runtime.errors import UserError
from drift.runtime.files import remove
from drift.runtime.lock import Holder, Lock
from drift.runtime.work import dvc_hash, read_note, size_of


@dataclass(frozen=True)
class Work:
    """A work folder, and whether its result is stored elsewhere."""

    folder: Path
    stored: bool
    why: str
    """In a few words."""
    size: int
    """Bytes that removing it frees."""


def find_work(root: Path) -> list[Work]:
    """The work folders in `root`, with what `dvc.lock` and DVC's cache say of the result of each.

    Raises `UserError` if there is no `dvc.lock`, or DVC does not tell where its cache is.
    """
    results, cache = _results(Path("dvc.lock")), _cache()
    found = []
    for note in sorted(root.glob("*/*/work.json")):
        stored, why = _judge(note.parent, results, cache)
        found.append(Work(note.parent, stored, why, size_of(note.parent)))
    return found


def remove_work(work: Work) -> bool:
    """Remove the folder, unless a process is at work there just now; whether it is gone."""
    lock = Lock(work.folder)
    if not work.stored or not lock.acquire():
        return False
    try:
        remove(work.folder)
    finally:
        lock.release()
    return True


def _judge(folder: Path, results: dict[str, tuple[Path, int]], cache: Path) -> tuple[bool, str]:
    note, holder = read_note(folder), Holder.of(folder)
    if holder is not None and holder.at_work(folder) is not False:
        return False, f"process {holder.pid} on {holder.host} is at work"
    if note is None or not note["finished"]:
        return False, "not finished"
    digest = note.get("result")
    if digest not in results:
        return False, "dvc.lock has no such result"
    path, size = results[digest]
    if digest.endswith(".dir"):
        stored = _in_cache(digest, size, cache)
        return stored, f"{path}, which DVC's cache {'has' if stored else 'lacks'}"
    stored = path.is_file() and dvc_hash(path) == digest  # in git, and not in the cache
    return stored, f"{path}, which {'is' if stored else 'has changed'}"


def _in_cache(digest: str, size: int, cache: Path) -> bool:
    """Whether the cache has all files of a folder."""
    try:
        listing = json.loads(_cached(digest, cache).read_text(encoding="utf-8"))
        return sum(_cached(entry["md5"], cache).stat().st_size for entry in listing) == size
    except FileNotFoundError:
        return False


def _cached(digest: str, cache: Path) -> Path:
    return cache / "files" / "md5" / digest[:2] / digest[2:]


def _results(lock: Path) -> dict[str, tuple[Path, int]]:
    """Path and bytes of each output in `dvc.lock`, by its hash."""
    if not lock.is_file():
        raise UserError(
            f"{lock}: none in {Path.cwd()}, so nothing is proven to be stored; run dvc repro there"
        )
    content = YAML(typ="safe", pure=True).load(lock)
    outs = [out for stage in content["stages"].values() for out in stage.get("outs", ())]
    return {out["md5"]: (Path(out["path"]), out["size"]) for out in outs}


def _cache() -> Path:
    done = subprocess.run([sys.executable, "-P", "-m", "dvc", "cache", "dir"], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"DVC does not say where its cache is: {' '.join(done.stderr.split())}")
    return Path(done.stdout.strip())
