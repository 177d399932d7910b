"""Inputs of the drifting loss, and its results as the tests compare them."""

import torch
from torch import Tensor

from drift.field import FieldSettings, drifting_loss


def relative_error(value: Tensor, expected: Tensor) -> float:
    value, expected = torch.as_tensor(value).double(), torch.as_tensor(expected).double()
    return float((value - expected).norm() / expected.norm())


def draw(
    seed: int = 0, *, classes=3, n=5, p=6, u=2, k=4, locations=2, channels=7, shift=0.5
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, pos, uncond, omega and a second batch; the first class has no guidance, and each its own scale."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 1 + torch.arange(classes)[:, None, None, None] / 2
    x, pos, uncond, second = (
        sizes * torch.randn(classes, count, locations, channels, generator=generator)
        for count in (n, p, u, k)
    )
    return x + shift, pos, uncond, 1 + torch.arange(classes) / 2, second + shift


def loss_and_grad(
    x: Tensor, pos: Tensor, uncond: Tensor, omega: Tensor, second: Tensor, settings: FieldSettings, **kwargs
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, gradient and statistics; the second batch is used where the settings want one."""
    x = x.detach().clone().requires_grad_()
    negatives = second if settings.negatives == "second_batch" else None
    loss, statistics = drifting_loss(x, pos, uncond, omega, settings, negatives=negatives, **kwargs)
    loss.backward()
    return loss.detach(), x.grad, statistics
