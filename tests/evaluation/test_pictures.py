from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from drift.evaluation.pictures import class_rows, image_grid, save_png


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 200, (5, 4, 6, 3)).astype(np.uint8)


@pytest.mark.parametrize(("pad", "scale"), [(2, 1), (0, 1), (1, 3)])
def test_every_pixel_is_where_it_belongs(images, pad, scale):
    grid = np.asarray(image_grid(torch.from_numpy(images), columns=3, pad=pad, scale=scale))
    assert grid.shape == (2 * (4 * scale + pad) + pad, 3 * (6 * scale + pad) + pad, 3)
    expected = np.full_like(grid, 255)
    for index in range(5):
        for y in range(4 * scale):
            for x in range(6 * scale):
                row = pad + (index // 3) * (4 * scale + pad) + y
                column = pad + (index % 3) * (6 * scale + pad) + x
                expected[row, column] = images[index, y // scale, x // scale]
    assert np.array_equal(grid, expected)


def test_row_labels_stand_left_of_their_rows(images):
    images = images.repeat(8, axis=1).repeat(8, axis=2)
    plain = np.asarray(image_grid(images, columns=3))
    labelled = np.asarray(image_grid(images, columns=3, row_labels=["tench", ""]))
    margin = labelled.shape[1] - plain.shape[1]
    assert margin > 10
    assert np.array_equal(labelled[:, margin:], plain)
    ink = np.flatnonzero((labelled[:, :margin] < 128).any((1, 2)))
    assert len(ink) > 0
    assert ink.min() > 2 and ink.max() < 34  # inside the first row, and about its middle
    assert abs((ink.min() + ink.max()) / 2 - 18) < 4


def test_png_has_the_pixels_and_no_date(images, tmp_path):
    grid = image_grid(images, columns=2, row_labels=["a", "b", "c"])
    for name in ("one.png", "two.png"):
        save_png(tmp_path / name, grid)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    with Image.open(tmp_path / "one.png") as image:
        assert image.info == {}
        assert np.array_equal(np.asarray(image), np.asarray(grid))
    assert {path.name for path in tmp_path.iterdir()} == {"one.png", "two.png"}


def test_class_rows_share_noise_down_a_column():
    class Decoder:
        def decode(self, latents):
            return latents

    class Stripes:
        """Red tells the class, green the noise, blue the style index and omega."""

        config = SimpleNamespace(in_channels=3, input_size=16, style_codebooks=1, style_entries=5)

        def __call__(self, noise, labels, omega, style_indices):
            levels = torch.stack([labels / 10, noise.mean((1, 2, 3)), style_indices[:, 0] / 10 * omega], 1)
            return levels[:, :, None, None].expand(-1, 3, 16, 16)

    classes, columns, pad, side = [7, 2, 5], 4, 2, 64
    arguments = (Stripes(), Decoder(), classes, columns)
    picture = class_rows(*arguments, 1.5, 0, batch_size=5)
    pixels = np.asarray(picture)
    pixels = pixels[:, pixels.shape[1] - columns * (side + pad) - pad :]  # without the labels
    centres = pixels[pad + side // 2 :: side + pad, pad + side // 2 :: side + pad]  # [rows, columns, RGB]
    assert centres.shape == (3, 4, 3)
    assert (centres[..., 0] == np.rint(127.5 + 127.5 * np.array(classes)[:, None] / 10)).all()
    assert (centres[..., 1:] == centres[:1, :, 1:]).all()
    assert len(np.unique(centres[0, :, 1])) == columns
    assert np.array_equal(np.asarray(class_rows(*arguments, 1.5, 0, batch_size=12)), np.asarray(picture))
