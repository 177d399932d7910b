"""Drift problems: vectors of one (class, location) -> coefficients of its field at every temperature.

Shapes: B drift problems, N generated vectors and M targets in each, C channels, T temperatures. The targets
are in the order repelling (K generated vectors: those N or a second batch), unconditional (U), positive (P).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from drift.errors import one_of
from drift.field.coupling import COUPLINGS, REMOVED, normalised_rows, sinkhorn
from drift.field.distance import (
    distances,
    gram_matrix,
    on_device,
    squared_distances,
    squared_distances_from_gram,
    weighted_sums,
)
from drift.field.form import DRIFT_FORMS, TINY
from drift.field.guidance import target_weights
from drift.field.settings import FieldSettings

COST_OF_KEPT_VECTORS = 1.4  # measured: both ways take the same time at C = 1.4 M of the ablation's M and T
UNCONDITIONAL_MARGINAL_FLOOR = 1e-6  # prior, `weighted_cols`


class Measured(NamedTuple):
    """B problems in distances, and what else makes vectors or inner products of coefficients."""

    distances: Tensor
    """`[B, N, M]`"""
    x: Tensor | None
    """Generated vectors `[B, N, C]`; None where vectors are long."""
    targets: Tensor | None
    """`[B, M, C]`; None where vectors are long."""
    gram: Tensor | None
    """Inner products of the targets `[B, M, M]`, where vectors are long."""


class Coefficients(NamedTuple):
    """The field of B problems and what its couplings look like."""

    field: Tensor
    """R `[B, T, N, M]`: S V_tau,i = sum_j R_ij y_j (+ `own`_i x_i)."""
    own: Tensor | None
    """Coefficient of the generated vector itself, `[B, T, N, 1]`; None where it is zero."""
    neighbours: Tensor
    """Effective number of positives of each generated vector, `[B, T, N]`."""
    marginal_error: Tensor | None
    """`[B, T]`, for `sinkhorn`."""


@dataclass(frozen=True)
class FeatureSet:
    """The inputs of a drifting loss: vectors `[Nc, *, L, C]`, CFG strengths and weights `[Nc]`."""

    x: Tensor
    repelling: Tensor | None
    """A second batch; None where the generated vectors repel each other."""
    uncond: Tensor
    pos: Tensor
    omega: Tensor
    weight: Tensor
    """Of one unconditional negative."""
    settings: FieldSettings
    squared_distance_floor: float

    @property
    def self_pairs(self) -> bool:
        """Whether targets 1 to N are the generated vectors themselves."""
        return self.repelling is None

    @property
    def counts(self) -> tuple[int, int, int]:
        """K, U, P."""
        repelling = self.x if self.repelling is None else self.repelling
        return repelling.shape[1], self.uncond.shape[1], self.pos.shape[1]

    @property
    def long_vectors(self) -> bool:
        """Whether inner products of fields are cheaper by the Gram matrix of the targets than from vectors.

        Per problem, T fields of N vectors take T N M C multiplications, by the Gram matrix
        (M - N) M C + T N M^2 and N M C for the final V. Keeping the vectors adds to the former.
        """
        n, m, channels, t = self.x.shape[1], sum(self.counts), self.x.shape[-1], self.fields
        by_gram = (m - n) * m * channels + t * n * m * m + n * m * channels
        by_vectors = t * n * m * channels * COST_OF_KEPT_VECTORS
        return self.self_pairs and not self.settings.drift_unit_vec and by_gram < by_vectors

    @property
    def fields(self) -> int:
        """How many different V_tau there are: one for each temperature, or one of an averaged kernel."""
        return 1 if self.settings.sinkhorn_agg_kernel else len(self.settings.temps)

    @property
    def working_bytes(self) -> int:
        """About what one problem needs while its fields are made."""
        n, m, channels, t = self.x.shape[1], sum(self.counts), self.x.shape[-1], len(self.settings.temps)
        vectors = (m if self.self_pairs else m + n) + (0 if self.long_vectors else self.fields * n)
        return 4 * (vectors * channels + (m if self.long_vectors else n) * m + 3 * t * n * m)

    @property
    def kept_bytes(self) -> int:
        """What one problem keeps from one pass to the next."""
        n, m, channels = self.x.shape[1], sum(self.counts), self.x.shape[-1]
        if self.long_vectors:
            return 4 * max((n + m) * m, self.fields * n * m)
        return 4 * max(n * m + (m if self.self_pairs else n + m) * channels, self.fields * n * channels)

    def chunks(self, max_problems: int) -> Iterator["Chunk"]:
        """Cut into chunks of at most so many problems: whole classes, or parts of one."""
        classes, locations = self.x.shape[0], self.x.shape[2]
        whole = max(1, max_problems // locations)
        part = min(locations, max_problems)
        for c in range(0, classes, whole):
            for l in range(0, locations, part):
                yield Chunk(self, slice(c, min(c + whole, classes)), slice(l, min(l + part, locations)))


@dataclass
class Chunk:
    """The drift problems of some classes at some locations."""

    of: FeatureSet
    classes: slice
    locations: slice

    @property
    def shape(self) -> tuple[int, int]:
        """Classes and locations; B is their product."""
        return self.classes.stop - self.classes.start, self.locations.stop - self.locations.start

    @property
    def problems(self) -> int:
        """B."""
        return math.prod(self.shape)

    def per_problem(self, values: Tensor) -> Tensor:
        """Values per class `[Nc, *]` -> `[B, *]`."""
        mine = values[self.classes]
        return mine[:, None].expand(-1, self.shape[1], *mine.shape[1:]).flatten(0, 1)

    def gather(self) -> tuple[Tensor, Tensor]:
        """Generated vectors `[B, N, C]` and targets `[B, M, C]` in float32, around the mean of the former.

        Only differences of vectors matter, and centred vectors keep more digits of them.
        """
        of = self.of
        sets = [of.x, of.uncond, of.pos] if of.self_pairs else [of.x, of.repelling, of.uncond, of.pos]
        parts = [vectors[self.classes, :, self.locations].transpose(1, 2) for vectors in sets]
        counts = [part.shape[2] for part in parts]
        gathered = of.x.new_empty(*self.shape, sum(counts), of.x.shape[-1], dtype=torch.float32)
        centre = parts[0].mean(dim=2, keepdim=True, dtype=torch.float32)  # [classes, locations, 1, C]
        for part, place in zip(parts, gathered.split(counts, dim=2), strict=True):
            torch.sub(part, centre, out=place)
        gathered, n = gathered.flatten(0, 1), counts[0]
        return gathered[:, :n], gathered if of.self_pairs else gathered[:, n:]

    def measure(self) -> Measured:
        """Distances, and the Gram matrix where it will be used."""
        of = self.of
        x, targets = self.gather()
        if of.long_vectors:
            gram = gram_matrix(x, targets)
            squares, kept = squared_distances_from_gram(gram, x.shape[1]), (None, None, gram)
        else:
            squares, kept = squared_distances(x, targets), (x, targets, None)
        d = distances(squares, of.settings.dist_metric, of.squared_distance_floor, of.self_pairs)
        return Measured(d, *kept)

    def distance_sums(self, d: Tensor) -> Tensor:
        """Numerator and denominator of the mean distance behind S, of each class: `[2, classes]`."""
        of = self.of
        return weighted_sums(
            d.unflatten(0, self.shape),
            target_weights(of.weight[self.classes], *of.counts),
            self_pairs=of.self_pairs,
            count_self_pairs=of.settings.self_in_scale or not of.settings.mask_self_neg,
        )

    def coefficients(self, d: Tensor, scale: Tensor) -> Coefficients:
        """R at every temperature from distances `[B, N, M]`, which it overwrites, and S `[Nc]`."""
        of, settings = self.of, self.of.settings
        k, u, _ = of.counts
        affinity, marginal_error = self._affinity(self._logits(d, scale))
        neighbours = _effective_number(affinity[..., k + u :])
        field, own = DRIFT_FORMS[settings.drift_form](affinity, k + u), None
        if settings.drift_unit_vec:
            # V_i = sum_j R_ij (y_j - x_i) / ||y_j - x_i||, in units of S as everything; pairs at the guard's
            # distance or below have no direction
            inverse = torch.where(d > 1.001 * math.sqrt(of.squared_distance_floor), 1 / d, 0)
            field *= (inverse * self.per_problem(scale)[:, None, None])[:, None]
            own = field.sum(dim=-1, keepdim=True).neg_()
        return Coefficients(field, own, neighbours, marginal_error)

    def _logits(self, d: Tensor, scale: Tensor) -> Tensor:
        """-d / (tau S sqrt(C)), `[B, T, N, M]`; pairs of a vector with itself masked in the distances."""
        settings = self.of.settings
        if settings.mask_self_neg and self.of.self_pairs and settings.coupling != "sinkhorn":
            d.diagonal(dim1=1, dim2=2).fill_(math.inf)
        roots = self.per_problem(scale * math.sqrt(self.of.x.shape[-1]))
        widths = roots[:, None] * on_device(settings.temps, d)
        logits = d[:, None] * (-1 / widths)[:, :, None, None]
        if settings.sinkhorn_agg_kernel:
            return logits.logsumexp(dim=1, keepdim=True) - math.log(len(settings.temps))
        return logits

    def _affinity(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """A, for `split` up to a factor of each row, and for `sinkhorn` the marginal error; overwrites."""
        of, settings = self.of, self.of.settings
        k, u, _ = of.counts
        unconditional, w = slice(k, k + u), self.per_problem(of.weight)[:, None, None, None]
        if settings.coupling == "sinkhorn":
            column_weights, by_logit = self._column_weights(), settings.sinkhorn_marginal == "none"
        else:
            column_weights, by_logit = None, settings.uncond_weighting == "logit"
        if by_logit:
            # A plan leaves out what has no weight by its marginal, other couplings by the logit
            log_w = w.log().clamp_min(REMOVED) if column_weights is None else torch.where(w > 0, w, 1).log()
            logits[..., unconditional] += log_w

        blocks = (slice(k + u), slice(k + u, None)) if settings.drift_form == "split" else (slice(None),)
        coupled = [
            self._couple(logits[..., block], None if column_weights is None else column_weights[:, block])
            for block in blocks
        ]
        affinity = torch.cat([a for a, _ in coupled], dim=-1) if len(coupled) > 1 else coupled[0][0]
        if column_weights is None:
            affinity[..., unconditional] *= (w > 0) if by_logit else w
            return affinity, None
        if settings.sinkhorn_marginal == "post_guidance":
            affinity[..., unconditional] *= self.per_problem(of.omega)[:, None, None, None]
        return affinity, torch.stack([error for _, error in coupled]).amax(dim=0)

    def _couple(self, logits: Tensor, column_weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A of one coupling, and the marginal error of `sinkhorn`."""
        settings = self.of.settings
        split, floor = settings.drift_form == "split", settings.affinity_floor
        if column_weights is not None:
            plan, g, error = sinkhorn(
                logits, column_weights, settings.sinkhorn_iters, settings.sinkhorn_tolerance
            )
            return (logits + g).softmax(dim=-1) if split else plan, error
        if split and floor == 0 and settings.alg2_impl == "logspace":
            return normalised_rows(logits, settings.coupling), None
        return COUPLINGS[settings.coupling, settings.alg2_impl](logits).clamp_min_(math.sqrt(floor)), None

    def _column_weights(self) -> Tensor:
        """What the column marginals of `sinkhorn` are proportional to, `[B, M]`."""
        of, (k, u, p) = self.of, self.of.counts
        weights = of.weight.new_ones(self.problems, k + u + p)
        w = self.per_problem(of.weight)[:, None]
        match of.settings.sinkhorn_marginal:
            case "weighted_cols":
                weights[:, k : k + u] = w.clamp_min(UNCONDITIONAL_MARGINAL_FLOOR)
            case "none":
                weights[:, k : k + u] = (w > 0).float()
            case marginal:
                one_of("sinkhorn_marginal", marginal, "post_guidance")  # uniform
        return weights

    def inner_products(
        self, coefficients: Coefficients, measured: Measured
    ) -> tuple[Tensor | Coefficients, Tensor]:
        """What V is a weighted sum of, and S^2 sum V_tau V_tau' over the vectors of each class.

        That is the vectors S V_tau `[B, T, N, C]`; where vectors are long, their coefficients, as inner
        products are R_tau G R_tau'^T then. The products are `[classes, T, T]`.
        """
        if measured.gram is None:
            fields = duals = made = _vectors(coefficients, measured.x, measured.targets)
        else:
            made, fields = coefficients, coefficients.field
            duals = (fields.flatten(1, 2) @ measured.gram).view_as(fields)
        products = fields.flatten(2) @ duals.flatten(2).mT  # [B, T, T]
        return made, products.unflatten(0, self.shape).sum(dim=1)

    def write(self, drift: Tensor, made: Tensor | Coefficients, factors: Tensor) -> None:
        """Put the sum over temperatures, with factors `[Nc, T]`, into its place in `[Nc, N, L, C]`."""
        factors = self.per_problem(factors)
        if isinstance(made, Coefficients):
            field, own = (None if r is None else _weighted_sum(r, factors)[:, None] for r in made[:2])
            vectors = _vectors(made._replace(field=field, own=own), *self.gather())[:, 0]
        else:
            vectors = _weighted_sum(made, factors)
        drift[self.classes, :, self.locations] = vectors.unflatten(0, self.shape).transpose(1, 2)


def _effective_number(weights: Tensor) -> Tensor:
    """(sum_j A_j)^2 / sum_j A_j^2, `[..., P]` -> `[...]`: 1 if one has it all, P if all are alike."""
    largest = weights.amax(dim=-1, keepdim=True).clamp_min_(TINY)
    relative = weights / largest  # their squares do not underflow
    return (relative.sum(dim=-1) / torch.linalg.vector_norm(relative, dim=-1).clamp_min_(TINY)).square_()


def _vectors(coefficients: Coefficients, x: Tensor, targets: Tensor) -> Tensor:
    """Fields `[B, T, N, C]` from their coefficients."""
    fields = (coefficients.field.flatten(1, 2) @ targets).unflatten(1, coefficients.field.shape[1:3])
    return fields if coefficients.own is None else fields.addcmul_(coefficients.own, x[:, None])


def _weighted_sum(fields: Tensor, factors: Tensor) -> Tensor:
    """`[B, T, N, *]`, `[B, T]` -> `[B, N, *]`."""
    return (factors[:, None] @ fields.flatten(2)).view(len(fields), *fields.shape[2:])
