"""The field of the 2-D experiments, in terms of `drift.field`.

    V = P(x, y) y - P(x, x) x,  P = rows of a coupling of exp(-d / eps), each with sum 1

The library's logits are -d / (S sqrt(C) tau) with the feature scale S. Here S = 1 and C = 2, so that
tau = eps / sqrt(2). V is not divided by its RMS. A sample is not its own negative, but for plans.
"""

import math

import torch
from torch import Tensor

from drift.field import FieldSettings, drifting_loss

DIMENSIONS = 2


def field_settings(coupling: str, dist_metric: str, eps: float, **changes) -> FieldSettings:
    """Settings of the field at the entropic temperature eps, with `changes` on top."""
    return FieldSettings.sinkhorn(
        coupling=coupling,
        drift_form="split",
        dist_metric=dist_metric,
        temps=(eps / math.sqrt(DIMENSIONS),),
        unit_scale=True,
        normalize_drift_theta=False,
        **changes,
    )


def losses(x: Tensor, y: Tensor, settings: FieldSettings) -> Tensor:
    """mean(V^2), added up over independent runs: points `x [R, N, 2]`, targets `y [R, M, 2]`.

    The sum gives every run the gradient that it would have alone.
    """
    loss, _ = drifting_loss(
        x[:, :, None], y[:, :, None], y[:, :0, None], torch.ones(len(x), device=x.device), settings
    )
    return len(x) * loss


def velocity(x: Tensor, y: Tensor, settings: FieldSettings) -> Tensor:
    """V `[N, 2]` of points `x [N, 2]` and targets `y [M, 2]`.

    It is read off the gradient of the loss: dloss/dx = -2 V / numel(x).
    """
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(losses(x[None], y[None], settings), x)
    return slope * (-x.numel() / 2)
