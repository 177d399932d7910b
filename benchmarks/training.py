"""Steps of the stages drift and mae on synthetic latents: run, split into parts, counted, and the plain step.

`run` takes the steps of the stage itself, with random latents and for drift an encoder of random weights.
`instrument` tells a `Split` which part of a step is at work, without waiting for the device. The backward
pass of drift is cut where gradients arrive at the features (before, it is the field's) and at the generated
latents (before, it is the encoder's).
"""

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from drift.field.coupling import COUPLINGS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import drift.field.problems
import drift.training.drift
import drift.training.log
import drift.training.loop
import drift.training.mae
import drift.training.objective
from benchmarks.field import TEMPS, plain_loss
from benchmarks.timing import Split, flop_meter
from drift.data.latents import LatentReader, LatentStore, write_latents
from drift.field import FieldSettings
from drift.models import Generator, LatentMAE
from drift.models.ema import EMA
from drift.runtime.processes import Ranks
from drift.settings import Settings
from drift.training.compile import Compiled
from drift.training.drift import FrozenEncoder, generator_config, train_generator
from drift.training.log import RunLog
from drift.training.mae import mae_config, train_mae
from drift.training.objective import drift_objective
from drift.training.prefetch import Prefetch

PER_CLASS = 128  # latents in the store, or as many as are asked for
NEVER = 10**9  # steps
FIELD, MAE_BACKWARD = "field", "MAE, backward"
FEATURES_BACKWARD = "encoder, generated, backward"
SUMS = "rest of the sums over the step"


class Enough(Exception):
    """Ends a run."""


@dataclass(frozen=True)
class Case:
    """Which steps are run, and where."""

    stage: str
    """`drift` or `mae`."""
    settings: Settings
    device: str
    plain: str | None = None
    """`vectorised` or `literal`: that field of `benchmarks.field` in the place of the project's."""

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)


def latent_shape(settings: Settings) -> tuple[int, int, int]:
    """(C, h, w) of the latents of the settings' VAE; one that is in no folder is taken for an SD-VAE."""
    channels, factor = 4, 8
    if (config := Path(settings.encode.vae, "config.json")).is_file():
        content = json.loads(config.read_text())
        channels, factor = content["latent_channels"], 2 ** (len(content["block_out_channels"]) - 1)
    side = settings.data.image_size // factor
    return channels, side, side


def run(case: Case, steps: int, on_step: Callable[[int], None], split: Split | None = None) -> None:
    """Take `steps` steps; `on_step` hears after each how many are done, and may raise `Enough`."""
    settings, stage = case.settings, case.stage
    hardware = settings.hardware.model_copy(update={"log_every": NEVER, "checkpoint_every": NEVER})
    done = 0

    def step(log: RunLog) -> None:
        nonlocal done
        done += 1
        on_step(done)

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = _store(settings, stage, folder)
        torch.manual_seed(0)
        for owner, name, replacement in (
            (RunLog, "step", step),
            (drift.training.log, "tqdm", lambda **kwargs: tqdm(**{**kwargs, "disable": True})),
            (drift.training.loop, "save_checkpoint", lambda *args, **kwargs: None),
        ):
            stack.enter_context(patch.object(owner, name, replacement))
        field = settings.field()
        if case.plain is not None:
            field = _plain(stack, case.plain, field)
        if split is not None:
            instrument(stack, split, stage, compiled=hardware.compile)
        shared = {"seed": 0, "hardware": hardware, "ranks": Ranks(0, 1, case.torch_device), "folder": folder}
        stack.enter_context(suppress(Enough))
        if stage == "mae":
            changes = {"steps": steps, "warmup_steps": 0, "finetune_steps": 0, "held_out": 0}
            train_mae(store, settings.mae.model_copy(update=changes), **shared)
        else:
            encoder = LatentMAE(**mae_config(settings.mae, store))
            options = settings.drift.model_copy(update={"steps": steps, "warmup_steps": 0})
            train_generator(store, encoder, options, field, **shared)


