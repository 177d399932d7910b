"""Images -> latents of one view: a loop that may be killed at any moment and shared by several processes.

The images are cut into blocks of consecutive ones. The rows of a block are on the disk before its images are
marked as done, and the processes take in turns the blocks that have unmarked images, so whoever comes next
goes on with what is left. What is written depends neither on the cut nor on the processes, beyond the
rounding of the VAE's convolutions in batches of another size. Rows that are not finite in bfloat16 are
computed again in float32.

Decoding, network and disk work at the same time: helper processes decode the blocks to come, and a thread
writes those that the network has done with.
"""

import math
import os
import platform
import shutil
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from drift.autoencoders.kl import VAE
from drift.data.images import (
    VIEW_OPTIONS,
    BadImage,
    ImageSource,
    augmented_view,
    center_view,
    first_few,
    refuse_or_leave_out,
)
from drift.data.latents import file_facts, latent_files
from drift.runtime.errors import Stopped, UserError, one_of
from drift.runtime.files import RowFile, atomic_write, write_json
from drift.runtime.progress import ProgressLog
from drift.runtime.seeds import numpy_generator, torch_generator

_TO_DO, _DONE, _UNDECODABLE = 0, 1, 2  # marks of an image
_BLOCKS_UNWRITTEN = 2  # how many blocks the network may be ahead of the disk
_ROWS_COPIED_AT_ONCE = 4096


def encode_view(
    source: ImageSource,
    vae: VAE,
    folder: str | Path,
    *,
    dataset: str,
    view: str,
    image_size: int,
    crops: int,
    crop_scale: tuple[float, float],
    crop_ratio: tuple[float, float],
    flip: bool,
    mirror: bool,
    posterior: str,
    seed: int,
    on_bad_image: str,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    meet: Callable[[int], int] = lambda number: number,
    asked_to_stop: Callable[[], int] = lambda: 0,
    progress: bool = False,
) -> Path:
    """Encode every image of `source`; returns the folder, within `folder`, that holds the finished latents.

    `view` is `center` (with `mirror`, each picture is followed by its mirror image) or `augmented` (`crops`
    random crops per image, shaped by `crop_scale`, `crop_ratio` and `flip`); the arguments of the other view
    have no effect. Rows follow the images, those of an image together. `posterior` is `mean` or `sample`.
    Images that do not decode are told after all have been tried; then, if `on_bad_image` is `error`, that is
    all, and if it is `skip`, their rows are left out and the meta file lists them.

    At most `batch_size` pictures go through the VAE at once, and `workers` processes decode (0: this one).
    `folder` serves one choice of the arguments up to `seed`, and is shared by the processes. `meet` waits for
    all of them and gives each the highest of their numbers. `asked_to_stop` gives the number of a signal, or
    0. The first process appends to logs.jsonl in `folder` how many images all of them have done.

    Raises `UserError` if images do not decode (with `skip`, only if a class would be left without any) or
    cannot be read at all; `FloatingPointError` if float16 cannot hold a latent; and `Stopped` in all
    processes, after the blocks at hand, once one of them is asked to stop. The next call goes on from there.
    """
    one_of("view", view, *VIEW_OPTIONS)
    one_of("posterior", posterior, "mean", "sample")
    one_of("on_bad_image", on_bad_image, "error", "skip")
    at_work = torch.full((workers, 2), -1).share_memory_()
    pictures = _Pictures(source, view, image_size, crops, crop_scale, crop_ratio, flip, mirror, seed, at_work)
    files = _Files(Path(folder))
    result = files.result(on_bad_image)
    if result is None:
        if rank == 0:
            if source.passed_over:
                print(source.passed_over, flush=True)
            files.prepare(source, pictures.per_image, vae.latent_shape(image_size))
        meet(0)
        blocks, marks = _blocks(len(source), max(1, batch_size // pictures.per_image)), files.marks()
        meet(0)  # all have read the marks before one changes them
        blocks = [block for block in blocks if (marks[block.start : block.stop] == _TO_DO).any()]
        blocks = blocks[rank::world_size]
        with _progress(
            files, view, len(source), blocks, world_size, shown=progress, logged=rank == 0
        ) as written:
            stopped_by = _encode_blocks(
                vae, pictures, blocks, files, posterior, batch_size, workers, asked_to_stop, written
            )
            stopped_by = meet(stopped_by)  # within, so that the log ends with the images of all
        if stopped_by:
            name = signal.Signals(stopped_by).name
            done = f"{files.count()} of {len(source)} images"
            told = f"encode {view}: {name} after {done}; run it again to go on"
            raise Stopped(told if rank == 0 else "", stopped_by)
        left_out = _to_leave_out(source, files.marks(), on_bad_image, told=rank == 0)
        result = files.kept if left_out else files.latents
        if rank == 0:
            if left_out:
                files.copy_without(left_out)
            meta = {
                "dataset": dataset,
                **_images_facts(source, left_out),
                **pictures.settings(),
                "posterior": posterior,
                **_network_facts(vae),
                **file_facts(result),
            }
            write_json(latent_files(result)[2], meta)
    meet(0)  # until then the others may still read the marks
    if rank == 0:
        files.clear(result)
    return result


def _images_facts(source: ImageSource, left_out: list[int]) -> dict[str, Any]:
    """For the meta file; alike for both values of `on_bad_image` if no image is left out."""
    return {
        "dataset_split": source.split,
        "images": len(source),
        "images_sha256": source.digest,
        "skipped_images": {
            "count": len(left_out),
            "names": [source.name_in_split(index) for index in left_out],
        },
        "class_names": source.class_names,
        "num_classes": len(source.class_names),
    }


def _network_facts(vae: VAE) -> dict[str, Any]:
    """For the meta file."""
    return {
        "vae": vae.id,
        "vae_revision": vae.revision,
        "vae_sha256": vae.digest,
        "vae_precision": vae.precision,
        "scaling_factor": vae.scaling_factor,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: version(name) for name in ("diffusers", "numpy", "pillow")},
        },
    }


