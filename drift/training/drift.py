"""Training of the generator: each step draws classes, moves their samples along the drift field, follows.

One step (paper Alg. 1): for every class slot draw omega, N noises, P real samples of the class and U real
samples of any class; generate; the drifting loss in the encoder's features gives the gradient. With
`negatives: second_batch` another N samples are generated to repel the first. With `hardware.classes_per_pass`
the classes are taken some at a time, and the gradients of the parts add up to that of the whole.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from drift.data.bank import DirectSampling, SampleQueue, choose_classes
from drift.data.latents import LatentReader, LatentStore, pinned
from drift.field.couplings import COUPLINGS
from drift.field.settings import FieldSettings
from drift.models.ema import EMA
from drift.models.generator import Generator
from drift.models.mae import LatentMAE
from drift.runtime.errors import one_of
from drift.runtime.processes import Ranks
from drift.runtime.seeds import derive_seed, torch_generator
from drift.settings import Drift, Hardware
from drift.training.compile import Compiled
from drift.training.log import Tree
from drift.training.loop import Backward, autocast, parts, train
from drift.training.objective import Samples, Statistics, drift_objective, mean_statistics, step_totals
from drift.training.schedule import draw_omega


def plot_columns(field: FieldSettings) -> list[str]:
    """What of each line of `logs.jsonl` goes into DVC's plots."""
    per_temperature = [f"{name}_{tau:g}" for name in _by_temperature(field) for tau in field.temps]
    return ["loss", *_by_temperature(field), *per_temperature, "scale", "grad_norm", "lr"]


def _by_temperature(field: FieldSettings) -> list[str]:
    """Statistics of `drifting_loss` that have one value per temperature."""
    return ["drift_rms", "neighbours", *COUPLINGS[field.coupling].statistics]


def generator_config(options: Drift, store: LatentStore) -> dict[str, Any]:
    """Sizes of the generator of `options` for the latents of `store`."""
    _, channels, height, _ = store.shape
    return {
        "in_channels": channels,
        "input_size": height,
        "num_classes": store.num_classes,
        "hidden_size": options.hidden,
        "depth": options.depth,
        "num_heads": options.heads,
        "patch_size": options.patch,
        "mlp_ratio": options.mlp_ratio,
        "context_tokens": options.context_tokens,
        "style_codebooks": options.style_codebooks,
        "style_entries": options.style_entries,
    }


def summarise(statistics: Mapping[str, Mapping[str, Tensor]], field: FieldSettings) -> dict[str, Tensor]:
    """Statistics per feature set -> `[T]` per temperature and scalars, means over the feature sets.

    `drift_rms_<tau>` is the RMS of the raw drift before each temperature's normalisation, in units of the
    feature scale S, and `drift_rms` its mean over temperatures: the number that falls while the generator
    learns. The normalised loss stays about one per temperature and feature set by construction.
    """
    summary = {}
    for name in _by_temperature(field):
        means = torch.stack([s[name] for s in statistics.values()]).mean(dim=0)  # [T]
        summary[name] = means.mean()
        summary |= {f"{name}_{tau:g}": mean for tau, mean in zip(field.temps, means, strict=True)}
    return {**summary, "scale": torch.stack([s["scale"] for s in statistics.values()]).mean()}


