"""Steps of the stage drift (or mae) on synthetic latents: how fast, and what takes the time.

    python -m benchmarks.step                                  # the ablation preset, on a GPU
    python -m benchmarks.step --preset presets/digits.yaml     # for a CPU
    python -m benchmarks.step --set drift.classes_per_step=2 mae.width=32 hardware.classes_per_pass=1

The stage's own training loop runs, with random latents and an encoder of random weights, and the very steps
that are timed are split into parts: on a GPU by events for which nothing waits, on a CPU by the clock. One
further step, uncompiled, is counted by torch.utils.flop_counter, and the rate set against that of large
square matrix products. benchmarks/README.md says how to read it.
"""

import functools
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import drift.training.objective
from benchmarks import timing
from benchmarks.timing import Split
from drift.autoencoders import AUTOENCODERS
from drift.data.latents import LatentReader, LatentStore, as_stored, write_latents
from drift.features import Encoder, EncoderOptions, MAEEncoder
from drift.features.base import Joined
from drift.models import Generator, LatentMAE
from drift.models.ema import EMA
from drift.runtime.processes import Ranks
from drift.settings import Settings
from drift.training.drift import train_generator
from drift.training.log import RunLog
from drift.training.loop import Run
from drift.training.mae import mae_config, train_mae

WARM_UP = 3  # steps before those that count
LATENTS = {"kl": (4, 8), "rae": (768, 16), "pixels": (3, 1)}
"""Channels, and pixels along a place, of the SD-VAE's and of DINOv2-B's latents, and of pixels."""


class Enough(Exception):
    """Ends a run."""


def run(settings: Settings, stage: str, device: torch.device, split: Split, on_step: Callable[[int], None]):
    """Run the stage's loop with its parts instrumented; `on_step(steps done)` may raise `Enough`."""
    done = 0

    def step(log: RunLog) -> None:
        nonlocal done
        done += 1
        on_step(done)
        split.switch("data")

    never = {"log_every": 10**9, "checkpoint_every": 10**9}
    hardware = settings.hardware.model_copy(update=never)
    changes = {"steps": 10**9, "warmup_steps": 0}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store = latents(settings, stage, folder)
        stack.enter_context(patch.object(RunLog, "step", step))
        instrument(stack, split, stage)
        stack.enter_context(suppress(Enough))
        run = Run(0, hardware, Ranks(0, 1, device), folder)
        if stage == "mae":
            changes |= {"finetune_steps": 0, "held_out": 0}
            train_mae(store, settings.mae.model_copy(update=changes), run)
        else:
            torch.manual_seed(0)
            encoder = Joined([_encoder(one, settings, store) for one in settings.features])
            encoder.eval().requires_grad_(False)
            options = settings.drift.model_copy(update=changes)
            train_generator(store, encoder, options, settings.field_settings(), run)


def _encoder(features: EncoderOptions, settings: Settings, store: LatentStore) -> Encoder:
    """An encoder of the settings, the MAE with random weights."""
    if features.needs_decoder:
        return features.load(autoencoder=settings.encode.autoencoder.load(settings.decoder_precision))
    if not features.needs_mae:
        return features.load()
    return MAEEncoder(LatentMAE(**mae_config(settings.mae, store)), drop_duplicates=settings.drops_duplicates)


def latents(settings: Settings, stage: str, folder: Path) -> LatentStore:
    """Noise, of as many classes as a step has, in the type in which latents of the kind are stored."""
    of_drift = settings.drift
    classes = of_drift.classes_per_step if stage == "drift" else settings.data.classes
    count = classes * max(128, of_drift.positives) if stage == "drift" else 2 * settings.mae.batch_size
    kind = settings.encode.autoencoder.kind
    channels, reduction = LATENTS[kind]
    side, labels = settings.data.image_size // reduction, np.arange(count) % classes
    numbers = np.random.default_rng(0).standard_normal((count, channels, side, side), np.float32)
    stored = as_stored(torch.from_numpy(numbers), AUTOENCODERS[kind].storage_dtype).numpy()
    write_latents(folder, "train", stored, labels, {"num_classes": classes})
    return LatentStore.open(folder)