@dataclass(frozen=True)
class _Files:
    """What the processes share: a folder with the rows of all images and the marks of those that are done."""

    folder: Path

    @property
    def latents(self) -> Path:
        return self.folder / "latents"

    @property
    def kept(self) -> Path:
        """Like `latents`, without the images that do not decode; made only if there are any."""
        return self.folder / "latents_kept"

    @property
    def log(self) -> Path:
        return self.folder / "logs.jsonl"

    @property
    def stopping(self) -> Path:
        """A file that tells all processes to stop, with the error for which they do, if it is one."""
        return self.folder / "stopping"

    @property
    def _marks(self) -> Path:
        return self.latents / "images_done.npy"

    @cached_property
    def _rows(self) -> tuple[RowFile, RowFile]:
        """Latents and marks."""
        return RowFile(latent_files(self.latents)[0]), RowFile(self._marks)

    def marks(self) -> np.ndarray:
        return self._rows[1].read()

    def count(self) -> int:
        """Images that are done with, by all processes."""
        return int(np.count_nonzero(self.marks() != _TO_DO))

    def result(self, on_bad_image: str) -> Path | None:
        """The folder of finished latents, which are complete once they have their meta file."""
        allowed = (self.latents, self.kept) if on_bad_image == "skip" else (self.latents,)
        return next((folder for folder in allowed if latent_files(folder)[2].exists()), None)

    def prepare(self, source: ImageSource, per_image: int, latent_shape: tuple[int, ...]) -> None:
        self.stopping.unlink(missing_ok=True)
        shutil.rmtree(self.kept, ignore_errors=True)  # cut off, or of a run that was to skip images
        if self._marks.exists():
            marks = self.marks()
            marks[marks == _UNDECODABLE] = _TO_DO  # may have been repaired
        else:
            shutil.rmtree(self.latents, ignore_errors=True)  # not overwritten: a result may share the files
            self.latents.mkdir(parents=True)
            latents_path, labels_path, _ = latent_files(self.latents)
            shape = (len(source) * per_image, *latent_shape)
            _require_room(self.folder, shape)
            RowFile.create(latents_path, np.float16, shape)
            _save(labels_path, np.repeat(source.labels, per_image))
            marks = np.full(len(source), _TO_DO, np.uint8)
        _save(self._marks, marks)  # after the others, for which it vouches

    def write(self, block: range, latents: np.ndarray, undecodable: list[int]) -> None:
        """Store the rows of a block, `[images * per_image, C, h, w]`, and mark its images."""
        marks = np.full(len(block), _DONE, np.uint8)
        marks[[block.index(index) for index in undecodable]] = _UNDECODABLE
        per_image = len(latents) // len(block)
        stored_latents, stored_marks = self._rows
        stored_latents.write(block.start * per_image, latents)
        stored_marks.write(block.start, marks)

    def stop_with(self, error: str) -> UserError:
        """Make all processes stop; the error to raise, which is that of the first process that had one."""
        with tempfile.NamedTemporaryFile(dir=self.folder) as file:
            file.write(os.fsencode(error))  # which may name files whose names are no UTF-8
            file.flush()
            with suppress(OSError):  # another was first, or the filesystem knows no links
                os.link(file.name, self.stopping)
        return UserError(self.error() or error)

    def error(self) -> str:
        """Why the processes stop; empty where they do not, or by a signal."""
        return os.fsdecode(self.stopping.read_bytes()) if self.stopping.exists() else ""

    def copy_without(self, left_out: list[int]) -> None:
        """Make `kept`, without the rows of some images; raises `UserError` if the disk has no room for it."""
        latents_path, labels_path, _ = latent_files(self.latents)
        latents, labels = np.load(latents_path, mmap_mode="r"), np.load(labels_path)
        keep = np.ones(len(self.marks()), bool)
        keep[left_out] = False
        keep = np.repeat(keep, len(labels) // len(keep))
        shape = (int(np.count_nonzero(keep)), *latents.shape[1:])
        self.kept.mkdir(exist_ok=True)
        _require_room(self.folder, shape)
        header = np.lib.format.header_data_from_array_1_0(latents) | {"shape": shape}
        kept_latents_path, kept_labels_path, _ = latent_files(self.kept)
        with atomic_write(kept_latents_path) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, len(keep), _ROWS_COPIED_AT_ONCE):
                rows = slice(start, start + _ROWS_COPIED_AT_ONCE)
                file.write(latents[rows][keep[rows]].tobytes())
        _save(kept_labels_path, labels[keep])

    def clear(self, result: Path) -> None:
        """Remove everything that was only of use until the latents in the folder `result` were finished."""
        self._marks.unlink(missing_ok=True)
        if result != self.latents:
            shutil.rmtree(self.latents, ignore_errors=True)


