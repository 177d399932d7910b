"""Classifier-free guidance at training time: unconditional samples as weighted negatives (paper A.7)."""

from torch import Tensor


def unconditional_weight(omega: Tensor, generated: int, unconditional: int) -> Tensor:
    """Weight of one unconditional negative, per class: `[Nc]` -> `[Nc]`; 0 without guidance (omega = 1).

        w = (N - 1) (omega - 1) / U

    Together the U samples then weigh omega - 1 times the N - 1 other generated samples.
    """
    return (omega.float() - 1) * ((generated - 1) / max(unconditional, 1))


def target_weights(weight: Tensor, generated: int, unconditional: int, positives: int) -> Tensor:
    """Weight of every target, in the order generated, unconditional, positive: w `[Nc]` -> `[Nc, N+U+P]`."""
    weights = weight.new_ones(len(weight), generated + unconditional + positives)
    weights[:, generated : generated + unconditional] = weight[:, None]
    return weights
