"""The drifting loss of one feature set: value, and gradient without an autograd graph (paper Alg. 1, 2).

Shapes: Nc classes, N generated, U unconditional and P positive samples for each, M = N + U + P targets,
L locations, C channels, T temperatures. One drift problem is one (class, location).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drift.errors import UserError
from drift.field.coupling import COUPLINGS
from drift.field.distance import feature_scale, l2, weighted_sums
from drift.field.form import DRIFT_FORMS
from drift.field.guidance import target_weights, unconditional_weight
from drift.field.settings import FieldSettings, unsupported

SELF_MASK = 100.0  # release: added to d / mean(d) where a vector meets itself
MEAN_SQUARE_FLOOR = 1e-8  # release: of V_tau, so that lambda_tau >= 1e-4

Reduce = Callable[[Tensor], Tensor]
"""Sums a 1-D float32 tensor over the processes that share the classes of a step."""


def drifting_loss(
    x: Tensor,
    pos: Tensor,
    uncond: Tensor,
    omega: Tensor,
    settings: FieldSettings,
    *,
    reduce: Reduce | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The drifting loss of one feature set, and what it tells about the field (paper Alg. 1, A.6).

        loss = mean((x/S - stopgrad(x/S + V))^2)
        hence its value is mean(V^2), and dloss/dx = -2 V / (S numel(x))

    The mean is over classes, samples, locations and channels. All of it is computed in float32, whatever
    the inputs are and whether or not autocast is on; the gradient has the type of `x`. Short distances are
    small differences of inner products: leave `torch.set_float32_matmul_precision` at "highest".

    Args:
        x: generated vectors `[Nc, N, L, C]`; the loss can be differentiated in them, once.
        pos: vectors of real samples of the same class, `[Nc, P, L, C]`.
        uncond: vectors of real samples of any class, `[Nc, U, L, C]`; U may be 0.
        omega: CFG strength of each class, at least 1, `[Nc]`.
        settings: the knobs of the field.
        reduce: given where processes share the classes of a step. S, lambda and the statistics then
            belong to all of them; the loss is the mean over this process's classes, so that gradients
            averaged over processes (equal shares assumed) are those of one process with all classes.

    Returns:
        The loss and detached statistics: `loss`; `scale`, the weighted mean distance that S is made of;
        `drift_rms`, the RMS of every V_tau before normalisation, `[T]`.

    Raises:
        UserError: a knob has a value that the field cannot compute.
    """
    if complaint := unsupported(settings):
        raise UserError(complaint)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        loss, drift, slope, statistics = _drift(
            x, pos, uncond, omega, settings, reduce or (lambda sums: sums)
        )
    return _KnownGradient.apply(x, loss, drift, slope), statistics


def _drift(
    x: Tensor, pos: Tensor, uncond: Tensor, omega: Tensor, settings: FieldSettings, reduce: Reduce
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """The loss, V `[Nc, N, L, C]`, the slope in `dloss/dx = slope V`, and the statistics."""
    assert omega.shape == x.shape[:1], f"{tuple(omega.shape)} strengths for {len(x)} classes"
    n, u, p = x.shape[1], uncond.shape[1], pos.shape[1]
    channels, temps = x.shape[-1], settings.temps
    weight = unconditional_weight(omega, n, u)  # [Nc]

    # Only differences of vectors matter, and centred vectors keep more digits of them.
    targets = torch.cat([samples.transpose(1, 2) for samples in (x, uncond, pos)], dim=2).float()
    targets -= targets.mean(dim=2, keepdim=True)  # [Nc, L, M, C]
    long_vectors = channels > n + u + p
    gram = (targets if long_vectors else targets[:, :, :n]) @ targets.mT  # [Nc, L, M or N, M]
    distances = l2(gram[:, :, :n], targets.square().sum(dim=-1))  # [Nc, L, N, M]

    # S = mean(d) / sqrt(C)
    distance_sum, weight_sum = reduce(weighted_sums(distances, target_weights(weight, n, u, p)))
    mean_distance = distance_sum / weight_sum
    scale = feature_scale(mean_distance, channels)

    # logits_tau = -d / (tau S sqrt(C)); a coupling makes A_tau of them, a drift form R_tau
    distances /= scale * math.sqrt(channels)
    if settings.mask_self_neg:
        distances.diagonal(dim1=-2, dim2=-1).add_(SELF_MASK)
    logits = torch.stack([distances / -tau for tau in temps], dim=2)  # [Nc, L, T, N, M]
    affinity = COUPLINGS[settings.coupling](logits).clamp_min_(math.sqrt(settings.affinity_floor))
    affinity[..., n : n + u] *= weight[:, None, None, None, None]
    coefficients = DRIFT_FORMS[settings.drift_form](affinity, negatives=n + u)
    coefficients = coefficients.flatten(2, 3)  # [Nc, L, T*N, M]

    # S V_tau = R_tau Y. The release subtracts rowsum(R_tau) x, which is zero but for rounding; centred
    # targets make that rounding harmless. Where vectors are longer than M, the fields stay coefficients
    # until the temperatures are summed, and their inner products are R_tau G R_tau'^T.
    if long_vectors:
        fields, duals = coefficients, coefficients @ gram
    else:
        fields = duals = coefficients @ targets
    fields, duals = (f.unflatten(2, (len(temps), n)).flatten(3) for f in (fields, duals))
    products = (fields @ duals.mT).sum(dim=(0, 1)) / scale.square()  # sum of V_tau V_tau', [T, T]

    # lambda_tau = sqrt(mean(V_tau^2)),  V = sum_tau V_tau / lambda_tau,  so that mean(V^2) needs no V
    numel = products.new_full((1,), x.numel())
    sums = reduce(torch.cat([numel, products.flatten()]))
    mean_products = (sums[1:] / sums[0]).view_as(products)
    mean_squares = mean_products.diagonal()
    inverse_lambda = mean_squares.clamp_min(MEAN_SQUARE_FLOOR).rsqrt()  # [T]
    loss = inverse_lambda @ products @ inverse_lambda / numel
    drift = fields.mul_((inverse_lambda / scale)[:, None]).sum(dim=2).unflatten(2, (n, -1))
    if long_vectors:
        drift = drift @ targets

    statistics = {
        "loss": inverse_lambda @ mean_products @ inverse_lambda,
        "scale": mean_distance,
        "drift_rms": mean_squares.clamp_min(0).sqrt(),
    }
    return loss.squeeze(0), drift.transpose(1, 2), -2 / (scale * x.numel()), statistics


class _KnownGradient(torch.autograd.Function):
    """A loss whose gradient in `x` is known to be `slope * drift`."""

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor, drift: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(drift.to(x.dtype), slope)  # half the memory where the gradient is half precise
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_gradient: Tensor):
        drift, slope = ctx.saved_tensors
        return (drift.float() * (slope * loss_gradient)).to(drift.dtype), None, None, None