@contextmanager
def _progress(
    files: _Files, view: str, images: int, blocks: list[range], world_size: int, *, shown: bool, logged: bool
) -> Iterator[Callable[[range], None]]:
    """A bar over this process's blocks, a log of the images of all; yields what to call after each block."""
    done = files.count()
    if shown and done:
        print(f"encode {view}: going on, {done} of {images} images are done", flush=True)
    log = ProgressLog(files.log, steps=images, unit="img") if logged else None
    share = f" (1/{world_size} of the images)" if world_size > 1 else ""
    images_left = sum(map(len, blocks))
    with tqdm(
        total=images_left, desc=f"encode {view}{share}", unit="img", disable=not shown, mininterval=1.0
    ) as bar:

        def written(block: range) -> None:
            bar.update(len(block))
            if log is not None:
                log.reached(files.count())

        yield written
    if log is not None:
        log.reached(files.count(), force=True)


class _Decoded(NamedTuple):
    """The pictures of a block of images."""

    pixels: Tensor  # [images * per_image, H, W, 3] uint8; black where an image does not decode
    undecodable: list[int]  # indices of images
    unreadable: str  # the complaint about an image that cannot be read, which makes the rest worthless


@dataclass(frozen=True)
class _Pictures(Dataset):
    """A block, as the range of its images' indices -> its pictures."""

    source: ImageSource
    view: str
    image_size: int
    crops: int
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: bool
    mirror: bool
    seed: int
    at_work: Tensor
    """`[helpers, 2]` int64 in shared memory: the number of each helper process and of its image, -1 for none,
    for the case that the system kills it."""

    @property
    def per_image(self) -> int:
        return self.crops if self.view == "augmented" else 1 + self.mirror

    def settings(self) -> dict[str, Any]:
        """For the meta file: what decides the pictures of this view."""
        keys = ("view", "image_size", "seed", *VIEW_OPTIONS[self.view])
        return {name: getattr(self, name) for name in keys}

    def __getitem__(self, block: range) -> _Decoded:
        size = self.image_size
        pixels = torch.zeros(len(block), self.per_image, size, size, 3, dtype=torch.uint8)
        undecodable, unreadable = [], ""
        for views, index in zip(pixels.numpy(), block, strict=True):
            self._note(index)
            try:
                image = self.source.load(index)
            except BadImage:
                undecodable.append(index)
                continue
            except UserError as error:
                unreadable = str(error)
                break
            if self.view == "augmented":
                for crop in range(self.crops):
                    views[crop] = self._crop(image, index, crop)
            else:
                views[0] = center_view(image, size)
                views[1:] = views[0, :, ::-1]
        self._note(-1)
        return _Decoded(pixels.flatten(0, 1), undecodable, unreadable)

    def _note(self, index: int) -> None:
        if (helper := get_worker_info()) is not None:
            self.at_work[helper.id] = torch.tensor([os.getpid(), index])

    def in_dead_hands(self) -> str:
        """The images that helper processes had in hand when they died."""
        names: list[str] = []
        end = time.monotonic() + 1  # the system closes the pipes of a process before it counts as dead
        while not names and time.monotonic() < end:
            time.sleep(0.02)
            at_work = [(process, index) for process, index in self.at_work.tolist() if index >= 0]
            names = [self.source.name(index) for process, index in at_work if _is_dead(process)]
        return ", ".join(names)

    def _crop(self, image: Image.Image, index: int, crop: int) -> np.ndarray:
        rng = numpy_generator(self.seed, "encode/crop", index, crop)
        return augmented_view(image, self.image_size, self.crop_scale, self.crop_ratio, self.flip, rng)


