"""Samples of a generator: sample i is a function of (seed, i) and omega alone.

Noise and style indices of sample i come from its own generator on the CPU, its label is i modulo the number
of classes. So batch size, number of processes and device do not change what is drawn, and a sweep over
omega guides the same noise with another strength.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from drift.models.generator import Generator, GeneratorConfig
from drift.models.vae import VAE, to_uint8
from drift.seeds import torch_generator


def draw_inputs(
    indices: Sequence[int],
    config: GeneratorConfig,
    seed: int,
    classes: int,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """What a generator with `config` turns into the samples `indices`.

    Returns noise `[B, C, H, W]`, labels `[B]` and style indices `[B, S]`, uniform in each codebook.
    """
    noise, style = [], []
    for index in indices:
        generator = torch_generator(seed, "fid/sample", index)
        noise.append(
            torch.randn(config.in_channels, config.input_size, config.input_size, generator=generator)
        )
        style.append(torch.randint(config.style_entries, (config.style_codebooks,), generator=generator))
    labels = torch.tensor([index % classes for index in indices])
    return torch.stack(noise).to(device), labels.to(device), torch.stack(style).to(device)


@torch.inference_mode()
def sample_latents(
    generator: Generator, noise: Tensor, labels: Tensor, style_indices: Tensor, omega: float
) -> Tensor:
    """Latents `[B, C, H, W]` at CFG strength `omega`; the other arguments as `draw_inputs` returns them.

    Raises `FloatingPointError` if a latent is not finite, which rounding to 8 bits would hide.
    """
    strength = torch.full((len(noise),), omega, device=noise.device)
    latents = generator(noise, labels, strength, style_indices)
    if not latents.isfinite().all():
        raise FloatingPointError(f"the generator's latents at omega {omega:g} are not finite")
    return latents


@torch.inference_mode()
def decode_images(vae: VAE, latents: Tensor) -> Tensor:
    """Latents `[B, C, H, W]` -> 8-bit images `[B, H, W, 3]` on the CPU, as a PNG would hold them."""
    return to_uint8(vae.decode(latents)).cpu()


def sample_images(
    generator: Generator,
    vae: VAE,
    indices: Sequence[int],
    omega: float,
    seed: int,
    batch_size: int,
    *,
    classes: int,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Sequence[int], Tensor, Tensor]]:
    """Yields (indices, labels `[B]`, uint8 images `[B, H, W, 3]`), on the CPU, at most `batch_size` at once.

    Of `indices`, rank r makes `indices[r::world_size]`; the first rank shows the progress.
    """
    mine = indices[rank::world_size]
    with tqdm(total=len(mine), desc=f"samples, omega {omega:g}", unit="image", disable=rank != 0) as progress:
        for start in range(0, len(mine), batch_size):
            batch = mine[start : start + batch_size]
            noise, labels, style_indices = draw_inputs(batch, generator.config, seed, classes, device)
            latents = sample_latents(generator, noise, labels, style_indices, omega)
            yield batch, labels.cpu(), decode_images(vae, latents)
            progress.update(len(batch))
