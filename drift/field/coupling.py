"""Couplings: from logits to non-negative weights A between generated vectors and targets."""

from torch import Tensor


def row(logits: Tensor) -> Tensor:
    """A = softmax of each generated vector over its targets: `[..., N, M]` -> `[..., N, M]`.

    A_ij = K_ij / sum_j K_ij,  K = exp(logits)
    """
    return logits.softmax(dim=-1)


def partial_two_sided(logits: Tensor) -> Tensor:
    """Geometric mean of the softmax over targets and that over generated vectors (paper Alg. 2).

    A_ij = K_ij / sqrt(sum_j K_ij sum_i K_ij),  K = exp(logits);  `[..., N, M]` -> `[..., N, M]`

    Each softmax has its own maximum: no shift shared by both sums would keep all of them from underflow.
    """
    return logits.softmax(dim=-1).mul_(logits.softmax(dim=-2)).sqrt_()


COUPLINGS = {"row": row, "partial_two_sided": partial_two_sided}
