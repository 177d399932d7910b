"""One evaluation of a generator: what the stage fid opens, measures and draws."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

import drift
from drift.data.datasets import Dataset, class_difference
from drift.evaluation.measurement import Measurement
from drift.evaluation.reference import Reference, measure_images, require_enough, self_test
from drift.evaluation.sample import ImageDecoder
from drift.evaluation.sweep import Entry, Sweep
from drift.models.base import model_files
from drift.models.ema import ema_variant
from drift.models.generator import CLASSES_FILE, Generator, read_class_names
from drift.runtime.errors import UserError
from drift.runtime.files import sha256
from drift.runtime.processes import Ranks
from drift.runtime.progress import ProgressLog
from drift.runtime.work import SETTINGS_FILE, settings_in_force
from drift.runtime.yaml_files import read_yaml
from drift.settings import Drift, Settings

PACKAGES = ("clean-fid", "diffusers", "numpy", "pillow", "scipy", "torch", "torchvision")


class Copies:
    """The EMA copies of the generator in a folder; if the drift stage did not write it, one copy: `None`."""

    def __init__(self, folder: Path, wanted: tuple[float, ...]):
        """Raises `UserError` if one of the `wanted` copies is missing or damaged."""
        settings = folder / SETTINGS_FILE
        self.folder = folder
        self.made_by = read_yaml(settings, "fetch it again (dvc pull)") if settings.is_file() else None
        """What the settings file says."""
        trained = None
        if self.made_by:
            trained = settings_in_force(self.made_by)["drift"].get("ema_decays", list(Drift().ema_decays))
        self._variants: dict[float | None, str | None] = {None: None}
        if trained:
            self._variants = {decay: ema_variant(trained, decay) for decay in wanted}
        self.decays = tuple(self._variants)
        self._cached = lru_cache(maxsize=1)(self._read)
        for decay in reversed(self.decays):
            self.load(decay)

    def _read(self, decay: float | None) -> Generator:
        return Generator.from_pretrained(self.folder, variant=self._variants[decay])

    def load(self, decay: float | None, device: str | torch.device = "cpu") -> Generator:
        """The copy of one of the `decays`; the last one stays in memory."""
        generator = self._cached(decay)
        nn.Module.to(generator, device)  # diffusers' own has no types
        return generator

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


class Evaluation(Measurement):
    """A generator's folder beside what measures it."""

    def __init__(self, settings: Settings, generator: Path):
        """Raises `UserError` for everything that can be known to fail before the work."""
        fid = settings.fid
        self.copies = Copies(generator, fid.ema_decays)
        sizes = self.copies.load(self.copies.decays[0]).config
        made = (sizes["in_channels"], sizes["input_size"], sizes["input_size"])
        super().__init__(settings, generator, made)
        self.copies.require_classes(self.training)
        self.floor_images = min(fid.floor_images, len(self.training))
        if self.floor_images:
            what = "real training images (fid.floor_images; 0 takes none)"
            require_enough(self.floor_images, self.network, what)
        if "inception_score" in fid.metrics and self.network.classify is None:
            raise UserError(
                f"fid.metrics has inception_score, but {fid.features} does not classify; leave it out"
            )

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

    def run(self, work: Path, ranks: Ranks) -> Evaluated | None:
        """Measure and draw, or go on from what `work` has; None on all processes but the first."""
        settings, fid = self.settings, self.settings.fid
        decode = self.decoder(ranks)
        load = partial(self.copies.load, device=ranks.device)
        decays, of_reference = self.copies.decays, len(self.reference_images or ())
        real = of_reference + self.floor_images
        total = real + len(decays) * len(fid.omegas) * fid.images
        with _progress(work / "logs.jsonl", total, ranks.first) as reached:
            reference = self.reference(ranks, reached)
            tested = self_test(reference, settings.seed) if ranks.first else {}
            training = None
            if self.floor_images:
                after = lambda images: reached(of_reference + images)  # noqa: E731
                part = {"images": self.floor_images, "ranks": ranks, "on_images": after}
                training = measure_images(self.training, self.network, settings, **part)
            pictures = self._draw(load(decays[0]), decode) if ranks.first else None
            sweep = Sweep(settings, self.labels, decays, load, decode, self.network, reference, ranks)
            entries = sweep.run(work, lambda images: reached(real + images))
        self.vae.tell_recomputed()
        if pictures is None:
            return None
        return Evaluated(self._described(entries, reference, training, tested), *pictures)

    def _draw(self, generator: Generator, decode: ImageDecoder) -> tuple[Image.Image, Image.Image]:
        """Columns of different noise; columns of omegas."""
        fid = self.settings.fid
        noises = [(column, fid.picture_omega) for column in range(fid.picture_columns)]
        strengths, heads = [(0, omega) for omega in fid.omegas], [f"omega {o:g}" for o in fid.omegas]
        return self.grid(generator, decode, noises), self.grid(generator, decode, strengths, heads)

    def _described(
        self, entries: list[Entry], reference: Reference, training: Reference | None, tested: dict[str, Any]
    ) -> dict[str, Any]:
        settings, fid, made_by = self.settings, self.settings.fid, self.copies.made_by
        return {
            "best": min(entries, key=lambda entry: entry["fid"]),
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
                "device": self.network.device.type,
                "vae": settings.encode.autoencoder.id,
                "vae_precision": fid.precision,
                "vae_sha256": self.vae.digest,
                "latent_scale_factor": self.vae.scaling_factor,
                "generator": made_by["how"] if made_by else None,
                "generator_folder": str(self.copies.folder),
                "generator_sha256": self.copies.digests,
                "versions": {"drift": drift.__version__} | {name: version(name) for name in PACKAGES},
            },
        }


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
