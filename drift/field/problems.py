"""Drift problems in chunks of bounded memory: one problem is one (class, location) of a feature set.

Shapes: B drift problems, N generated vectors and M targets in each, C channels, T temperatures. The targets
are in the order repelling (K generated vectors: those N or a second batch), unconditional (U), positive (P).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drift.field.distances import distances, weighted_sums
from drift.field.guidance import Targets, coefficients, target_weights, unconditional_weight
from drift.field.settings import FieldSettings

CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 2 * 2**30}
"""Memory for one chunk: on a CPU what stays in its caches, on a GPU what keeps it busy."""
KEEP_BYTES = {"cpu": 4 * 2**30, "cuda": 16 * 2**30}
"""Memory for what one pass over the chunks keeps for the next; beyond it, chunks are computed again."""


class Chunk(NamedTuple):
    """The drift problems of some classes at some locations; B is the product of their numbers."""

    classes: slice
    locations: slice

    @property
    def shape(self) -> tuple[int, int]:
        return self.classes.stop - self.classes.start, self.locations.stop - self.locations.start

    def cut(self, vectors: Tensor) -> Tensor:
        """`[Nc, *, L, C]` -> `[classes, locations, *, C]`."""
        return vectors[self.classes, :, self.locations].transpose(1, 2)

    def per_problem(self, values: Tensor) -> Tensor:
        """Values per class `[Nc, *]` -> `[B, *]`."""
        mine = values[self.classes]
        return mine[:, None].expand(-1, self.shape[1], *mine.shape[1:]).flatten(0, 1)


class Measured(NamedTuple):
    """Vectors of B problems in float32, less the mean of the generated ones, and their distances."""

    x: Tensor
    """`[B, N, C]`"""
    targets: Tensor
    """`[B, M, C]`"""
    distances: Tensor
    """`[B, N, M]`"""


class Fields(NamedTuple):
    """The fields of B problems."""

    vectors: Tensor
    """S V_tau, `[B, T, N, C]`."""
    statistics: dict[str, Tensor]
    """Of the coupling and, if wanted, `Attraction`; sums over problems, `[T]`."""


class Remembered:
    """A function of a chunk. With `keep`, what a call returns is kept for the next call, and then dropped."""

    def __init__(self, compute: Callable[[Chunk], Any], keep: bool):
        self._compute, self._keep, self._kept = compute, keep, {}

    def __call__(self, chunk: Chunk) -> Any:
        key = chunk.classes.start, chunk.locations.start
        if key in self._kept:
            return self._kept.pop(key)
        result = self._compute(chunk)
        if self._keep:
            self._kept[key] = result
        return result


@dataclass
class Problems:
    """The inputs of a drifting loss, which `drifting_loss` describes, and the passes over its chunks."""

    x: Tensor
    pos: Tensor
    uncond: Tensor
    omega: Tensor
    settings: FieldSettings
    second_batch: Tensor | None = None
    attraction: bool = True
    """Whether `drift` tells about `Attraction`."""
    chunk_bytes: int | None = None
    keep_bytes: int | None = None

    def __post_init__(self):
        if (self.second_batch is not None) != (self.settings.negatives == "second_batch"):
            raise ValueError(
                f"settings.negatives is {self.settings.negatives}, negatives are "
                f"{type(self.second_batch).__name__}"
            )
        assert self.omega.shape == self.x.shape[:1], f"{self.omega.shape} strengths for {len(self.x)} classes"
        classes, n, locations, channels = self.x.shape
        self.omega = self.omega.float()
        repelling = self.x if self.second_batch is None else self.second_batch
        counts = (repelling.shape[1], self.uncond.shape[1], self.pos.shape[1])
        others = self.second_batch is None or self.settings.conventions == "wflow"
        weight = unconditional_weight(self.omega, n - 1 if others else counts[0], counts[1])
        self.targets = Targets(*counts, self.omega, weight)  # of each class
        self.coupling = self.settings.coupling_object()
        # `torch.tensor` would make the host wait for a GPU
        self.temps = torch.stack([weight.new_full((), tau) for tau in self.settings.temps])
        device, m = self.x.device.type, sum(counts)
        kept = max(n * m + (n + m) * channels, self.settings.fields * n * channels)
        room = KEEP_BYTES.get(device, KEEP_BYTES["cuda"]) if self.keep_bytes is None else self.keep_bytes
        keep = 4 * kept * classes * locations <= room
        self._measured = Remembered(self._measure, keep)
        self._keep = keep
        working = (n + m + self.settings.fields * n) * channels + (1 + 3 * len(self.settings.temps)) * n * m
        chunk = CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) if self.chunk_bytes is None else self.chunk_bytes
        self.chunks = self._cut(max(1, chunk // (4 * working)))

    @property
    def row_mass(self) -> float:
        """Roughly the sum of a row of A, which `alg2_joint` has in V twice: A_ij times a mass."""
        joint_plan = self.coupling.transport and self.settings.drift_form == "alg2_joint"
        return 1 / self.x.shape[1] if joint_plan else 1.0

    def _cut(self, most: int) -> list[Chunk]:
        """Chunks of at most so many problems: whole classes, or parts of one."""
        classes, _, locations, _ = self.x.shape
        whole, part = max(1, most // locations), min(locations, most)
        return [
            Chunk(slice(c, min(c + whole, classes)), slice(l, min(l + part, locations)))
            for c in range(0, classes, whole)
            for l in range(0, locations, part)
        ]

    def _measure(self, chunk: Chunk) -> Measured:
        """Only differences of vectors matter, and centred vectors keep more digits of them."""
        itself = self.second_batch is None
        sets = [self.x, *([] if itself else [self.second_batch]), self.uncond, self.pos]
        parts = [chunk.cut(vectors) for vectors in sets]
        counts, n = [part.shape[2] for part in parts], self.x.shape[1]
        centre = parts[0].mean(dim=2, keepdim=True, dtype=torch.float32)  # [classes, locations, 1, C]
        gathered = centre.new_empty(*chunk.shape, sum(counts), centre.shape[-1])
        for part, place in zip(parts, gathered.split(counts, dim=2), strict=True):
            torch.sub(part, centre, out=place)
        gathered = gathered.flatten(0, 1)
        x, targets = gathered[:, :n], gathered if itself else gathered[:, n:]
        floor = self.settings.guards.squared_distance
        return Measured(x, targets, distances(x, targets, self.settings.dist_metric, floor, itself))

    def distance_sums(self) -> Tensor:
        """Numerator and denominator of the mean distance behind S, of each class: `[2, Nc]`."""
        settings, targets = self.settings, self.targets
        sums = self.omega.new_zeros(2, len(self.x), dtype=torch.float64)
        if settings.unit_scale:
            return sums
        floor, itself = settings.guards.squared_distance, self.second_batch is None
        if settings.guidance == "velocity":  # unconditional samples repel by a field of their own
            targets = targets._replace(weight=0 * targets.weight)
        weights = target_weights(targets)
        ones = weights.new_ones(len(self.x), self.x.shape[1])
        counted_as = {("l2", "rms"): torch.square, ("l2_sq", "mean_length"): torch.sqrt}
        change = counted_as.get((settings.dist_metric, settings.scale_statistic), lambda d: d)
        for chunk in self.chunks:
            x, _, d = self._measured(chunk)
            counted = [(d, weights, itself and not settings.self_in_scale)]
            if settings.generated_in_scale:
                own = distances(x, x, settings.dist_metric, floor, self_pairs=True)
                counted.append((own, ones, not settings.self_in_scale))
            for d, weight, without in counted:
                d = change(d).unflatten(0, chunk.shape)
                sums[:, chunk.classes] += weighted_sums(d, weight[chunk.classes], without)
        return sums

    def fields(self, scale: Tensor) -> Remembered:
        """V_tau of a chunk at S `[Nc]`."""
        return Remembered(lambda chunk: self._fields(chunk, self._measured(chunk), scale), self._keep)

    def _fields(self, chunk: Chunk, measured: Measured, scale: Tensor) -> Fields:
        """All temperatures' fields of some problems."""
        settings, channels = self.settings, self.x.shape[-1]
        x, y, d = measured
        itself = self.second_batch is None
        if itself and (settings.mask_self_neg or not self.coupling.normalises):  # its displacement is 0
            d.diagonal(dim1=1, dim2=2).fill_(math.inf)
        unit = scale * math.sqrt(channels)  # of distances
        if settings.dist_metric == "l2_sq" and not settings.scale_is_square:
            unit = unit.square()
        widths = chunk.per_problem(unit)[:, None] * (self.temps / settings.cost_factor)  # [B, T]
        logits = d[:, None] * (-1 / widths)[:, :, None, None]
        if settings.sinkhorn_agg_kernel:
            logits = logits.logsumexp(dim=1, keepdim=True) - math.log(len(settings.temps))
        guidance = (chunk.per_problem(values) for values in (self.targets.omega, self.targets.weight))
        targets = Targets(*self.targets[:3], *guidance)
        r, statistics = coefficients(logits, targets, settings, self.attraction)
        if settings.drift_unit_vec:
            # V_i = sum_j R_ij (y_j - x_i) / ||y_j - x_i||, in units of S as everything; pairs at the guard's
            # distance or below have no direction
            apart = d > 1.001 * math.sqrt(settings.guards.squared_distance)
            r *= (torch.where(apart, 1 / d, 0) * chunk.per_problem(scale)[:, None, None])[:, None]
        vectors = (r.flatten(1, 2) @ y).unflatten(1, r.shape[1:3])  # [B, T, N, C]
        if settings.drift_unit_vec or not self.coupling.normalises:  # otherwise rows of R sum to zero
            vectors.addcmul_(r.sum(dim=-1, keepdim=True), x[:, None], value=-1)
        return Fields(vectors, {name: s.sum(dim=0) for name, s in statistics.items()})

    def squares(self, fields: Remembered, scale: Tensor) -> Tensor:
        """Sum of V_tau^2 of each class, and below it the count of numbers: `[T + 1, Nc]`."""
        classes, n, locations, channels = self.x.shape
        sums = self.omega.new_zeros(self.settings.fields + 1, classes, dtype=torch.float64)
        for chunk in self.chunks:
            norms = torch.linalg.vector_norm(fields(chunk).vectors, dim=(2, 3)).square()  # [B, T]
            sums[:-1, chunk.classes] += norms.unflatten(0, chunk.shape).sum(dim=1).mT
        sums[:-1] /= scale.square()
        sums[-1] = n * locations * channels
        return sums

    def drift(self, fields: Remembered, factors: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """V, the sum of S V_tau by `factors [Nc, T]`; mean(V^2); and means of the statistics.

        V is `[Nc, N, L, C]`, the statistics are `[T]`.
        """
        drift = torch.empty_like(self.x)  # half the memory where x is in half precision
        value, statistics = self.omega.new_zeros(()), {}
        classes, n, locations, _ = self.x.shape
        for chunk in self.chunks:
            vectors, sums = fields(chunk)
            v = (chunk.per_problem(factors)[:, None] @ vectors.flatten(2)).view(-1, n, self.x.shape[-1])
            value += torch.linalg.vector_norm(v).square()
            drift[chunk.classes, :, chunk.locations] = v.unflatten(0, chunk.shape).transpose(1, 2)
            for name, total in sums.items():
                statistics[name] = statistics.get(name, 0) + total / (classes * locations)
        temps = len(self.settings.temps)
        return drift, value / self.x.numel(), {name: s.expand(temps) for name, s in statistics.items()}