def train_generator(
    store: LatentStore,
    encoder: LatentMAE,
    options: Drift,
    field: FieldSettings,
    *,
    seed: int,
    hardware: Hardware,
    ranks: Ranks,
    folder: Path,
) -> tuple[Generator, list[EMA]]:
    """Train a Generator on `store` in the features of `encoder`, going on from `folder` if it can.

    Returns the generator and one EMA per decay of `options.ema_decays`. Raises `UserError` if the classes of
    a step do not split over the processes, or a class has too few samples.
    """
    mine = ranks.share(options.classes_per_step, "drift.classes_per_step")  # of the Nc class slots
    slots = range(mine.start, mine.stop)
    torch.manual_seed(derive_seed(seed, "drift/init"))
    model = Generator(**generator_config(options, store)).to(ranks.device)
    config = model.config
    model.activation_checkpointing = hardware.activation_checkpointing
    network = Compiled(model, "generator") if hardware.compile else model
    frozen = FrozenEncoder(encoder, ranks.device, compile=hardware.compile)
    reader = LatentReader(store, ranks.device, on_device=hardware.latents_on_device)
    real = RealSamples(store, options, seed)
    reduce = ranks.sum if ranks.world_size > 1 else None
    objective_options = {
        "drop_duplicates": one_of("duplicate_features", options.duplicate_features, "keep", "drop") == "drop",
        "feature_batch": hardware.feature_batch,
        "feature_dtype": feature_dtype(options.precision),
    }
    n = options.generated
    sample_shape = (config.in_channels, config.input_size, config.input_size)

    drawn = ("drift/noise", "drift/negatives") if field.negatives == "second_batch" else ("drift/noise",)

    def draw(what: str, step: int) -> tuple[Tensor, Tensor]:
        """Noise `[Nc, N, C, H, W]` and style indices `[Nc, N, S]`; each slot has its own generator."""
        noise, style = [], []
        for slot in slots:
            generator = torch_generator(seed, what, step, slot)
            noise.append(torch.randn(n, *sample_shape, generator=generator))
            style.append(
                torch.randint(config.style_entries, (n, config.style_codebooks), generator=generator)
            )
        return pinned(torch.stack(noise), ranks.device), pinned(torch.stack(style), ranks.device)

    def prepare(step: int) -> _Batch:
        classes, of_class, of_any = real.draw(step, slots)
        omega = draw_omega(
            options.classes_per_step,
            low=options.omega_min,
            high=options.omega_max,
            exponent=options.omega_exponent,
            no_guidance_fraction=options.no_guidance_fraction,
            generator=torch_generator(seed, "drift/omega", step),
        )
        return _Batch(
            pinned(torch.as_tensor(classes[mine]), ranks.device),
            pinned(omega[mine], ranks.device),
            reader.fetch(of_class),
            reader.fetch(of_any),
            {what: draw(what, step) for what in drawn},
        )

    def place(drawn: Tensor) -> Tensor:
        return drawn.to(ranks.device, non_blocking=True)

    def generate(what: str, batch: _Batch, part: slice) -> Tensor:
        """Samples of the classes of a part `[Nc, N, C, H, W]`."""
        noise, style = (place(x[part].flatten(0, 1)) for x in batch.drawn[what])
        labels, omega = (place(x[part]).repeat_interleave(n) for x in (batch.classes, batch.omega))
        with autocast(ranks, options.precision):
            return network(noise, labels, omega, style).unflatten(0, (-1, n))

    def samples(batch: _Batch, part: slice) -> Samples:
        negatives = None
        if field.negatives == "second_batch":
            with torch.no_grad():
                negatives = generate("drift/negatives", batch, part)
        return Samples(
            generate("drift/noise", batch, part),
            reader.place(batch.positives[part]),
            reader.place(batch.unconditional[part]),
            place(batch.omega[part]),
            negatives,
        )

    def compute(step: int, batch: _Batch, backward: Backward) -> Tree:
        passes = parts(len(slots), hardware.classes_per_pass)
        totals = None
        if len(passes) > 1 and field.normalization_scope == "batch":
            with torch.no_grad():
                given = [samples(batch, part) for part in passes]
            with autocast(ranks, options.precision):
                totals = step_totals(given, frozen, field, reduce=reduce, **objective_options)
        gathered, shares = [], []
        for part in passes:
            *inputs, negatives = samples(batch, part)
            with autocast(ranks, options.precision):
                loss, statistics = drift_objective(
                    *inputs,
                    frozen,
                    field,
                    negatives=negatives,
                    reduce=reduce,
                    totals=totals,
                    **objective_options,
                )
            classes = part.stop - part.start
            backward(classes * loss, last=part.stop == len(slots))
            gathered.append(statistics)
            shares.append(classes / len(slots))
        statistics = over_processes(mean_statistics(gathered, shares), ranks)
        total = torch.stack([s["loss"] for s in statistics.values()]).sum()
        return {"loss": total, **summarise(statistics, field), "feature_sets": statistics}

    emas = train(
        model,
        prepare,
        compute,
        count=options.classes_per_step,
        options=options,
        ema_decays=options.ema_decays,
        hardware=hardware,
        ranks=ranks,
        folder=folder,
        what="drift",
    )
    return model, emas


