"""The published sizes: how many parameters they have, and one real optimisation step of each."""

import json
import os
import resource
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from imports import ROOT
from small_rae import small_rae

from drift.autoencoders import AUTOENCODERS, Pixels
from drift.data.latents import LatentStore, as_stored, write_latents
from drift.evaluation.networks import load_feature_network
from drift.evaluation.pictures import draw_images
from drift.evaluation.sample import ImageDecoder
from drift.features import load_encoders
from drift.field import FieldSettings
from drift.models import Generator, LatentMAE
from drift.models.generator import sincos_positions
from drift.runtime.processes import Ranks
from drift.settings import Hardware, load_settings
from drift.training import drift_objective
from drift.training.drift import generator_config, train_generator
from drift.training.log import read_log
from drift.training.loop import Run
from drift.training.mae import mae_config

from diffusers import AutoencoderKL  # isort: skip

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


NARROW = {
    "hidden": 32, "depth": 1, "heads": 2, "style_codebooks": 2, "classes_per_step": 2, "generated": 3,
    "positives": 3, "unconditional": 2, "queue_per_class": 4, "queue_global": 4, "push_per_step": 4,
    "steps": 1, "warmup_steps": 0,
}  # fmt: skip
LATENTS = {
    "rae_latent": (768, 16, 16), "imagenet512_b2": (4, 64, 64), "imagenet512_rae": (768, 32, 32),
    "pixel_b16": (3, 256, 256),
}  # fmt: skip


def narrow_autoencoder(kind, pixels, shape, folder):
    """It decodes latents of the real size."""
    if kind == "pixels":
        return Pixels()
    if kind == "rae":
        small_rae(pixels=pixels, side=shape[1], channels=shape[0]).save_pretrained(folder)
    else:
        blocks = {
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
        }
        widths = {"block_out_channels": (4,) * 4, "norm_num_groups": 2, "layers_per_block": 1}
        AutoencoderKL(**blocks, **widths, mid_block_add_attention=False).save_pretrained(folder)
    return AUTOENCODERS[kind].from_pretrained(folder)


@pytest.mark.parametrize("preset", LATENTS)
def test_a_narrow_generator_learns_whole_latents_and_is_measured(tmp_path, preset):
    """One step of the stage's own loop, in the preset's feature sets that need no weights from the hub.

    An image has the preset's side.
    """
    settings, shape = load_settings(ROOT / "presets" / f"{preset}.yaml"), LATENTS[preset]
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((8, *shape), np.float32))
    stored = as_stored(noise, AUTOENCODERS[settings.encode.autoencoder.kind].storage_dtype)
    write_latents(tmp_path, "train", stored.numpy(), np.arange(8) % 2, {})
    store = LatentStore.open(tmp_path)
    LatentMAE(**mae_config(settings.mae.model_copy(update={"width": 32}), store)).save_pretrained(
        tmp_path / "mae"
    )
    without_hub = [one for one in settings.features if not one.needs_decoder]
    encoder = load_encoders(without_hub, mae=tmp_path / "mae")
    options = settings.drift.model_copy(update=NARROW | {"precision": "float32"})
    run = Run(0, Hardware(log_every=1), Ranks(0, 1, torch.device("cpu")), tmp_path)
    generator, _ = train_generator(store, encoder, options, settings.field_settings(), run)
    (line,) = read_log(tmp_path / "logs.jsonl")
    assert line["loss"] > 0 and line["grad_norm"] > 0
    places = {name: values["scale"] for name, values in line["feature_sets"].items()}
    assert places.keys() == {"global"} if not settings.needs_mae else len(places) > 80
    assert generator.final.output.weight.abs().max() > 0  # which begins at zero
    side = shape[1] // options.patch
    assert torch.equal(
        Generator(**generator_config(options, store)).position_embedding[0],
        sincos_positions(side, 32).float(),
    )
    pixels = settings.data.image_size
    vae = narrow_autoencoder(settings.encode.autoencoder.kind, pixels, shape, tmp_path / "vae")
    assert vae.latent_shape(pixels) == shape
    images = draw_images(generator.eval(), ImageDecoder(vae, 1), [(0, 0, 1.5)], 0, 1)
    assert images.shape == (1, pixels, pixels, 3)
    network = load_feature_network(
        settings.fid.model_copy(update={"features": str(ROOT / "pretrained/mnist_classifier")})
    )
    assert network(images).isfinite().all()


if __name__ == "__main__":
    one_step(*sys.argv[1:])
