"""Files that are whole or absent: written under a temporary name, flushed to the disk, then renamed."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from drift.runtime.errors import UserError

if TYPE_CHECKING:
    import numpy as np

Value = TypeVar("Value")

# NumPy compiles the header, which fails at times in two threads (CPython issue 106905)
_PARSING = threading.Lock()
_NO_SUCH_CALL = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
# Words that torch.compile, FSDP and activation checkpointing put anywhere into a parameter's name
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """An open binary file that becomes `path` when the block ends without an error.

    Until then `path` keeps its old content. A writer that needs a name uses the file's `name`. This temporary
    name is fixed, so the next writer overwrites what a killed one left behind. Two processes must not write
    the same `path` at once.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with naming(path):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                _flush(file.fileno())
            try:
                os.replace(temporary, path)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                shutil.copyfile(temporary, path)  # a mount point, which containers make of single files
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Name the file in `OSError`s of the block, such as a full disk's; by itself only `open` does."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` atomically as JSON whose bytes depend on its content alone: keys sorted, indented.

    Raises `ValueError` for a NaN or an infinity, which JSON lacks.
    """
    text = json.dumps(obj, sort_keys=True, indent=2, allow_nan=False) + "\n"
    with atomic_write(path) as file:
        file.write(text.encode())


def replace_folder(source: str | Path, destination: str | Path) -> None:
    """Move the finished folder `source` to `destination`, on any filesystem, replacing what is there.

    Renames swap old and new: `destination` is never half old and half new, and stays as it was if this fails.
    Only a folder that cannot be renamed, such as a mounted volume, has its contents replaced instead.
    `source` is removed last.
    """
    source, destination = Path(source), Path(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(destination) and _renamed(source, destination):
        sync(destination.parent)
        return
    new, old = (destination.with_name(f".{destination.name}.{what}") for what in ("replacing", "replaced"))
    remove(old)
    try:
        link_folder(source, new)
        if not os.path.lexists(destination):
            os.rename(new, destination)
        elif _renamed(destination, old):
            try:
                os.rename(new, destination)
            except OSError:
                os.rename(old, destination)
                raise
        else:
            for path in destination.iterdir():
                remove(path)
            _copy(new, destination)
    finally:
        remove(new)
    sync(destination.parent)
    remove(old)
    remove(source)


def _renamed(path: Path, name: Path) -> bool:
    try:
        os.rename(path, name)
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EXDEV):  # a mount point; of an overlay's lower layer
            raise
        return False
    return True


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all its contents, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link_folder(source: Path, destination: Path) -> None:
    """Make the folder `destination` with the files of `source`: hard links, or copies where links fail.

    Nobody may write into these files afterwards.
    """
    remove(destination)
    _copy(source, destination)


def _copy(source: Path, destination: Path) -> None:
    """Copies names and bytes only, as some filesystems store nothing else.

    Unlike `shutil.copytree`, an error names the file.
    """
    destination.mkdir(exist_ok=True)
    for path in source.iterdir():
        copy = destination / path.name
        if path.is_dir() and not path.is_symlink():
            _copy(path, copy)
            continue
        with suppress(OSError):  # another filesystem, or one without links
            os.link(path, copy, follow_symlinks=False)
            continue
        with naming(copy):
            shutil.copyfile(path, copy, follow_symlinks=False)


def check_writable(folder: str | Path) -> None:
    """Create `folder` if it is missing, and make sure that files can be created in it.

    Permission bits say little: root ignores them, and a filesystem may be read-only. So this creates a file
    and removes it. Raises `UserError` with the folder and the operating system's reason.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable-"):
            pass
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); make it a writable folder or name another"
        ) from None


def check_output(path: str | Path) -> None:
    """Make sure that a stage can put its output at `path` at its end, and that DVC can take it.

    Raises `UserError` if the folder of `path`, or a folder at `path`, cannot be written. Under DVC it also
    does so if a link leads out of the Git repository.
    """
    path = Path(path)
    check_writable(path.parent)
    if path.is_dir():
        check_writable(path)
    if "DVC_STAGE" in os.environ:
        here, home = Path.cwd().resolve(), path.parent.resolve()
        project = next((folder for folder in (here, *here.parents) if (folder / ".git").exists()), here)
        if not home.is_relative_to(project):
            raise UserError(
                f"{path}: a link leads to {home}, out of the Git repository, where DVC takes no outputs; put "
                "a folder in the place of the link (dvc cache dir FOLDER moves what is large)"
            )


