"""The target distributions, drawn in the order of the paper's code from one NumPy generator.

That order (which part of the shape, then a permutation, then the noise) decides the numbers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator


@dataclass(frozen=True)
class Target:
    draw: Callable[[Generator, int], np.ndarray]
    """`(rng, n)` -> points `[n, 2]`."""
    centres: np.ndarray | None = None
    """Of the modes, `[K, 2]`, if it has any."""
    std: float = 0.0
    """Of a mode, in each direction."""

    def sample(self, seed: int, n: int) -> np.ndarray:
        """Points `[n, 2]` in float32."""
        return self.draw(np.random.default_rng(seed), n).astype(np.float32)


def _mixture(centres: np.ndarray, std: float) -> Target:
    def draw(rng: Generator, n: int) -> np.ndarray:
        index = rng.integers(0, len(centres), n)
        return centres[index] + rng.normal(0.0, std, (n, 2))

    return Target(draw, centres, std)


def _moons(rng: Generator, n: int) -> np.ndarray:
    t = rng.uniform(0, math.pi, n)
    upper = np.stack([np.cos(t), np.sin(t)], axis=1)
    lower = np.stack([1 - np.cos(t), 0.5 - np.sin(t)], axis=1)  # of the same t
    points = np.concatenate([upper, lower])[rng.permutation(2 * n)[:n]]
    return points + rng.normal(0.0, 0.08, (n, 2))


def _spiral(rng: Generator, n: int) -> np.ndarray:
    t = rng.uniform(0, 4 * math.pi, n)
    r = 2.5 * t / (4 * math.pi)
    points = np.stack([r * np.cos(t), r * np.sin(t)], axis=1)
    return points + rng.normal(0.0, 0.05, (n, 2))


def _checkerboard(rng: Generator, n: int) -> np.ndarray:
    points = np.empty((0, 2))
    while len(points) < n:
        drawn = rng.uniform(0, 4, (n, 2))
        points = np.concatenate([points, drawn[np.floor(drawn).sum(axis=1) % 2 == 0]])
    return points[:n] - 2 + rng.normal(0.0, 0.05, (n, 2))


_ANGLES = np.arange(8) * math.pi / 4
_CIRCLE = 2 * np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)
_GRID = np.stack(np.meshgrid(np.linspace(-2, 2, 5), np.linspace(-2, 2, 5), indexing="ij"), axis=-1)

TARGETS = {
    "8gaussians": _mixture(_CIRCLE, 0.08),
    "checkerboard": Target(_checkerboard),
    "moons": Target(_moons),
    "spiral": Target(_spiral),
    "25gaussians": _mixture(_GRID.reshape(-1, 2), 0.06),
}
"""By name. The first four are the paper's; the last is from its authors' notebook, which scales it."""


def mode_coverage(points: np.ndarray, target: Target) -> tuple[float, int]:
    """Share of the points within three standard deviations of a centre, and the number of covered modes.

    A mode is covered if at least half of its fair share of all points lies within that distance. Of points of
    the target itself, 1 - exp(-9/2) = 98.9 % lie there.
    """
    distances = np.linalg.norm(points[:, None] - target.centres[None], axis=2)
    nearest, near = distances.argmin(axis=1), distances.min(axis=1) <= 3 * target.std
    counts = np.bincount(nearest[near], minlength=len(target.centres))
    return float(near.mean()), int((counts >= len(points) / (2 * len(target.centres))).sum())
