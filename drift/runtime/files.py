"""Files that are whole or absent: written under a temporary name, flushed to the disk, then renamed."""

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from drift.runtime.errors import UserError

if TYPE_CHECKING:
    import numpy as np

Value = TypeVar("Value")

_PARSING = threading.Lock()
_NO_SUCH_CALL = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
# Words that torch.compile, FSDP and activation checkpointing put anywhere into a parameter's name
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


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
                shutil.copyfile(temporary, path)  # it is mounted there, as containers do with single files
                temporary.unlink()
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Give `OSError`s within, such as that of a full disk, the name of the file, which only `open` does."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


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
    filesystems `source` is copied beside `destination` first, and removed last. Where this fails, `source`
    and `destination` are as they were.
    """
    source, destination = Path(source), Path(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        _swap_in(source, destination)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy = destination.with_name(f".{destination.name}.new")
        try:
            remove(copy)
            _copy(source, copy)
            _swap_in(copy, destination)
        finally:
            remove(copy)
        remove(source)


def move(path: Path, name: Path) -> None:
    """Rename `path`, or copy it where an overlay does not let go of a folder that a layer below holds."""
    try:
        os.rename(path, name)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        try:
            _copy(path, name)
        except BaseException:
            remove(name)
            raise
        remove(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it; none is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link_folder(source: str | Path, destination: str | Path) -> Path:
    """Make the folder `destination` with the files of `source`: by hard links, or copies if there are none.

    Nobody may write into the files after that. Returns `destination`.
    """
    source, destination = Path(source), Path(destination)
    remove(destination)
    _copy(source, destination, by_links=True)
    return destination


def _copy(source: Path, destination: Path, *, by_links: bool = False) -> None:
    """Names and bytes alone, as some filesystems have no more; unlike `shutil.copytree`, says what failed."""
    destination.mkdir()
    for path in source.iterdir():
        copy = destination / path.name
        if path.is_dir() and not path.is_symlink():
            _copy(path, copy, by_links=by_links)
        elif not (by_links and _linked(path, copy)):
            with naming(copy):
                shutil.copyfile(path, copy, follow_symlinks=False)


def _linked(path: Path, name: Path) -> bool:
    try:
        os.link(path, name)
    except OSError:  # the filesystem knows no links
        return False
    return True


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


def check_output(path: str | Path) -> None:
    """Make sure that a stage can put its output at `path` once it has finished, and that DVC can take it.

    Raises `UserError` if the folder of `path` cannot be written, if a folder at `path` cannot give way (a
    mounted volume), or if DVC runs the stage and a link leads out of the Git repository.
    """
    path = Path(path)
    check_writable(path.parent)
    if "DVC_STAGE" in os.environ:
        here, home = Path.cwd().resolve(), path.parent.resolve()
        project = next((folder for folder in (here, *here.parents) if (folder / ".git").exists()), here)
        if not home.is_relative_to(project):
            raise UserError(
                f"{path}: a link leads to {home}, out of the Git repository, where DVC takes no outputs; put "
                "a folder in the place of the link (dvc cache dir FOLDER moves what is large)"
            )
    if path.is_dir() and not path.is_symlink():
        _check_movable(path)


def _check_movable(folder: Path) -> None:
    # No folder takes the place of one that is not empty, so nothing is moved here; but the system says before
    # that if `folder` cannot be moved at all
    full = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".movable-"))
    try:
        (full / "file").touch()
        os.rename(folder, full)
    except OSError as error:
        if error.errno in (errno.EBUSY, errno.EPERM, errno.EACCES):
            raise UserError(
                f"{folder}: cannot be replaced ({error.strerror}); name another folder, or if it is a "
                "mounted volume, mount the folder above it"
            ) from None
    finally:
        (full / "file").unlink()
        full.rmdir()


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
    """Flush a file, or the names in a folder, to the disk: a rename survives a power failure only then."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _flush(descriptor)
    finally:
        os.close(descriptor)


def _flush(descriptor: int) -> None:
    """Wait until the disk has it, where the filesystem can tell: some cannot, above all for folders."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SUCH_CALL:
            raise


class RowFile:
    """Rows of a `.npy` file, read and overwritten in place, by any number of threads and processes.

    The header is parsed once, when the file is opened, and by one thread at a time: NumPy has Python's
    compiler do that, which in Python up to 3.11.7 fails at times when two threads are at it (`SystemError:
    AST constructor recursion depth mismatch`, CPython issue 106905).

    Not a memory map, which would be killed by a full disk (SIGBUS), whose pages would count as this process's
    memory, and which, on a network filesystem, would write whole pages over the neighbouring rows of another
    machine.
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

        Without a writable memory map, which some network filesystems do not have.
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
        """The rows of an array of row numbers or of a slice, as they are now; neighbours in one go."""
        import numpy as np

        rows = np.arange(len(self))[rows]
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        buffer = found.reshape(-1).view(np.uint8)
        firsts = np.flatnonzero(np.diff(rows, prepend=-2) != 1).tolist()
        with self.path.open("rb", buffering=0) as file:
            for first, end in pairwise([*firsts, len(rows)]):
                file.seek(self._offset + int(rows[first]) * self._row_bytes)
                part = buffer[first * self._row_bytes : end * self._row_bytes]
                while len(part):  # one call reads at most 2 GiB
                    count = file.readinto(part)
                    assert count, f"{self.path} is cut short"
                    part = part[count:]
        return found

    def write(self, start: int, rows: "np.ndarray", *, flush: bool = True) -> None:
        """Overwrite rows from row `start` on, and with `flush` wait until the disk has them."""
        assert (
            rows.dtype == self.dtype and rows.shape[1:] == self.shape[1:] and start + len(rows) <= len(self)
        )
        with naming(self.path), self.path.open("r+b") as file:
            file.seek(self._offset + start * self._row_bytes)
            file.write(rows.tobytes())
            if flush:
                file.flush()
                _flush(file.fileno())


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _swap_in(folder: Path, destination: Path) -> None:
    old = destination.with_name(f".{destination.name}.old")
    remove(old)
    if os.path.lexists(destination):
        move(destination, old)
    try:
        os.rename(folder, destination)
    except OSError:
        if os.path.lexists(old):
            os.rename(old, destination)
        raise
    sync(destination.parent)
    remove(old)


def without_wrappers(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """Tensors, or what is known of them, by the names that they have in the bare model.

    What was saved from inside DistributedDataParallel, torch.compile and the like has `module.` in front, or
    words of theirs in between. Raises `UserError` if two tensors have one name without them.
    """
    bare: dict[str, Value] = {}
    for name, tensor in tensors.items():
        words = [word for word in name.split(".") if word not in _WRAPPERS]
        while len(words) > 1 and words[0] == "module":
            del words[0]
        if ".".join(words) in bare:
            raise UserError(
                f"parameter {name} is there twice, with and without the prefix of a wrapper; save one of them"
            )
        bare[".".join(words)] = tensor
    return bare
