"""Samples of a generator: sample i is a function of (seed, i) and omega alone.

Noise and style indices of sample i come from its own generator on the CPU; its label is number i of a list.
So batch size, number of processes and device do not change what is drawn, and a sweep over omega guides the
same noise with another strength. Networks see batches of one shape, so batch size and number of processes do
not change a pixel either.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from drift.autoencoders import Autoencoder
from drift.data.datasets import open_images
from drift.data.levels import Rounding, to_uint8
from drift.evaluation.batches import in_batches
from drift.models.generator import Generator
from drift.runtime.seeds import numpy_generator, torch_generator
from drift.settings import Settings


def sample_generator(seed: int, index: int) -> torch.Generator:
    """The random generator of sample number `index`, on the CPU."""
    return torch_generator(seed, "fid/sample", index)


def draw_sample(config: Mapping[str, Any], generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """What a generator network with `config` turns into one sample, beside its label.

    Returns noise `[C, H, W]` and style indices `[S]`, uniform in each codebook, on the device of the random
    `generator` (None is PyTorch's own).
    """
    device = None if generator is None else generator.device
    shape = (config["in_channels"], config["input_size"], config["input_size"])
    noise = torch.randn(shape, generator=generator, device=device)
    entries, codebooks = config["style_entries"], config["style_codebooks"]
    return noise, torch.randint(entries, (codebooks,), generator=generator, device=device)


def draw_inputs(
    indices: Sequence[int],
    config: Mapping[str, Any],
    seed: int,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor]:
    """Noise `[B, C, H, W]` and style indices `[B, S]` of the samples `indices`."""
    noise, style = zip(
        *(draw_sample(config, sample_generator(seed, index)) for index in indices), strict=True
    )
    return torch.stack(noise).to(device), torch.stack(style).to(device)


def sample_labels(settings: Settings) -> np.ndarray:
    """The labels `[fid.images]` of the samples, as `fid.labels` has them.

    `balanced`: in turn. `random`: uniform and independent, as the Sinkhorn paper's code draws them. A split:
    those of its images in a random order, each image once before any comes again; the split itself has them
    sorted, so its first ones would be of few classes.
    """
    fid, data = settings.fid, settings.data
    rng = numpy_generator(settings.seed, "fid/labels")
    if fid.labels == "balanced":
        return np.arange(fid.images) % data.classes
    if fid.labels == "random":
        return rng.integers(data.classes, size=fid.images)
    labels = open_images(data.dataset, data.root, fid.labels, data.classes).labels
    assert labels is not None
    return labels[np.resize(rng.permutation(len(labels)), fid.images)]


@torch.no_grad()  # and no inference mode, in which hooks that move the network to its device would fail
def sample_latents(
    generator: Generator, noise: Tensor, labels: Tensor, style_indices: Tensor, omega: float | Tensor
) -> Tensor:
    """Latents `[B, C, H, W]` at CFG strength `omega`, one for all or `[B]`; noise etc. as of `draw_inputs`.

    Raises `FloatingPointError` if a latent is not finite, which rounding to 8 bits would hide.
    """
    strength = torch.as_tensor(omega, dtype=noise.dtype, device=noise.device).expand(len(noise))
    latents = in_batches(generator, noise, labels, strength, style_indices)
    if not latents.isfinite().all():
        values = ", ".join(f"{value:g}" for value in strength.unique().tolist())
        raise FloatingPointError(f"the generator's latents at omega {values} are not finite")
    return latents


class ImageDecoder:
    """Latents `[B, C, H, W]` -> 8-bit images `[B, H, W, 3]` on the CPU, exactly as a PNG would hold them.

    The VAE always decodes `batch_size` at once, and half as many from then on whenever the device runs out of
    memory (a few pixels may then differ by one level, as the rounding changes). Images that are not finite in
    bfloat16 are decoded again in float32; raises `FloatingPointError` if they are not finite then either.
    """

    def __init__(self, vae: Autoencoder, batch_size: int, rounding: Rounding = "nearest"):
        self.vae, self.batch_size = vae, batch_size
        self.rounding: Rounding = rounding

    @torch.inference_mode()
    def __call__(self, latents: Tensor) -> Tensor:
        images: list[Tensor] = []
        done = 0
        while done < len(latents):
            part = latents[done : done + self.batch_size]
            if (decoded := self._decode(part)) is None:
                self._halve()
            else:
                images.append(decoded)
                done += len(part)
        return torch.cat(images)

    def _decode(self, latents: Tensor) -> Tensor | None:
        """None if the device has run out of memory; only outside this `except` can its tensors be freed."""
        try:
            images, finite = self._images(self.vae, latents)
            if not finite.all() and self.vae.precision != "float32":
                overflown = ~finite
                images[overflown], finite[overflown] = self._images(
                    self.vae.in_float32(), latents[overflown.to(latents.device)]
                )
        except torch.OutOfMemoryError:
            if self.batch_size == 1:
                raise
            return None
        if not finite.all():
            raise FloatingPointError(
                "the VAE's images are not finite; are its weights whole, and is it the VAE for these latents?"
            )
        return images

    def _images(self, vae: Autoencoder, latents: Tensor) -> tuple[Tensor, Tensor]:
        """8-bit images `[B, H, W, 3]`, and whether each was finite before it was rounded, `[B]`."""
        decoded = in_batches(vae.decode, latents, size=self.batch_size)
        finite = decoded.isfinite().flatten(1).all(1)
        return to_uint8(decoded, self.rounding).cpu(), finite.cpu()

    def _halve(self) -> None:
        before, self.batch_size = self.batch_size, self.batch_size // 2
        tqdm.write(
            f"the VAE ran out of memory with {before} images at once: {self.batch_size} from now on "
            f"(to start with as many, set hardware.decode_batch: {self.batch_size})"
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
