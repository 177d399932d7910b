"""The training objective of the generator: the drifting loss, summed over the encoder's feature sets.

A step with too many classes for the memory is taken in parts. S and lambda belong to all of its classes, so
`step_totals` goes over the parts twice before `drift_objective` gives the loss of each.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from drift.field.loss import Reduce, Totals, drifting_loss, feature_scale, pooled
from drift.field.problems import Problems
from drift.field.settings import FieldSettings

Statistics = dict[str, dict[str, Tensor]]
"""Those of `drifting_loss` by feature set."""


class FeatureEncoder(Protocol):
    """Anything with the `encode` of `drift.models.mae.LatentMAE`."""

    def encode(self, latents: Tensor, drop_duplicates: bool = False) -> dict[str, Tensor]:
        """Latents `[B, C, H, W]` -> feature sets `[B, L_j, C_j]` by name."""


class Samples(NamedTuple):
    """Latents of some classes of a step, and their CFG strengths; see `drift_objective`."""

    generated: Tensor
    positives: Tensor
    unconditional: Tensor
    omega: Tensor
    negatives: Tensor | None = None


def drift_objective(
    generated: Tensor,
    positives: Tensor,
    unconditional: Tensor,
    omega: Tensor,
    encoder: FeatureEncoder,
    settings: FieldSettings,
    *,
    negatives: Tensor | None = None,
    reduce: Reduce | None = None,
    drop_duplicates: bool = False,
    feature_batch: int | None = None,
    feature_dtype: torch.dtype = torch.float32,
    totals: Mapping[str, Totals] | None = None,
) -> tuple[Tensor, Statistics]:
    """Sum over feature sets of the drifting loss (paper A.5, A.6).

        L = sum_j loss_j,  j over the encoder's feature sets and `global`, the whole latent as one vector

    Args:
        generated: latents of the generator `[Nc, N, C, H, W]`; the loss can be differentiated in them.
        positives: latents of real samples of the same class, `[Nc, P, C, H, W]`.
        unconditional: latents of real samples of any class, `[Nc, U, C, H, W]`; U may be 0.
        omega: CFG strength of each class, `[Nc]`.
        encoder: the frozen feature encoder.
        settings: the knobs of the field.
        negatives: for `settings.negatives: second_batch`, latents of other generated samples of the same
            class, `[Nc, K, C, H, W]`.
        reduce: sums over the processes that share the classes of a step, see `drifting_loss`.
        drop_duplicates: leave out feature sets that repeat another one whatever the values are. The
            release keeps them, so that those count twice.
        feature_batch: generated samples whose activations in the encoder are kept at once; beyond them, they
            are computed again in the backward pass, as many at a time. None keeps all.
        feature_dtype: what features of locations and patches are held in, nearly all of the memory. The field
            is float32 all the same. Means and stds of whole maps are always held in float32: rounding has
            averaged out in them, and samples may differ by little of their size.
        totals: `step_totals` of the step of which these are some classes.

    Returns:
        The loss, which is a mean over the given classes, and by feature set the statistics of
        `drifting_loss`.

    Raises:
        UserError, ValueError: see `drifting_loss`.
    """
    samples = Samples(generated, positives, unconditional, omega, negatives)
    losses, statistics = [], {}
    for name, inputs in _feature_sets(samples, encoder, drop_duplicates, feature_batch, feature_dtype):
        *vectors, second = inputs
        loss, statistics[name] = drifting_loss(
            *vectors,
            settings,
            negatives=second,
            reduce=reduce,
            totals=totals[name] if totals is not None else None,
        )
        losses.append(loss)
    total = torch.stack(losses).sum()
    return total / len(losses) if settings.feature_sets == "mean" else total, statistics


@torch.no_grad()
def step_totals(
    parts: Sequence[Samples],
    encoder: FeatureEncoder,
    settings: FieldSettings,
    *,
    reduce: Reduce | None = None,
    drop_duplicates: bool = False,
    feature_batch: int | None = None,
    feature_dtype: torch.dtype = torch.float32,
) -> dict[str, Totals]:
    """What `drift_objective` of each part of a step needs of all of them; for `normalization_scope: batch`.

    Features are computed twice: fields need S, and S all distances. Arguments as those of `drift_objective`.
    """

    def total(ask: Callable[[str, Problems], Tensor]) -> dict[str, Tensor]:
        """What `ask` gives, summed over parts and processes: one collective for all feature sets."""
        sums: dict[str, Tensor] = {}
        for part in parts:
            for name, inputs in _feature_sets(part, encoder, drop_duplicates, feature_batch, feature_dtype):
                *vectors, second = inputs
                with torch.autocast(vectors[0].device.type, enabled=False):
                    problems = Problems(*vectors, settings, second, keep_bytes=0)
                    sums[name] = sums.get(name, 0) + pooled(ask(name, problems), settings)
        stacked = torch.stack(list(sums.values()))
        if reduce is not None:
            stacked = reduce(stacked.flatten()).view_as(stacked)
        return dict(zip(sums, stacked, strict=True))

    distances = total(lambda name, problems: problems.distance_sums())

    def squares(name: str, problems: Problems) -> Tensor:
        scale = feature_scale(distances[name], problems)
        return problems.squares(problems.fields(scale), scale)

    return {name: Totals(distances[name], sums) for name, sums in total(squares).items()}


def _feature_sets(
    samples: Samples,
    encoder: FeatureEncoder,
    drop_duplicates: bool,
    feature_batch: int | None,
    feature_dtype: torch.dtype,
) -> Iterator[tuple[str, tuple]]:
    """Of every feature set by name what `drifting_loss` takes: x, pos, uncond, omega and a second batch.

    A set that was looked at makes room for the next.
    """
    # What nothing is learned through: [Nc, P+U(+K), C, H, W]
    given = [samples.positives, samples.unconditional]
    if samples.negatives is not None:
        given.append(samples.negatives)
    classes, fixed = len(samples.generated), torch.cat(given, dim=1).detach()

    def features(latents: Tensor) -> dict[str, Tensor]:
        sets = _encode(encoder, latents, drop_duplicates, feature_batch, feature_dtype)
        return {**sets, "global": latents.flatten(1)[:, None]}

    with torch.no_grad():
        of_fixed = features(fixed.flatten(0, 1))
    of_generated = features(samples.generated.flatten(0, 1))
    for name in list(of_generated):
        x = of_generated.pop(name).unflatten(0, (classes, -1))
        counts = [latents.shape[1] for latents in given]
        pos, uncond, *second = of_fixed.pop(name).unflatten(0, (classes, -1)).split(counts, dim=1)
        yield name, (x, pos, uncond, samples.omega, second[0] if second else None)


def _encode(
    encoder: FeatureEncoder, latents: Tensor, drop_duplicates: bool, batch: int | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """`encoder.encode` in batches of which each keeps its activations only while it is at work."""
    encode = partial(_encode_batch, encoder, drop_duplicates, dtype)
    if batch is None or len(latents) <= batch:
        return encode(latents)
    if torch.is_grad_enabled() and latents.requires_grad:
        parts = [checkpoint(encode, part, use_reentrant=False) for part in latents.split(batch)]
    else:
        parts = [encode(part) for part in latents.split(batch)]
    return {name: torch.cat([part.pop(name) for part in parts]) for name in list(parts[0])}


def _encode_batch(
    encoder: FeatureEncoder, drop_duplicates: bool, dtype: torch.dtype, latents: Tensor
) -> dict[str, Tensor]:
    """Sets of more than one vector per sample in `dtype`."""
    sets = encoder.encode(latents, drop_duplicates=drop_duplicates)
    for name in sets:
        if sets[name].shape[1] > 1:
            sets[name] = sets[name].to(dtype)
    return sets
