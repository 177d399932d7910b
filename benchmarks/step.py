"""Steps of the stage drift (or mae) on synthetic latents: how fast, and what takes the time.

    python -m benchmarks.step                                       # the ablation preset, on a GPU
    python -m benchmarks.step --classes 2 --samples 4 --width 32    # reduced, for a CPU
    python -m benchmarks.step --preset presets/digits.yaml --stage mae

The stage's own training loop runs, with random latents and an encoder of random weights, and the very steps
that are timed are split into parts: on a GPU by events for which nothing waits, on a CPU by the clock. One
further step, uncompiled, is counted by torch.utils.flop_counter, and the rate set against that of large
square matrix products. benchmarks/README.md says how to read it.
"""

import argparse
import functools
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import yaml
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import drift.training.objective
from benchmarks.timing import (
    Split,
    clock,
    machine,
    matmul_rate,
    peak_memory,
    restart_peak,
    synchronize,
    write,
)
from drift.data.latents import LatentReader, LatentStore, write_latents
from drift.models import Generator, LatentMAE
from drift.models.ema import EMA
from drift.runtime.processes import Ranks
from drift.settings import Settings, load_settings
from drift.training.drift import FrozenEncoder, train_generator
from drift.training.log import RunLog
from drift.training.mae import mae_config, train_mae

WARM_UP = 3  # steps before those that count
TRACED = 3  # steps after them
CHANNELS, REDUCTION = 4, 8  # of the SD-VAE


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
        shared = {"seed": 0, "hardware": hardware, "ranks": Ranks(0, 1, device), "folder": folder}
        if stage == "mae":
            changes |= {"finetune_steps": 0, "held_out": 0}
            train_mae(store, settings.mae.model_copy(update=changes), **shared)
        else:
            torch.manual_seed(0)
            encoder = LatentMAE(mae_config(settings.mae, store))
            options = settings.drift.model_copy(update=changes)
            train_generator(store, encoder, options, settings.field(), **shared)


def latents(settings: Settings, stage: str, folder: Path) -> LatentStore:
    """Noise, of as many classes as a step has."""
    of_drift = settings.drift
    classes = of_drift.classes_per_step if stage == "drift" else settings.data.classes
    count = classes * max(128, of_drift.positives) if stage == "drift" else 2 * settings.mae.batch_size
    side = settings.data.image_size // REDUCTION
    numbers = np.random.default_rng(0).standard_normal((count, CHANNELS, side, side), np.float32)
    write_latents(
        folder, "train", numbers.astype(np.float16), np.arange(count) % classes, {"num_classes": classes}
    )
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
    part(FrozenEncoder, "encode", encoder)
    for name in ("drifting_loss", "step_totals"):
        owner = drift.training.objective if name == "drifting_loss" else drift.training.drift
        part(owner, name, lambda *_: "field")
    part(LatentReader, "place", lambda *_: "data")
    part(torch.Tensor, "backward", lambda *_: "MAE, backward" if stage == "mae" else "encoder, backward")
    for owner, name in ((nn.utils, "clip_grad_norm_"), (torch.optim.AdamW, "step"), (EMA, "update")):
        part(owner, name, lambda *_: "optimizer, EMA")


