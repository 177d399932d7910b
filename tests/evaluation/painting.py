"""Small real and generated images whose features and classes are known by looking at their pixels."""

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from drift.evaluation.networks import FeatureNetwork

CLASSES = 3


class Source:
    """Real images in memory: noise around a grey that tells the class."""

    split, passed_over = "train", ""

    def __init__(self, count, seed):
        rng = np.random.default_rng(seed)
        self.labels = np.arange(count) % CLASSES
        greys = 40 + 80 * self.labels[:, None, None, None]
        self.images = (greys + rng.integers(-30, 31, (count, 4, 4, 3))).astype(np.uint8)
        self.digest = f"{count} {seed}"
        self.loaded = []

    def __len__(self):
        return len(self.labels)

    def load(self, index):
        self.loaded.append(int(index))
        return Image.fromarray(self.images[index])


class Decoder:
    def decode(self, latents):
        return latents


class Painter:
    """Generates the greys of `Source`; below omega 1.2 every fifth noise gives the next class instead."""

    config = SimpleNamespace(in_channels=3, input_size=4, style_codebooks=1, style_entries=2)

    def __call__(self, noise, labels, omega, style_indices):
        slips = (noise[:, 0, 0, 0] > 0.84) & (omega < 1.2)
        grey = 40 + 80 * ((labels + slips) % CLASSES)
        return (grey[:, None, None, None] + 8 * noise) / 127.5 - 1


def flat(images):
    """The features of images `[N, H, W, 3]`, as NumPy sees them."""
    return np.asarray(images).reshape(len(images), -1)[:, :7].astype(np.float64)


def pixel_network():
    """Seven pixels are the features, their mean grey tells the class."""
    return FeatureNetwork(
        name="pixels",
        dimension=7,
        digest="pixels",
        device=torch.device("cpu"),
        resize=lambda image: image,
        extract=lambda x: x.permute(0, 2, 3, 1).flatten(1)[:, :7],
        classify=lambda f: -(f.mean(1, keepdim=True) - torch.tensor([40.0, 120.0, 200.0])).abs(),
        labels=True,
    )