def _encode_blocks(
    vae: VAE,
    pictures: _Pictures,
    blocks: list[range],
    files: _Files,
    posterior: str,
    batch_size: int,
    workers: int,
    asked_to_stop: Callable[[], int],
    written: Callable[[range], None],
) -> int:
    """Encode and store blocks, and tell `written` of each that is on the disk.

    Returns 0, or the number of the signal that has ended it early.
    """
    loader = DataLoader(
        pictures,
        sampler=blocks,
        batch_size=None,  # a block is one item
        num_workers=workers,
        worker_init_fn=_ignore_ctrl_c,
        pin_memory=vae.device.type == "cuda",
    )
    unwritten: deque[tuple[range, _Decoded, Future[Tensor | None]]] = deque()

    def store(block: range, decoded: _Decoded, latents: Tensor, may_overflow: bool) -> Tensor | None:
        """None, or the latents if some are to be computed again: then nothing is stored."""
        latents = latents.cpu()
        if may_overflow and not latents.isfinite().all():
            return latents
        files.write(block, _require_finite(latents, pictures, block).numpy(), decoded.undecodable)
        return None

    def take_written(leave: int) -> None:
        while unwritten and (len(unwritten) > leave or unwritten[0][2].done()):
            block, decoded, future = unwritten.popleft()
            overflown = future.result()  # raises what went wrong
            if overflown is not None:
                exact = vae.in_float32()
                again = _encode(exact, pictures, block, decoded.pixels, posterior, batch_size).cpu()
                finite = overflown.isfinite().flatten(1).all(1)[:, None, None, None]
                store(block, decoded, torch.where(finite, overflown, again), False)
            written(block)

    with ThreadPoolExecutor(1) as writer:
        for block, decoded in zip(blocks, _read_ahead(loader, asked_to_stop), strict=False):
            if decoded.unreadable:
                raise files.stop_with(f"{decoded.unreadable}, what is done is kept")
            latents = _encode(vae, pictures, block, decoded.pixels, posterior, batch_size)
            future = writer.submit(store, block, decoded, latents, vae.precision != "float32")
            unwritten.append((block, decoded, future))
            take_written(_BLOCKS_UNWRITTEN)
            if asked_to_stop() or files.stopping.exists():
                break
        take_written(0)
    if error := files.error():
        raise UserError(error)
    if stopped_by := asked_to_stop():
        files.stopping.touch()
    return stopped_by