def check_readable(path: str | Path, what: str, way_out: str) -> None:
    """Raise `UserError` with `what`, the reason and `way_out` if the file `path` cannot be opened."""
    try:
        with Path(path).open("rb"):
            pass
    except FileNotFoundError:
        raise UserError(f"{what}: there is no such file; {way_out}") from None
    except OSError as error:
        raise UserError(f"{what}: cannot be read ({error.strerror}); {way_out}") from None


def sync(path: str | Path) -> None:
    """Flush a file, or the names in a folder, to the disk, so that a rename survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _flush(descriptor)
    finally:
        os.close(descriptor)


def _flush(descriptor: int) -> None:
    """Wait for the disk, unless the filesystem has no `fsync`; some have none for folders."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SUCH_CALL:
            raise


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RowFile:
    """Rows of a `.npy` file, read and overwritten in place, by any number of threads and processes.

    Not a memory map: on a full disk that dies of SIGBUS, its pages count as memory of the process, and on a
    network filesystem it writes whole pages, over neighbouring rows that another machine has written.
    """

    def __init__(self, path: str | Path):
        """Raises `OSError` or `ValueError` if there is no such file or it is no `.npy` file."""
        import numpy as np

        with _PARSING:
            stored = np.load(path, mmap_mode="r")
        self.path = Path(path)
        self.shape: tuple[int, ...] = stored.shape
        self.dtype: np.dtype = stored.dtype
        self._offset: int = stored.offset
        self._row_bytes = stored.dtype.itemsize * math.prod(stored.shape[1:])

    @classmethod
    def create(cls, path: str | Path, dtype: "np.typing.DTypeLike", shape: tuple[int, ...]) -> "RowFile":
        """A new file of zeros, which take no room on the disk until they are overwritten.

        It needs no writable memory map, which some network filesystems lack.
        """
        import numpy as np

        dtype = np.dtype(dtype)
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        with naming(path), Path(path).open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + dtype.itemsize * math.prod(shape))
        return cls(path)

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, rows: "np.ndarray | slice" = slice(None)) -> "np.ndarray":
        """The rows of an array of row numbers or of a slice, as they are now; neighbours in one read."""
        import numpy as np

        rows = np.arange(len(self))[rows]
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        buffer = found.reshape(-1).view(np.uint8)
        firsts = np.flatnonzero(np.diff(rows, prepend=-2) != 1).tolist()
        with self.path.open("rb") as file:
            for first, end in pairwise([*firsts, len(rows)]):
                file.seek(self._offset + int(rows[first]) * self._row_bytes)
                part = buffer[first * self._row_bytes : end * self._row_bytes]
                assert file.readinto(part.data) == len(part), f"{self.path} is cut short"
        return found

    def write(self, start: int, rows: "np.ndarray", *, flush: bool = True) -> None:
        """Overwrite rows from row `start` on, and with `flush` wait until the disk has them."""
        assert rows.dtype == self.dtype and rows.shape[1:] == self.shape[1:]
        assert start + len(rows) <= len(self)
        with naming(self.path), self.path.open("r+b") as file:
            file.seek(self._offset + start * self._row_bytes)
            file.write(rows.tobytes())
            if flush:
                file.flush()
                _flush(file.fileno())


def without_wrappers(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """Tensors by their names in the bare model.

    DistributedDataParallel puts `module.` in front of a name, torch.compile and FSDP put words into it.
    Raises `UserError` if two tensors have the same bare name.
    """
    bare: dict[str, Value] = {}
    for name, tensor in tensors.items():
        bare_name = re.sub(r"^(module\.)+", "", _WRAPPERS.sub("", name))
        if bare_name in bare:
            raise UserError(
                f"parameter {name} is there twice, with and without a wrapper's prefix; save one of them"
            )
        bare[bare_name] = tensor
    return bare
