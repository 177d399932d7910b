"""The published sizes: how many parameters they have, and one real optimisation step of each."""

import json
import os
import resource
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
from imports import ROOT

from drift.field import FieldSettings
from drift.models import Generator, LatentMAE
from drift.settings import load_settings
from drift.training import drift_objective
from drift.training.drift import generator_config
from drift.training.mae import mae_config

COPIES = 5  # weights, gradient, two moments, weights before
BYTES = 4
HEADROOM = 2 * 2**30  # activations and the interpreter


class ImageNet:
    """What sizes depend on in a latent store."""

    shape = (1_281_167, 4, 32, 32)
    num_classes = 1000


def build(kind: str, preset: str, device: str = "meta"):
    settings = load_settings(ROOT / "presets" / f"{preset}.yaml")
    with torch.device(device):
        if kind == "generator":
            return Generator(**generator_config(settings.drift, ImageNet))
        return LatentMAE(**mae_config(settings.mae, ImageNet))


def parameters(model) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("preset", "millions"),
    [
        *(("imagenet256_ablation", 133), ("imagenet256_b2", 133), ("imagenet256_l2", 463)),
        *(("wflow_ablation", 133), ("wflow_b2", 133), ("wflow_l2", 463), ("wflow_xl2", 679)),
    ],
)
def test_generators_have_the_published_number_of_parameters(preset, millions):
    assert round(parameters(build("generator", preset)) / 1e6) == millions


def one_step(kind: str, preset: str) -> None:
    """One optimizer step on two latents, in a process of its own; prints what came of it."""
    torch.manual_seed(0)
    model, latents = build(kind, preset, "cpu").train(), torch.randn(2, 4, 32, 32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if kind == "generator":
        style = torch.zeros(2, model.config.style_codebooks, dtype=torch.int64)
        generated = model(latents, torch.zeros(2, dtype=torch.int64), torch.ones(2), style)[None]
        encoder = SimpleNamespace(encode=lambda latents, **_: {"mean": latents.mean(dim=(2, 3))[:, None]})
        real = torch.randn(1, 3, 4, 32, 32).split([2, 1], dim=1)
        loss, _ = drift_objective(generated, *real, torch.ones(1), encoder, FieldSettings())
    else:
        mask = torch.rand(2, *model.mask_grid(32, 32)) < 0.5
        errors, logits = model(latents, mask)
        loss = errors.mean() + torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1]))
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"loss": loss.item(), "grad_norm": norm.item(), "moved": moved, "gib": gib}))


@pytest.mark.parametrize(
    ("kind", "preset"),
    [
        pytest.param("generator", "imagenet256_b2", id="B/2", marks=pytest.mark.slow),
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
    command = [sys.executable, __file__, kind, preset]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    environment.pop("OMP_NUM_THREADS", None)  # here more threads do help
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert 0 < result["loss"] < float("inf")
    assert 0 < result["grad_norm"] < float("inf")
    if kind == "generator":  # all else is behind layers that begin at zero (adaLN-zero)
        assert {"final.output.weight", "final.output.bias"} <= set(result["moved"])
    else:
        assert len(result["moved"]) > 0.9 * len(list(build(kind, preset).parameters()))
    print(f"\nloss {result['loss']:.4g}, peak memory {result['gib']:.1f} GiB")


if __name__ == "__main__":
    one_step(*sys.argv[1:])