def _store(settings: Settings, stage: str, folder: Path) -> LatentStore:
    if stage == "mae":
        classes, count = settings.data.classes, 2 * settings.mae.batch_size
        labels = np.arange(count) % classes
    else:
        classes = settings.drift.classes_per_step
        labels = np.repeat(np.arange(classes), max(PER_CLASS, settings.drift.positives))
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((len(labels), *latent_shape(settings)), np.float32).astype(np.float16)
    write_latents(folder, "train", latents, labels, {"num_classes": classes})
    return LatentStore.open(folder)


def instrument(stack: ExitStack, split: Split, stage: str, *, compiled: bool) -> None:
    """Let the parts of a step tell `split` when they are at work, until `stack` is left.

    Networks that are `compiled` are measured from outside: a reading within would break them apart.
    """

    def generator(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(call)
        def wrapper(*args, **kwargs):
            name = "forward" if torch.is_grad_enabled() else "without gradient"
            with split.part(f"generator, {name}"):
                latents = call(*args, **kwargs)
            if latents.requires_grad:
                latents.register_hook(lambda gradient: split.cut("generator, backward"))
            return latents

        return wrapper

    def mae(call: Callable) -> Callable:
        return split.wrapped("MAE, forward", call)

    def compile(function: Callable, name: str) -> Callable:
        return {"generator": generator, "MAE": mae}.get(name, lambda call: call)(Compiled(function, name))

    encode_plainly = FrozenEncoder.encode

    def encode(self, *args, **kwargs):
        if split.at_work(FEATURES_BACKWARD):  # a checkpoint
            name = "encoder, computed again"
        elif split.at_work(SUMS):
            name = "encoder, for the sums"
        else:
            name = "encoder, generated, forward" if torch.is_grad_enabled() else "encoder, real"
        with split.part(name):
            features = encode_plainly(self, *args, **kwargs)
        for vectors in features.values():
            if vectors.requires_grad:
                vectors.register_hook(lambda gradient: split.cut(FEATURES_BACKWARD))
        return features

    passes = drift.training.objective.FieldPasses
    methods = [
        name
        for name, value in vars(passes).items()
        if callable(value) and (name == "__init__" or not name.startswith("_"))
    ]
    parts = [
        (Prefetch, "get", "data"),
        (LatentReader, "place", "data"),
        (torch.Tensor, "backward", MAE_BACKWARD if stage == "mae" else FIELD),
        (torch.nn.utils, "clip_grad_norm_", "optimizer"),
        (torch.optim.AdamW, "step", "optimizer"),
        (EMA, "update", "EMA"),
        (drift.training.drift, "step_sums", SUMS),
        *((passes, name, FIELD) for name in methods),
    ]
    replaced = [
        (FrozenEncoder, "encode", encode),
        *((owner, name, split.wrapped(part, getattr(owner, name))) for owner, name, part in parts),
    ]
    if compiled:
        replaced += [(drift.training.drift, "Compiled", compile), (drift.training.mae, "Compiled", compile)]
    elif stage == "mae":
        replaced.append((LatentMAE, "forward", mae(LatentMAE.forward)))
    else:
        replaced.append((Generator, "forward", generator(Generator.forward)))
    for owner, name, replacement in replaced:
        stack.enter_context(patch.object(owner, name, replacement))


def step_flops(case: Case) -> dict[str, int]:
    """FLOPs of a step by part, as PyTorch's counter counts matrix products and convolutions; nothing twice.

    Counted on fake tensors, so it takes neither memory nor a device: one class (for mae one latent) of the
    networks and the field in full, times their number, in which a step is linear. What a run computes again
    to save memory is not in it.
    """
    settings = case.settings
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        let_tensors_be_fake(stack)
        # Other attention kernels are not counted on a CPU, or count what their backward pass computes again
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        counter = stack.enter_context(FlopCounterMode(display=False))
        split = Split(flop_meter(counter))
        instrument(stack, split, case.stage, compiled=False)
        split.start()
        times = _count_mae(settings) if case.stage == "mae" else _count_drift(settings)
        split.stop()
        return {name: times * int(flops) for name, flops in split.totals().items() if flops}


def let_tensors_be_fake(stack: ExitStack) -> None:
    """Leave out what looks at numbers or exchanges tensors; couplings hold no products of two matrices."""

    def coupling(logits: Tensor) -> Tensor:
        return logits.exp()

    def sinkhorn(logits: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
        return logits.exp(), logits.amax(dim=-2, keepdim=True), logits.amax(dim=(-2, -1))

    stack.enter_context(patch.dict(COUPLINGS, dict.fromkeys(COUPLINGS, coupling)))
    for owner, name, replacement in (
        (drift.field.problems, "sinkhorn", sinkhorn),
        (LatentMAE, "initialize_weights", lambda self: None),
        (torch.nn.Module, "to", lambda self, *args, **kwargs: self),
    ):
        stack.enter_context(patch.object(owner, name, replacement))


def _count_drift(settings: Settings) -> int:
    options, shape = settings.drift, latent_shape(settings)
    store = SimpleNamespace(shape=(1, *shape), num_classes=options.classes_per_step)
    generator = Generator(**generator_config(options, store))
    encoder = FrozenEncoder(LatentMAE(**mae_config(settings.mae, store)), torch.device("cpu"), compile=False)
    field = settings.field()

    def generate() -> Tensor:
        n = options.generated
        style = torch.zeros(n, options.style_codebooks, dtype=torch.int64)
        labels = torch.zeros(n, dtype=torch.int64)
        return generator(torch.zeros(n, *shape), labels, torch.ones(n), style)[None]

    negatives = None
    if field.negatives == "second_batch":
        with torch.no_grad():
            negatives = generate()
    real = (torch.zeros(1, count, *shape) for count in (options.positives, options.unconditional))
    loss, _ = drift_objective(
        generate(), *real, torch.ones(1), encoder, field, negatives=negatives,
        drop_duplicates=options.duplicate_features == "drop",
    )  # fmt: skip
    loss.backward()
    return options.classes_per_step


def _count_mae(settings: Settings) -> int:
    shape = latent_shape(settings)
    model = LatentMAE(
        **mae_config(settings.mae, SimpleNamespace(shape=(1, *shape), num_classes=settings.data.classes))
    )
    mask = torch.zeros(1, *model.mask_grid(*shape[1:]), dtype=torch.bool)
    errors, logits = model(torch.zeros(1, *shape), mask)
    (errors.mean() + logits.logsumexp(1).mean()).backward()
    return settings.mae.batch_size


def plain_case(case: Case, implementation: str, classes_per_pass: int | None) -> Case:
    """The plain step beside `case`: an Algorithm 2 that loops, nothing compiled, the same precision."""
    update = {"compile": False, "classes_per_pass": classes_per_pass}
    hardware = case.settings.hardware.model_copy(update=update)
    settings = case.settings.model_copy(update={"hardware": hardware})
    return dataclasses.replace(case, settings=settings, plain=implementation)


def no_plain_field(field: FieldSettings) -> str | None:
    """Why the plain field cannot stand in for the one of these settings; None if it can."""
    release = FieldSettings(temps=TEMPS)
    for knob in dataclasses.fields(FieldSettings):
        wanted = getattr(release, knob.name)
        if (found := getattr(field, knob.name)) != wanted:
            return f"the plain field knows the release's settings alone; {knob.name} is {found}, not {wanted}"
    return None


def _plain(stack: ExitStack, implementation: str, field: FieldSettings) -> FieldSettings:
    """Put the plain field in the place of the project's; the field's settings to run it with."""

    class PlainPasses:
        def __init__(self, x, pos, uncond, omega, *_, **others):
            self._inputs = [vectors.float() for vectors in (x, pos, uncond, omega)]

        def all(self, reduce):
            with torch.autocast(self._inputs[0].device.type, enabled=False):
                loss = plain_loss(*self._inputs, literal=implementation == "literal")
            per_temperature = loss.new_zeros(len(TEMPS))
            statistics = {"loss": loss.detach(), "scale": loss.new_zeros(())}
            return loss, statistics | dict.fromkeys(("drift_rms", "neighbours"), per_temperature)

    stack.enter_context(patch.object(drift.training.objective, "FieldPasses", PlainPasses))
    # In parts, each has a scale of its own, as nothing is computed twice then: less work, not more
    return dataclasses.replace(field, normalization_scope="class")
