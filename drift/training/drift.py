"""Training of the generator (paper Alg. 1).

For each of Nc class slots, a step draws omega, N noises, P real samples of the class and U of any class. It
generates N samples; the drifting loss in the encoder's features gives the gradient. With `negatives:
second_batch`, another N samples repel the first.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from drift.data.bank import DirectSampling, SampleQueue, choose_classes
from drift.data.latents import LatentReader, LatentStore, pinned
from drift.features import Encoder, ImageEncoder
from drift.field import couplings
from drift.field.couplings import COUPLINGS
from drift.field.guidance import Attraction
from drift.field.loss import Totals
from drift.field.settings import FieldSettings
from drift.models.base import CONFIG_FILE
from drift.models.ema import EMA
from drift.models.generator import Generator
from drift.runtime.errors import UserError, one_of
from drift.runtime.seeds import derive_seed, device_generator, torch_generator
from drift.settings import Drift
from drift.training.compile import Compiled
from drift.training.log import Tree
from drift.training.loop import Measured, Run, Task, autocast, logs, train
from drift.training.objective import Execution, Samples, drift_objective, step_totals
from drift.training.schedule import draw_omega, temperatures

NOISE = {"generated": "noise", "negatives": "negatives"}
"""What needs noise, and the word for it in the paths of seeds."""
DRAWN_BY_HOST = 2**20
"""Numbers of noise for a class: more are drawn on the device, at once with the step. A core of a CPU draws
1e8 a second, and a step on latents of 768x16x16 takes 8e8."""


def plot_columns(field: FieldSettings) -> list[str]:
    """The columns of `logs.jsonl` for DVC's plots."""
    per_temperature = [f"{name}_{tau:g}" for name in _by_temperature(field) for tau in field.temps]
    return ["loss", *_by_temperature(field), *per_temperature, "scale", "grad_norm", "lr"]


def _by_temperature(field: FieldSettings) -> list[str]:
    """Statistics of `drifting_loss` with one value per temperature."""
    return ["drift_rms", *Attraction._fields, *COUPLINGS[field.coupling].statistics]


def generator_config(options: Drift, store: LatentStore) -> dict[str, Any]:
    """Sizes of the generator for the latents of `store`."""
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


def open_generator(source: str, sizes: Mapping[str, Any]) -> Generator:
    """The generator in the folder `source`, with the weights of its first EMA, to start from.

    Raises `UserError` if it is missing or damaged, or its sizes are not these (see `generator_config`).
    """
    what = f"drift.init_from = {source}"
    if not Path(source, CONFIG_FILE).is_file():
        raise UserError(
            f"{what}: there is no {CONFIG_FILE} in it; name the folder of a generator from the stage drift "
            "or drift import-release"
        )
    model = Generator.from_pretrained(source)
    for key, size in sizes.items():
        if (found := model.config[key]) != size:
            raise UserError(f"{what}: its {key} is {found}, and that of this run is {size}; make them equal")
    return model.train()


class Batch(NamedTuple):
    """This process's share of what a step draws, with latents as `LatentReader.fetch` gives them."""

    classes: Tensor
    """`[Nc]`"""
    omega: Tensor
    """`[Nc]`"""
    positives: Tensor
    """`[Nc, P, ...]`"""
    unconditional: Tensor
    """`[Nc, U, ...]`"""
    noise: Mapping[str, tuple[Tensor | None, Tensor]]
    """Of `generated` and `negatives`: noise `[Nc, N, C, H, W]`, unless `_noise_on_device` draws it later, and
    style indices `[Nc, N, S]`."""
    step: int


Evaluate = Callable[[Generator, Mapping[str, Tensor], int], Measured]
"""Measures a generator with some weights after so many steps."""


