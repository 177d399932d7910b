"""Images -> latents of one view: a loop that may be killed at any moment, and that several processes share.

Consecutive images form a block. The rows of a block are on the disk before its images are marked as done.
Processes take turns at the blocks that are not done, so any later run goes on with what is left. The result
depends neither on blocks nor on processes, except for the rounding of the VAE's convolutions in batches of
another size. Workers decode the blocks to come; a block is stored while the device computes the next.
"""

import math
import platform
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

from drift.autoencoders import Autoencoder
from drift.data.datasets import Dataset, refuse_or_leave_out
from drift.data.images import BadImage
from drift.data.latents import as_stored, file_facts, latent_files, pinned
from drift.data.views import View
from drift.runtime.errors import Stopped, UserError, one_of
from drift.runtime.files import RowFile, atomic_write, link_folder, write_json
from drift.runtime.processes import Ranks
from drift.runtime.progress import ProgressLog
from drift.runtime.seeds import numpy_generator, torch_generator

T = TypeVar("T")
_TO_DO, _DONE, _UNDECODABLE = 0, 1, 2  # marks of an image
_COPIED_AT_ONCE = 2**25  # numbers


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """What latents depend on besides the images and the VAE."""

    view: View
    image_size: int
    posterior: str
    """`mean`, or `sample` for one draw."""
    seed: int
    on_bad_image: str
    """`error` or `skip`: what to do, once all have been tried, about images that do not decode."""

    def __post_init__(self) -> None:
        one_of("posterior", self.posterior, "mean", "sample")
        one_of("on_bad_image", self.on_bad_image, "error", "skip")


