"""Distances from generated vectors to their targets, and the feature scale S (paper A.6)."""

import math

import torch
from torch import Tensor

SQUARED_DISTANCE_FLOOR = 1e-8  # release: keeps the distance of a vector to itself at 1e-4
SCALE_FLOOR = 1e-3  # release: smallest S


def l2(gram: Tensor, squared_norms: Tensor) -> Tensor:
    """Distances from the first N of M vectors to all of them, `[..., N, M]`.

        d_ij = ||y_i - y_j|| = sqrt(<y_i, y_i> + <y_j, y_j> - 2 <y_i, y_j>)

    `gram [..., N, M]` holds the inner products, `squared_norms [..., M]` those of every vector with itself.
    In float32 the difference has an error of about 1e-7 squared norms: distances below a thousandth of the
    vectors' length are rounding, except that of a vector to itself, which is set.
    """
    n = gram.shape[-2]
    squares = squared_norms[..., :n, None] + squared_norms[..., None, :]
    squares.sub_(gram, alpha=2).clamp_min_(SQUARED_DISTANCE_FLOOR)
    squares.diagonal(dim1=-2, dim2=-1).fill_(SQUARED_DISTANCE_FLOOR)
    return squares.sqrt_()


def weighted_sums(distances: Tensor, weights: Tensor) -> Tensor:
    """Numerator and denominator of the mean distance over classes, locations and pairs, as `[2]`.

        mean distance = sum_ij w_j d_ij / sum_ij w_j

    `distances [Nc, L, N, M]`, `weights [Nc, M]`. Pairs of a vector with itself count (release).
    """
    _, locations, n, _ = distances.shape
    return torch.stack([(distances.sum(dim=(1, 2)) * weights).sum(), weights.sum() * (locations * n)])


def feature_scale(mean_distance: Tensor, channels: int) -> Tensor:
    """S_j = mean distance / sqrt(C_j), bounded from below (paper A.6; bound: release)."""
    return (mean_distance / math.sqrt(channels)).clamp_min(SCALE_FLOOR)
