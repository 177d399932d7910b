"""Steps of the drift stage on synthetic latents: how many per second, and what takes the time.

    python -m benchmarks.step                                       # the ablation preset, on a GPU
    python -m benchmarks.step --classes 2 --samples 4 --width 32    # reduced, for a CPU

It runs `train_generator` itself, with random latents and an encoder of random weights. Steps per second and
peak memory are those of a run without further ado; the split is that of a second run, in which the device is
waited for wherever one part ends and another begins, so it says what costs how much, not what overlaps. The
backward pass is cut where the gradient arrives at the generated latents: before, it is the encoder's and the
field's.
"""

import argparse
import functools
import json
import platform
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

import drift.training.loop
from drift.data.latents import LatentStore, write_latents
from drift.data.prefetch import Prefetch
from drift.field.loss import FieldPasses
from drift.launch import Ranks
from drift.models import Generator, LatentMAE
from drift.models.ema import EMA
from drift.params import Settings, load_settings
from drift.training.drift import train_generator
from drift.training.log import RunLog
from drift.training.mae import mae_config

PER_CLASS = 128
WARM_UP = 3  # steps before those that count


class Clock:
    """Seconds by what is being done; a part within another is not counted twice."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = defaultdict(float)
        self._device, self._parts, self._since = device, ["rest"], 0.0

    def restart(self) -> None:
        self._count()
        self.seconds.clear()

    def _count(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[self._parts[-1]] += now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._count()
        self._parts.append(name)
        try:
            yield
        finally:
            self._count()
            self._parts.pop()

    def timed(self, name: str, call: Callable) -> Callable:
        @functools.wraps(call)
        def wrapper(*args, **kwargs):
            with self.part(name):
                return call(*args, **kwargs)

        return wrapper

    def cut(self, name: str) -> None:
        """From now on the present part goes by another name."""
        self._count()
        self._parts[-1] = name


def instrument(stack: ExitStack, clock: Clock) -> None:
    """Let the parts of a step tell `clock` when they are at work."""
    generate = Generator.forward

    def forward(self, *args, **kwargs):
        with clock.part("generator, forward"):
            latents = generate(self, *args, **kwargs)
        if latents.requires_grad:
            latents.register_hook(lambda gradient: clock.cut("generator, backward"))
        return latents

    parts = [
        (Prefetch, "get", "data"),
        (LatentMAE, "encode", "encoder, forward"),
        (torch.Tensor, "backward", "encoder and field, backward"),
        (torch.optim.AdamW, "step", "optimizer"),
        (EMA, "update", "EMA"),
        *(
            (FieldPasses, name, "field")
            for name in ("__init__", "all", "distance_sums", "field_sums", "loss", "statistics")
        ),
    ]
    stack.enter_context(patch.object(Generator, "forward", forward))
    for owner, name, part in parts:
        stack.enter_context(patch.object(owner, name, clock.timed(part, getattr(owner, name))))


def run(settings: Settings, width: int, steps: int, device: torch.device, clock: Clock | None) -> float:
    """Seconds of `steps` steps, after some that do not count; `clock` splits them."""
    options = settings.drift.model_copy(update={"steps": WARM_UP + steps, "warmup_steps": 0})
    hardware = settings.hardware.model_copy(update={"log_every": 10**9, "checkpoint_every": 10**9})
    began, done = [], []

    def step(log: RunLog) -> None:
        done.append(None)
        if len(done) in (WARM_UP, WARM_UP + steps):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            began.append(time.perf_counter())
            if clock is not None and len(done) == WARM_UP:
                clock.restart()

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        classes = settings.drift.classes_per_step
        rng = np.random.default_rng(0)
        latents = rng.standard_normal((classes * PER_CLASS, 4, 32, 32), np.float32).astype(np.float16)
        labels = np.repeat(np.arange(classes), PER_CLASS)
        write_latents(folder, "train", latents, labels, {"num_classes": classes})
        store = LatentStore.open(folder)
        torch.manual_seed(0)
        encoder = LatentMAE(mae_config(settings.mae.model_copy(update={"width": width}), store))
        stack.enter_context(patch.object(RunLog, "step", step))
        stack.enter_context(
            patch.object(drift.training.loop, "save_checkpoint", lambda *args, **kwargs: None)
        )
        if clock is not None:
            instrument(stack, clock)
        train_generator(
            store, encoder, options, settings.field(), seed=0, hardware=hardware,
            ranks=Ranks(0, 1, device), folder=folder,
        )  # fmt: skip
    return began[1] - began[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", type=Path, default=Path("presets/imagenet256_ablation.yaml"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--classes", type=int, help="classes per step, instead of the preset's")
    parser.add_argument("--samples", type=int, help="generated and positive samples per class")
    parser.add_argument("--width", type=int, help="of the encoder")
    parser.add_argument("--classes-per-pass", type=int)
    parser.add_argument("--feature-batch", type=int)
    parser.add_argument("--json", type=Path, help="where to write all figures")
    args = parser.parse_args()

    settings, device = load_settings(args.preset), torch.device(args.device)
    sizes = {"classes_per_step": args.classes, "generated": args.samples, "positives": args.samples}
    sizes |= {"unconditional": args.samples and max(1, args.samples // 4)}
    hardware = {"classes_per_pass": args.classes_per_pass, "feature_batch": args.feature_batch}
    if device.type == "cpu":
        hardware |= {"compile": False, "precision": "float32"}
    settings = settings.model_copy(
        update={
            name: section.model_copy(update={k: v for k, v in changes.items() if v is not None})
            for name, section, changes in (
                ("drift", settings.drift, sizes), ("hardware", settings.hardware, hardware),
            )
        }
    )  # fmt: skip
    width = args.width or settings.mae.width

    seconds = run(settings, width, args.steps, device, None)
    if device.type == "cuda":
        machine, peak = torch.cuda.get_device_name(device), torch.cuda.max_memory_allocated(device)
    else:
        machine = platform.processor() or platform.machine()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    clock = Clock(device)
    # Without compilation, which would merge the parts
    plain = settings.model_copy(update={"hardware": settings.hardware.model_copy(update={"compile": False})})
    run(plain, width, args.steps, device, clock)

    drift_options = settings.drift
    print(
        f"{machine}, torch {torch.__version__}, {args.preset}: {drift_options.classes_per_step} classes of "
        f"{drift_options.generated} generated, {drift_options.positives} positive, "
        f"{drift_options.unconditional} unconditional samples, encoder of width {width}"
    )
    print(f"{args.steps / seconds:.3f} steps/s, peak memory {peak / 2**30:.1f} GiB")
    total = sum(clock.seconds.values())
    for name, spent in sorted(clock.seconds.items(), key=lambda item: -item[1]):
        print(f"{name:30} {spent / args.steps * 1e3:10.1f} ms a step {spent / total:7.1%}")
    if args.json:
        content = {
            "device": machine,
            "torch": torch.__version__,
            "settings": settings.model_dump(mode="json"),
            "encoder_width": width,
            "steps_per_s": args.steps / seconds,
            "peak_bytes": peak,
            "ms_per_step": {name: spent / args.steps * 1e3 for name, spent in clock.seconds.items()},
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n")
        print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
