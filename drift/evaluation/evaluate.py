"""One evaluation of a generator: what the stage fid opens, measures and draws."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import drift
from drift.data.datasets import Dataset, class_difference, open_images
from drift.evaluation.networks import FeatureNetwork, load_feature_network
from drift.evaluation.pictures import VISIBLE_SIDE, draw_images, image_grid
from drift.evaluation.reference import (
    Reading,
    Reference,
    load_statistics,
    measure_images,
    open_reference,
    require_enough,
    self_test,
)
from drift.evaluation.sample import ImageDecoder, Samples, balanced_labels, random_labels, split_labels
from drift.evaluation.sweep import Entry, Sweep, Tools, best_entry, check_metrics, evaluate_sweep
from drift.models.base import model_files
from drift.models.ema import ema_variant
from drift.models.generator import CLASSES_FILE, Generator, read_class_names
from drift.runtime.errors import UserError
from drift.runtime.files import sha256
from drift.runtime.processes import Ranks
from drift.runtime.progress import ProgressLog
from drift.runtime.seeds import numpy_generator
from drift.runtime.work import SETTINGS_FILE, settings_in_force, work_root
from drift.runtime.yaml_files import read_yaml
from drift.settings import Drift, Settings
from drift.training.compile import Compiled

PACKAGES = ("clean-fid", "diffusers", "numpy", "pillow", "scipy", "torch", "torchvision")


class Copies:
    """The EMA copies of the generator in a folder; one that no stage of ours has made has one, `None`."""

    def __init__(self, folder: Path, wanted: tuple[float, ...]):
        """Raises `UserError` if one of the `wanted` copies is missing or damaged."""
        settings = folder / SETTINGS_FILE
        self.folder = folder
        self.made_by = read_yaml(settings, "fetch it again (dvc pull)") if settings.is_file() else None
        """What the settings file says."""
        trained = None
        if self.made_by:
            trained = settings_in_force(self.made_by)["drift"].get("ema_decays", list(Drift().ema_decays))
        self.decays: tuple[float | None, ...] = wanted if trained else (None,)
        self._variants = {d: ema_variant(trained, d) if trained else None for d in self.decays}
        self.load = lru_cache(maxsize=1)(self._load)
        for decay in reversed(self.decays):
            self.load(decay)

    def _load(self, decay: float | None) -> Generator:
        return Generator.from_pretrained(self.folder, variant=self._variants[decay])

    @property
    def digests(self) -> list[str]:
        """SHA-256 of the config and of each copy's weights."""
        paths = [path for d in self.decays for path in model_files(self.folder, self._variants[d])]
        return [sha256(path) for path in dict.fromkeys(paths)]

    def require_classes(self, training: Dataset) -> None:
        """Raise `UserError` if the labels mean other classes than those of the data, as far as is known."""
        names = read_class_names(self.folder)
        if names is None or names == [str(label) for label in range(len(names))]:  # of latents without names
            return
        of = str(self.folder / CLASSES_FILE)
        if difference := class_difference(of, names, "the data", training.class_names):
            raise UserError(
                f"{difference}; take the data that it was trained on, or remove {CLASSES_FILE} if its labels "
                "are those of the data all the same"
            )


class Evaluated(NamedTuple):
    measured: dict[str, Any]
    """All numbers, and how they were measured: see docs/protocol.md."""
    samples: Image.Image
    """A row per class, the same noise in every row of a column."""
    omegas: Image.Image
    """A row per class, a column per CFG strength, the same noise in all."""


