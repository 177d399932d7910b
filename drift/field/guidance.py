"""Drift forms and guidance: from logits to the coefficients R of the field, V_i = sum_j R_ij y_j.

Classifier-free guidance acts at training time, by unconditional samples among the negatives (paper A.7).
Targets are in the order repelling (K generated vectors), unconditional (U), positive (P); M is their sum.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from drift.field.couplings import REMOVED, TINY, Coupling, Plan
from drift.field.settings import FieldSettings

UNCONDITIONAL_MARGINAL_FLOOR = 1e-6  # Sinkhorn paper's code, `weighted_cols`
UNUSED = 0.01  # of the weight that a positive has if all are alike
SMALLEST = torch.finfo(torch.float32).tiny


class Targets(NamedTuple):
    """What the targets of B problems are, and their guidance."""

    repelling: int
    """K."""
    unconditional: int
    """U."""
    positives: int
    """P."""
    omega: Tensor
    """CFG strength, `[B]`."""
    weight: Tensor
    """w of one unconditional target, `[B]`."""

    @property
    def negatives(self) -> int:
        return self.repelling + self.unconditional

    def uniform(self, count: int) -> Tensor:
        """The uniform marginal of `count` targets, not normalised, `[B, count]`."""
        return self.weight.new_ones(len(self.weight), count)


class Coefficients(NamedTuple):
    """The field of B problems, and what its couplings look like."""

    field: Tensor
    """R `[B, T, N, M]`."""
    statistics: dict[str, Tensor]
    """Those of the coupling, where there are several plans the largest of each, and `Attraction` if it is
    wanted; `[B, T]`."""


class Attraction(NamedTuple):
    """How the weights of A over positives spread, in rows p_i that are divided by their sums; `[B, T]`."""

    neighbours: Tensor
    """Effective number of positives, 1 / sum_j p_ij^2, mean over i: 1 if one has all, P if all are alike."""
    row_entropy: Tensor
    """-sum_j p_ij log p_ij in nats, mean over i: from 0 to log P."""
    unused_positives: Tensor
    """Share of positives with sum_i p_ij < 0.01 N / P, a hundredth of what each has if all are alike."""


def unconditional_weight(omega: Tensor, repelling: int, unconditional: int) -> Tensor:
    """Weight of one unconditional negative, per class: `[Nc]` -> `[Nc]`; 0 without guidance (omega = 1).

        w = G (omega - 1) / U

    G generated samples (`repelling`) repel each one: the N - 1 others, or all of an independent second batch.
    Together, the U unconditional samples then weigh omega - 1 times as much as these.
    """
    return (omega.float() - 1) * (repelling / max(unconditional, 1))


def target_weights(targets: Targets) -> Tensor:
    """Weight of every target, `[B, M]`: w of the unconditional ones, 1 of others."""
    weights = targets.uniform(targets.negatives + targets.positives)
    weights[:, targets.repelling : targets.negatives] = targets.weight[:, None]
    return weights


def coefficients(
    logits: Tensor, targets: Targets, settings: FieldSettings, attraction: bool = True
) -> Coefficients:
    """R from logits `[B, T, N, M]`, which it overwrites; `attraction` says whether that is wanted."""
    if settings.guidance == "velocity":
        return _velocity(logits, targets, settings, attraction)
    return {"alg2_joint": _joint, "split": _split}[settings.drift_form](logits, targets, settings, attraction)


def _joint(logits: Tensor, targets: Targets, settings: FieldSettings, attraction: bool) -> Coefficients:
    """Attraction and repulsion, each weighted by the other's mass (paper Alg. 2). Rows of R sum to zero.

    V_i = sum_{j in pos} A_ij (sum_{k in neg} A_ik) y_j - sum_{j in neg} A_ij (sum_{k in pos} A_ik) y_j
    """
    coupling = settings.coupling_object()
    affinity, statistics = _weighted(coupling, coupling.plan, logits, targets, settings)
    to_neg, to_pos = affinity[..., : targets.negatives], affinity[..., targets.negatives :]
    statistics |= _spread(to_pos, attraction)
    neg_mass, pos_mass = to_neg.sum(dim=-1, keepdim=True), to_pos.sum(dim=-1, keepdim=True)
    to_neg *= -pos_mass
    to_pos *= neg_mass
    return Coefficients(affinity, statistics)


def _split(logits: Tensor, targets: Targets, settings: FieldSettings, attraction: bool) -> Coefficients:
    """Cross minus self: two couplings, each with rows that sum to one (Sinkhorn paper).

        V_i = sum_{j in pos} A_ij y_j / sum_{k in pos} A_ik - sum_{j in neg} A_ij y_j / sum_{k in neg} A_ik

    Rows of a coupling that does not normalise stay as they are.
    """
    coupling = settings.coupling_object()
    negatives, positives = logits[..., : targets.negatives], logits[..., targets.negatives :]
    to_neg, of_neg = _weighted(coupling, coupling.normalised_rows, negatives, targets, settings)
    to_neg /= -to_neg.sum(dim=-1, keepdim=True).clamp_min_(TINY) if coupling.normalises else -1
    to_pos, of_pos = coupling.normalised_rows(positives, targets.uniform(targets.positives))
    field = torch.cat([to_neg, to_pos], dim=-1)
    return Coefficients(field, _largest([of_neg, of_pos]) | _spread(to_pos, attraction))


def _velocity(logits: Tensor, targets: Targets, settings: FieldSettings, attraction: bool) -> Coefficients:
    """A field of the unconditional samples alone, omega - 1 times (W-Flow).

        V = (T_pos - T_neg) + (omega - 1) (T_pos - T_uncond)

    T are barycentric projections: means of targets by the rows of a coupling.
    """
    coupling = settings.coupling_object()
    counts = [targets.repelling, targets.unconditional, targets.positives]
    (to_neg, of_neg), (to_uncond, of_uncond), (to_pos, of_pos) = (
        coupling.normalised_rows(part, targets.uniform(count)) if count else Plan(part, {})
        for part, count in zip(logits.split(counts, dim=-1), counts, strict=True)
    )
    strength = targets.omega[:, None, None, None] - 1 if targets.unconditional else 0
    field = torch.cat([-to_neg, -strength * to_uncond, (1 + strength) * to_pos], dim=-1)
    return Coefficients(field, _largest([of_neg, of_uncond, of_pos]) | _spread(to_pos, attraction))


def _weighted(
    coupling: Coupling,
    couple: Callable[[Tensor, Tensor], Plan],
    logits: Tensor,
    targets: Targets,
    settings: FieldSettings,
) -> Plan:
    """`couple` of a coupling with the weight w of the unconditional targets, where settings let it enter."""
    unconditional, w = slice(targets.repelling, targets.negatives), targets.weight[:, None, None, None]
    marginal = targets.uniform(logits.shape[-1])
    by_logit = settings.uncond_weighting == "logit"
    if coupling.transport:
        by_logit = settings.sinkhorn_marginal == "none"
        if settings.sinkhorn_marginal == "weighted_cols":
            marginal[:, unconditional] = targets.weight[:, None].clamp_min(UNCONDITIONAL_MARGINAL_FLOOR)
        elif by_logit:
            marginal[:, unconditional] = (targets.weight > 0).float()[:, None]
    if by_logit:
        # A plan leaves out what has no weight by its marginal, other couplings by the logit
        log_w = torch.where(w > 0, w, 1).log() if coupling.transport else w.log().clamp_min(REMOVED)
        logits[..., unconditional] += log_w
    affinity, statistics = couple(logits, marginal)
    if coupling.transport:
        if settings.sinkhorn_marginal == "post_guidance":
            affinity[..., unconditional] *= targets.omega[:, None, None, None]
    else:
        affinity[..., unconditional] *= (w > 0) if by_logit else w
    return Plan(affinity, statistics)


def _largest(statistics: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of several plans, the largest of each statistic."""
    names = {name for of in statistics for name in of}
    return {name: torch.stack([of[name] for of in statistics if name in of]).amax(dim=0) for name in names}


def _spread(to_pos: Tensor, wanted: bool) -> dict[str, Tensor]:
    """`Attraction` of weights over positives `[B, T, N, P]`; a row of zeros has no neighbours."""
    if not wanted:
        return {}
    n, positives = to_pos.shape[-2:]
    p = to_pos / to_pos.sum(dim=-1, keepdim=True).clamp_min(SMALLEST)
    neighbours = (p.sum(dim=-1) / torch.linalg.vector_norm(p, dim=-1).clamp_min(SMALLEST)).square()
    entropy = -(p * p.clamp_min(SMALLEST).log()).sum(dim=-1)
    unused = (p.sum(dim=-2) < UNUSED * n / positives).float()
    return Attraction(*(of.mean(dim=-1) for of in (neighbours, entropy, unused)))._asdict()