def _ignore_ctrl_c(worker: int) -> None:
    """A terminal sends it to helpers too. (SIGTERM is how a parent that exits ends those that are left.)"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _read_ahead(loader: DataLoader, asked_to_stop: Callable[[], int]) -> Iterator[_Decoded]:
    """What the loader's helper processes decode; ends early if they die of a signal that asks to stop."""
    try:
        decoded = iter(loader)
        if loader.num_workers and threading.current_thread() is threading.main_thread():
            # torch's handler raises the death of a helper wherever this process happens to be; the loader
            # finds it too, within seconds
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield from decoded
    except (EOFError, OSError, RuntimeError) as error:  # there is no type for it
        if loader.num_workers == 0 or str(error).startswith("Caught "):  # a bug, here or there
            raise
        if not asked_to_stop():
            reason = " ".join(str(error).split()) or type(error).__name__
            names = loader.dataset.in_dead_hands()
            raise UserError(
                f"a process that decodes images is gone ({reason}){f', reading {names}' if names else ''}; "
                "lower hardware.workers or hardware.encode_batch, or allow more (shared) memory, and run "
                "again: what is done is kept"
            ) from None


def _is_dead(process: int) -> bool:
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _encode(
    vae: VAE, pictures: _Pictures, block: range, pixels: Tensor, posterior: str, batch_size: int
) -> Tensor:
    """The latents of a block, float16 `[rows, C, h, w]`, which the VAE's device may still be computing."""
    moments = [vae.moments(part) for part in pixels.split(batch_size)]
    mean, std = (torch.cat(parts) for parts in zip(*moments, strict=True))  # [rows, C, h, w]
    if posterior == "sample":
        noise = torch.empty(mean.shape, pin_memory=mean.is_cuda)
        keys = ((index, number) for index in block for number in range(pictures.per_image))
        for row, (index, number) in zip(noise, keys, strict=True):
            row.normal_(
                generator=torch_generator(pictures.seed, "encode/posterior", pictures.view, index, number)
            )
        mean = mean + std * noise.to(mean.device, non_blocking=True)
    return vae.scale(mean).half()


def _require_finite(latents: Tensor, pictures: _Pictures, block: range) -> Tensor:
    """The latents of a block `[rows, C, h, w]`, unless one of them is beyond float16."""
    finite = latents.isfinite().flatten(1).all(1)
    if not finite.all():
        index = block[int(finite.int().argmin()) // pictures.per_image]
        raise FloatingPointError(
            f"{pictures.source.name(index)}: its latents are not finite in float16; "
            "are the weights of the VAE whole, and is it the VAE for these images?"
        )
    return latents


def _to_leave_out(source: ImageSource, marks: np.ndarray, on_bad_image: str, told: bool) -> list[int]:
    """The images that do not decode; raises `UserError` if they may not be left out or are all of a class."""
    assert (marks != _TO_DO).all()
    bad = np.flatnonzero(marks == _UNDECODABLE).tolist()
    empty = np.setdiff1d(source.labels, source.labels[marks == _DONE])
    if len(empty) and on_bad_image == "skip":
        named = first_few([source.class_names[label] for label in empty], len(empty))
        raise UserError(
            f"{len(empty)} of {len(source.class_names)} classes have no image that decodes: {named}; "
            "repair some, or remove the folders of these classes"
        )
    refuse_or_leave_out(
        source,
        bad,
        on_bad_image,
        "; the meta file lists all. fid leaves out those of other splits (drift fid-selftest tells now)",
        told=told,
    )
    return bad


def _blocks(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _require_room(folder: Path, shape: tuple[int, ...]) -> None:
    """Raises `UserError` if the disk has no room for float16 numbers of this shape."""
    needed, free = 2 * math.prod(shape), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: the latents need {needed / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} GiB "
            "free; make room or move the work folder (DRIFT_WORK_DIR)"
        )


def _save(path: Path, array: np.ndarray) -> None:
    with atomic_write(path) as file:
        np.save(file, array)
