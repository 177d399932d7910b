"""The drifting loss as one reads it: problem by problem, temperature by temperature, in float64."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from drift.field.settings import FieldSettings

TRANSPORT = ("sinkhorn", "unbalanced")
GUARDS = {"release": (1e-8, 1e-3, 1e-8), "sinkhorn": (0.0, 1e-6, 1e-12), "wflow": (0.0, 1e-3, 1e-8)}
"""Of squared distances, S and mean(V^2), by whose code."""


class Naive(NamedTuple):
    loss: Tensor
    grad: Tensor
    scale: Tensor
    drift_rms: Tensor
    attraction: dict[str, Tensor]
    marginal_error: Tensor | None


@dataclass
class Problem:
    """One class at one location."""

    x: Tensor  # [N, C]
    targets: Tensor  # [M, C], in the order of K repelling, U unconditional and P positive vectors
    weights: Tensor  # [M], w for the unconditional ones and 1 for the others
    distances: Tensor  # [N, M]
    self_pairs: Tensor  # [N, M], whether a target is the generated vector itself
    negatives: int  # K + U
    unconditional: slice
    omega: Tensor


def naive_drifting_loss(
    x: Tensor,
    pos: Tensor,
    uncond: Tensor,
    omega: Tensor,
    settings: FieldSettings,
    negatives: Tensor | None = None,
) -> Naive:
    """Arguments and results as those of `drifting_loss`, for settings that do not contradict each other."""
    x, pos, uncond, omega = (t.detach().double() for t in (x, pos, uncond, omega))
    repelling = x if negatives is None else negatives.detach().double()
    classes, _, locations, channels = x.shape
    problems = {}
    for c, l in product(range(classes), range(locations)):
        vectors = (t[c, :, l] for t in (x, repelling, uncond, pos))
        problems[c, l] = make_problem(*vectors, omega[c], settings)
    size = {"batch": classes, "part": settings.classes_per_part or classes, "class": 1}
    size = size[settings.normalization_scope]
    sharing = [range(c, c + size) for c in range(0, classes, size)]  # one S and one lambda

    scale = torch.ones(classes, dtype=torch.float64)
    if not settings.unit_scale:
        for group in sharing:
            scale[group] = feature_scale([p for (c, _), p in problems.items() if c in group], settings)

    total = torch.zeros_like(x)
    drift_rms, attraction, errors = [], [], []
    for tau in settings.temps:
        raw, attracted, deviations = torch.empty_like(x), [], []
        for (c, l), problem in problems.items():
            raw[c, :, l], spread, deviation = drift(problem, scale[c], tau, settings)
            attracted.append(spread)
            deviations.append(deviation)
        drift_rms.append(raw.square().mean().sqrt())
        attraction.append({name: sum(s[name] for s in attracted) / len(attracted) for name in attracted[0]})
        if settings.coupling in TRANSPORT:  # of several plans the one that is furthest off
            errors.append(torch.tensor(deviations, dtype=torch.float64).amax(dim=1).mean())

        if settings.drift_tau_scale:
            raw *= (2 if settings.dist_metric == "l2_sq" else 1) / (tau * math.sqrt(channels))
        for group in sharing:
            floor = GUARDS[settings.conventions][2]  # of what has no unit
            squared = settings.dist_metric == "l2_sq" and settings.scale_statistic == "mean"
            floor = floor / scale[group[0]] if squared else floor
            mean_square = raw[group].square().mean().clamp(min=floor)
            total[group] += raw[group] / (mean_square.sqrt() if settings.normalize_drift_theta else 1)

    x.requires_grad_()
    scaled = x / scale[:, None, None, None]
    loss = (scaled - (scaled + total).detach()).square().mean()
    (grad,) = torch.autograd.grad(loss, x)
    return Naive(
        loss.detach(),
        grad,
        scale.mean(),
        torch.stack(drift_rms),
        {name: torch.tensor([of[name] for of in attraction]) for name in attraction[0]},
        torch.stack(errors) if settings.coupling in TRANSPORT else None,
    )


def make_problem(x, repelling, uncond, pos, omega, settings) -> Problem:
    n, k, u = len(x), len(repelling), len(uncond)
    itself = settings.negatives == "self"
    others = itself or settings.conventions == "wflow"
    w = ((n - 1) if others else k) * (float(omega) - 1) / u if u else 0.0
    targets = torch.cat([repelling, uncond, pos])
    squares = (x[:, None] - targets).square().sum(dim=-1)
    squares = squares.clamp(min=GUARDS[settings.conventions][0])
    return Problem(
        x=x,
        targets=targets,
        weights=torch.tensor([1.0] * k + [w] * u + [1.0] * len(pos), dtype=torch.float64),
        distances=squares if settings.dist_metric == "l2_sq" else squares.sqrt(),
        self_pairs=torch.eye(n, len(targets), dtype=torch.bool) & itself,
        negatives=k + u,
        unconditional=slice(k, k + u),
        omega=omega,
    )


def feature_scale(problems: Sequence[Problem], settings: FieldSettings) -> Tensor:
    """S: weighted mean distance, or its root mean square, over the pairs of these problems, over sqrt(C)."""
    rms = settings.scale_statistic == "rms"
    length = settings.scale_statistic == "mean_length" and settings.dist_metric == "l2_sq"
    floor, scale_floor, _ = GUARDS[settings.conventions]
    total = count = 0.0
    for problem in problems:
        pairs = []
        for i, j in product(range(len(problem.x)), range(len(problem.targets))):
            unconditional = problem.unconditional.start <= j < problem.unconditional.stop
            if bool(problem.self_pairs[i, j]) and not settings.self_in_scale:
                continue
            if unconditional and settings.guidance == "velocity":
                continue
            pairs.append((problem.distances[i, j], problem.weights[j]))
        if settings.generated_in_scale:
            for i, j in product(range(len(problem.x)), repeat=2):
                if i != j or settings.self_in_scale:
                    d = (problem.x[i] - problem.x[j]).square().sum().clamp(min=floor)
                    pairs.append((d if settings.dist_metric == "l2_sq" else d.sqrt(), 1.0))
        for d, w in pairs:
            d = d.square() if rms and settings.dist_metric == "l2" else d
            total += w * (d.sqrt() if length else d)
            count += w
    mean = torch.as_tensor(total / count)
    return ((mean.sqrt() if rms else mean) / math.sqrt(problems[0].x.shape[-1])).clamp(min=scale_floor)


def drift(problem: Problem, scale: Tensor, tau: float, settings: FieldSettings):
    """V_tau `[N, C]` before any factor, how weights over positives spread, each plan's marginal error."""
    channels, negatives = problem.x.shape[-1], problem.negatives
    kernels = settings.temps if settings.sinkhorn_agg_kernel else [tau]
    cost = settings.cost_factor * problem.distances / (scale * math.sqrt(channels))
    if settings.scale_statistic != "mean" and settings.dist_metric == "l2_sq":
        cost = cost / (scale * math.sqrt(channels))
    logits = torch.stack([-cost / t for t in kernels]).logsumexp(dim=0) - math.log(len(kernels))
    alone = settings.coupling in TRANSPORT and settings.sinkhorn_iters == 0
    if settings.mask_self_neg or alone:  # alone, a self-pair moves nothing
        logits = logits.masked_fill(problem.self_pairs, -math.inf)

    weights = problem.weights
    if settings.guidance == "velocity":
        repelling, u, omega = problem.unconditional.start, problem.unconditional, problem.omega
        maps, errors = [], []
        for block in (slice(repelling), u, slice(negatives, None)):
            if logits[:, block].shape[1]:
                plan, error = couple(logits[:, block], torch.ones_like(weights[block]), settings)
                plan = plan / row_mass(plan, settings)
                errors += error
            else:
                plan, omega = torch.zeros_like(logits[:, block]), torch.ones_like(omega)
            maps.append(plan)
        to_neg, to_uncond, to_pos = maps
        coefficients = torch.cat([-to_neg, -(omega - 1) * to_uncond, omega * to_pos], dim=1)
    elif settings.drift_form == "split":
        to_neg, error_neg = couple(logits[:, :negatives], weights[:negatives], settings)
        to_pos, error_pos = couple(logits[:, negatives:], weights[negatives:], settings)
        errors = error_neg + error_pos
        if settings.coupling in TRANSPORT and settings.sinkhorn_marginal == "post_guidance":
            to_neg[:, problem.unconditional] *= problem.omega
        p_neg, p_pos = (a / row_mass(a, settings) for a in (to_neg, to_pos))
        coefficients = torch.cat([-p_neg, p_pos], dim=1)
    else:
        affinity, errors = couple(logits, weights, settings)
        to_neg, to_pos = affinity[:, :negatives], affinity[:, negatives:]
        neg_mass, pos_mass = (a.sum(dim=1, keepdim=True) for a in (to_neg, to_pos))
        coefficients = torch.cat([-to_neg * pos_mass, to_pos * neg_mass], dim=1)

    displacements = (problem.targets - problem.x[:, None]) / scale  # [N, M, C]
    if settings.drift_unit_vec:
        lengths = problem.distances[:, :, None] / scale
        displacements = torch.where(lengths > 0, displacements / lengths, 0)
    field = (coefficients[:, :, None] * displacements).sum(dim=1)
    return field, spread_of(to_pos), errors


