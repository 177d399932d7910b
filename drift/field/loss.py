"""The drifting loss of one feature set: value, and gradient without an autograd graph (paper Alg. 1, 2).

Shapes: Nc classes, N generated, U unconditional and P positive samples for each, L locations, C channels,
T temperatures. One drift problem is one (class, location); see `drift/field/problems.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drift.errors import UserError
from drift.field.distance import GUARDS, feature_scale
from drift.field.guidance import unconditional_weight
from drift.field.problems import Chunk, Coefficients, FeatureSet, Measured
from drift.field.settings import FieldSettings, contradiction

Reduce = Callable[[Tensor], Tensor]
"""Sums a 1-D float32 tensor over the processes that share the classes of a step."""

CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 2 * 2**30}
"""Memory for one chunk: on a CPU what stays in its caches, on a GPU what keeps it busy."""
KEEP_BYTES = {"cpu": 4 * 2**30, "cuda": 16 * 2**30}
"""Memory for what one pass over the chunks keeps for the next; beyond it, chunks are computed again."""


def drifting_loss(
    x: Tensor,
    pos: Tensor,
    uncond: Tensor,
    omega: Tensor,
    settings: FieldSettings,
    *,
    negatives: Tensor | None = None,
    reduce: Reduce | None = None,
    chunk_bytes: int | None = None,
    keep_bytes: int | None = None,
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
        negatives: for `settings.negatives: second_batch`, vectors of other generated samples of the same
            class, `[Nc, K, L, C]`, which repel x in place of x itself.
        reduce: given where processes share the classes of a step. S, lambda and the statistics then
            belong to all of them; the loss is the mean over this process's classes, so that gradients
            averaged over processes (equal shares assumed) are those of one process with all classes.
        chunk_bytes, keep_bytes: memory bounds, see `CHUNK_BYTES` and `KEEP_BYTES`; they change the result
            by rounding only.

    Returns:
        The loss and detached statistics, all over classes and locations: `loss`; `scale`, the feature scale
        S (its mean where each class has its own); per temperature `[T]` `drift_rms`, the RMS of V_tau
        before normalisation; `neighbours`, the effective number (sum_j A_ij)^2 / sum_j A_ij^2 of positives
        that attract one generated vector; for `sinkhorn` `marginal_error`, the L1 distance of both marginals
        of the plan from what they should be (for `split` that of the worse plan).

    Raises:
        UserError: two knobs contradict each other.
        ValueError: `negatives` is given without `settings.negatives: second_batch`, or missing with it.
    """
    if complaint := contradiction(settings):
        raise UserError(complaint)
    if (negatives is not None) != (settings.negatives == "second_batch"):
        raise ValueError(
            f"settings.negatives is {settings.negatives}, negatives are {type(negatives).__name__}"
        )
    assert omega.shape == x.shape[:1], f"{tuple(omega.shape)} strengths for {len(x)} classes"
    device = x.device.type
    with torch.no_grad(), torch.autocast(device, enabled=False):
        n, u = x.shape[1], uncond.shape[1]
        repelling = n - 1 if negatives is None else negatives.shape[1]
        features = FeatureSet(
            x,
            negatives,
            uncond,
            pos,
            omega.float(),
            unconditional_weight(omega, repelling, u),
            settings,
            GUARDS[settings.normalization_scope].squared_distance,
        )
        loss, drift, slope, statistics = _drift(
            features,
            reduce or (lambda sums: sums),
            CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) if chunk_bytes is None else chunk_bytes,
            KEEP_BYTES.get(device, KEEP_BYTES["cuda"]) if keep_bytes is None else keep_bytes,
        )
    return _KnownGradient.apply(x, loss, drift, slope), statistics


@dataclass
class _Kept:
    """A chunk on its way through the passes, with what is kept of it in between."""

    chunk: Chunk
    keep: bool
    measured: Measured | None = None
    """From the first pass to the second."""
    made: Tensor | Coefficients | None = None
    """What V is a weighted sum of, from the second pass to the third."""

    def measure(self) -> Measured:
        measured, self.measured = self.measured or self.chunk.measure(), None
        return measured

    def take(self, scale: Tensor) -> Tensor | Coefficients:
        made, self.made = self.made, None
        return self.chunk.coefficients(self.chunk.measure().distances, scale) if made is None else made


