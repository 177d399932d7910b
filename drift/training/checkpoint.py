"""Checkpoints by torch.distributed.checkpoint (DCP): written in the background, whole or not at all.

A checkpoint is a folder `step-00001000/`. Beside DCP's files of the tensors, `files.json` holds the small
rest of the state, and the size and CRC-32 of each file, as DCP notices no flipped bit; `Checkpoints.newest`
compares them. The folder is written
under a temporary name, flushed and renamed: a kill at any moment leaves the checkpoint before intact. All
processes have the same state, so the first alone reads and writes.
"""

import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_in_place
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.optim import Optimizer

from drift.runtime.errors import UserError
from drift.runtime.files import sync, write_json

KEPT = 2
_FILES = "files.json"
_NAME = re.compile(r"step-(\d{8})")
_READ_AT_ONCE = 2**24  # bytes
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process saves


class Saved(NamedTuple):
    step: int
    """How many steps were finished."""
    state: dict[str, Any]
    path: Path


class Checkpoints:
    """The checkpoints in a folder. As a context manager, it waits until the last one is written."""

    def __init__(self, folder: Path, *, keep_every: int = 0, group: dist.ProcessGroup | None = None):
        """Keep the newest two, and those after a multiple of `keep_every` steps. `group` is on CPUs."""
        self.folder, self._keep_every, self._group = folder, keep_every, group
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Copy the tensors, then write them in the background; first waits for the checkpoint before."""
        self.wait()
        for left_by_a_kill in self.folder.glob("tmp-*"):
            shutil.rmtree(left_by_a_kill)
        draft = self.folder / f"tmp-{step:08d}"
        draft.mkdir(parents=True)
        # One thread: DCP does not report what others fail to write
        writer = FileSystemWriter(draft, thread_count=1)
        written = async_save(dict(tensors), storage_writer=writer, process_group=self._group, no_dist=True)
        assert isinstance(written, Future)
        self._pending = self._thread.submit(self._finish, written, draft, step, dict(state))

    def wait(self) -> None:
        """Wait until what was saved is on the disk; raises what failed, such as OSError of a full disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def newest(self) -> Saved | None:
        """The newest checkpoint that is whole; names damaged ones on the screen and passes over them."""
        found = self._found()
        for step, path in found:
            try:
                content = json.loads((path / _FILES).read_text())
                for name, facts in content["files"].items():
                    if _facts(path / name) != facts:
                        raise ValueError(f"{name} is not what was written")
            except (OSError, ValueError, KeyError, TypeError) as error:
                print(f"{path}: damaged ({error}); trying the one before", flush=True)
            else:
                return Saved(step, content["state"], path)
        if found:
            print(f"{self.folder}: no checkpoint there is whole; starting from step 0", flush=True)
        return None

    def _finish(self, written: Future, draft: Path, step: int, state: dict[str, Any]) -> None:
        """Give the draft its final name, and remove what it supersedes."""
        try:
            written.result()
            files = {path.name: _facts(path) for path in draft.iterdir()}
            write_json(draft / _FILES, {"state": state, "files": files})
        except (OSError, CheckpointException) as error:
            shutil.rmtree(draft)  # makes room again on a disk that is full
            raise _reason(error, draft) from None
        final = self.folder / f"step-{step:08d}"
        self._remove(final)
        os.replace(draft, final)
        sync(self.folder)
        found = self._found()
        past = [(other, path) for other, path in found if other <= step]  # later ones are damaged
        kept = {path for _, path in past[:KEPT]}
        kept |= {path for other, path in past if self._keep_every and other % self._keep_every == 0}
        for path in {path for _, path in found} - kept:
            self._remove(path)

    def _remove(self, path: Path) -> None:
        """Remove a checkpoint under a temporary name, so that a kill leaves no half of it."""
        if path.exists():
            shutil.rmtree(path.rename(path.with_name(path.name.replace("step-", "tmp-old-"))))

    def _found(self) -> list[tuple[int, Path]]:
        """(step, path) of the checkpoints, the newest first."""
        paths = self.folder.iterdir() if self.folder.is_dir() else []
        named = ((_NAME.fullmatch(path.name), path) for path in paths)
        return sorted(((int(name[1]), path) for name, path in named if name), reverse=True)


def load(saved: Saved, tensors: Mapping[str, Tensor]) -> None:
    """Fill `tensors` in place with those of a checkpoint, one after the other.

    Raises `UserError` naming the first tensor whose shape differs.
    """
    reader = FileSystemReader(saved.path)
    stored = reader.read_metadata().state_dict_metadata
    there = {name: tuple(of.size) for name, of in stored.items() if isinstance(of, TensorStorageMetadata)}
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(there.keys() | wanted.keys()):
        has, wants = there.get(name, "nothing"), wanted.get(name, "nothing")
        if has != wants:
            raise UserError(
                f"{saved.path}: {name} is {has} where this run has {wants}: a checkpoint of another model; "
                "delete that folder, or run the stage with --fresh"
            )
    load_in_place(dict(tensors), storage_reader=reader, no_dist=True)


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by name, not copied; before the first step, zeros to be filled."""
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=flat)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _facts(path: Path) -> dict[str, int]:
    """The size and CRC-32 of a file."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_READ_AT_ONCE):
            checksum = zlib.crc32(block, checksum)
    return {"size": path.stat().st_size, "crc32": checksum}


def _reason(error: OSError | CheckpointException, draft: Path) -> BaseException:
    """The OSError behind an error, such as that of a full disk, with a file name; else the error itself."""
    cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__  # PyTorch's writer fails once more when it closes the file
    if cause is None:
        return error
    cause.filename = cause.filename or str(draft)  # only `open` sets it
    return cause
