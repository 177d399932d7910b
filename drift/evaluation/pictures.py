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

VISIBLE_SIDE = 64  # pixels; smaller images are enlarged to at least this, or nobody sees anything
_BACKGROUND = 255


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
    if column_labels is not None:
        grid = _with_column_labels(grid, column_labels, step_x, pad)
    if row_labels is not None:
        grid = _with_row_labels(grid, row_labels, step_y, pad, top=grid.height - canvas.shape[0])
    return grid


def _with_column_labels(grid: Image.Image, labels: Sequence[str], step: int, pad: int) -> Image.Image:
    assert len(labels) * step + pad == grid.width, "one label per column"
    font = ImageFont.load_default()
    boxes = [font.getbbox(label) for label in labels]  # left, top, right, bottom
    margin = int(max(box[3] for box in boxes)) + 2 * pad
    labelled = Image.new("RGB", (grid.width, margin + grid.height), (_BACKGROUND,) * 3)
    labelled.paste(grid, (0, margin))
    draw = ImageDraw.Draw(labelled)
    for column, (label, (left, _, right, _)) in enumerate(zip(labels, boxes, strict=True)):
        middle = pad + column * step + (step - pad) / 2
        draw.text((round(middle - (left + right) / 2), pad), label, fill=(0, 0, 0), font=font)
    return labelled


def _with_row_labels(grid: Image.Image, labels: Sequence[str], step: int, pad: int, top: int) -> Image.Image:
    """`top`: pixels above the first row."""
    assert top + len(labels) * step + pad == grid.height, "one label per row"
    font = ImageFont.load_default()
    boxes = [font.getbbox(label) for label in labels]  # left, top, right, bottom
    margin = int(max(box[2] for box in boxes)) + 2 * pad
    labelled = Image.new("RGB", (margin + grid.width, grid.height), (_BACKGROUND,) * 3)
    labelled.paste(grid, (margin, 0))
    draw = ImageDraw.Draw(labelled)
    for row, (label, (_, upper, right, lower)) in enumerate(zip(labels, boxes, strict=True)):
        middle = top + pad + row * step + (step - pad) / 2
        draw.text(
            (margin - pad - right, round(middle - (upper + lower) / 2)), label, fill=(0, 0, 0), font=font
        )
    return labelled


def save_png(path: str | Path, image: Image.Image) -> None:
    """Write a PNG atomically; the bytes depend on the pixels (and on the PNG library) alone."""
    with atomic_write(path) as file:
        image.save(file, format="PNG")


def class_rows(
    generator: Generator,
    decode: ImageDecoder,
    classes: Sequence[int],
    per_class: int,
    omega: float,
    seed: int,
    *,
    batch_size: int,
    device: str | torch.device = "cpu",
    names: Sequence[str],
) -> Image.Image:
    """A grid with a row per class, in which a column shares noise and style indices.

    The columns are those of the samples 0 to `per_class` - 1 of `sample_images`. `names` stand at the rows.
    """
    rows = [(label, column, omega) for label in classes for column in range(per_class)]
    images = _draw(generator, decode, rows, seed, batch_size, device)
    return image_grid(images, per_class, scale=-(-VISIBLE_SIDE // images.shape[1]), row_labels=names)


def omega_columns(
    generator: Generator,
    decode: ImageDecoder,
    classes: Sequence[int],
    omegas: Sequence[float],
    seed: int,
    *,
    batch_size: int,
    device: str | torch.device = "cpu",
    names: Sequence[str],
) -> Image.Image:
    """A grid with a row per class and a column per CFG strength, all of the same noise and style indices.

    They are those of sample 0 of `sample_images`. `names` stand at the rows, the strengths above the columns.
    """
    rows = [(label, 0, omega) for label in classes for omega in omegas]
    images = _draw(generator, decode, rows, seed, batch_size, device)
    scale = -(-VISIBLE_SIDE // images.shape[1])
    heads = [f"omega {omega:g}" for omega in omegas]
    return image_grid(images, len(omegas), scale=scale, row_labels=names, column_labels=heads)


def _draw(
    generator: Generator,
    decode: ImageDecoder,
    wanted: Sequence[tuple[int, int, float]],
    seed: int,
    batch_size: int,
    device: str | torch.device,
) -> Tensor:
    """Images uint8 `[n, H, W, 3]` of each wanted (label, sample, omega)."""
    images = []
    for start in range(0, len(wanted), batch_size):
        labels, samples, omegas = zip(*wanted[start : start + batch_size], strict=True)
        noise, style_indices = draw_inputs(samples, generator.config, seed, device)
        latents = sample_latents(
            generator,
            noise,
            torch.tensor(labels, device=device),
            style_indices,
            torch.tensor(omegas, device=device),
        )
        images.append(decode(latents))
    return torch.cat(images)