class Evaluation:
    """A generator, the settings, and what they name: opened and checked before any process is started."""

    def __init__(self, settings: Settings, generator: Path):
        """Raises `UserError` for everything that can be known to fail before the work."""
        data, encode, fid = settings.data, settings.encode, settings.fid
        self.settings = settings
        self.copies = Copies(generator, fid.ema_decays)
        self.vae = encode.autoencoder.load(fid.precision)
        self.training = open_images(data.dataset, data.root, "train", data.classes)
        self.copies.require_classes(self.training)
        self.reference_images = open_reference(fid.reference, data.dataset, data.root, data.classes)
        self.labels = _labels(settings)
        self.floor_images = min(fid.floor_images, len(self.training))
        self.network = self._load_network("cpu")
        require_enough(fid.images, self.network, "generated images per omega (fid.images)")
        if self.floor_images:
            what = "real training images (fid.floor_images; 0 takes none)"
            require_enough(self.floor_images, self.network, what)
        check_metrics(fid.metrics, self.network, self.reference_images is not None)

    def _load_network(self, device: str | torch.device) -> FeatureNetwork:
        fid = self.settings.fid
        return load_feature_network(
            fid.features, fid.mode, device, self.settings.hardware.workers, fid.inception
        )

    def enter(self, ranks: Ranks) -> None:
        """Move the networks to the device of one of the processes."""
        fid, hardware, self.ranks = self.settings.fid, self.settings.hardware, ranks
        if ranks.device != self.network.device:
            self.network = self._load_network(ranks.device)
        if hardware.compile and ranks.device.type == "cuda":
            self.vae.compile_with(Compiled)
        self.decode = ImageDecoder(self.vae.to(ranks.device), hardware.decode_batch, fid.rounding)
        on_device = lambda decay: self.copies.load(decay).to(ranks.device).eval()  # noqa: E731
        self.load: Callable[[float | None], Generator] = lru_cache(maxsize=1)(on_device)

    @property
    def decides(self) -> dict[str, Any]:
        """Everything that the numbers depend on."""
        settings, images = self.settings, self.reference_images
        return {
            "seed": settings.seed,
            "data": settings.data.model_dump(mode="json"),
            "fid": settings.fid.model_dump(mode="json"),
            "generator": self.copies.digests,
            "vae": self.vae.digest,
            "features": self.network.digest,
            "images": self.training.digest,
            "reference": sha256(settings.fid.reference) if images is None else images.digest,
        }

    def run(self, work: Path) -> Evaluated | None:
        """Measure and draw, or go on from what `work` has; None on all processes but the first."""
        settings, fid, ranks, decays = self.settings, self.settings.fid, self.ranks, self.copies.decays
        of_reference = 0 if self.reference_images is None else len(self.reference_images)
        real = of_reference + self.floor_images
        total = real + len(decays) * len(fid.omegas) * fid.images
        with _progress(work / "logs.jsonl", total, ranks.first) as reached:
            reference = self._reference(reached)
            tested = self_test(reference, settings.seed) if ranks.first else {}
            training = None
            if self.floor_images:
                after = lambda images: reached(of_reference + images)  # noqa: E731
                training = self._measure(self.training, after, self.floor_images)
            pictures = self._draw(self.load(decays[0])) if ranks.first else ()
            samples = Samples(self.labels, settings.seed, settings.hardware.sample_batch, ranks.device)
            sweep = Sweep(samples, fid.omegas, decays, fid.metrics, fid.precision_recall_images)
            folder = settings.hardware.png_folder
            entries = evaluate_sweep(
                sweep,
                Tools(self.load, self.decode, self.network, reference),
                work,
                png=None if folder is None else Path(folder),
                ranks=ranks,
                on_images=lambda images: reached(real + images),
            )
        self.vae.tell_recomputed()
        if not ranks.first:
            return None
        return Evaluated(self._described(entries, reference, training, tested), *pictures)

    def _reference(self, reached: Callable[[int], None]) -> Reference:
        if self.reference_images is None:
            return load_statistics(self.settings.fid.reference, self.network.dimension, self.network.digest)
        return self._measure(self.reference_images, reached)

    def _measure(
        self, source: Dataset, reached: Callable[[int], None], images: int | None = None
    ) -> Reference:
        cache, reading = work_root() / "reference", Reading.of(self.settings)
        options = {"images": images, "ranks": self.ranks, "on_images": reached}
        return measure_images(source, self.network, cache, reading, **options)

    def _draw(self, generator: Generator) -> tuple[Image.Image, Image.Image]:
        """Rows of random classes: columns of different noise; columns of omegas."""
        fid, seed, batch = self.settings.fid, self.settings.seed, self.settings.hardware.sample_batch
        drawn = numpy_generator(seed, "fid/pictures").permutation(self.settings.data.classes)
        classes = sorted(drawn[: fid.picture_classes].tolist())
        names, grids = [self.training.class_names[label] for label in classes], []
        for columns, heads in (
            ([(column, fid.picture_omega) for column in range(fid.picture_columns)], None),
            ([(0, omega) for omega in fid.omegas], [f"omega {omega:g}" for omega in fid.omegas]),
        ):
            wanted = [(label, *column) for label in classes for column in columns]
            images = draw_images(generator, self.decode, wanted, seed, batch)
            scale = -(-VISIBLE_SIDE // images.shape[1])
            options = {"scale": scale, "row_labels": names, "column_labels": heads}
            grids.append(image_grid(images, len(columns), **options))
        return grids[0], grids[1]

    def _described(
        self, entries: list[Entry], reference: Reference, training: Reference | None, tested: dict[str, Any]
    ) -> dict[str, Any]:
        settings, fid, made_by = self.settings, self.settings.fid, self.copies.made_by
        return {
            "best": best_entry(entries),
            "sweep": entries,
            "floor": tested["halves"],
            "training": training and training.statistics.distance(reference.statistics),
            "images": fid.images,
            "classifier_accuracy_real": reference.statistics.accuracy,
            "self_test": tested,
            "protocol": {
                "image_size": settings.data.image_size,
                "labels": fid.labels,
                "rounding": fid.rounding,
                "features": fid.features,
                "features_sha256": self.network.digest,
                "published_weights": self.network.published,
                "mode": fid.mode,
                "reference": fid.reference,
                "reference_digest": reference.digest,
                "reference_images": reference.statistics.count,
                "floor_images": training.statistics.count if training else 0,
                "precision_recall_images": fid.precision_recall_images,
                "seed": settings.seed,
                "device": self.ranks.device.type,
                "vae": settings.encode.autoencoder.source,
                "vae_precision": fid.precision,
                "vae_sha256": self.vae.digest,
                "latent_scale_factor": self.vae.scaling_factor,
                "generator": made_by["how"] if made_by else None,
                "generator_folder": str(self.copies.folder),
                "generator_sha256": self.copies.digests,
                "versions": {"drift": drift.__version__} | {name: version(name) for name in PACKAGES},
            },
        }


def _labels(settings: Settings) -> np.ndarray:
    fid, data, seed = settings.fid, settings.data, settings.seed
    if fid.labels == "balanced":
        return balanced_labels(fid.images, data.classes)
    if fid.labels == "random":
        return random_labels(fid.images, data.classes, seed)
    return split_labels(
        open_images(data.dataset, data.root, fid.labels, data.classes).labels, fid.images, seed
    )


@contextmanager
def _progress(path: Path, total: int, first: bool) -> Iterator[Callable[[int], None]]:
    """What receives how many of `total` images are measured: a progress bar and `logs.jsonl`."""
    with tqdm(total=total, desc="fid", unit="image", disable=not first, mininterval=1.0) as bar:
        log = ProgressLog(path, steps=total, unit="img") if first else None

        def reached(images: int) -> None:
            if log is not None:
                bar.update(images - bar.n)
                log.reached(images, force=images == total)

        yield reached
