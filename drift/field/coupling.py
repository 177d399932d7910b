"""Couplings: from logits to non-negative weights A between generated vectors and targets.

Every one is A_ij = exp(z_ij + f_i + g_j) for logits z `[..., N, M]`; they differ in the potentials f and g.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from drift.errors import one_of

MAXIMA_RANGE = 160.0  # of logits: a quarter of it to either side is well within a float's exponents
ITERATIONS_PER_KERNEL = 5
KERNEL_RANGE = 20.0  # of the potentials: what underflows in the kernel then stays below 1e-20 of a plan
REMOVED = -1e30  # logit or potential of a target that is not there: its kernel is zero at any temperature
KERNEL_SUM_FLOOR = 1e-12  # prior: of the row and column sums of exponentiated logits


def row(logits: Tensor) -> Tensor:
    """A = softmax of each generated vector over its targets: `[..., N, M]` -> `[..., N, M]`.

    A_ij = K_ij / sum_j K_ij,  K = exp(logits)
    """
    return logits.softmax(dim=-1)


def partial_two_sided(logits: Tensor) -> Tensor:
    """Geometric mean of the softmax over targets and that over generated vectors (paper Alg. 2).

        A_ij = K_ij / sqrt(sum_j K_ij sum_i K_ij),  K = exp(logits);  `[..., N, M]` -> `[..., N, M]`

    With row maxima r_i and column maxima c_j, all of it comes from one exponential that cannot overflow,
    B_ij = exp(z_ij - (r_i + c_j) / 2) <= 1:

        sum_j K_ij = e^(r_i / 2) sum_j B_ij e^(c_j / 2),  and so for columns

    as long as the maxima of a problem lie so near each other that their exponentials are floats. Where
    they do not, and on a GPU, where asking would make it wait, the sums are taken in log space.
    """
    row_max, column_max = logits.amax(dim=-1, keepdim=True), logits.amax(dim=-2, keepdim=True)
    top = torch.maximum(row_max.amax(dim=-2, keepdim=True), column_max.amax(dim=-1, keepdim=True))
    bottom = torch.minimum(row_max.amin(dim=-2, keepdim=True), column_max.amin(dim=-1, keepdim=True))
    if logits.device.type != "cpu" or (top - bottom).max() > MAXIMA_RANGE:
        potentials = logits.logsumexp(dim=-1, keepdim=True) + logits.logsumexp(dim=-2, keepdim=True)
        return (logits - potentials.div_(2)).exp_()
    rows, columns = ((maxima - (top + bottom) / 2).div_(2) for maxima in (row_max, column_max))
    kernel = (logits - (top + bottom) / 2).sub_(rows).sub_(columns).exp_()  # B
    rows, columns = rows.exp_(), columns.exp_()
    # K = rows B columns, so that A = B sqrt(rows / (B columns)) sqrt(columns / (B^T rows))
    row_factors = (rows / (kernel @ columns.mT)).sqrt_()
    return kernel.mul_((columns / (rows.mT @ kernel)).sqrt_()).mul_(row_factors)


def row_kernel(logits: Tensor) -> Tensor:
    """`row` with the logits exponentiated first; rows may underflow to zero (prior, `alg2_impl: kernel`)."""
    kernel = logits.exp()
    return kernel.div_(kernel.sum(dim=-1, keepdim=True).clamp_min_(KERNEL_SUM_FLOOR))


def partial_two_sided_kernel(logits: Tensor) -> Tensor:
    """`partial_two_sided` with the logits exponentiated first (prior, `alg2_impl: kernel`)."""
    kernel = logits.exp()
    rows, columns = (kernel.sum(dim=d, keepdim=True).clamp_min_(KERNEL_SUM_FLOOR).rsqrt_() for d in (-1, -2))
    return kernel.mul_(rows).mul_(columns)


COUPLINGS = {
    ("row", "logspace"): row,
    ("row", "kernel"): row_kernel,
    ("partial_two_sided", "logspace"): partial_two_sided,
    ("partial_two_sided", "kernel"): partial_two_sided_kernel,
}
"""By `coupling` and `alg2_impl`; for `sinkhorn` see there."""


def normalised_rows(logits: Tensor, coupling: str) -> Tensor:
    """P = A divided by its row sums, which can be too small for a float, without making A.

        P_ij = exp(z_ij + g_j) / sum_j exp(z_ij + g_j)

    for `row` (g = 0) and `partial_two_sided` (g_j = -1/2 log sum_i exp z_ij).
    """
    if one_of("coupling", coupling, "row", "partial_two_sided") == "partial_two_sided":
        logits = logits - logits.logsumexp(dim=-2, keepdim=True) / 2
    return logits.softmax(dim=-1)


def sinkhorn(
    logits: Tensor, column_weights: Tensor, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Entropic optimal transport by log-space scalings: row marginal 1/N, given column marginal (prior).

        f_i = log(1/N) - log sum_j exp(z_ij + g_j),  g_j = log b_j - log sum_i exp(z_ij + f_i)

    so that columns are exact after each iteration and rows get there. Most sums are products with the
    kernel exp(z + f + g) of some iterations ago, which has entries of a plan's size.

    Args:
        logits: z, `[B, T, N, M]`.
        column_weights: proportional to b, `[B, M]`; a column of weight 0 is left out of the problem.
        iterations: at most so many.
        tolerance: a (problem, temperature) stops for itself, whatever else is in the batch, once its
            sum_i |sum_j A_ij - 1/N| is at most this.

    Returns:
        The plan A `[B, T, N, M]`, the column potentials g `[B, T, 1, M]`, and the error of both marginals,
        `sum_i |sum_j A_ij - 1/N| + sum_j |sum_i A_ij - b_j|`, `[B, T]`.
    """
    n = logits.shape[-2]
    marginal = (column_weights / column_weights.sum(dim=-1, keepdim=True))[:, None, None]  # b, [B, 1, 1, M]
    log_marginal, removed = marginal.log(), marginal == 0
    start = Potentials(
        f=logits.new_full((*logits.shape[:-1], 1), math.inf),  # not read but for the first row sums: not done
        g=torch.where(removed, REMOVED, torch.zeros_like(logits[..., :1, :])),
        done=torch.zeros_like(logits[..., :1, :1], dtype=torch.bool),
    )

    def iterate(start: Potentials, count: int, log_sums: LogSums) -> Potentials:
        f, g, done = start
        for _ in range(count):
            next_f = -math.log(n) - log_sums(g, -1)
            if tolerance > 0:
                # The row sums of exp(z + f + g) are exp(f - next_f) / N
                done = done | (((f - next_f).exp() - 1).abs().mean(dim=-2, keepdim=True) <= tolerance)
                next_f = torch.where(done, f, next_f)
            next_g = torch.where(removed, REMOVED, log_marginal - log_sums(next_f, -2))
            f, g = next_f, torch.where(done, g, next_g) if tolerance > 0 else next_g
        return Potentials(f, g, done)

    now, step = iterate(start, 1, _log_sums(logits)), 1
    while step < iterations and not (tolerance > 0 and now.done.all()):
        count = min(ITERATIONS_PER_KERNEL, iterations - step)
        after = iterate(now, count, _log_sums_by_kernel(logits, now))
        moved = torch.maximum((after.f - now.f).abs().amax(), (after.g - now.g).abs().amax())
        # Not a number where a row of the kernel has underflowed
        now = after if moved < KERNEL_RANGE else iterate(now, count, _log_sums(logits))
        step += count

    plan = (logits + now.g).add_(now.f).exp_()
    row_error = (plan.sum(dim=-1) - 1 / n).abs().sum(dim=-1)
    column_error = (plan.sum(dim=-2) - marginal[:, :, 0]).abs().sum(dim=-1)
    return plan, now.g, row_error + column_error


class Potentials(NamedTuple):
    """Where the iterations of `sinkhorn` are."""

    f: Tensor
    """`[B, T, N, 1]`"""
    g: Tensor
    """`[B, T, 1, M]`"""
    done: Tensor
    """Whether a (problem, temperature) has stopped, `[B, T, 1, 1]`."""


LogSums = Callable[[Tensor, int], Tensor]
"""(g, -1) -> log sum_j exp(z_ij + g_j);  (f, -2) -> log sum_i exp(z_ij + f_i)."""


def _log_sums(logits: Tensor) -> LogSums:
    return lambda potential, dim: (logits + potential).logsumexp(dim=dim, keepdim=True)


def _log_sums_by_kernel(logits: Tensor, around: Potentials) -> LogSums:
    """The same near given potentials, by products with K = exp(z + f + g): one exponential for many sums."""
    kernel = (logits + around.g).add_(around.f).exp_()

    def log_sums(potential: Tensor, dim: int) -> Tensor:
        if dim == -1:
            return (kernel @ (potential - around.g).exp().mT).log() - around.f
        return ((potential - around.f).exp().mT @ kernel).log() - around.g

    return log_sums