def spread_of(weights: Tensor) -> dict[str, float]:
    """What is logged of weights over positives `[N, P]`."""
    n, positives = weights.shape
    rows = [[w / sum(row) for w in row] for row in weights.tolist()]
    entropies = [-sum(p * math.log(p) for p in row if p > 0) for row in rows]
    received = [sum(row[j] for row in rows) for j in range(positives)]
    return {
        "neighbours": sum(1 / sum(p * p for p in row) for row in rows) / n,
        "row_entropy": sum(entropies) / n,
        "unused_positives": sum(mass < 0.01 * n / positives for mass in received) / positives,
    }


def row_mass(plan: Tensor, settings: FieldSettings) -> Tensor | float:
    """What the rows of A are divided by; without iterations, what those of a plan hold."""
    alone = settings.coupling in TRANSPORT and settings.sinkhorn_iters == 0
    return 1 / len(plan) if alone else plan.sum(dim=1, keepdim=True)


def couple(logits: Tensor, weights: Tensor, settings: FieldSettings) -> tuple[Tensor, list[float]]:
    """A `[N, M]` from logits and column weights `[M]`, and, for `sinkhorn` only, its marginal error."""
    sinkhorn = settings.coupling in TRANSPORT
    by_logit = settings.sinkhorn_marginal == "none" if sinkhorn else settings.uncond_weighting == "logit"
    present = weights > 0 if by_logit else torch.ones_like(weights, dtype=torch.bool)
    z = logits[:, present] + (weights[present].log() if by_logit else 0)
    affinity = torch.zeros_like(logits)

    if sinkhorn:
        weighted = settings.sinkhorn_marginal == "weighted_cols"
        marginal = weights.clamp(min=1e-6) if weighted else torch.ones_like(z[0])
        affinity[:, present], error = sinkhorn_plan(z, marginal / marginal.sum(), settings)
        return affinity, [error]

    if settings.alg2_impl == "kernel":
        kernel = z.exp()
        rows, columns = (kernel.sum(dim=d, keepdim=True).clamp(min=1e-12) for d in (1, 0))
        a = kernel / (rows if settings.coupling == "row" else (rows * columns).sqrt())
    elif settings.coupling == "row":
        a = z.softmax(dim=1)
    else:
        a = ((z.log_softmax(dim=1) + z.log_softmax(dim=0)) / 2).exp()
    affinity[:, present] = a.clamp(min=math.sqrt(settings.affinity_floor))
    return affinity if by_logit else affinity * weights, []


def sinkhorn_plan(z: Tensor, marginal: Tensor, settings: FieldSettings) -> tuple[Tensor, float]:
    n = len(z)
    rho = settings.options.get("rho", 10.0)
    damping = rho / (1 + rho) if settings.coupling == "unbalanced" else 1.0
    f, g = torch.zeros_like(z[:, :1]), torch.zeros_like(z[:1])
    if settings.sinkhorn_iters == 0:
        plan = z.exp() * marginal / n
        row_error = (plan.sum(dim=1) - 1 / n).abs().sum()
    for _ in range(settings.sinkhorn_iters):
        f = damping * (-math.log(n) - (z + g).logsumexp(dim=1, keepdim=True))
        g = damping * (marginal.log() - (z + f).logsumexp(dim=0, keepdim=True))
        plan = (z + f + g).exp()
        row_error = (plan.sum(dim=1) - 1 / n).abs().sum()
        if row_error <= settings.sinkhorn_tolerance:
            break
    return plan, float(row_error + (plan.sum(dim=0) - marginal).abs().sum())
