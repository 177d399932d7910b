"""Images -> latents of one view: a loop that may be killed at any moment and shared by several processes.

Consecutive images form a block. The rows of a block are on the disk before its images are marked as done, and
the processes take in turns the blocks with images that are not, so whoever comes next goes on with what is
left. The result depends neither on the blocks nor on the processes, except for the rounding of the VAE's
convolutions in batches of another size.

Decoding, network and disk work at the same time: a DataLoader's workers decode the blocks to come, and a
block is stored while the device computes the next.
"""

import math
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
import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

from drift.autoencoders.kl import VAE
from drift.data.datasets import Dataset, first_few, refuse_or_leave_out
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
_ALONE = Ranks(0, 1, torch.device("cpu"))


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """What latents depend on, besides the images and the VAE."""

    view: View
    image_size: int
    posterior: str
    """`mean`, or `sample` for one draw."""
    seed: int
    on_bad_image: str
    """`error` or `skip`: what to do about images that do not decode, once all have been tried."""

    def __post_init__(self) -> None:
        one_of("posterior", self.posterior, "mean", "sample")
        one_of("on_bad_image", self.on_bad_image, "error", "skip")


def encode_view(
    source: Dataset,
    vae: VAE,
    folder: str | Path,
    options: EncodeOptions,
    ranks: Ranks = _ALONE,
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
    pictures = _Pictures(source, options, torch.full((workers, 2), -1).share_memory_())
    rows = _Rows(Path(folder), source, options.view.per_image)
    if ranks.first:
        rows.prepare(vae.latent_shape(options.image_size))
    ranks.barrier()
    marks = rows.marks.read()
    ranks.barrier()  # all have read the marks before one changes them
    size = max(1, batch_size // options.view.per_image)
    blocks = [range(start, min(start + size, len(marks))) for start in range(0, len(marks), size)]
    blocks = [block for block in blocks if (marks[block.start : block.stop] == _TO_DO).any()]
    decoded = _decode(pictures, blocks[ranks.rank :: ranks.world_size], vae.device, asked_to_stop)
    turns = math.ceil(len(blocks) / ranks.world_size)
    what = f"encode {options.view.name}"
    _store(_encode(vae, pictures, decoded, batch_size), rows, turns, ranks, asked_to_stop, what)
    left_out = _to_leave_out(source, rows.marks.read(), options.on_bad_image, show=ranks.first)
    export = Path(folder) / "export"
    if ranks.first:
        rows.export(export, left_out)
        meta = _image_facts(source, left_out) | _option_facts(options) | _network_facts(vae)
        write_json(latent_files(export)[2], meta | file_facts(export))
    ranks.barrier()
    return export


def _image_facts(source: Dataset, left_out: list[int]) -> dict[str, Any]:
    """For the meta file; alike for both values of `on_bad_image` if no image is left out."""
    return {
        "dataset": source.dataset,
        "dataset_split": source.split,
        "images": len(source),
        "images_sha256": source.digest,
        "skipped_images": {"count": len(left_out), "names": [source.name_in_split(i) for i in left_out]},
        "class_names": source.class_names,
        "num_classes": len(source.class_names),
    }


def _option_facts(options: EncodeOptions) -> dict[str, Any]:
    facts = {name: getattr(options, name) for name in ("image_size", "seed", "posterior")}
    return facts | {"view": options.view.name} | asdict(options.view)


def _network_facts(vae: VAE) -> dict[str, Any]:
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
class _Rows:
    """Files that the processes share: the latents and labels of all images, and the marks of those done."""

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

    def done(self) -> int:
        """How many images all processes are done with."""
        return int(np.count_nonzero(self.marks.read() != _TO_DO))

    def prepare(self, latent_shape: tuple[int, ...]) -> None:
        """Create the files, or take over those of an earlier run."""
        if self._marks.exists():
            marks = self.marks.read()
            marks[marks == _UNDECODABLE] = _TO_DO  # may have been repaired
        else:
            if self.source.passed_over:
                print(self.source.passed_over, flush=True)
            latents_path, labels_path, _ = latent_files(self.folder / "latents")
            shutil.rmtree(latents_path.parent, ignore_errors=True)  # not overwritten: a result may share them
            latents_path.parent.mkdir(parents=True)
            marks = np.full(len(self.source), _TO_DO, np.uint8)
            self._create(latents_path, (len(marks) * self.per_image, *latent_shape))
            _save(labels_path, np.repeat(self.source.labels, self.per_image))
        _save(self._marks, marks)  # after the others, for which it vouches

    def _create(self, path: Path, shape: tuple[int, ...]) -> RowFile:
        """A file for float16 numbers; raises `UserError` if the disk has no room for them."""
        needed, free = 2 * math.prod(shape), shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"{self.folder}: the latents need {needed / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} "
                "GiB free; make room or move the work folder (DRIFT_WORK_DIR)"
            )
        return RowFile.create(path, np.float16, shape)

    def write(self, block: range, latents: np.ndarray, undecodable: list[int]) -> None:
        """Store the rows of a block, `[images * per_image, C, h, w]`, and mark its images."""
        marks = np.full(len(block), _DONE, np.uint8)
        marks[[block.index(index) for index in undecodable]] = _UNDECODABLE
        self.latents.write(block.start * self.per_image, latents)
        self.marks.write(block.start, marks)

    def export(self, folder: Path, left_out: list[int]) -> None:
        """Make a folder of the files by second names or, where images are left out, of copies without them.

        So the rows stay where a run that is started again looks for them.
        """
        if not left_out:
            link_folder(self.folder / "latents", folder)
            return
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        latents_path, labels_path, _ = latent_files(folder)
        images = np.delete(np.arange(len(self.source)), left_out)
        kept = (images[:, None] * self.per_image + np.arange(self.per_image)).reshape(-1)
        copy = self._create(latents_path, (len(kept), *self.latents.shape[1:]))
        for start in range(0, len(kept), _ROWS_COPIED_AT_ONCE):
            copy.write(start, self.latents.read(kept[start : start + _ROWS_COPIED_AT_ONCE]))
        _save(labels_path, np.repeat(self.source.labels[images], self.per_image))


def _save(path: Path, array: np.ndarray) -> None:
    with atomic_write(path) as file:
        np.save(file, array)


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
            made = view.pictures(image, size, partial(numpy_generator, seed, "encode/crop", index))
            for number, picture in enumerate(made):
                stored[number] = picture
        self._note(-1)
        return pixels.flatten(0, 1), undecodable, unreadable

    def _note(self, index: int) -> None:
        if (worker := get_worker_info()) is not None:
            self.at_work[worker.id] = torch.tensor([os.getpid(), index])

    def in_dead_hands(self) -> str:
        """The images that workers had in hand when they died."""
        for _ in range(50):  # the system closes the pipes of a process before it counts as dead
            time.sleep(0.02)
            held = [
                self.source.name(i) for process, i in self.at_work.tolist() if i >= 0 and _is_dead(process)
            ]
            if held:
                break
        return ", ".join(held)


def _is_dead(process: int) -> bool:
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


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
    vae: VAE, pictures: _Pictures, blocks: Iterator[_Decoded], batch_size: int
) -> Iterator[tuple[_Decoded, np.ndarray]]:
    """Blocks and their latents, float16 `[rows, C, h, w]`; the device computes the next meanwhile.

    Rows that are not finite in bfloat16 are computed again in float32. Raises `UserError` if an image cannot
    be read, `FloatingPointError` if a latent is beyond float16.
    """

    def finished(decoded: _Decoded, latents: Tensor) -> tuple[_Decoded, np.ndarray]:
        latents = latents.cpu()
        finite = latents.isfinite().all(-1).all(-1).all(-1)[:, None, None, None]
        if not finite.all() and vae.precision != "float32":
            exact = _latents(vae.in_float32(), pictures.options, decoded, batch_size).cpu()
            latents = torch.where(finite, latents, exact)
            finite = latents.isfinite().all(-1).all(-1).all(-1)
        if not finite.all():
            row = int(finite.flatten().int().argmin())
            name = pictures.source.name(decoded.block[row // pictures.options.view.per_image])
            raise FloatingPointError(
                f"{name}: its latents are not finite in float16; "
                "are the weights of the VAE whole, and is it the VAE for these images?"
            )
        return decoded, latents.numpy()

    before: tuple[_Decoded, Tensor] | None = None
    for decoded in blocks:
        if decoded.unreadable:
            raise UserError(f"{decoded.unreadable}, what is done is kept")
        latents = _latents(vae, pictures.options, decoded, batch_size)
        if before is not None:
            yield finished(*before)
        before = decoded, latents
    if before is not None:
        yield finished(*before)


def _latents(vae: VAE, options: EncodeOptions, decoded: _Decoded, batch_size: int) -> Tensor:
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


def _to_leave_out(source: Dataset, marks: np.ndarray, on_bad_image: str, show: bool) -> list[int]:
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
    remark = (
        "; the meta file lists all. fid leaves out those of other splits (drift fid-selftest names them now)"
    )
    refuse_or_leave_out(source, bad, on_bad_image, remark, show=show)
    return bad
