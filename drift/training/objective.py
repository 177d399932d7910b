"""The training objective of the generator: the drifting loss, summed over the encoder's feature sets.

A step with too many classes for the memory is taken in parts. S and lambda belong to all of its classes:
`step_totals` goes over the parts twice before `drift_objective` gives the loss of each part.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    """Latents of some classes of a step (see `drift_objective`), or a feature set of them."""

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
    """`step_totals`, where the step is taken in parts."""
    attraction: bool = True
    """Whether the statistics of `drift.field.guidance.Attraction` are wanted."""
    feature_batch: int | None = None
    """Generated samples whose activations the encoder keeps at once. If there are more, the backward pass
    computes activations again, of as many at a time. None keeps all."""
    feature_dtype: torch.dtype = torch.float32
    """What features of locations and patches, nearly all of the memory, are held in. The field stays float32.
    So do sets with one vector per sample, such as means of whole maps: rounding has averaged out in them, and
    the differences between samples may be a small part of their size."""


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
    for name, sets in _feature_sets(samples, encoder, execution):
        totals = execution.totals[name] if execution.totals is not None else None
        loss, statistics[name] = drifting_loss(
            *sets[:4],
            settings,
            negatives=sets.negatives,
            reduce=execution.reduce,
            totals=totals,
            attraction=execution.attraction,
        )
        losses.append(loss)
    total = torch.stack(losses).sum()
    return total / len(losses) if settings.feature_sets == "mean" else total, statistics


@torch.no_grad()
def step_totals(
    parts: Sequence[Samples], encoder: Encoder | Any, settings: FieldSettings, execution: Execution
) -> dict[str, Totals]:
    """What `drift_objective` of one part of a step needs of all parts, for `normalization_scope: batch`.

    Features are computed twice: the fields need S, which needs all distances.
    """

    def total(ask: Callable[[str, Problems], Tensor]) -> dict[str, Tensor]:
        """The results of `ask`, summed over parts and processes: one collective for all feature sets."""
        sums: dict[str, Tensor] = {}
        for part in parts:
            for name, sets in _feature_sets(part, encoder, execution):
                with torch.autocast(part.generated.device.type, enabled=False):
                    problems = Problems(*sets[:4], settings, sets.negatives, attraction=False, keep_bytes=0)
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
) -> Iterator[tuple[str, Samples]]:
    """Every feature set by name: vectors `[Nc, N, L, C]` in the place of latents.

    A set is freed once it has been used.
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
        yield name, Samples(x, pos, uncond, samples.omega, *second)


def _encode(encoder: Encoder, latents: Tensor, execution: Execution) -> dict[str, Tensor]:
    """Feature sets, computed in batches; a batch keeps its activations only while it is being computed."""

    def encode(batch: Tensor) -> dict[str, Tensor]:
        sets = encoder.encode(batch)
        return {name: x.to(execution.feature_dtype) if x.shape[1] > 1 else x for name, x in sets.items()}

    size = execution.feature_batch or len(latents)
    if len(latents) <= size:
        return encode(latents)
    if torch.is_grad_enabled() and latents.requires_grad:
        parts = [checkpoint(encode, part, use_reentrant=False) for part in latents.split(size)]
    else:
        parts = [encode(part) for part in latents.split(size)]
    return {name: torch.cat([part.pop(name) for part in parts]) for name in list(parts[0])}
