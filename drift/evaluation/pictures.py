"""Grids of images as PNG: the one place that lays images out."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from drift.evaluation.sample import ImageDecoder, draw_inputs, sample_latents
from drift.models.generator import Generator
from drift.runtime.files import atomic_write

VISIBLE_SIDE = 64  # pixels; smaller images are enlarged to at least this, so that a person can see them


def visible_scale(side: int) -> int:
    """How many times images of this side are enlarged to be visible."""
    return -(-VISIBLE_SIDE // side)


def image_grid(
    images: Tensor | np.ndarray,
    columns: int,
    pad: int = 2,
    scale: int = 1,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
) -> Image.Image:
    """Images uint8 `[n, H, W, 3]`, row by row, `pad` pixels apart on white.

    Each pixel becomes a block of `scale` x `scale`. `row_labels`, one per row, stand to the left,
    `column_labels`, one per column, above.
    """
    images = np.asarray(images).repeat(scale, axis=1).repeat(scale, axis=2)
    n, height, width, _ = images.shape
    rows, step_y, step_x = -(-n // columns), height + pad, width + pad
    font = ImageFont.load_default()
    left = top = 0
    if row_labels is not None:
        assert len(row_labels) == rows, "one label per row"
        left = int(max(font.getlength(label) for label in row_labels)) + 2 * pad
    if column_labels is not None:
        assert len(column_labels) == columns, "one label per column"
        top = int(max(font.getbbox(label)[3] for label in column_labels)) + 2 * pad
    grid = Image.new("RGB", (left + columns * step_x + pad, top + rows * step_y + pad), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        grid.paste(Image.fromarray(image), (left + pad + column * step_x, top + pad + row * step_y))
    draw = ImageDraw.Draw(grid)
    for column, label in enumerate(column_labels or ()):
        x = left + pad + column * step_x + (width - font.getlength(label)) / 2
        draw.text((round(x), pad), label, "black", font)
    for row, label in enumerate(row_labels or ()):
        _, upper, right, lower = font.getbbox(label)
        y = top + pad + row * step_y + (height - upper - lower) / 2
        draw.text((left - pad - right, round(y)), label, "black", font)
    return grid


def save_png(path: str | Path, image: Image.Image) -> None:
    """Write a PNG atomically; the bytes depend on the pixels (and on the PNG library) alone."""
    with atomic_write(path) as file:
        image.save(file, format="PNG")


def draw_images(
    generator: Generator,
    decode: ImageDecoder,
    wanted: Sequence[tuple[int, int, float]],
    seed: int,
    batch_size: int,
) -> Tensor:
    """Images uint8 `[n, H, W, 3]` of each wanted (label, number of the sample, omega)."""
    device, images = generator.device, []
    for start in range(0, len(wanted), batch_size):
        labels, samples, omegas = zip(*wanted[start : start + batch_size], strict=True)
        noise, style_indices = draw_inputs(samples, generator.config, seed, device)
        labels, omegas = torch.tensor(labels, device=device), torch.tensor(omegas, device=device)
        images.append(decode(sample_latents(generator, noise, labels, style_indices, omegas)))
    return torch.cat(images)