class GeneratorTraining(Task[Batch]):
    """The drift stage: a generator that follows the drift field in the features of a frozen encoder."""

    name = "drift"
    model: Generator
    options: Drift

    def __init__(
        self,
        store: LatentStore,
        encoder: Encoder,
        options: Drift,
        field: FieldSettings,
        run: Run,
        evaluation: Evaluate | None = None,
    ):
        seed, hardware, ranks, _ = run
        self.options, self.ema_decays, self._field = options, options.ema_decays, field
        self._seed, self._ranks, self.at_once = seed, ranks, hardware.classes_per_pass
        self._hardware = hardware
        share = ranks.share(options.classes_per_step, "drift.classes_per_step")
        self._slots = range(share.start, share.stop)  # this process's class slots
        self.count = len(self._slots)
        if self.count % (field.classes_per_part or 1):
            raise UserError(
                f"drift.classes_per_part = {field.classes_per_part}: no divisor of the {self.count} classes "
                f"of each of {ranks.world_size} processes; run with another --nproc, or change "
                f"drift.classes_per_step ({options.classes_per_step})"
            )
        torch.manual_seed(derive_seed(seed, "drift/init"))
        sizes, source = generator_config(options, store), options.init_from
        self.model = Generator(**sizes) if source is None else open_generator(source, sizes)
        self.model.activation_checkpointing = hardware.activation_checkpointing
        self.evaluate_every, self._evaluation = evaluation and options.evaluate_every, evaluation
        self._encoder = encoder.to(ranks.device)
        if hardware.compile:
            if ranks.device.type == "cuda":  # uncompiled, every GroupNorm would copy its input back
                encoder.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
                for one in list(encoder.modules()):
                    if isinstance(one, ImageEncoder) and one.autoencoder is not None:
                        one.autoencoder.compile_with(Compiled)
            self._encoder = CompiledEncoder(encoder)
        self._reader = LatentReader(store, ranks.device, on_device=hardware.latents_on_device)
        self._real = RealSamples(store, options, seed)
        self._execution = Execution(
            reduce=ranks.sum if ranks.world_size > 1 else None,
            feature_batch=hardware.feature_batch,
            feature_dtype=feature_dtype(options.precision),
        )

    def prepare(self, step: int) -> Batch:
        """Draw classes, omega, real samples and noise, as a function of (seed, step, slot)."""
        count, device = self.options.classes_per_step, self._ranks.device
        classes, of_class, of_any = self._real.draw(step, self._slots)
        omega = draw_omega(count, self.options, torch_generator(self._seed, "drift/omega", step))
        kinds = NOISE if self._field.negatives == "second_batch" else ["generated"]
        noise = {what: self._draw(what, step) for what in kinds}
        mine = slice(self._slots.start, self._slots.stop)
        return Batch(
            pinned(torch.as_tensor(classes[mine]), device),
            pinned(omega[mine], device),
            self._reader.fetch(of_class),
            self._reader.fetch(of_any),
            noise,
            step,
        )

    def _draw(self, what: str, step: int) -> tuple[Tensor | None, Tensor]:
        """Noise and style indices of this process's slots."""
        config, size = self.model.config, self._noise_size
        entries, codebooks = config["style_entries"], config["style_codebooks"]
        noise, style = [], []
        for slot in self._slots:
            generator = torch_generator(self._seed, f"drift/{NOISE[what]}", step, slot)
            if math.prod(size) <= DRAWN_BY_HOST:
                noise.append(torch.randn(size, generator=generator))
            style.append(torch.randint(entries, (size[0], codebooks), generator=generator))
        drawn = pinned(torch.stack(noise), self._ranks.device) if noise else None
        return drawn, pinned(torch.stack(style), self._ranks.device)

    @property
    def _noise_size(self) -> tuple[int, int, int, int]:
        """Of a slot: (N, C, H, W)."""
        config = self.model.config
        return self.options.generated, config["in_channels"], config["input_size"], config["input_size"]

    def _noise_on_device(self, what: str, step: int, slots: range) -> Tensor:
        """The noise of some slots `[slots, N, C, H, W]`, a function of (seed, step, slot) like all draws."""
        noise = torch.empty(len(slots), *self._noise_size, device=self._ranks.device)
        for of_slot, slot in zip(noise, slots, strict=True):
            path = self._seed, f"drift/{NOISE[what]}/device", step, slot
            of_slot.normal_(generator=device_generator(self._ranks.device, *path))
        return noise

    def totals(self, network: nn.Module, batch: Batch, parts: Sequence[slice]) -> Mapping[str, Totals] | None:
        """S and lambda of all classes of a step that is taken in parts."""
        if len(parts) == 1 or self._field.normalization_scope != "batch":
            return None
        with torch.no_grad():
            samples = [self._samples(network, batch, part) for part in parts]
        with autocast(self._ranks, self.options.precision):
            return step_totals(samples, self._encoder, self._field_at(batch.step), self._execution)

    def loss(
        self, network: nn.Module, batch: Batch, part: slice, totals: Mapping[str, Totals] | None
    ) -> tuple[Tensor, Tree]:
        """The drifting loss of some classes."""
        samples = self._samples(network, batch, part)
        field, logged = self._field_at(batch.step), logs(self, batch.step, self._hardware)
        execution = replace(self._execution, totals=totals, attraction=logged)
        with autocast(self._ranks, self.options.precision):
            loss, statistics = drift_objective(
                *samples[:4], self._encoder, field, negatives=samples.negatives, execution=execution
            )
        for of_set in statistics.values():
            of_set["drift_rms"] = of_set["drift_rms"].square()  # squares can be averaged over parts
        return loss, {"feature_sets": statistics}

    def _field_at(self, step: int) -> FieldSettings:
        """With the temperatures of the step."""
        return replace(self._field, temps=temperatures(step, self._field.temps, self.options))

    def _samples(self, network: nn.Module, batch: Batch, part: slice) -> Samples:
        """Generate the samples of some classes, and move the real ones to the device."""
        negatives = None
        if self._field.negatives == "second_batch":
            with torch.no_grad():
                negatives = self._generate(network, batch, "negatives", part)
        return Samples(
            self._generate(network, batch, "generated", part),
            self._reader.place(batch.positives[part]),
            self._reader.place(batch.unconditional[part]),
            self._place(batch.omega[part]),
            negatives,
        )

    def _generate(self, network: nn.Module, batch: Batch, what: str, part: slice) -> Tensor:
        n = self.options.generated
        noise, style = batch.noise[what]
        noise = self._noise_on_device(what, batch.step, self._slots[part]) if noise is None else noise[part]
        noise, style = (self._place(x.flatten(0, 1)) for x in (noise, style[part]))
        labels, omega = (self._place(x[part]).repeat_interleave(n) for x in (batch.classes, batch.omega))
        # One autocast for each call: a longer one would reuse weights that it has cast without a graph
        with autocast(self._ranks, self.options.precision):
            return network(noise, labels, omega, style).unflatten(0, (-1, n))  # [Nc, N, C, H, W]

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._ranks.device, non_blocking=True)

    def summary(self, means: Tree) -> Tree:
        """Means over the feature sets, for each temperature and for all of them; then the sets one by one.

        `drift_rms_<tau>` is the RMS of the raw drift before each temperature's normalisation, in units of
        S, and `drift_rms` its mean over temperatures: the number that falls while the generator learns. The
        normalised loss stays about one per temperature and feature set by construction. Temperatures are
        named by `temps`, also while they fall (`temps_start`).
        """
        sets = {
            name: {**of, "drift_rms": of["drift_rms"].sqrt()} for name, of in means["feature_sets"].items()
        }
        summary = {}
        for name in _by_temperature(self._field):
            if not all(name in of_set for of_set in sets.values()):  # of a step that is not logged
                continue
            by_temperature = torch.stack([of_set[name] for of_set in sets.values()]).mean(dim=0)  # [T]
            summary[name] = by_temperature.mean()
            each = zip(self._field.temps, by_temperature, strict=True)
            summary |= {f"{name}_{tau:g}": mean for tau, mean in each}
        summary["scale"] = torch.stack([of_set["scale"] for of_set in sets.values()]).mean()
        return {**summary, "feature_sets": sets}

    def evaluate(self, done: int, weights: Mapping[str, Tensor]) -> Measured:
        """What `evaluation` measures."""
        assert self._evaluation is not None, "there is no evaluate_every without it"
        return self._evaluation(self.model, weights, done)


