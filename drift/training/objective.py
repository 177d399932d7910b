"""The training objective of the generator: the drifting loss, summed over the encoder's feature sets.

A step with too many classes for the memory is taken in parts. S and lambda belong to all of its classes, so
`step_totals` goes over the parts twice before `drift_objective` gives the loss of each.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from drift.features import Encoder, MAEEncoder
from drift.field.loss import Reduce, Totals, drifting_loss, feature_scale, pooled
from drift.field.problems import Problems
from drift.field.settings import FieldSettings

Statistics = dict[str, dict[str, Tensor]]
"""Those of `drifting_loss` by feature set."""


class Samples(NamedTuple):
    """Latents of some classes of a step, and their CFG strengths; see `drift_objective`."""

    generated: Tensor
    positives: Tensor
    unconditional: Tensor
    omega: Tensor
    negatives: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How an objective is computed. Types and batches change it by rounding only."""

    reduce: Reduce | None = None
    """Sums over the processes that share the classes of a step, see `drifting_loss`."""
    totals: Mapping[str, Totals] | None = None
    """`step_totals` of the step of which these are some classes."""
    feature_batch: int | None = None
    """Generated samples whose activations the encoder keeps at once; beyond them, they are computed again in
    the backward pass, as many at a time. None keeps all."""
    feature_dtype: torch.dtype = torch.float32
    """What features of locations and patches are held in, nearly all of the memory. The field is float32 all
    the same. Sets of one vector per sample, such as means of whole maps, stay float32: rounding has averaged
    out in them, and samples may differ by little of their size."""


def drift_objective(
    generated: Tensor,
    positives: Tensor,
    unconditional: Tensor,
    omega: Tensor,
    encoder: Encoder | Any,
    settings: FieldSettings,
    *,
    negatives: Tensor | None = None,
    execution: Execution = Execution(),
) -> tuple[Tensor, Statistics]:
    """Sum, or mean for `feature_sets: mean`, over feature sets j of the drifting loss (paper A.5, A.6).

        L = sum_j loss_j

    Args:
        generated: latents of the generator `[Nc, N, C, H, W]`; the loss can be differentiated in them.
        positives: latents of real samples of the same class, `[Nc, P, C, H, W]`.
        unconditional: latents of real samples of any class, `[Nc, U, C, H, W]`; U may be 0.
        omega: CFG strength of each class, `[Nc]`.
        encoder: a frozen `drift.features.Encoder`. Of anything else, such as a `LatentMAE`, the feature sets
            are those of its `encode` and `global`, the whole latent as one vector.
        settings: those of the field.
        negatives: for `settings.negatives: second_batch`, latents of other generated samples of the same
            class, `[Nc, K, C, H, W]`.
        execution: see there.

    Returns:
        The loss, which is a mean over the given classes, and by feature set the statistics of
        `drifting_loss`.

    Raises:
        UserError, ValueError: see `drifting_loss`.
    """
    samples = Samples(generated, positives, unconditional, omega, negatives)
    losses, statistics = [], {}
    for name, (*vectors, second) in _feature_sets(samples, encoder, execution):
        totals = execution.totals[name] if execution.totals is not None else None
        loss, statistics[name] = drifting_loss(
            *vectors, settings, negatives=second, reduce=execution.reduce, totals=totals
        )
        losses.append(loss)
    total = torch.stack(losses).sum()
    return total / len(losses) if settings.feature_sets == "mean" else total, statistics


@torch.no_grad()
def step_totals(
    parts: Sequence[Samples], encoder: Encoder | Any, settings: FieldSettings, execution: Execution
) -> dict[str, Totals]:
    """What `drift_objective` of each part of a step needs of all of them; for `normalization_scope: batch`.

    Features are computed twice: fields need S, and S all distances.
    """

    def total(ask: Callable[[str, Problems], Tensor]) -> dict[str, Tensor]:
        """What `ask` gives, summed over parts and processes: one collective for all feature sets."""
        sums: dict[str, Tensor] = {}
        for part in parts:
            for name, (*vectors, second) in _feature_sets(part, encoder, execution):
                with torch.autocast(vectors[0].device.type, enabled=False):
                    problems = Problems(*vectors, settings, second, keep_bytes=0)
                    sums[name] = sums.get(name, 0) + pooled(ask(name, problems), settings)
        stacked = torch.stack(list(sums.values()))
        if execution.reduce is not None:
            stacked = execution.reduce(stacked.flatten()).view_as(stacked)
        return dict(zip(sums, stacked, strict=True))

    distances = total(lambda name, problems: problems.distance_sums())

    def squares(name: str, problems: Problems) -> Tensor:
        scale = feature_scale(distances[name], problems)
        return problems.squares(problems.fields(scale), scale)

    return {name: Totals(distances[name], sums) for name, sums in total(squares).items()}


def _feature_sets(
    samples: Samples, encoder: Encoder | Any, execution: Execution
) -> Iterator[tuple[str, tuple]]:
    """Of every feature set by name what `drifting_loss` takes: x, pos, uncond, omega and a second batch.

    A set that was looked at makes room for the next.
    """
    encoder = encoder if isinstance(encoder, Encoder) else MAEEncoder(encoder)
    # What nothing is learned through: [Nc, P+U(+K), C, H, W]
    given = [samples.positives, samples.unconditional]
    if samples.negatives is not None:
        given.append(samples.negatives)
    classes, fixed = len(samples.generated), torch.cat(given, dim=1).detach()
    with torch.no_grad():
        of_fixed = _encode(encoder, fixed.flatten(0, 1), execution)
    of_generated = _encode(encoder, samples.generated.flatten(0, 1), execution)
    for name in list(of_generated):
        x = of_generated.pop(name).unflatten(0, (classes, -1))
        counts = [latents.shape[1] for latents in given]
        pos, uncond, *second = of_fixed.pop(name).unflatten(0, (classes, -1)).split(counts, dim=1)
        yield name, (x, pos, uncond, samples.omega, second[0] if second else None)


def _encode(encoder: Encoder, latents: Tensor, execution: Execution) -> dict[str, Tensor]:
    """`encoder.encode` in batches of which each keeps its activations only while it is at work."""
    encode, batch = partial(_encode_batch, encoder, execution.feature_dtype), execution.feature_batch
    if batch is None or len(latents) <= batch:
        return encode(latents)
    if torch.is_grad_enabled() and latents.requires_grad:
        parts = [checkpoint(encode, part, use_reentrant=False) for part in latents.split(batch)]
    else:
        parts = [encode(part) for part in latents.split(batch)]
    return {name: torch.cat([part.pop(name) for part in parts]) for name in list(parts[0])}


def _encode_batch(encoder: Encoder, dtype: torch.dtype, latents: Tensor) -> dict[str, Tensor]:
    """Sets of more than one vector per sample in `dtype`."""
    return {name: x.to(dtype) if x.shape[1] > 1 else x for name, x in encoder.encode(latents).items()}
