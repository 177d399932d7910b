from types import SimpleNamespace

import numpy as np
import pytest
import torch
from painting import Decoder
from PIL import Image

from drift.evaluation.pictures import class_rows, image_grid, omega_columns, save_png
from drift.evaluation.sample import ImageDecoder


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


def test_column_labels_stand_above_their_columns(images):
    images = images.repeat(8, axis=1).repeat(8, axis=2)
    plain = np.asarray(image_grid(images, columns=3))
    labelled = np.asarray(image_grid(images, columns=3, column_labels=["", "w 2", ""], row_labels=["a", "b"]))
    top, left = (labelled.shape[i] - plain.shape[i] for i in (0, 1))
    assert top > 8
    assert np.array_equal(labelled[top:, left:], plain)
    ink = np.flatnonzero((labelled[:top] < 128).any((0, 2))) - left
    middle = 2 + 50 + 24  # of the second column
    assert len(ink) and abs((ink.min() + ink.max()) / 2 - middle) < 4


class Stripes:
    """Red tells the class, green the noise, blue the style index and omega."""

    config = SimpleNamespace(in_channels=3, input_size=16, style_codebooks=1, style_entries=5)

    def __call__(self, noise, labels, omega, style_indices):
        levels = torch.stack([labels / 10, noise.mean((1, 2, 3)), style_indices[:, 0] / 10 * omega / 4], 1)
        return levels[:, :, None, None].expand(-1, 3, 16, 16)


def centres(picture, rows, columns, pad=2, side=64):
    """Colours `[rows, columns, RGB]` in the middle of each image of a grid with labels."""
    pixels = np.asarray(picture)
    pixels = pixels[
        pixels.shape[0] - rows * (side + pad) - pad :, pixels.shape[1] - columns * (side + pad) - pad :
    ]
    return pixels[pad + side // 2 :: side + pad, pad + side // 2 :: side + pad]


def test_class_rows_share_noise_down_a_column():
    classes, columns = [7, 2, 5], 4
    arguments = (Stripes(), ImageDecoder(Decoder(), 5), classes, columns, 1.5, 0)
    picture = class_rows(*arguments, batch_size=5, names="abc")
    found = centres(picture, 3, columns)
    assert found.shape == (3, 4, 3)
    assert (found[..., 0] == np.rint(127.5 + 127.5 * np.array(classes)[:, None] / 10)).all()
    assert (found[..., 1:] == found[:1, :, 1:]).all()
    assert len(np.unique(found[0, :, 1])) == columns
    again = class_rows(*arguments, batch_size=12, names="abc")
    assert np.array_equal(np.asarray(again), np.asarray(picture))


def test_omega_columns_share_all_noise():
    classes, omegas = [7, 2], [1.0, 2.0, 4.0]
    picture = omega_columns(
        Stripes(), ImageDecoder(Decoder(), 5), classes, omegas, 3, batch_size=4, names="ab"
    )
    found = centres(picture, 2, 3)
    assert (found[..., 0] == np.rint(127.5 + 127.5 * np.array(classes)[:, None] / 10)).all()
    assert len(np.unique(found[..., 1])) == 1
    blue = (found[0, :, 2] / 127.5 - 1) / np.array(omegas)
    assert blue[0] > 0 and np.ptp(blue) < 0.02
