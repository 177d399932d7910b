"""Images -> latents of one view: a loop that may be killed at any moment and shared by several processes.

Consecutive images form a block. The rows of a block are on the disk before its images are marked as done, and
the processes take in turns the blocks with images that are not: whoever comes next goes on with what is left.
The result depends neither on the blocks nor on the processes, except for the rounding of the VAE's
convolutions in batches of another size. Workers decode the blocks to come, and a block is stored while the
device computes the next.
"""

import math
import multiprocessing
import os
import platform
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

from drift.autoencoders import Autoencoder
from drift.data.datasets import Dataset, refuse_or_leave_out
from drift.data.images import BadImage
from drift.data.latents import file_facts, latent_files, pinned
from drift.data.views import View
from drift.runtime.errors import Stopped, UserError, one_of
from drift.runtime.files import RowFile, atomic_write, link_folder, write_json
from drift.runtime.processes import Ranks
from drift.runtime.progress import ProgressLog
from drift.runtime.seeds import numpy_generator, torch_generator

_TO_DO, _DONE, _UNDECODABLE = 0, 1, 2  # marks of an image
_ROWS_COPIED_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """What latents depend on, besides the images and the VAE."""

    view: View
    image_size: int
    posterior: str
    """`mean`, or `sample` for one draw."""
    seed: int
    on_bad_image: str
    """`error` or `skip`: what happens, after all have been tried, if images do not decode."""

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
    """Encode every image of `source`; returns the folder, within `folder`, with the finished latents.

    Rows follow the images, those of an image together. At most `batch_size` pictures go through the VAE at
    once, and `workers` processes decode (0: this one). `folder` serves one choice of source, VAE and options
    (`on_bad_image` may change), and is shared by the processes. `asked_to_stop` gives the number of a signal,
    or 0. The first process logs progress to logs.jsonl in `folder`.

    Raises `UserError` if images do not decode (with `skip`, only if a class would be left without any) or
    cannot be read at all; `FloatingPointError` if float16 cannot hold a latent; and `Stopped` in all
    processes, after the blocks at hand, once one of them is asked to stop. The next call goes on from there.
    """
    rows = _Rows(Path(folder), source, options.view.per_image)
    if ranks.first:
        rows.prepare(vae.latent_shape(options.image_size), retry=options.on_bad_image == "error")
    ranks.barrier()
    marks = rows.marks.read()
    ranks.barrier()  # all have read the marks before one changes them
    size = max(1, batch_size // options.view.per_image)
    blocks = [range(start, min(start + size, len(marks))) for start in range(0, len(marks), size)]
    blocks = [block for block in blocks if (marks[block.start : block.stop] == _TO_DO).any()]
    turns = math.ceil(len(blocks) / ranks.world_size)
    pictures = _Pictures(source, options, torch.full((workers, 2), -1).share_memory_())
    decoded = _decode(pictures, blocks[ranks.rank :: ranks.world_size], vae.device, asked_to_stop)
    encoded = _encode(decoded, vae, source, options, batch_size)
    if turns:
        _store(encoded, rows, turns, ranks, asked_to_stop, f"encode {options.view.name}")

    left_out = np.flatnonzero(rows.marks.read() == _UNDECODABLE)
    remark = "; the meta file lists all. fid leaves out those of other splits (drift fid-selftest names them)"
    refuse_or_leave_out(source, left_out.tolist(), options.on_bad_image, remark, show=ranks.first)
    export = Path(folder) / "export"
    if ranks.first:
        rows.export(export, left_out)
        meta = _facts(source, vae, options, left_out) | file_facts(export)
        write_json(latent_files(export)[2], meta)
    ranks.barrier()
    return export


def _facts(source: Dataset, vae: Autoencoder, options: EncodeOptions, left_out: np.ndarray) -> dict[str, Any]:
    """For the meta file; alike for both values of `on_bad_image` if no image is left out."""
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


@dataclass(frozen=True)
class _Rows:
    """Files that the processes share: the latents of all images, and the marks of those that are done."""

    folder: Path
    source: Dataset
    per_image: int

    @property
    def _marks(self) -> Path:
        return self.folder / "images_done.npy"

    @cached_property
    def latents(self) -> RowFile:
        return RowFile(latent_files(self.folder / "latents")[0])

    @cached_property
    def marks(self) -> RowFile:
        return RowFile(self._marks)

    def prepare(self, latent_shape: tuple[int, ...], *, retry: bool) -> None:
        """Create the files, or take over those of an earlier run; `retry` images that did not decode."""
        if self._marks.exists():
            marks = self.marks.read()
            if retry:
                marks[marks == _UNDECODABLE] = _TO_DO  # may have been repaired
        else:
            if self.source.passed_over:
                print(self.source.passed_over, flush=True)
            shutil.rmtree(self.folder / "latents", ignore_errors=True)  # a result may share its files
            (self.folder / "latents").mkdir(parents=True)
            marks = np.full(len(self.source), _TO_DO, np.uint8)
            self._create(self.folder / "latents", (len(marks) * self.per_image, *latent_shape))
        with atomic_write(self._marks) as file:  # last, as it vouches for the latents
            np.save(file, marks)

    def _create(self, folder: Path, shape: tuple[int, ...]) -> RowFile:
        """A file for latents; raises `UserError` if the disk has no room for them."""
        needed, free = 2 * math.prod(shape), shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(
                f"{folder}: the latents need {needed / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} GiB "
                "free; make room or move the work folder (DRIFT_WORK_DIR)"
            )
        return RowFile.create(latent_files(folder)[0], np.float16, shape)

    def done(self) -> int:
        """How many images all processes are done with."""
        return int(np.count_nonzero(self.marks.read() != _TO_DO))

    def write(self, block: range, latents: np.ndarray, undecodable: list[int]) -> None:
        """Store the rows of a block, `[images * per_image, C, h, w]`, and mark its images."""
        marks = np.full(len(block), _DONE, np.uint8)
        marks[[block.index(index) for index in undecodable]] = _UNDECODABLE
        self.latents.write(block.start * self.per_image, latents)
        self.marks.write(block.start, marks)

    def export(self, folder: Path, left_out: np.ndarray) -> None:
        """Make a folder of latents, under a second name or copied without some images, and labels.

        So the rows stay where a run that is started again looks for them.
        """
        images = np.delete(np.arange(len(self.source)), left_out)
        if len(left_out):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            kept = (images[:, None] * self.per_image + np.arange(self.per_image)).reshape(-1)
            copy = self._create(folder, (len(kept), *self.latents.shape[1:]))
            for start in range(0, len(kept), _ROWS_COPIED_AT_ONCE):
                copy.write(start, self.latents.read(kept[start : start + _ROWS_COPIED_AT_ONCE]))
        else:
            link_folder(self.folder / "latents", folder)
        with atomic_write(latent_files(folder)[1]) as file:
            np.save(file, np.repeat(self.source.labels[images], self.per_image))


class _Decoded(NamedTuple):
    """The pictures of a block of images."""

    block: range
    pixels: Tensor  # [images * per_image, H, W, 3] uint8; black where an image does not decode
    undecodable: list[int]  # indices of images
    unreadable: str  # the complaint about an image that cannot be read, which makes the rest worthless


@dataclass(frozen=True)
class _Pictures(TorchDataset):
    """A block, as the range of its images' indices -> what `_Decoded` has of it."""

    source: Dataset
    options: EncodeOptions
    at_work: Tensor
    """`[workers, 2]` int64 in shared memory: each worker's process id and its image, -1 for none."""

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
            self.at_work[worker.id] = torch.tensor([os.getpid(), index])

    def in_dead_hands(self) -> str:
        """The images that workers had in hand when they died."""
        time.sleep(0.5)  # the system closes the pipes of a process before it counts as dead
        alive = {process.pid for process in multiprocessing.active_children()}
        held = [index for process, index in self.at_work.tolist() if index >= 0 and process not in alive]
        return ", ".join(map(self.source.name, held))


def _decode(
    pictures: _Pictures, blocks: list[range], device: torch.device, asked_to_stop: Callable[[], int]
) -> Iterator[_Decoded]:
    """The blocks, decoded ahead by workers; ends early if these die of a signal that asks to stop."""
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
        for block, content in zip(blocks, decoded, strict=False):
            yield _Decoded(block, *content)
    except (EOFError, OSError, RuntimeError) as error:  # there is no type for it
        if loader.num_workers == 0 or str(error).startswith("Caught "):  # a bug, here or there
            raise
        if not asked_to_stop():
            reason = " ".join(str(error).split()) or type(error).__name__
            names = pictures.in_dead_hands()
            raise UserError(
                f"a process that decodes images is gone ({reason}){f', reading {names}' if names else ''}; "
                "lower hardware.workers or hardware.encode_batch, or allow more (shared) memory, and run "
                "again: what is done is kept"
            ) from None


def _ignore_ctrl_c(worker: int) -> None:
    """A terminal sends it to workers too. (SIGTERM is how a parent that exits ends those that are left.)"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _encode(
    blocks: Iterator[_Decoded], vae: Autoencoder, source: Dataset, options: EncodeOptions, batch_size: int
) -> Iterator[tuple[_Decoded, np.ndarray]]:
    """Blocks and their latents, float16 `[rows, C, h, w]`; the device computes the next block meanwhile.

    Rows that are not finite in bfloat16 are computed again in float32. Raises `UserError` if an image cannot
    be read, `FloatingPointError` if a latent is beyond float16.
    """

    def finished(decoded: _Decoded, latents: Tensor) -> tuple[_Decoded, np.ndarray]:
        latents = latents.cpu()
        if vae.precision != "float32" and not latents.isfinite().all():
            exact = _latents(decoded, vae.in_float32(), options, batch_size).cpu()
            latents = torch.where(latents.isfinite().flatten(1).all(1)[:, None, None, None], latents, exact)
        finite = latents.isfinite().flatten(1).all(1)
        if not finite.all():
            index = decoded.block[int(finite.int().argmin()) // options.view.per_image]
            raise FloatingPointError(
                f"{source.name(index)}: its latents are not finite in float16; "
                "are the weights of the VAE whole, and is it the VAE for these images?"
            )
        return decoded, latents.numpy()

    before: tuple[_Decoded, Tensor] | None = None
    for decoded in blocks:
        if decoded.unreadable:
            raise UserError(f"{decoded.unreadable}, what is done is kept")
        following = decoded, _latents(decoded, vae, options, batch_size)
        if before is not None:
            yield finished(*before)
        before = following
    if before is not None:
        yield finished(*before)


def _latents(decoded: _Decoded, vae: Autoencoder, options: EncodeOptions, batch_size: int) -> Tensor:
    """Float16 `[rows, C, h, w]`, which the VAE's device may still be computing."""
    parts = decoded.pixels.split(batch_size)
    if options.posterior == "mean":
        return torch.cat([vae.encode(part) for part in parts]).half()
    noise = torch.empty(len(decoded.pixels), *vae.latent_shape(options.image_size))
    keys = ((index, number) for index in decoded.block for number in range(options.view.per_image))
    for row, key in zip(noise, keys, strict=True):
        row.normal_(generator=torch_generator(options.seed, "encode/posterior", options.view.name, *key))
    noise = pinned(noise, vae.device).to(vae.device, non_blocking=True)
    return torch.cat([vae.encode(*both) for both in zip(parts, noise.split(batch_size), strict=True)]).half()


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
    if done and ranks.first:
        print(f"{what}: going on, {done} of {images} images are done", flush=True)
    log = ProgressLog(rows.folder / "logs.jsonl", steps=images, unit="img") if ranks.first else None
    with tqdm(total=images, initial=done, desc=what, unit="img", disable=not ranks.first) as bar:
        for turn in range(turns):
            for decoded, latents in islice(blocks, 1):
                rows.write(decoded.block, latents, decoded.undecodable)
            stop = ranks.highest([asked_to_stop()])[0]
            if log is not None:
                done = rows.done()
                bar.update(done - bar.n)
                log.reached(done, force=bool(stop) or turn == turns - 1)
            if stop:
                message = f"{what}: {signal.Signals(stop).name} after {done} of {images} images"
                raise Stopped(f"{message}; run it again to go on" if ranks.first else "", stop)
