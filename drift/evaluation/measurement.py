"""What settings name for measuring a generator: VAE, feature network, reference, labels, pictures."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from PIL import Image

from drift.data.datasets import open_images
from drift.evaluation.networks import load_feature_network
from drift.evaluation.pictures import draw_images, image_grid, visible_scale
from drift.evaluation.reference import (
    Reference,
    load_statistics,
    measure_images,
    open_reference,
    require_enough,
)
from drift.evaluation.sample import ImageDecoder, sample_labels
from drift.models.generator import Generator
from drift.runtime.errors import UserError
from drift.runtime.processes import Ranks
from drift.runtime.seeds import numpy_generator
from drift.settings import Settings
from drift.training.compile import Compiled


class Measurement:
    """The section `fid` of the settings: opened and checked before any process is started."""

    def __init__(
        self,
        settings: Settings,
        source: Path,
        made: tuple[int, ...],
        images_setting: str = "fid.images",
    ):
        """The generator makes latents of the shape `made` (C, h, w), which are those of `source`.

        `images_setting` is where `settings.fid.images` comes from. Raises `UserError` for everything that can
        be known to fail before the work.
        """
        data, encode, fid = settings.data, settings.encode, settings.fid
        self.settings = settings
        self.vae = encode.autoencoder.load(fid.precision)
        if made != (wanted := self.vae.latent_shape(data.image_size)):
            raise UserError(
                f"{source}: its latents are {list(made)}, but those of {self.vae.id} (encode.autoencoder) at "
                f"data.image_size {data.image_size} are {list(wanted)}; correct the settings"
            )
        self.training = open_images(data.dataset, data.root, "train", data.classes)
        self.reference_images = open_reference(fid.reference, data.dataset, data.root, data.classes)
        self.labels = sample_labels(settings)
        self.network = load_feature_network(fid, workers=settings.hardware.workers)
        require_enough(fid.images, self.network, f"generated images per omega ({images_setting})")

    def decoder(self, ranks: Ranks) -> ImageDecoder:
        """Move the networks to the device of a process; returns the VAE's decoder there."""
        fid, hardware = self.settings.fid, self.settings.hardware
        if ranks.device != self.network.device:
            self.network = load_feature_network(fid, ranks.device, hardware.workers)
        if hardware.compile and ranks.device.type == "cuda":
            self.vae.compile_with(Compiled)
        return ImageDecoder(self.vae.to(ranks.device), hardware.decode_batch, fid.rounding)

    def reference(self, ranks: Ranks, on_images: Callable[[int], None] = lambda images: None) -> Reference:
        """What generated images are compared with, measured if that has not been done."""
        images = self.reference_images
        if images is None:
            return load_statistics(self.settings.fid.reference, self.network.dimension, self.network.digest)
        return measure_images(images, self.network, self.settings, ranks=ranks, on_images=on_images)

    @cached_property
    def picture_classes(self) -> list[int]:
        """The classes of pictures, drawn at random, ascending."""
        drawn = numpy_generator(self.settings.seed, "fid/pictures").permutation(self.settings.data.classes)
        return sorted(drawn[: self.settings.fid.picture_classes].tolist())

    def grid(
        self,
        generator: Generator,
        decode: ImageDecoder,
        columns: Sequence[tuple[int, float]],
        heads: Sequence[str] | None = None,
    ) -> Image.Image:
        """A row for each of the picture's classes; a column is (number of the sample, omega)."""
        seed, batch_size = self.settings.seed, self.settings.hardware.sample_batch
        wanted = [(label, *column) for label in self.picture_classes for column in columns]
        images = draw_images(generator, decode, wanted, seed, batch_size)
        names = [self.training.class_names[label] for label in self.picture_classes]
        scale = visible_scale(images.shape[1])
        return image_grid(images, len(columns), scale=scale, row_labels=names, column_labels=heads)
