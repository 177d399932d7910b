"""The drifting loss as one reads it: problem by problem, pair by pair, in float64, by release conventions."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from drift.field.settings import FieldSettings


class Naive(NamedTuple):
    loss: Tensor
    grad: Tensor
    scale: Tensor
    drift_rms: Tensor


def naive_drifting_loss(
    x: Tensor, pos: Tensor, uncond: Tensor, omega: Tensor, settings: FieldSettings
) -> Naive:
    """Arguments as those of `drifting_loss`; only for `alg2_joint` drifts of `l2` distances."""
    x, pos, uncond, omega = (t.detach().double() for t in (x, pos, uncond, omega))
    classes, n, locations, channels = x.shape
    u = uncond.shape[1]
    problems = [(c, l) for c in range(classes) for l in range(locations)]

    def targets(c, l):
        return torch.cat([x[c, :, l], uncond[c, :, l], pos[c, :, l]])

    def weights(c):
        w = (n - 1) * (omega[c] - 1) / u if u else 0.0
        return torch.tensor([1.0] * n + [w] * u + [1.0] * pos.shape[1], dtype=torch.float64)

    def distance(a, b):
        return math.sqrt(max(float((a - b).square().sum()), 1e-8))

    distances = {
        (c, l): torch.tensor([[distance(a, b) for b in targets(c, l)] for a in x[c, :, l]]).double()
        for c, l in problems
    }
    numerator = sum((distances[c, l] * weights(c)).sum() for c, l in problems)
    denominator = sum(n * weights(c).sum() for c, l in problems)
    mean_distance = numerator / denominator
    s = max(float(mean_distance) / math.sqrt(channels), 1e-3)

    drift = torch.zeros_like(x)
    drift_rms = []
    for tau in settings.temps:
        raw = torch.zeros_like(x)
        for c, l in problems:
            d = distances[c, l] / (s * math.sqrt(channels))
            if settings.mask_self_neg:
                d = d + 100 * torch.eye(n, d.shape[1])
            over_targets = (-d / tau).log_softmax(dim=1)
            over_generated = (-d / tau).log_softmax(dim=0)
            if settings.coupling == "row":
                a = over_targets.exp()
            else:
                a = ((over_targets + over_generated) / 2).exp()
            a = a.clamp(min=math.sqrt(settings.affinity_floor)) * weights(c)
            y = targets(c, l) / s
            for i in range(n):
                a_neg, a_pos = a[i, : n + u], a[i, n + u :]
                raw[c, i, l] += (a_pos * a_neg.sum()) @ (y[n + u :] - y[i])
                raw[c, i, l] -= (a_neg * a_pos.sum()) @ (y[: n + u] - y[i])
        mean_square = raw.square().mean()
        drift_rms.append(mean_square.sqrt())
        drift += raw / mean_square.clamp(min=1e-8).sqrt()

    x.requires_grad_()
    goal = (x / s + drift).detach()
    loss = (x / s - goal).square().mean()
    (grad,) = torch.autograd.grad(loss, x)
    return Naive(loss.detach(), grad, mean_distance, torch.stack(drift_rms))