def encode_view(
    source: Dataset,
    vae: Autoencoder,
    folder: str | Path,
    options: EncodeOptions,
    ranks: Ranks,
    *,
    batch_size: int,
    workers: int = 0,
    asked_to_stop: Callable[[], int] = lambda: 0,
) -> Path:
    """Encode every image of `source`; returns the folder, within `folder`, of the finished latents.

    Rows follow the images, those of an image together. At most `batch_size` pictures go through the VAE at
    once; `workers` processes decode (0: this one). All processes share `folder`, which serves one choice of
    source, VAE and options (`on_bad_image` may change). `asked_to_stop` gives the number of a signal, or 0.
    The first process logs progress to `folder/logs.jsonl`.

    Raises `UserError` if images do not decode (with `skip`, only if a class would have none left) or cannot
    be read at all; `FloatingPointError` if float16 cannot hold a latent; and `Stopped` in all processes,
    after the blocks at hand, once one of them is asked to stop. The next call goes on from there.
    """
    rows = _Rows(Path(folder), source, options.view.per_image)
    if ranks.first:
        shape = vae.latent_shape(options.image_size)
        rows.prepare(shape, vae.storage_dtype, retry=options.on_bad_image == "error")
    ranks.barrier()
    marks = rows.marks.read()
    ranks.barrier()  # nobody changes the marks before all have read them
    size = max(1, batch_size // options.view.per_image)
    blocks = [range(start, min(start + size, len(marks))) for start in range(0, len(marks), size)]
    blocks = [block for block in blocks if (marks[block.start : block.stop] == _TO_DO).any()]
    turns = math.ceil(len(blocks) / ranks.world_size)
    pictures = _Pictures(source, options, torch.full((workers,), -1).share_memory_())
    decoded = _decode(pictures, blocks[ranks.rank :: ranks.world_size], vae.device, asked_to_stop)
    encoded = _encode(decoded, vae, source, options, batch_size)
    if turns:
        _store(encoded, rows, turns, ranks, asked_to_stop, f"encode {options.view.name}")

    left_out: list[int] = np.flatnonzero(rows.marks.read() == _UNDECODABLE).tolist()
    remark = "; the meta file lists all. fid leaves out those of other splits (drift fid-selftest names them)"
    refuse_or_leave_out(source, left_out, options.on_bad_image, remark, show=ranks.first)
    export = Path(folder) / "export"
    if ranks.first:
        rows.export(export, left_out)
        write_json(latent_files(export)[2], _facts(source, vae, options, left_out) | file_facts(export))
    ranks.barrier()
    return export


def _facts(source: Dataset, vae: Autoencoder, options: EncodeOptions, left_out: list[int]) -> dict[str, Any]:
    """For the meta file; the same for both values of `on_bad_image` if no image is left out."""
    names = [source.name_in_split(index) for index in left_out]
    return {
        "dataset": source.dataset,
        "dataset_split": source.split,
        "images": len(source),
        "images_sha256": source.digest,
        "skipped_images": {"count": len(names), "names": names},
        "class_names": source.class_names,
        "num_classes": len(source.class_names),
        "view": options.view.name,
        **asdict(options.view),
        **{key: getattr(options, key) for key in ("image_size", "posterior", "seed")},
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


class _Rows:
    """The files that the processes share: latents of all images, and marks of those that are done."""

    def __init__(self, folder: Path, source: Dataset, per_image: int):
        self.folder, self.source, self.per_image = folder, source, per_image
        self._latents, self._marks = folder / "latents", folder / "images_done.npy"

    @cached_property
    def latents(self) -> RowFile:
        return RowFile(latent_files(self._latents)[0])

    @cached_property
    def marks(self) -> RowFile:
        return RowFile(self._marks)

    def prepare(self, latent_shape: tuple[int, ...], dtype: np.dtype, *, retry: bool) -> None:
        """Create the files, or take over those of an earlier run; `retry` images that did not decode."""
        if self._marks.exists():
            marks = self.marks.read()
            if retry:
                marks[marks == _UNDECODABLE] = _TO_DO  # may have been repaired
        else:
            if self.source.passed_over:
                print(self.source.passed_over, flush=True)
            shutil.rmtree(self._latents, ignore_errors=True)  # a result may share its files
            self._latents.mkdir(parents=True)
            marks = np.full(len(self.source), _TO_DO, np.uint8)
            _create(self._latents, (len(marks) * self.per_image, *latent_shape), dtype)
        with atomic_write(self._marks) as file:  # last, as it vouches for the latents
            np.save(file, marks)

    def done(self) -> int:
        """How many images all processes are done with."""
        return int(np.count_nonzero(self.marks.read() != _TO_DO))

    def write(self, block: range, latents: np.ndarray, undecodable: list[int]) -> None:
        """Store the rows of a block, `[images * per_image, C, h, w]`, and mark its images."""
        marks = np.full(len(block), _DONE, np.uint8)
        marks[[block.index(index) for index in undecodable]] = _UNDECODABLE
        self.latents.write(block.start * self.per_image, latents)
        self.marks.write(block.start, marks)

    def export(self, folder: Path, left_out: list[int]) -> None:
        """Make a folder of labels and latents: these under a second name, or a copy without some images.

        The rows stay where a run that is started again looks for them.
        """
        assert self.source.labels is not None
        images = np.delete(np.arange(len(self.source)), left_out)
        if left_out:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            kept = (images[:, None] * self.per_image + np.arange(self.per_image)).reshape(-1)
            copy = _create(folder, (len(kept), *self.latents.shape[1:]), self.latents.dtype)
            rows = max(1, _COPIED_AT_ONCE // math.prod(copy.shape[1:]))
            for start in range(0, len(kept), rows):
                copy.write(start, self.latents.read(kept[start : start + rows]))
        else:
            link_folder(self._latents, folder)
        with atomic_write(latent_files(folder)[1]) as file:
            np.save(file, np.repeat(self.source.labels[images], self.per_image))


def _create(folder: Path, shape: tuple[int, ...], dtype: np.dtype) -> RowFile:
    """A file for latents; raises `UserError` if the disk has no room for them."""
    needed, free = dtype.itemsize * math.prod(shape), shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: the latents need {needed / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} GiB free; "
            "make room or move the work folder (DRIFT_WORK_DIR)"
        )
    return RowFile.create(latent_files(folder)[0], dtype, shape)


class _Decoded(NamedTuple):
    """The pictures of a block of images."""

    block: range
    pixels: Tensor  # [images * per_image, H, W, 3] uint8; black where an image does not decode
    undecodable: list[int]  # indices of images


@dataclass(frozen=True)
class _Pictures(TorchDataset):
    """A block, as the range of its images' indices -> its pictures, undecodable images, and a complaint.

    The complaint is about an image that cannot be read, which makes the rest worthless.
    """

    source: Dataset
    options: EncodeOptions
    at_work: Tensor
    """`[workers]` int64 in shared memory: the image that each worker has in hand, or -1."""

    def __getitem__(self, block: range) -> tuple[Tensor, list[int], str]:
        view, size, seed = self.options.view, self.options.image_size, self.options.seed
        pixels = torch.zeros(len(block), view.per_image, size, size, 3, dtype=torch.uint8)
        undecodable, unreadable = [], ""
        for stored, index in zip(pixels.numpy(), block, strict=True):
            self._note(index)
            try:
                image = self.source.load(index)
            except BadImage:
                undecodable.append(index)
                continue
            except UserError as error:
                unreadable = str(error)
                break
            generator_of = partial(numpy_generator, seed, "encode/crop", index)
            for number, picture in enumerate(view.pictures(image, size, generator_of)):
                stored[number] = picture
        self._note(-1)
        return pixels.flatten(0, 1), undecodable, unreadable

    def _note(self, index: int) -> None:
        if (worker := get_worker_info()) is not None:
            self.at_work[worker.id] = index


def _decode(
    pictures: _Pictures, blocks: list[range], device: torch.device, asked_to_stop: Callable[[], int]
) -> Iterator[_Decoded]:
    """The blocks, decoded ahead by workers; ends early if a signal that asks to stop ends these too.

    Raises `UserError` if an image cannot be read, or a worker is gone.
    """
    loader = DataLoader(
        pictures,
        sampler=blocks,
        batch_size=None,  # a block is one item
        num_workers=len(pictures.at_work),
        worker_init_fn=_ignore_ctrl_c,
        pin_memory=device.type == "cuda",
    )
    try:
        decoded = iter(loader)
        if loader.num_workers and threading.current_thread() is threading.main_thread():
            # torch's handler raises the death of a worker wherever this process happens to be; the loader
            # finds it too, within seconds
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for block, (pixels, undecodable, complaint) in zip(blocks, decoded, strict=False):
            if complaint:
                raise UserError(f"{complaint}, what is done is kept")
            yield _Decoded(block, pixels, undecodable)
    except (EOFError, OSError, RuntimeError) as error:  # there is no type for it
        if loader.num_workers == 0 or str(error).startswith("Caught "):  # a bug, here or there
            raise
        if not asked_to_stop():
            reason = " ".join(str(error).split()) or type(error).__name__
            held = " or ".join(pictures.source.name(i) for i in pictures.at_work.tolist() if i >= 0)
            reading = f", reading {held}" if held else ""
            raise UserError(
                f"a process that decodes images is gone ({reason}){reading}; lower hardware.workers or "
                "hardware.encode_batch, or allow more (shared) memory, and run again: what is done is kept"
            ) from None


def _ignore_ctrl_c(worker: int) -> None:
    """A terminal sends it to workers too. (SIGTERM stays: by it, a parent that exits ends its workers.)"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _encode(
    blocks: Iterator[_Decoded], vae: Autoencoder, source: Dataset, options: EncodeOptions, batch_size: int
) -> Iterator[tuple[_Decoded, np.ndarray]]:
    """Blocks and their latents as stored, `[rows, C, h, w]`; the device computes the next block meanwhile.

    Rows that are not finite in bfloat16 are computed again in float32. Raises `FloatingPointError` if a
    latent is beyond float16.
    """
    computing = ((decoded, _latents(decoded, vae, options, batch_size)) for decoded in blocks)
    for decoded, latents in _one_ahead(computing):
        latents = latents.cpu()
        finite = latents.isfinite().flatten(1).all(1)  # [rows]
        if vae.precision != "float32" and not finite.all():
            exact = _latents(decoded, vae.in_float32(), options, batch_size).cpu()
            latents[~finite] = exact[~finite]
            finite = latents.isfinite().flatten(1).all(1)
        if not finite.all():
            index = decoded.block[int(finite.int().argmin()) // options.view.per_image]
            raise FloatingPointError(
                f"{source.name(index)}: its latents are not finite in float16; "
                "are the weights of the VAE whole, and is it the VAE for these images?"
            )
        yield decoded, latents.numpy()


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, each given out only when the next one has been made."""
    waiting = deque(islice(items, 1))
    for item in items:
        waiting.append(item)
        yield waiting.popleft()
    yield from waiting


def _latents(decoded: _Decoded, vae: Autoencoder, options: EncodeOptions, batch_size: int) -> Tensor:
    """As they are stored, `[rows, C, h, w]`; the device may still be computing them."""
    parts = decoded.pixels.split(batch_size)
    if options.posterior == "mean":
        return as_stored(torch.cat([vae.encode(part) for part in parts]), vae.storage_dtype)
    noise = torch.empty(len(decoded.pixels), *vae.latent_shape(options.image_size))
    keys = ((index, number) for index in decoded.block for number in range(options.view.per_image))
    for row, key in zip(noise, keys, strict=True):
        row.normal_(generator=torch_generator(options.seed, "encode/posterior", options.view.name, *key))
    noise = pinned(noise, vae.device).to(vae.device, non_blocking=True)
    latents = [vae.encode(*both) for both in zip(parts, noise.split(batch_size), strict=True)]
    return as_stored(torch.cat(latents), vae.storage_dtype)


def _store(
    blocks: Iterator[tuple[_Decoded, np.ndarray]],
    rows: _Rows,
    turns: int,
    ranks: Ranks,
    asked_to_stop: Callable[[], int],
    what: str,
) -> None:
    """Write this process's blocks, one a turn; all processes stop after the same turn, by `Stopped`."""
    images, done = len(rows.source), rows.done()
    log = ProgressLog(rows.folder / "logs.jsonl", steps=images, unit="img") if ranks.first else None
    if done and ranks.first:
        print(f"{what}: going on, {done} of {images} images are done", flush=True)
    with tqdm(total=images, initial=done, desc=what, unit="img", disable=not ranks.first) as bar:
        for turn in range(turns):
            for decoded, latents in islice(blocks, 1):
                rows.write(decoded.block, latents, decoded.undecodable)
            (stop,) = ranks.highest([asked_to_stop()])
            if log is not None:
                done = rows.done()
                bar.update(done - bar.n)
                log.reached(done, force=bool(stop) or turn == turns - 1)
            if stop:
                message = f"{what}: {signal.Signals(stop).name} after {done} of {images} images"
                raise Stopped(f"{message}; run it again to go on" if ranks.first else "", stop)