def train_generator(
    store: LatentStore,
    encoder: Encoder,
    options: Drift,
    field: FieldSettings,
    run: Run,
    evaluation: Evaluate | None = None,
) -> tuple[Generator, list[EMA]]:
    """Train a Generator on `store` in the features of `encoder`, from the newest checkpoint on.

    Where there is an `evaluation`, `options.evaluate_every` says how often it is called.

    Returns the generator, and one EMA per decay of `options.ema_decays`. Raises `UserError` if the classes of
    a step do not split over the processes, or a class has too few samples.
    """
    if run.hardware.compile and run.ranks.device.type == "cuda":
        couplings.fuse(partial(Compiled, name="scalings of a plan", dynamic=None))
    training = GeneratorTraining(store, encoder, options, field, run, evaluation)
    return training.model, train(training, run)


def feature_dtype(precision: str) -> torch.dtype:
    """The type that features are held in: bfloat16 where convolutions in bfloat16 have made them.

    They then have no more digits. Never float16, whose range gradients of single features leave.
    """
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float32}[precision]


class CompiledEncoder(Encoder):
    """An encoder by torch.compile."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self._encode = Compiled(encoder.encode, "encoder")

    def encode(self, latents: Tensor) -> dict[str, Tensor]:
        return self._encode(latents)


class RealSamples:
    """The classes, and the rows of real samples, of each step; ask for the steps in order."""

    def __init__(self, store: LatentStore, options: Drift, seed: int):
        self._options, self._seed = options, seed
        self._labels, self._classes = store.labels, np.arange(store.num_classes)
        data = {"labels": store.labels, "num_classes": store.num_classes, "seed": seed}
        data |= {"class_names": store.class_names, "per_image": store.per_image}
        sizes = {"per_class": options.queue_per_class, "global_size": options.queue_global}
        queue = one_of("sampling", options.sampling, "queue", "direct") == "queue"
        self._sampling = SampleQueue(**data, **sizes) if queue else DirectSampling(**data)
        self._of_pushed = one_of("class_sampling", options.class_sampling, "pushed", "uniform") == "pushed"
        self._sampling.require(options.positives, options.unconditional)

    def draw(self, step: int, slots: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The classes of the whole step `[Nc]`; for `slots`, rows of the class `[slots, P]` and of any."""
        options = self._options
        pushed = self._sampling.push(step, options.push_per_step)
        candidates = self._labels[pushed] if self._of_pushed else self._classes
        classes = choose_classes(self._seed, step, options.classes_per_step, candidates)
        rows = self._sampling.draw(step, classes, options.positives, options.unconditional, slots)
        return classes, *rows
