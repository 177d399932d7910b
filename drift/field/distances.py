"""Distances from generated vectors to their targets, and the feature scale S (paper A.6).

Shapes: B drift problems, N generated vectors and M targets in each, C channels.
"""

import torch
from torch import Tensor


def squared_distances(queries: Tensor, targets: Tensor) -> Tensor:
    """`[B, N, C]`, `[B, M, C]` -> `[B, N, M]`, by inner products.

        ||x_i - y_j||^2 = <x_i, x_i> + <y_j, y_j> - 2 <x_i, y_j>

    In float32 the difference has an error of about 1e-7 squared norms: distances below a thousandth of the
    vectors' length are rounding.
    """
    norms = _squared_norms(queries)[:, :, None] + _squared_norms(targets)[:, None, :]
    return norms.baddbmm_(queries, targets.mT, alpha=-2)


def distances(queries: Tensor, targets: Tensor, metric: str, floor: float, self_pairs: bool) -> Tensor:
    """Distances of `metric`, `[B, N, M]`, whose squares are at least `floor`.

    With `self_pairs`, targets 1 to N are the generated vectors. A vector's distance to itself is set to the
    floor, not left to rounding.
    """
    squares = squared_distances(queries, targets).clamp_min_(floor)
    if self_pairs:
        squares.diagonal(dim1=1, dim2=2).fill_(floor)
    return squares if metric == "l2_sq" else squares.sqrt_()


def weighted_sums(distances: Tensor, weights: Tensor, without_self_pairs: bool) -> Tensor:
    """Numerator and denominator of a mean distance of each class, `[2, Nc]`.

        mean distance = sum_lij w_j d_lij / sum_lij w_j

    `distances [Nc, L, N, M]`, `weights [Nc, M]` of the targets. Self-pairs, where they are left out, are on
    the diagonal and have weight 1.
    """
    _, locations, n, _ = distances.shape
    total = (distances.sum(dim=2) * weights[:, None]).sum(dim=(1, 2))
    count = weights.sum(dim=1) * (locations * n)
    if without_self_pairs:
        total = total - distances.diagonal(dim1=2, dim2=3).sum(dim=(1, 2))
        count = count - locations * n
    return torch.stack([total, count])


def _squared_norms(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=-1).square_()
