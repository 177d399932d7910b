"""Drift forms: from weights A to the coefficients R of the field, V_i = sum_j R_ij y_j."""

from torch import Tensor

TINY = 1e-30  # keeps quotients of masses that have all underflowed, and logarithms of weights, finite


def alg2_joint(affinity: Tensor, negatives: int) -> Tensor:
    """Attraction and repulsion, each weighted by the other's mass (paper Alg. 2); overwrites `affinity`.

        V_i = sum_{j in pos} A_ij (sum_{k in neg} A_ik) y_j - sum_{j in neg} A_ij (sum_{k in pos} A_ik) y_j

    `affinity [..., N, M]` has the negatives in its first `negatives` columns. Rows of R sum to zero.
    """
    to_neg, to_pos = affinity[..., :negatives], affinity[..., negatives:]
    neg_mass, pos_mass = to_neg.sum(dim=-1, keepdim=True), to_pos.sum(dim=-1, keepdim=True)
    to_neg *= -pos_mass
    to_pos *= neg_mass
    return affinity


def split(affinity: Tensor, negatives: int) -> Tensor:
    """Cross minus self: two couplings, each with rows that sum to one (prior); overwrites `affinity`.

    V_i = sum_{j in pos} A_ij y_j / sum_{k in pos} A_ik - sum_{j in neg} A_ij y_j / sum_{k in neg} A_ik
    """
    to_neg, to_pos = affinity[..., :negatives], affinity[..., negatives:]
    to_neg /= -to_neg.sum(dim=-1, keepdim=True).clamp_min_(TINY)
    to_pos /= to_pos.sum(dim=-1, keepdim=True).clamp_min_(TINY)
    return affinity


DRIFT_FORMS = {"alg2_joint": alg2_joint, "split": split}
