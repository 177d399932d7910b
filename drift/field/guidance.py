"""Classifier-free guidance at training time: unconditional samples as weighted negatives (paper A.7)."""

from torch import Tensor


def unconditional_weight(omega: Tensor, repelling: int, unconditional: int) -> Tensor:
    """Weight of one unconditional negative, per class: `[Nc]` -> `[Nc]`; 0 without guidance (omega = 1).

        w = R (omega - 1) / U

    R generated samples repel each one: the N - 1 others, or all of an independent second batch. Together
    the U unconditional samples then weigh omega - 1 times as much as they.
    """
    return (omega.float() - 1) * (repelling / max(unconditional, 1))


def target_weights(weight: Tensor, generated: int, unconditional: int, positives: int) -> Tensor:
    """Weight of every target, in the order generated, unconditional, positive: w `[Nc]` -> `[Nc, M]`."""
    weights = weight.new_ones(len(weight), generated + unconditional + positives)
    weights[:, generated : generated + unconditional] = weight[:, None]
    return weights
