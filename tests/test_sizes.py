"""The published sizes: how many parameters they have, and one real optimisation step of each."""

import json
import subprocess
import sys

import psutil
import pytest
import torch
from imports import ROOT

from drift.models import Generator, LatentMAE
from drift.settings import load_settings
from drift.training.drift import generator_config
from drift.training.mae import mae_config

COPIES = 5  # weights, gradient, two moments, EMA
BYTES = 4
HEADROOM = 2 * 2**30  # activations and the interpreter


class ImageNet:
    """The facts of a latent store that decide sizes."""

    shape = (1_281_167, 4, 32, 32)
    num_classes = 1000


def build(kind: str, preset: str):
    settings = load_settings(ROOT / "presets" / f"{preset}.yaml")
    with torch.device("meta"):
        if kind == "generator":
            return Generator(generator_config(settings.drift, ImageNet))
        return LatentMAE(mae_config(settings.mae, ImageNet))


def parameters(model) -> int:
    return sum(p.numel() for p in model.parameters())


def mae_parameters(width: int, layers: tuple[int, ...]) -> int:
    """Counted from the description of the network (paper A.3), latents of 4 channels, 1000 classes."""

    def conv(a, b, norm=True):
        return 9 * a * b + 2 * b * norm

    total, channels = conv(4, width), width
    for stage, depth in enumerate(layers):
        wide = width * 2**stage
        for block in range(depth):
            total += conv(channels, wide) + conv(wide, wide)
            if block == 0 and stage > 0:
                total += channels * wide + 2 * wide  # 1x1 shortcut and its norm
            channels = wide
        total += 2 * wide
    total += conv(8 * width, 8 * width)
    for below, skip, out in ((8, 4, 4), (4, 2, 2), (2, 1, 1), (1, 1, 1)):
        joined = (below + skip) * width
        total += 2 * joined + conv(joined, out * width) + conv(out * width, out * width)
    return total + (width * 4 + 4) + (8 * width * 1000 + 1000)


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("imagenet256_ablation", 133), ("imagenet256_b2", 133), ("imagenet256_l2", 463)],
)
def test_generators_have_the_published_number_of_parameters(preset, millions):
    assert round(parameters(build("generator", preset)) / 1e6) == millions


@pytest.mark.parametrize(("preset", "width"), [("imagenet256_ablation", 256), ("imagenet256_b2", 640)])
def test_encoders_have_as_many_parameters_as_counted_by_hand(preset, width):
    assert parameters(build("mae", preset)) == mae_parameters(width, (3, 4, 6, 3))


STEP = """
import json, resource, sys, tempfile, time
from pathlib import Path
import numpy as np
import torch
import drift.training.loop
from drift.data.latents import LatentStore, write_latents
from drift.runtime.processes import Ranks
from drift.models.mae import LatentMAE
from drift.settings import load_settings
from drift.training.drift import train_generator
from drift.training.log import read_log
from drift.training.mae import train_mae

kind, preset = sys.argv[1:]
settings = load_settings(f"presets/{preset}.yaml")
hardware = settings.hardware.model_copy(update={"compile": False})
common = {"seed": 0, "hardware": hardware, "ranks": Ranks(0, 1, torch.device("cpu"))}
one_step = {"steps": 1, "warmup_steps": 0, "precision": "float32"}
drift.training.loop.save_checkpoint = lambda *args, **kwargs: None  # gigabytes that nobody reads
with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    latents = np.random.default_rng(0).standard_normal((8, 4, 32, 32)).astype(np.float16)
    write_latents(folder, "train", latents, np.zeros(8, np.int64), {"num_classes": 1000})
    store = LatentStore.open(folder)
    if kind == "generator":
        sizes = {"classes_per_step": 1, "generated": 2, "positives": 2, "unconditional": 1}
        options = settings.drift.model_copy(update={**one_step, **sizes, "ema_decays": (0.999,)})
        drift.training.drift.choose_classes = lambda *args: np.zeros(1, np.int64)  # the one that has images
        drift.training.drift.SampleQueue.require = lambda *args: None
        encoder = LatentMAE(base_channels=32, layers=(1, 1, 1, 1))
        model, (ema,) = train_generator(store, encoder, options, settings.field(), folder=folder, **common)
    else:
        sizes = {"batch_size": 2, "held_out": 0, "finetune_steps": 1, "finetune_ramp_steps": 0}
        options = settings.mae.model_copy(update={**one_step, **sizes})
        model, (ema,) = train_mae(store, options, folder=folder, **common)
    (line,) = read_log(folder / "logs.jsonl")
moved = [name for name, p in model.named_parameters() if not torch.equal(p, ema.state_dict()[name])]
result = {"loss": line["loss"], "grad_norm": line["grad_norm"], "moved": moved}
print(json.dumps({**result, "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))
"""


@pytest.mark.parametrize(
    ("kind", "preset"),
    [
        pytest.param("generator", "imagenet256_b2", id="B/2"),
        pytest.param("generator", "imagenet256_l2", id="L/2", marks=pytest.mark.large),
        pytest.param("mae", "imagenet256_ablation", id="width-256", marks=pytest.mark.large),
        pytest.param("mae", "imagenet256_b2", id="width-640", marks=pytest.mark.large),
    ],
)
def test_one_step_of_the_published_sizes(kind, preset):
    """In a process of its own, which gives the memory back."""
    needed = COPIES * BYTES * parameters(build(kind, preset)) + HEADROOM
    there = psutil.virtual_memory().available + psutil.swap_memory().free
    if there < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of memory and swap, there are {there / 2**30:.0f}")
    command = [sys.executable, "-c", STEP, kind, preset]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert 0 < result["loss"] < float("inf")
    assert 0 < result["grad_norm"] < float("inf")
    if kind == "generator":  # all else is behind layers that begin at zero (adaLN-zero)
        assert {"final.output.weight", "final.output.bias"} <= set(result["moved"])
    else:
        assert len(result["moved"]) > 0.9 * len(list(build(kind, preset).parameters()))
    print(f"\nloss {result['loss']:.4g}, peak memory {result['gib']:.1f} GiB")
