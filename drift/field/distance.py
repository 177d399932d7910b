"""Distances from generated vectors to their targets, and the feature scale S (paper A.6).

Shapes: B drift problems, N generated vectors and M targets in each, C channels.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from drift.errors import one_of


class Guards(NamedTuple):
    """Lower bounds that keep degenerate features, such as constant ones, from dividing by zero."""

    squared_distance: float
    scale: float
    """Of S."""
    mean_square: float
    """Of mean(V_tau^2); for `l2_sq` of S times that, which has no unit either."""


GUARDS = {
    "batch": Guards(1e-8, 1e-3, 1e-8),  # release: a vector is 1e-4 from itself, lambda_tau >= 1e-4
    "class": Guards(0.0, 1e-6, 1e-12),  # prior
}
"""By `normalization_scope`, as each reference has them, but for that S of `l2_sq`."""


def on_device(values: Sequence[float], like: Tensor) -> Tensor:
    """Numbers as float32 `[len(values)]` beside `like`; `torch.tensor` would make the host wait for a GPU."""
    return torch.stack([like.new_full((), value, dtype=torch.float32) for value in values])


def squared_distances(queries: Tensor, targets: Tensor) -> Tensor:
    """`[B, N, C]`, `[B, M, C]` -> `[B, N, M]`, by inner products.

        ||x_i - y_j||^2 = <x_i, x_i> + <y_j, y_j> - 2 <x_i, y_j>

    In float32 the difference has an error of about 1e-7 squared norms: distances below a thousandth of the
    vectors' length are rounding.
    """
    norms = _squared_norms(queries)[:, :, None] + _squared_norms(targets)[:, None, :]
    return norms.baddbmm_(queries, targets.mT, alpha=-2)


def gram_matrix(x: Tensor, targets: Tensor) -> Tensor:
    """Inner products of all targets `[B, M, C]`, of which x `[B, N, C]` are the first N: `[B, M, M]`.

    From two blocks, since those of the first N with the others are there twice.
    """
    n, m = x.shape[1], targets.shape[1]
    others = targets[:, n:]
    gram = x.new_empty(len(x), m, m)
    gram[:, :n] = x @ targets.mT
    gram[:, n:, :n] = gram[:, :n, n:].mT
    gram[:, n:, n:] = others @ others.mT
    return gram


def squared_distances_from_gram(gram: Tensor, n: int) -> Tensor:
    """The same between the first N of M vectors and all of them, from all inner products `[B, M, M]`."""
    norms = gram.diagonal(dim1=1, dim2=2)
    return (norms[:, :n, None] + norms[:, None, :]).sub_(gram[:, :n], alpha=2)


def distances(squares: Tensor, metric: str, floor: float, self_pairs: bool) -> Tensor:
    """Squared distances -> distances of `metric`, in place.

    With `self_pairs`, targets 1 to N are the generated vectors; a vector's distance to itself is set to
    the guard's, not left to rounding.
    """
    squares.clamp_min_(floor)
    if self_pairs:
        squares.diagonal(dim1=1, dim2=2).fill_(floor)
    return squares if one_of("metric", metric, "l2", "l2_sq") == "l2_sq" else squares.sqrt_()


def weighted_sums(distances: Tensor, weights: Tensor, *, self_pairs: bool, count_self_pairs: bool) -> Tensor:
    """Numerator and denominator of the mean distance of each class, `[2, Nc]`.

        mean distance = sum_lij w_j d_lij / sum_lij w_j

    `distances [Nc, L, N, M]`, `weights [Nc, M]` of the targets.
    """
    _, locations, n, _ = distances.shape
    total = (distances.sum(dim=2) * weights[:, None]).sum(dim=(1, 2))
    count = weights.sum(dim=1) * (locations * n)
    if self_pairs and not count_self_pairs:
        total = total - distances.diagonal(dim1=2, dim2=3).sum(dim=(1, 2))
        count = count - locations * n
    return torch.stack([total, count])


def feature_scale(mean_distance: Tensor, channels: int, floor: float) -> Tensor:
    """S_j = mean distance / sqrt(C_j), bounded from below (paper A.6)."""
    return (mean_distance / math.sqrt(channels)).clamp_min(floor)


def _squared_norms(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=-1).square_()
