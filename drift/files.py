"""Files that are whole or absent: written under a temporary name, flushed to the disk, then renamed."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from drift.errors import UserError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """An open binary file that becomes `path` when the block ends without an error.

    Until then `path` keeps its old content. A writer that wants a name instead of a file takes the
    yielded file's `name`. The temporary name is a fixed one, so what a killed writer leaves behind is
    overwritten by the next; two processes must not write the same `path` at once.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` atomically as JSON whose bytes depend on its content alone: keys sorted, indented.

    Raises `ValueError` for a NaN or an infinity, which JSON does not know.
    """
    text = json.dumps(obj, sort_keys=True, indent=2, allow_nan=False) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode())


def replace_folder(source: str | Path, destination: str | Path) -> None:
    """Rename the finished folder `source` to `destination`, replacing what is there.

    Old and new are swapped by renames, so `destination` is never half old and half new. Between
    filesystems `source` is copied beside `destination` first, and removed last.
    """
    source, destination = Path(source), Path(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        _swap_in(source, destination)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy = destination.with_name(f".{destination.name}.new")
        _remove(copy)
        shutil.copytree(source, copy)
        _swap_in(copy, destination)
        _remove(source)


def check_writable(folder: str | Path) -> None:
    """Make sure that files can be created in `folder`, which is made with its parents if it is missing.

    Permission bits say little (root ignores them, a filesystem may be read-only), so a file is really
    created and removed. Raises `UserError` with the folder and the operating system's reason.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable-"):
            pass
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); make it a writable folder or name another"
        ) from None


def sync(path: str | Path) -> None:
    """Flush a file, or the names in a folder, to the disk: a rename survives a power failure only then."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _swap_in(folder: Path, destination: Path) -> None:
    old = destination.with_name(f".{destination.name}.old")
    _remove(old)
    if os.path.lexists(destination):
        os.rename(destination, old)
    try:
        os.rename(folder, destination)
    except OSError:
        if os.path.lexists(old):
            os.rename(old, destination)
        raise
    sync(destination.parent)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
