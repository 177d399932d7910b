import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp

from drift.data.views import augmented_view, center_view, random_crop
from drift.runtime.torchvision import ensure_torchvision

ensure_torchvision()
from torchvision.transforms import RandomResizedCrop  # noqa: E402


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def smooth_image(width: int, height: int) -> Image.Image:
    """Far enough from black and white that no filter overshoots, where PIL clips after each of its passes."""
    few = np.random.default_rng(0).integers(64, 192, (4, 5, 3), np.uint8)
    return Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC)


def whole_then_cut(image: Image.Image, size: int) -> np.ndarray:
    """ADM's center_crop_arr, which the release took over: the whole picture is resized before it is cut."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(("width", "height"), [(500, 333), (97, 31), (31, 490), (33, 520), (8, 8), (3, 47)])
def test_center_view_is_the_releases_to_the_bit(width, height):
    image = noise_image(width, height)
    assert np.array_equal(center_view(image, 32), whole_then_cut(image, 32))


@pytest.mark.parametrize(
    ("width", "height"), [(1, 2000), (2001, 3), (31, 999), (40, 5000), (4001, 97), (1, 1)]
)
def test_center_view_of_a_narrow_image_is_the_releases_within_rounding(width, height):
    image = smooth_image(width, height)
    difference = np.abs(center_view(image, 32).astype(int) - whole_then_cut(image, 32))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure")
@pytest.mark.parametrize("shape", ["1, 2000", "2000, 1"])
def test_center_view_of_a_narrow_image_takes_little_memory(shape):
    program = f"""
import re
from pathlib import Path
from PIL import Image
from drift.data.views import center_view

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])

center_view(Image.new("RGB", (300, 300)), 256)
before = peak()
center_view(Image.new("RGB", ({shape})), 256)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20_000  # KiB; the whole would be 512 000 x 256 pixels


@pytest.mark.parametrize(
    ("width", "height", "scale"), [(500, 375, (0.2, 1.0)), (120, 200, (0.08, 1.0)), (40, 100, (0.5, 0.9))]
)
def test_random_crop_is_distributed_like_torchvisions(width, height, scale):
    """Kolmogorov-Smirnov on area, aspect ratio and place; the last image often needs several attempts."""
    ratio, n = (3 / 4, 4 / 3), 3000
    rng = np.random.default_rng(0)
    ours = np.array([random_crop(width, height, scale, ratio, rng) for _ in range(n)], float)
    torch.manual_seed(0)
    canvas = torch.empty(1, height, width)
    boxes = [RandomResizedCrop.get_params(canvas, list(scale), list(ratio)) for _ in range(n)]
    theirs = np.array([(left, top, w, h) for top, left, h, w in boxes], float)

    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= (width, height)).all()
    for statistic in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 2] / b[:, 3],
        lambda b: b[:, 0] / (width - b[:, 2] + 1),
        lambda b: b[:, 1] / (height - b[:, 3] + 1),
    ):
        assert ks_2samp(statistic(ours), statistic(theirs), method="asymp").pvalue > 1e-3


@pytest.mark.parametrize(("width", "height"), [(10, 100), (100, 10), (101, 8), (1, 50)])
def test_random_crop_that_cannot_fit_falls_back_like_torchvision(width, height):
    scale, ratio = (1.0, 1.0), (3 / 4, 4 / 3)
    top, left, h, w = RandomResizedCrop.get_params(torch.empty(1, height, width), list(scale), list(ratio))
    box = random_crop(width, height, scale, ratio, np.random.default_rng(0))
    assert box == (left, top, w, h)


def test_augmented_view_mirrors_half_of_the_time():
    image = noise_image(8, 8)
    rng = np.random.default_rng(0)
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    plain, mirrored = np.asarray(image), np.asarray(image)[:, ::-1]
    views = [augmented_view(image, 8, flip=True, rng=rng, **whole) for _ in range(400)]
    flips = [np.array_equal(view, mirrored) for view in views]
    assert all(flipped or np.array_equal(view, plain) for view, flipped in zip(views, flips, strict=True))
    assert abs(np.mean(flips) - 0.5) < 4 * math.sqrt(0.25 / 400)
    views = [augmented_view(image, 8, flip=False, rng=rng, **whole) for _ in range(20)]
    assert all(np.array_equal(view, plain) for view in views)
