"""Samples of a generator: sample i is a function of (seed, i) and omega alone.

Noise and style indices of sample i come from its own generator on the CPU; its label is number i of a list.
So batch size, number of processes and device do not change what is drawn, and a sweep over omega guides the
same noise with another strength. Networks see batches of one shape, so batch size and number of processes do
not change a pixel either.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor
from tqdm import tqdm

from drift.autoencoders import Autoencoder
from drift.autoencoders.kl import Rounding, to_uint8
from drift.evaluation.batches import in_batches
from drift.models.generator import Generator
from drift.runtime.seeds import numpy_generator, torch_generator


def sample_generator(seed: int, index: int) -> torch.Generator:
    """The random generator of sample number `index`, on the CPU."""
    return torch_generator(seed, "fid/sample", index)


def draw_sample(config: FrozenDict, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """What a generator network with `config` turns into one sample, beside its label.

    Returns noise `[C, H, W]` and style indices `[S]`, uniform in each codebook, on the device of the random
    `generator` (None is PyTorch's own).
    """
    device = None if generator is None else generator.device
    shape = (config.in_channels, config.input_size, config.input_size)
    noise = torch.randn(shape, generator=generator, device=device)
    return noise, torch.randint(
        config.style_entries, (config.style_codebooks,), generator=generator, device=device
    )


def draw_inputs(
    indices: Sequence[int],
    config: FrozenDict,
    seed: int,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor]:
    """Noise `[B, C, H, W]` and style indices `[B, S]` of the samples `indices`."""
    noise, style = zip(
        *(draw_sample(config, sample_generator(seed, index)) for index in indices), strict=True
    )
    return torch.stack(noise).to(device), torch.stack(style).to(device)


def balanced_labels(count: int, classes: int) -> np.ndarray:
    """Labels `[count]` in turn: label i is i modulo the number of classes."""
    return np.arange(count) % classes


def random_labels(count: int, classes: int, seed: int) -> np.ndarray:
    """Labels `[count]`, uniform and independent, as the Sinkhorn paper's code draws them."""
    return numpy_generator(seed, "fid/labels").integers(classes, size=count)


def split_labels(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Labels `[count]` of a split's images in a random order: each image once before any comes again.

    The split's own `labels [N]` are sorted, so the first of them would cover few classes.
    """
    order = numpy_generator(seed, "fid/labels").permutation(len(labels))
    return labels[np.resize(order, count)]


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
        raise FloatingPointError(f"the generator's latents at omega {omega} are not finite")
    return latents


class ImageDecoder:
    """Latents `[B, C, H, W]` -> 8-bit images `[B, H, W, 3]` on the CPU, exactly as a PNG would hold them.

    The VAE always decodes `batch_size` at once, and half as many from then on whenever the device runs out of
    memory (a few pixels may then differ by one level, as the rounding changes). Images that are not finite in
    bfloat16 are decoded again in float32; raises `FloatingPointError` if they are not finite then either.
    """

    def __init__(self, vae: Autoencoder, batch_size: int, rounding: Rounding = "nearest"):
        self.vae, self.batch_size, self.rounding = vae, batch_size, rounding

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


@dataclass(frozen=True)
class Samples:
    """Which samples are drawn, and how many at once."""

    labels: np.ndarray
    """`[N]`, the label of every sample."""
    seed: int
    batch_size: int
    """Generated and decoded at once, per process; changes no number."""
    device: str | torch.device = "cpu"

    def __len__(self) -> int:
        return len(self.labels)

    def images(
        self, generator: Generator, decode: ImageDecoder, indices: Sequence[int], omega: float
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """Yields (indices, uint8 images `[B, H, W, 3]` on the CPU), at most `batch_size` at once."""
        for start in range(0, len(indices), self.batch_size):
            batch = indices[start : start + self.batch_size]
            noise, style_indices = draw_inputs(batch, generator.config, self.seed, self.device)
            labels = torch.tensor([int(self.labels[index]) for index in batch], device=self.device)
            yield batch, decode(sample_latents(generator, noise, labels, style_indices, omega))