def over_processes(statistics: Statistics, ranks: Ranks) -> Statistics:
    """Means over the processes, which have as many classes each; one collective for all of them."""
    if ranks.world_size == 1:
        return statistics
    values = [value for of_set in statistics.values() for value in of_set.values()]
    flat = ranks.sum(torch.cat([value.reshape(-1) for value in values])) / ranks.world_size
    parts = iter(flat.split([value.numel() for value in values]))
    return {
        name: {key: next(parts).view_as(value) for key, value in of_set.items()}
        for name, of_set in statistics.items()
    }


def feature_dtype(precision: str) -> torch.dtype:
    """What features are held in: convolutions in bfloat16 have left no more digits in them than it has.

    Not float16, whose range gradients of single features leave.
    """
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float32}[precision]


class _Batch(NamedTuple):
    """What a step needs of the data; latents as they are fetched."""

    classes: Tensor
    """`[Nc]`"""
    omega: Tensor
    """`[Nc]`"""
    positives: Tensor
    """`[Nc, P, ...]`"""
    unconditional: Tensor
    """`[Nc, U, ...]`"""
    drawn: Mapping[str, tuple[Tensor, Tensor]]
    """By what it is for, noise `[Nc, N, C, H, W]` and style indices `[Nc, N, S]`."""


class FrozenEncoder:
    """A feature encoder that learns nothing, on a device, in the memory layout that suits it."""

    def __init__(self, encoder: LatentMAE, device: torch.device, *, compile: bool):
        self._encoder = encoder.eval().requires_grad_(False)
        encoder.encoder.to(device)  # not the decoder, which is as large
        self._compiled = Compiled(encoder.encode, "encoder") if compile else None
        if compile and device.type == "cuda":
            # Uncompiled, every GroupNorm would copy its input back to the other layout
            encoder.encoder.to(memory_format=torch.channels_last)

    def encode(self, latents: Tensor, drop_duplicates: bool = False) -> dict[str, Tensor]:
        """As that of `LatentMAE`."""
        return (self._compiled or self._encoder.encode)(latents, drop_duplicates=drop_duplicates)


class RealSamples:
    """Classes, and rows of real samples, of one step after the other."""

    def __init__(self, store: LatentStore, options: Drift, seed: int):
        self._options, self._seed = options, seed
        self._labels, self._classes = store.labels, np.arange(store.num_classes)
        data = {
            "labels": store.labels,
            "num_classes": store.num_classes,
            "seed": seed,
            "class_names": store.class_names,
            "per_image": store.per_image,
        }
        if one_of("sampling", options.sampling, "queue", "direct") == "queue":
            sizes = {"per_class": options.queue_per_class, "global_size": options.queue_global}
            self._sampling = SampleQueue(**data, **sizes)
        else:
            self._sampling = DirectSampling(**data)
        self._of_pushed = one_of("class_sampling", options.class_sampling, "pushed", "uniform") == "pushed"
        self._sampling.require(options.positives, options.unconditional)

    def draw(self, step: int, slots: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The classes of the whole step, and of the slots the rows of each class and of any."""
        options = self._options
        pushed = self._sampling.push(step, options.push_per_step)
        candidates = self._labels[pushed] if self._of_pushed else self._classes
        classes = choose_classes(self._seed, step, options.classes_per_step, candidates)
        rows = self._sampling.draw(step, classes, options.positives, options.unconditional, slots)
        return classes, *rows
