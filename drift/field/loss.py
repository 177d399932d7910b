"""The drifting loss of one feature set (paper Alg. 1 and 2), with a gradient that needs no autograd graph.

Shapes: Nc classes, N generated, U unconditional and P positive samples for each, L locations, C channels,
T temperatures. One drift problem is one (class, location); B of them are computed at once.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drift.field.problems import Problems
from drift.field.settings import FieldSettings, contradictions
from drift.runtime.errors import UserError

Reduce = Callable[[Tensor], Tensor]
"""Sums a 1-D tensor over the processes that share the classes of a step."""


class Totals(NamedTuple):
    """Sums over all classes of a step, behind S and lambda, where the step is taken in parts."""

    distances: Tensor
    """`[2, 1]`, see `Problems.distance_sums`."""
    squares: Tensor
    """`[T + 1, 1]`, see `Problems.squares`."""


def drifting_loss(
    x: Tensor,
    pos: Tensor,
    uncond: Tensor,
    omega: Tensor,
    settings: FieldSettings,
    *,
    negatives: Tensor | None = None,
    reduce: Reduce | None = None,
    totals: Totals | None = None,
    attraction: bool = True,
    chunk_bytes: int | None = None,
    keep_bytes: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The drifting loss of one feature set, and statistics of the field (paper Alg. 1, A.6).

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
        settings: the settings of the field.
        negatives: for `settings.negatives: second_batch`, vectors of other generated samples of the same
            class, `[Nc, K, L, C]`, which repel x in place of x itself.
        reduce: given where processes share the classes of a step. With `normalization_scope: batch`, S and
            lambda then belong to all of them; the loss is the mean over this process's classes, so that
            gradients averaged over processes are those of one process with all classes.
        totals: for `normalization_scope: batch`, where these are only some of the classes of a step.
        attraction: whether to compute the statistics of `drift.field.guidance.Attraction`, which take up to a
            tenth of the time.
        chunk_bytes, keep_bytes: memory bounds, see `Problems`; they change the result by rounding only.

    Returns:
        The loss and detached statistics of these classes: `loss`; `scale`, S (the mean of several); per
        temperature `[T]` `drift_rms`, the RMS of V_tau before normalisation; those of the coupling; and
        `neighbours`, `row_entropy` and `unused_positives` (see `drift.field.guidance.Attraction`).

    Raises:
        UserError: two settings contradict each other.
        ValueError: `negatives` is given without `settings.negatives: second_batch`, or missing with it; the
            classes are not a multiple of `settings.classes_per_part`.
    """
    if complaint := next(contradictions(settings, x.shape[1]), None):
        raise UserError(complaint)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        problems = Problems(x, pos, uncond, omega, settings, negatives, attraction, chunk_bytes, keep_bytes)
        # 1. S = mean distance / sqrt(C)
        distances = totals.distances if totals else pooled(problems.distance_sums(), settings, reduce)
        scale = feature_scale(distances, problems)  # [Nc]
        # 2. V_tau of every temperature, and lambda_tau = RMS of V_tau
        fields = problems.fields(scale)
        squares = totals.squares if totals else pooled(problems.squares(fields, scale), settings, reduce)
        factors = temperature_factors(squares, scale, problems)  # [Nc or 1, T]
        # 3. V = sum_tau V_tau / lambda_tau, the loss mean(V^2), and its gradient
        drift, value, statistics = problems.drift(fields, factors / scale[:, None])
        slope = (-2 / (scale * x.numel()))[:, None, None, None]
        rms = (squares[:-1] / squares[-1]).mean(dim=1).sqrt().float().expand(len(settings.temps))
        statistics |= {"loss": value, "scale": scale.mean(), "drift_rms": rms}
    return KnownGradient.apply(x, value, drift, slope), statistics


def pooled(sums: Tensor, settings: FieldSettings, reduce: Reduce | None = None) -> Tensor:
    """Sums of each class `[K, Nc]` -> sums over the classes that share S and lambda, `[K, Nc or 1]`."""
    if settings.normalization_scope == "class":
        return sums
    if settings.normalization_scope == "part" and (size := settings.classes_per_part):
        if sums.shape[1] % size:
            raise ValueError(f"classes_per_part = {size}: {sums.shape[1]} classes are not a multiple of it")
        return sums.unflatten(1, (-1, size)).sum(dim=2).repeat_interleave(size, dim=1)
    total = sums.sum(dim=1)
    if settings.normalization_scope == "batch" and reduce is not None:
        total = reduce(total)
    return total[:, None]


def feature_scale(distance_sums: Tensor, problems: Problems) -> Tensor:
    """S of each class `[Nc]`, bounded from below (paper A.6).

    S_j = mean distance / sqrt(C_j)
    """
    settings, channels, classes = problems.settings, problems.x.shape[-1], len(problems.x)
    if settings.unit_scale:
        return problems.x.new_ones(classes, dtype=torch.float32)
    mean = distance_sums[0] / distance_sums[1]
    if settings.scale_statistic == "rms":
        mean = mean.sqrt()
    scale = (mean / math.sqrt(channels)).clamp_min(settings.guards.scale)
    return scale.float().expand(classes)


def temperature_factors(squares: Tensor, scale: Tensor, problems: Problems) -> Tensor:
    """What every V_tau is multiplied by in V, `[Nc or 1, T]`: 1 / lambda_tau, if nothing else is set."""
    settings, channels = problems.settings, problems.x.shape[-1]
    mean_squares = (squares[:-1] / squares[-1]).mT.float()
    if settings.normalize_drift_theta:
        floor = settings.guards.mean_square * problems.row_mass**4
        # Where S is a square, V_tau is 1 / length
        factors = mean_squares.clamp_min(
            floor / scale[:, None] if settings.scale_is_square else floor
        ).rsqrt()
    elif settings.drift_tau_scale:
        # |d log K / d d| = 1 / (tau sqrt(C)), and twice d more of it for squares
        power = 2 if settings.dist_metric == "l2_sq" else 1
        factors = power / (problems.temps * math.sqrt(channels)).expand_as(mean_squares)
    else:
        factors = torch.ones_like(mean_squares)
    return factors * (len(settings.temps) // settings.fields)  # temperatures that share a field


class KnownGradient(torch.autograd.Function):
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
