"""Trains the two stand-in networks of handwritten digits: a small VAE and a small image classifier.

    python -m pretrained.train vae --dataset mnist5k --out pretrained/mnist_vae
    python -m pretrained.train classifier --dataset digits --out pretrained/digits_classifier

They take the places of the SD-VAE and Inception, so that digits run through the same stages without a
download. Both see the training split only. The same command on the same machine writes the same bytes. Sizes
and schedules were found by trial.
"""

import argparse
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from drift.autoencoders.kl import VAE
from drift.data.datasets import open_images
from drift.data.levels import to_float
from drift.data.views import augmented_view, center_view
from drift.models.classifier import ImageClassifier
from drift.runtime.errors import UserError
from drift.runtime.files import check_output, replace_folder
from drift.runtime.processes import run_stage
from drift.runtime.seeds import derive_seed, numpy_generator, torch_generator
from drift.runtime.torchvision import ensure_torchvision

IMAGE_SIZE = 32


class Sizes(NamedTuple):
    """What differs between the networks of two data sets."""

    vae_widths: tuple[int, ...]
    """Channels of each level of the VAE; each but the first halves the side."""
    latent_channels: int
    classifier_steps: int


SIZES = {"digits": Sizes((16, 32, 32), 4, 600), "mnist5k": Sizes((16, 32, 64, 64), 8, 1500)}
VAE_STEPS = 1200


class TrainingImages:
    """The training split of a data set of digits."""

    def __init__(self, dataset: str):
        self.sizes = SIZES[dataset]
        source = open_images(dataset, None, "train", 10)
        self.labels = torch.from_numpy(source.labels)
        self.pictures = [source.load(index) for index in range(len(source))]
        self.views = np.stack([center_view(picture, IMAGE_SIZE) for picture in self.pictures])
        """`[N, S, S, 3]` uint8."""


def train_vae(data: TrainingImages, steps: int, seed: int = 0) -> tuple[nn.Module, list[float]]:
    """Train an AutoencoderKL; returns it and the losses of all steps.

    Half of each batch are central views, half random crops, since the pipeline encodes both. The loss is the
    squared error per value plus a multiple of the KL divergence from N(0, 1) per latent. With the
    `scaling_factor` in its config, latents of the central views have standard deviation 1.
    """
    ensure_torchvision()
    from diffusers import AutoencoderKL

    batch_size, kl_weight = 64, 3e-3
    crop_scale, crop_ratio = (0.5, 1.0), (0.75, 4 / 3)  # somewhat wider than those of the encode stage
    widths = data.sizes.vae_widths
    torch.manual_seed(derive_seed(seed, "standins/vae/init"))
    model = AutoencoderKL(
        sample_size=IMAGE_SIZE,
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        latent_channels=data.sizes.latent_channels,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )

    def loss_of(step: int) -> Tensor:
        rng = numpy_generator(seed, "standins/vae/batch", step)
        rows = rng.integers(len(data.views), size=batch_size)
        crops = [
            augmented_view(data.pictures[row], IMAGE_SIZE, crop_scale, crop_ratio, flip=False, rng=rng)
            for row in rows[batch_size // 2 :]
        ]
        images = to_float(torch.from_numpy(np.concatenate([data.views[rows[: batch_size // 2]], crops])))
        posterior = model.encode(images).latent_dist
        noise = torch_generator(seed, "standins/vae/noise", step)
        reconstruction = model.decode(posterior.sample(noise)).sample
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return F.mse_loss(reconstruction, images) + kl_weight * divergence

    losses = _minimise(model, loss_of, steps=steps, lr=2e-3, weight_decay=0.0)
    mean, _ = VAE(model, id="stand-in").moments(torch.from_numpy(data.views))
    model.register_to_config(scaling_factor=round(1 / mean.std().item(), 5))
    return model, losses


def train_classifier(data: TrainingImages, steps: int, seed: int = 0) -> tuple[nn.Module, list[float]]:
    """Train an ImageClassifier on randomly moved digits; returns it and the losses of all steps."""
    images = torch.from_numpy(data.views).permute(0, 3, 1, 2).float()  # [N, 3, S, S] in 0..255
    torch.manual_seed(derive_seed(seed, "standins/classifier/init"))
    model = ImageClassifier(image_size=IMAGE_SIZE, num_classes=10)

    def loss_of(step: int) -> Tensor:
        generator = torch_generator(seed, "standins/classifier/batch", step)
        rows = torch.randint(len(images), (128,), generator=generator)
        moved = move_randomly(images[rows], generator)
        return F.cross_entropy(model.logits(model.features(moved)), data.labels[rows])

    return model, _minimise(model, loss_of, steps=steps, lr=3e-3, weight_decay=0.05)


def move_randomly(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, resize, stretch and shift each of `images [B, C, H, W]` a little; 0 comes in from outside."""
    turn, size, stretch, right, down = (2 * torch.rand(5, len(images), generator=generator) - 1).unbind()
    turn = math.radians(12) * turn
    size, stretch = (0.12 * size).exp(), (0.08 * stretch).exp()
    right, down = 0.16 * right, 0.16 * down  # of half the side, since coordinates go from -1 to 1
    to_source = [turn.cos() * size * stretch, -turn.sin() * size, right]
    to_source += [turn.sin() * size, turn.cos() * size / stretch, down]
    grid = F.affine_grid(torch.stack(to_source, 1).view(-1, 2, 3), images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _minimise(
    model: nn.Module, loss_of: Callable[[int], Tensor], *, steps: int, lr: float, weight_decay: float
) -> list[float]:
    """AdamW with a warm-up of 50 steps, then a cosine to 0; returns the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=weight_decay)
    losses = []
    model.train()
    for step in tqdm(range(steps), unit="step"):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 50) / max(1, steps - 50)))
        optimizer.param_groups[0]["lr"] = lr * ((1 + 0.98 * step) / 50 if step < 50 else cosine)
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


NETWORKS = {"vae": train_vae, "classifier": train_classifier}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--dataset", choices=SIZES, default="mnist5k")
    parser.add_argument("--out", type=Path, required=True, help="folder, replaced if it is there")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: as many as the committed network has seen")
    args = parser.parse_args(argv)
    train, data = NETWORKS[args.network], TrainingImages(args.dataset)
    usual = VAE_STEPS if args.network == "vae" else data.sizes.classifier_steps
    steps = usual if args.steps is None else args.steps
    if steps < 1:
        raise UserError(f"--steps {steps}: give at least 1")
    check_output(args.out)
    model, _ = train(data, steps, args.seed)
    unfinished = args.out.with_name(f".{args.out.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    replace_folder(unfinished, args.out)


if __name__ == "__main__":
    run_stage(main)
