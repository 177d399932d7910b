"""Grids of images as PNG: the one place that lays images out."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from drift.evaluation.sample import decode_images, draw_inputs, sample_latents
from drift.files import atomic_write
from drift.models.generator import Generator
from drift.models.vae import VAE

VISIBLE_SIDE = 64  # pixels; smaller images are enlarged to at least this, or nobody sees anything
_BACKGROUND = 255


def image_grid(
    images: Tensor | np.ndarray,
    columns: int,
    pad: int = 2,
    scale: int = 1,
    row_labels: Sequence[str] | None = None,
) -> Image.Image:
    """Images uint8 `[n, H, W, 3]`, row by row, `pad` pixels apart on white.

    Each pixel becomes a block of `scale` x `scale`. `row_labels`, one per row, stand to the left.
    """
    images = np.asarray(images)
    n, height, width, _ = images.shape
    rows = -(-n // columns)
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    step_y, step_x = height * scale + pad, width * scale + pad
    canvas = np.full((rows * step_y + pad, columns * step_x + pad, 3), _BACKGROUND, np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = pad + row * step_y, pad + column * step_x
        canvas[top : top + height * scale, left : left + width * scale] = image
    grid = Image.fromarray(canvas)
    return grid if row_labels is None else _with_row_labels(grid, row_labels, step_y, pad)


def _with_row_labels(grid: Image.Image, labels: Sequence[str], step: int, pad: int) -> Image.Image:
    assert len(labels) * step + pad == grid.height, "one label per row"
    font = ImageFont.load_default()
    boxes = [font.getbbox(label) for label in labels]  # left, top, right, bottom
    margin = int(max(box[2] for box in boxes)) + 2 * pad
    labelled = Image.new("RGB", (margin + grid.width, grid.height), (_BACKGROUND,) * 3)
    labelled.paste(grid, (margin, 0))
    draw = ImageDraw.Draw(labelled)
    for row, (label, (_, top, right, bottom)) in enumerate(zip(labels, boxes, strict=True)):
        middle = pad + row * step + (step - pad) / 2
        draw.text(
            (margin - pad - right, round(middle - (top + bottom) / 2)), label, fill=(0, 0, 0), font=font
        )
    return labelled


def save_png(path: str | Path, image: Image.Image) -> None:
    """Write a PNG atomically; the bytes depend on the pixels (and on the PNG library) alone."""
    with atomic_write(path) as file:
        image.save(file, format="PNG")


def class_rows(
    generator: Generator,
    vae: VAE,
    classes: Sequence[int],
    per_class: int,
    omega: float,
    seed: int,
    *,
    batch_size: int,
    device: str | torch.device = "cpu",
    row_labels: Sequence[str] | None = None,
) -> Image.Image:
    """A grid with a row per class, in which a column shares noise and style indices.

    The columns are those of the samples 0 to `per_class` - 1 of `sample_images`. Rows are labelled with
    `row_labels`, or with the class numbers.
    """
    noise, _, style_indices = draw_inputs(range(per_class), generator.config, seed, classes=1, device=device)
    labels = torch.tensor(classes, device=device).repeat_interleave(per_class)
    columns = torch.arange(per_class, device=device).repeat(len(classes))
    images = []
    for label, column in zip(labels.split(batch_size), columns.split(batch_size), strict=True):
        latents = sample_latents(generator, noise[column], label, style_indices[column], omega)
        images.append(decode_images(vae, latents))
    images = torch.cat(images)
    names = [str(label) for label in classes] if row_labels is None else row_labels
    return image_grid(images, per_class, scale=-(-VISIBLE_SIDE // images.shape[1]), row_labels=names)