def instrument(stack: ExitStack, split: Split, stage: str) -> None:
    """Let the parts of a step tell `split` when they are at work, until `stack` is left.

    Networks are measured from outside: a reading within would break a compiled one apart.
    """

    def part(owner: object, name: str, what: Callable[..., str]) -> None:
        call = getattr(owner, name)

        @functools.wraps(call)
        def wrapper(*args, **kwargs):
            if torch.compiler.is_compiling() or not (title := what(*args)):
                return call(*args, **kwargs)
            with split.part(title):
                result = call(*args, **kwargs)
            if title == "generator, forward":  # the backward pass is the encoder's up to here
                result.register_hook(lambda gradient: split.switch("generator, backward"))
            return result

        stack.enter_context(patch.object(owner, name, wrapper))

    def network(module: nn.Module, *_) -> str:
        module = getattr(module, "_orig_mod", module)
        if isinstance(module, Generator):
            return "generator, forward" if torch.is_grad_enabled() else "generator, without gradient"
        return "MAE, forward" if isinstance(module, LatentMAE) else ""

    def encoder(*_) -> str:
        if split.name.endswith("backward"):
            return "encoder, computed again"
        return "encoder, generated" if torch.is_grad_enabled() else "encoder, without gradient"

    for kind in (Generator, LatentMAE, OptimizedModule):
        part(kind, "__call__", network)
    part(Joined, "encode", encoder)
    for owner, name, title in (
        (drift.training.objective, "drifting_loss", "field"),
        (drift.training.drift, "step_totals", "field"),
        (LatentReader, "place", "data"),
        (torch.Tensor, "backward", "MAE, backward" if stage == "mae" else "encoder, backward"),
        (nn.utils, "clip_grad_norm_", "optimizer, EMA"),
        (torch.optim.AdamW, "step", "optimizer, EMA"),
        (EMA, "update", "optimizer, EMA"),
    ):
        part(owner, name, lambda *_, title=title: title)


def measure(settings: Settings, stage: str, device: torch.device, steps: int) -> dict[str, Any]:
    """Seconds of a step, by part, and of the first and the last tenth of the steps; peak memory."""
    read, difference = timing.clock(device)
    split, readings, result = Split(read, difference), [], {}

    def on_step(done: int) -> None:
        if done == WARM_UP:
            timing.synchronize(device)
            timing.restart_peak(device)
            split.start()
        if done >= WARM_UP:
            readings.append(read())
        if done == WARM_UP + steps:
            timing.synchronize(device)
            result["parts"] = {name: seconds / steps for name, seconds in split.totals().items()}
            result["peak_bytes"] = timing.peak_memory(device)
            raise Enough

    run(settings, stage, device, split, on_step)
    tenth = max(1, steps // 10)
    result["tenths"] = [difference(readings[i], readings[i + tenth]) / tenth for i in (0, steps - tenth)]
    return {"steps": steps, "seconds": difference(readings[0], readings[-1]) / steps, **result}


def count_flops(settings: Settings, stage: str, device: torch.device) -> dict[str, float]:
    """FLOPs of one uncompiled step by part, a multiplication with its addition as two."""
    uncompiled = settings.hardware.model_copy(update={"compile": False})
    settings = settings.model_copy(update={"hardware": uncompiled})
    # A CPU's other attention kernels are not counted
    counted = nullcontext() if device.type == "cuda" else sdpa_kernel(SDPBackend.MATH)
    totals: dict[str, float] = {}
    with counted, FlopCounterMode(display=False) as counter:
        split = Split(counter.get_total_flops, lambda start, end: end - start)
        split.start()

        def on_step(done: int) -> None:
            totals.update(split.totals())
            raise Enough

        run(settings, stage, device, split, on_step)
    return totals


def main(argv: list[str] | None = None) -> None:
    options = timing.parser(__doc__, "presets/imagenet256_ablation.yaml")
    add = options.add_argument
    add("--device", default=timing.GPU_OR_CPU, help="on a CPU uncompiled and in float32 unless --set says so")
    add("--stage", choices=("drift", "mae"), default="drift")
    add("--steps", type=int, default=10, help="that count (10); thousands show whether it slows down")
    add("--memory-limit", type=float, metavar="GB", help="have no more than so many 10^9 bytes of the GPU")
    args = options.parse_args(argv)
    device, changes = torch.device(args.device), {}
    if device.type == "cpu":
        changes = {"hardware.compile": False, "drift.precision": "float32", "mae.precision": "float32"}
    settings = timing.read_settings(args, changes)
    if args.memory_limit is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory_limit * 1e9 / total))
    facts = timing.machine(device)
    print(f"{args.preset}, {args.stage}")
    result = measure(settings, args.stage, device, args.steps)
    flops = count_flops(settings, args.stage, device)
    precision = (settings.mae if args.stage == "mae" else settings.drift).precision
    rate, seconds = timing.matmul_rate(device, precision), result["seconds"]
    share = sum(flops.values()) / seconds / rate
    first, last = (1000 * spent for spent in result["tenths"])
    print(f"{1 / seconds:.3f} steps/s, {1000 * seconds:.1f} ms (first tenth {first:.1f}, last {last:.1f}), "
          f"peak memory {result['peak_bytes'] / 2**30:.2f} GiB")  # fmt: skip
    print(f"{'part':28} {'a step':>13} {'share':>7} {'GFLOP':>10}")
    for name, spent in sorted(result["parts"].items(), key=lambda row: -row[1]):
        count = flops.get(name, 0) / 1e9
        print(f"{name:28} {1000 * spent:10.2f} ms {spent / seconds:7.1%} {count:10.4g}")
    print(f"matrix products in {precision}: {rate / 1e12:.3g} TFLOP/s; the step has {share:.1%} of that")
    facts |= {"stage": args.stage, "settings": settings.model_dump(mode="json")}
    timing.write(
        args.json, facts | result | {"flops": flops, "matmul_flops_per_s": rate, "share_of_matmul": share}
    )


if __name__ == "__main__":
    main()