def measure(settings: Settings, stage: str, device: torch.device, steps: int, trace: Path | None) -> dict:
    """Seconds of a step by part, of the first and the last tenth of the steps, and peak memory."""
    read, difference = clock(device)
    split, readings, result = Split(read, difference), [], {}
    profiler = torch.profiler.profile()

    def on_step(done: int) -> None:
        if done < WARM_UP:
            return
        if done == WARM_UP:
            synchronize(device)
            restart_peak(device)
            split.start()
        if done <= WARM_UP + steps:
            readings.append(read())
        if done == WARM_UP + steps:
            synchronize(device)
            result.update(parts={name: s / steps for name, s in split.totals().items()})
            result.update(peak_bytes=peak_memory(device))
            if trace is None:
                raise Enough
            profiler.start()
        if done == WARM_UP + steps + TRACED:
            profiler.stop()
            profiler.export_chrome_trace(str(trace))
            raise Enough

    run(settings, stage, device, split, on_step)
    synchronize(device)
    tenth = max(1, steps // 10)
    ends = [difference(readings[i], readings[i + tenth]) / tenth for i in (0, steps - tenth)]
    seconds = difference(readings[0], readings[-1]) / steps
    return result | {"steps": steps, "seconds": seconds, "first_tenth": ends[0], "last_tenth": ends[1]}


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


def read_settings(args: argparse.Namespace) -> Settings:
    """The preset with what the command line changes; on a CPU uncompiled and in float32 unless it says so."""
    content = load_settings(args.preset).model_dump(mode="json")
    changes: dict[str, Any] = {
        "drift.classes_per_step": args.classes,
        "drift.generated": args.samples,
        "drift.positives": args.samples,
        "drift.unconditional": args.samples and max(1, args.samples // 4),
        "mae.width": args.width,
        "mae.norm_groups": args.width and min(content["mae"]["norm_groups"], args.width),
        "hardware.classes_per_pass": args.classes_per_pass,
    }
    if args.device == "cpu":
        changes |= {"hardware.compile": False, "drift.precision": "float32", "mae.precision": "float32"}
    changes = {key: value for key, value in changes.items() if value is not None}
    for text in args.set:
        key, _, value = text.partition("=")
        changes[key] = yaml.safe_load(value)
    for key, value in changes.items():
        *sections, name = key.split(".")
        functools.reduce(dict.__getitem__, sections, content)[name] = value
    return Settings.model_validate(content)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", type=Path, default=Path("presets/imagenet256_ablation.yaml"))
    add("--stage", choices=("drift", "mae"), default="drift")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--steps", type=int, default=10, help="that count (10); thousands show whether it slows down")
    add("--classes", type=int, help="classes per step, instead of the preset's")
    add("--samples", type=int, help="generated and positive samples per class; a quarter of it unconditional")
    add("--width", type=int, help="of the encoder")
    add("--classes-per-pass", type=int, metavar="N", help="classes at once")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="any setting: mae.batch_size=8")
    add("--memory-limit", type=float, metavar="GB", help="have no more than so many 10^9 bytes of the GPU")
    add("--trace", type=Path, help=f"write a Chrome trace of {TRACED} more steps there")
    add("--json", type=Path, help="where to write all figures")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    settings, device = read_settings(args), torch.device(args.device)
    if args.memory_limit is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory_limit * 1e9 / total))
    facts = machine(device)
    print(
        f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, {args.preset}, {args.stage}"
    )
    result = measure(settings, args.stage, device, args.steps, args.trace)
    flops = count_flops(settings, args.stage, device)
    precision = (settings.mae if args.stage == "mae" else settings.drift).precision
    rate, seconds, whole = matmul_rate(device, precision), result["seconds"], sum(flops.values())
    share = whole / seconds / rate
    ends = [1000 * result[f"{which}_tenth"] for which in ("first", "last")]
    print(
        f"{1 / seconds:.3f} steps/s, {1000 * seconds:.1f} ms a step (first tenth {ends[0]:.1f}, last {ends[1]:.1f}),"
        f" peak memory {result['peak_bytes'] / 2**30:.2f} GiB"
    )
    print(f"{'part':28} {'a step':>13} {'share':>7} {'GFLOP':>10} {'TFLOP/s':>9}")
    for name, spent in sorted(result["parts"].items(), key=lambda row: -row[1]):
        count = flops.get(name, 0) / 1e9
        print(
            f"{name:28} {1000 * spent:10.2f} ms {spent / seconds:7.1%} {count:10.4g} {count / spent / 1e3:9.3g}"
        )
    print(f"matrix products in {precision}: {rate / 1e12:.3g} TFLOP/s; the step has {share:.1%} of that")
    more = {"flops": flops, "matmul_flops_per_s": rate, "share_of_matmul": share}
    settings_used = {"stage": args.stage, "settings": settings.model_dump(mode="json")}
    write(args.json, facts | settings_used | result | more)


if __name__ == "__main__":
    main()