def _drift(
    features: FeatureSet, reduce: Reduce, chunk_bytes: int, keep_bytes: int
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """The loss, V `[Nc, N, L, C]`, the slope in `dloss/dx = slope V`, and the statistics.

    Three passes over chunks of problems: the fields need S, and V needs lambda, which belong to all.
    """
    x, settings = features.x, features.settings
    classes, n, _, channels = x.shape
    per_class = settings.normalization_scope == "class"
    guards = GUARDS[settings.normalization_scope]
    mean_square_floor = guards.mean_square
    if settings.coupling == "sinkhorn" and settings.drift_form == "alg2_joint":
        mean_square_floor /= n**4  # rows of a plan hold 1/N, those of other couplings about 1
    chunks, room = [], keep_bytes
    for chunk in features.chunks(max(1, chunk_bytes // features.working_bytes)):
        room -= chunk.problems * features.kept_bytes
        chunks.append(_Kept(chunk, keep=room >= 0))

    # S = mean(d) / sqrt(C)
    if settings.vanilla:
        scale = x.new_ones(classes, dtype=torch.float32)
    else:
        sums = x.new_zeros(2, classes, dtype=torch.float32)
        for kept in chunks:
            measured = kept.chunk.measure()
            sums[:, kept.chunk.classes] += kept.chunk.distance_sums(measured.distances)
            if kept.keep:
                kept.measured = measured
        if not per_class:
            sums = reduce(sums.sum(dim=1))[:, None].expand(2, classes)
        scale = feature_scale(sums[0] / sums[1], channels, guards.scale)  # [Nc]

    # sum V_tau V_tau' over the vectors of each class
    t = features.fields
    products = x.new_zeros(classes, t, t, dtype=torch.float32)
    neighbours, marginal_errors = x.new_zeros(2, t, dtype=torch.float32)
    for kept in chunks:
        measured = kept.measure()
        coefficients = kept.chunk.coefficients(measured.distances, scale)
        made, chunk_products = kept.chunk.inner_products(coefficients, measured)
        products[kept.chunk.classes] += chunk_products
        neighbours += coefficients.neighbours.sum(dim=(0, 2))
        if coefficients.marginal_error is not None:
            marginal_errors += coefficients.marginal_error.sum(dim=0)
        if kept.keep:
            kept.made = made
    products /= scale.square()[:, None, None]

    # lambda_tau = sqrt(mean(V_tau^2)),  V = sum_tau V_tau / lambda_tau,  so that mean(V^2) needs no V
    numel = x.new_tensor(x.numel(), dtype=torch.float32)
    factors = _factors(products * (classes / numel), features, mean_square_floor)  # [Nc, T]
    sums = (numel, products.sum(dim=0), _loss(factors, products), scale.sum(), scale.new_tensor(classes))
    all_numel, total, loss_sum, scale_sum, all_classes, neighbours, marginal_errors = _reduce(
        reduce, *sums, neighbours, marginal_errors
    )
    mean_products = total / all_numel
    if not per_class:
        factors = _factors(mean_products[None], features, mean_square_floor)
        loss_sum = _loss(factors, total[None])
        factors = factors.expand(classes, t)

    drift = torch.empty_like(x)  # half the memory where the gradient is half precise
    for kept in chunks:
        kept.chunk.write(drift, kept.take(scale), factors / scale[:, None])

    temps = len(settings.temps)
    statistics = {
        "loss": loss_sum / all_numel,
        "scale": scale_sum / all_classes,
        "drift_rms": mean_products.diagonal().clamp_min(0).sqrt().expand(temps),
        "neighbours": (neighbours / all_numel * channels).expand(temps),
    }
    if settings.coupling == "sinkhorn":
        statistics["marginal_error"] = (marginal_errors / all_numel * (channels * n)).expand(temps)
    slope = (-2 / (scale * numel))[:, None, None, None]
    return _loss(factors, products) / numel, drift, slope, statistics


def _factors(mean_products: Tensor, features: FeatureSet, floor: float) -> Tensor:
    """What every V_tau is multiplied by in V, from mean(V_tau V_tau') `[*, T, T]`: `[*, T]`."""
    settings = features.settings
    mean_squares = mean_products.diagonal(dim1=-2, dim2=-1)
    if settings.normalize_drift_theta:
        factors = mean_squares.clamp_min(floor).rsqrt()
    elif settings.drift_tau_scale:
        # |d log K / d d| = 1 / (tau sqrt(C)), and twice d more of it for squares
        power = 2 if settings.dist_metric == "l2_sq" else 1
        factors = power / (mean_squares.new_tensor(settings.temps) * math.sqrt(features.x.shape[-1]))
        factors = factors.expand_as(mean_squares)
    else:
        factors = torch.ones_like(mean_squares)
    return factors * (len(settings.temps) // features.fields)  # temperatures that share a field


def _loss(factors: Tensor, products: Tensor) -> Tensor:
    """Sum of V^2 from factors `[*, T]` and sums of V_tau V_tau' `[*, T, T]`."""
    return (factors[..., None, :] @ products @ factors[..., None]).sum()


def _reduce(reduce: Reduce, *tensors: Tensor) -> list[Tensor]:
    """Every tensor summed over the processes, in one collective."""
    sums = reduce(torch.cat([tensor.flatten() for tensor in tensors]))
    parts = sums.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


class _KnownGradient(torch.autograd.Function):
    """A loss whose gradient in `x` is known to be `slope * drift`."""

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor, drift: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(drift, slope)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_gradient: Tensor):
        drift, slope = ctx.saved_tensors
        return (drift.float() * (slope * loss_gradient)).to(drift.dtype), None, None, None
