import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from complaints import complaint
from safetensors.torch import load_file, save_file

from drift.autoencoders import AUTOENCODERS
from drift.autoencoders.base import CONFIG_FILE
from drift.autoencoders.kl import VAE
from drift.data.datasets import open_images
from drift.data.levels import to_float, to_uint8
from drift.data.views import center_view
from drift.models.base import WEIGHTS_FILE
from drift.runtime.torchvision import ensure_torchvision
from drift.training.compile import Compiled

ensure_torchvision()
from diffusers import AutoencoderKL  # noqa: E402
from diffusers.image_processor import VaeImageProcessor  # noqa: E402

COMMITTED = Path(__file__).parents[2] / "pretrained/digits_vae"


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, latent_channels=3, scaling_factor=0.4,
        shift_factor=0.25, mid_block_add_attention=False,
    ).eval()  # fmt: skip


@pytest.fixture
def folder(network, tmp_path):
    network.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def images():
    return torch.randint(256, (2, 8, 12, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def edit_config(folder, **changes):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def digits(split):
    source = open_images("digits", None, split, 10)
    return torch.from_numpy(np.stack([center_view(source.load(i), 32) for i in range(len(source))]))


def test_every_8_bit_value_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    images = torch.cat([levels, levels.flip(1), levels.transpose(1, 2)], dim=3)  # [1, 16, 16, 3]
    floats = to_float(images)
    assert floats.shape == (1, 3, 16, 16) and (floats.min(), floats.max()) == (-1, 1)
    assert torch.equal(to_uint8(floats), images)


def test_range_is_that_of_diffusers(images):
    processor = VaeImageProcessor(vae_scale_factor=2)
    floats = to_float(images)
    torch.testing.assert_close(floats, processor.preprocess(images.numpy() / np.float32(255)))
    pictures = processor.postprocess(floats * 1.2, output_type="pil")
    assert np.array_equal(to_uint8(floats * 1.2), np.stack(pictures))


def test_rounding_down_cuts_off_and_is_half_a_level_darker():
    floats = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1
    nearest, down = (to_uint8(floats, rounding).numpy() for rounding in ("nearest", "down"))
    # As code in use writes it: a cast to bytes cuts off
    cut = ((floats.clamp(-1, 1) + 1) * 127.5).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(down, cut)
    inside = (nearest > 0) & (nearest < 255)
    assert (nearest[inside] - down[inside].astype(float)).mean() == pytest.approx(0.5, abs=0.02)


@torch.no_grad()
def test_moments_encode_and_decode_are_those_of_diffusers(network, folder, images):
    """To the bit on one thread, which is what `moments` gives each part of a batch."""
    vae, threads = AUTOENCODERS["kl"].from_pretrained(folder), torch.get_num_threads()
    torch.set_num_threads(1)
    posterior = network.encode(to_float(images)).latent_dist
    mean, std = vae.moments(images)
    assert torch.equal(mean, posterior.mean) and torch.equal(std, posterior.std)
    latents = vae.encode(images)  # scaled as in the pipelines of diffusers that know a shift
    torch.testing.assert_close(latents, (mean - 0.25) * 0.4)
    assert torch.equal(vae.decode(latents), network.decode(latents / 0.4 + 0.25).sample)
    noise = torch.randn(mean.shape)
    torch.testing.assert_close(vae.encode(images, noise), (mean + std * noise - 0.25) * 0.4)
    torch.set_num_threads(threads)
    assert vae.scaling_factor == 0.4 and vae.latent_shape(12) == (3, 6, 6) and vae.storage_dtype == np.float16
    assert "multiple of 2" in complaint(lambda: vae.latent_shape(11))


def test_frozen_weights_and_a_gradient_to_the_latents(folder, images):
    vae = VAE.from_pretrained(folder)
    assert not vae.model.training and not any(parameter.requires_grad for parameter in vae.parameters())
    latents = vae.encode(images)
    assert not latents.requires_grad and not vae.decode(latents).requires_grad
    vae.decode(latents.requires_grad_()).square().sum().backward()
    assert latents.grad.any()


NORMALISED = {"shift_factor": None, "latents_mean": [-1.5, 0.5, 2.0], "latents_std": [8.0, 0.5, 3.0]}


@torch.no_grad()
def test_latents_are_normalised_per_channel_as_in_stable_diffusion_xl(network, folder, images):
    """diffusers: `latents = (z - latents_mean) * scaling_factor / latents_std`, and back before decoding."""
    plain = VAE.from_pretrained(folder)
    edit_config(folder, **NORMALISED)
    vae = VAE.from_pretrained(folder)
    mean, _ = vae.moments(images)
    latents = vae.latent_scale.apply(mean)
    for channel, (shift, std) in enumerate(zip((-1.5, 0.5, 2.0), (8.0, 0.5, 3.0), strict=True)):
        np.testing.assert_allclose(latents[:, channel], (mean[:, channel] - shift) * 0.4 / std, rtol=1e-5)
    for decoded in (vae.decode(latents), vae.decode_by(vae.model, latents)):
        torch.testing.assert_close(decoded, network.decode(mean).sample, rtol=1e-4, atol=1e-4)
    assert vae.digest != plain.digest


@pytest.mark.parametrize(
    "changes",
    [
        {"scaling_factor": None},
        {"scaling_factor": 0},
        {"scaling_factor": "much"},
        {"shift_factor": [1, 2]},
        {"latents_mean": [0.0] * 3},
        NORMALISED | {"shift_factor": 0.25},
        NORMALISED | {"latents_std": None},
        NORMALISED | {"latents_std": [1.0, 0.0, 1.0]},
        NORMALISED | {"latents_mean": [0.0] * 4},
    ],
)
def test_a_scale_that_cannot_be_is_refused(folder, changes):
    edit_config(folder, **changes)
    for load in (VAE.from_pretrained, known_scale):
        message = complaint(lambda load=load: load(folder))
        name, value = list(changes.items())[-1]
        assert (
            str(folder) in message and CONFIG_FILE in message and f"{name} = {json.dumps(value)}" in message
        )


def test_the_number_of_threads_changes_no_bit():
    vae, before = VAE.from_pretrained(COMMITTED), torch.get_num_threads()
    seen = set()
    for count, threads in itertools.product((7, 21), (1, 2, 3)):
        torch.set_num_threads(threads)
        mean, std = vae.moments(digits("train")[:count])
        assert torch.get_num_threads() == threads
        seen.add((count, mean.numpy().tobytes(), std.numpy().tobytes()))
    torch.set_num_threads(before)
    assert len(seen) == 2


def test_bfloat16_is_near_float32():
    """Mantissas of 8 bits through the committed VAE, whose latents have a spread of 1."""
    exact, rough = (VAE.from_pretrained(COMMITTED, precision=p) for p in ("float32", "bfloat16"))
    images = digits("held_out")
    (mean, std), (rough_mean, rough_std) = exact.moments(images), rough.moments(images)
    assert rough_mean.dtype == rough_std.dtype == torch.float32 == next(rough.parameters()).dtype
    latents, rough_latents = exact.latent_scale.apply(mean), rough.latent_scale.apply(rough_mean)
    error = (rough_latents - latents).abs()
    assert 1e-3 < error.square().mean().sqrt() < 0.012 and error.max() < 0.1
    torch.testing.assert_close(rough_std, std, rtol=0.04, atol=0)
    assert exact.digest == rough.digest
    pixels, rough_pixels = exact.decode(latents), rough.decode(latents)
    assert rough_pixels.dtype == torch.float32 and not torch.equal(pixels, rough_pixels)
    levels = (to_uint8(pixels).int() - to_uint8(rough_pixels).int()).abs()
    assert levels.max() <= 3 and levels.float().mean() < 0.25
    with pytest.raises(ValueError, match="precision = 'float16': allowed: float32 or bfloat16"):
        VAE(exact.model, "vae", precision="float16")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiled_networks_see_one_shape_and_change_nothing(folder, images, precision, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="aot_eager"))
    plain, vae = (VAE.from_pretrained(folder, precision=precision) for _ in range(2))
    calls = []

    def compiler(function, name):
        compiled = Compiled(function, name)

        def call(x):
            calls.append((name, len(x)))
            result = compiled(x)
            assert compiled._fast is not None, "compiling has failed"
            return result

        return call

    vae.compile_with(compiler)
    for some in (images, images[:1], images):
        torch.testing.assert_close(vae.moments(some), plain.moments(some))
    latents = plain.encode(images)
    with torch.inference_mode():  # as fid does
        torch.testing.assert_close(vae.decode(latents), plain.decode(latents))
    assert calls == [("VAE's encoder", 2), ("VAE's encoder", 2), ("VAE's decoder", 2)]
    calls.clear()
    again = vae.in_float32()
    again.decode(latents), again.moments(images)
    assert not calls and again.precision == "float32"


def test_digest_is_of_the_weights_and_the_scale(folder, tmp_path):
    digest = VAE.from_pretrained(folder).digest
    assert VAE.from_pretrained(COMMITTED).digest.startswith("8714f3a8d362b403")  # as in latents' meta files
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = load_file(copy / WEIGHTS_FILE)
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):  # of wrappers, which are taken off
        save_file({prefix + name: tensor for name, tensor in weights.items()}, copy / WEIGHTS_FILE)
        assert VAE.from_pretrained(copy).digest == digest
    edit_config(copy, scaling_factor=0.5)
    assert VAE.from_pretrained(copy).digest != digest
    save_file({name: tensor.half() for name, tensor in weights.items()}, folder / WEIGHTS_FILE)
    vae = VAE.from_pretrained(folder)
    assert vae.digest != digest and next(vae.parameters()).dtype == torch.float32


def known_scale(source, revision=None):
    known = VAE.known(source, revision, 8)
    assert known is None or known.shape == (3, 4, 4)
    return known and known.scaling_factor


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize(
    "damage, said",
    [
        (shutil.rmtree, "not a local folder"),
        (lambda folder: (folder / CONFIG_FILE).unlink(), CONFIG_FILE),
        (lambda folder: (folder / WEIGHTS_FILE).unlink(), f"{WEIGHTS_FILE}: is missing"),
        (lambda folder: (folder / CONFIG_FILE).write_text("{"), "not a valid JSON file"),
        (lambda folder: (folder / CONFIG_FILE).write_text("[]"), CONFIG_FILE),
        (lambda folder: cut(folder / WEIGHTS_FILE, 0.9), f"{WEIGHTS_FILE}: damaged"),
        (lambda folder: cut(folder / WEIGHTS_FILE, 0), f"{WEIGHTS_FILE}: damaged"),
        (lambda folder: edit_config(folder, latent_channels=4), "size mismatch"),
        (lambda folder: edit_config(folder, norm_num_groups=3), "divisible"),
        (lambda folder: edit_config(folder, layers_per_block=2), "Missing key"),
        (lambda folder: edit_config(folder, mid_block_add_attention=True), "Missing key"),
    ],
)
def test_a_damaged_folder_is_named(folder, damage, said, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    damage(folder)
    message = complaint(lambda: VAE.from_pretrained(folder))
    assert said in message and str(folder) in message


def test_hub_ids_go_through_the_hub_and_folders_do_not(folder, monkeypatch):
    commit = "31f26fdeee1355a5c34592e401dd41e45d25a493"

    def snapshot_download(repo_id, *, revision, allow_patterns):
        assert (repo_id, revision) == ("somebody/vae", "main")
        return str(shutil.copytree(folder, folder.parent / commit))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    vae = VAE.from_pretrained("somebody/vae", "main")
    assert (vae.id, vae.revision) == ("somebody/vae", commit)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(folder.parent)
    vae = VAE.from_pretrained("vae", "main")
    assert (vae.id, vae.revision) == ("vae", None)


def in_cache(folder, cache, commit, name="vae"):
    """The cache's layout: a folder per commit, and files that say which commit a branch is at."""
    cache = cache / f"models--somebody--{name}"
    shutil.copytree(folder, cache / "snapshots" / commit)
    (cache / "refs").mkdir(exist_ok=True)
    (cache / "refs/main").write_text(commit)
    return cache / "snapshots" / commit


def test_scaling_factor_without_loading_weights(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    old, new = "1" * 40, "2" * 40
    for commit, scaling_factor in ((old, 0.5), (new, 0.75)):
        edit_config(folder, scaling_factor=scaling_factor)
        in_cache(folder, tmp_path / "hub", commit)
    assert known_scale("somebody/vae") == known_scale("somebody/vae", "main") == 0.75
    assert known_scale("somebody/vae", old) == 0.5
    assert known_scale("somebody/vae", "3" * 40) is known_scale("somebody/other") is None
    (folder / WEIGHTS_FILE).unlink()
    assert known_scale(str(folder), "main") == 0.75
    config = json.loads((folder / CONFIG_FILE).read_text())
    del config["scaling_factor"]
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    assert known_scale(folder) == AutoencoderKL.from_config(config).config.scaling_factor
    (folder / CONFIG_FILE).write_text("{")
    assert known_scale(folder) is known_scale(tmp_path / "that/is/gone") is None


LOADS = """
import sys, time
from drift.autoencoders.kl import VAE

started = time.monotonic()
for name in sys.argv[1:]:
    try:
        print(VAE.from_pretrained(name, "main").revision)
    except Exception as error:
        print(error)
assert time.monotonic() - started < 20
"""


# How a cluster without a network is set up; a port where nobody listens; a proxy for which the hub's client
# gives up before it looks into its cache
@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [
        {"HF_HUB_OFFLINE": "1"},
        {"HF_ENDPOINT": "http://127.0.0.1:9"},
        dict.fromkeys(("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"), "socks5h://127.0.0.1:1"),
    ],
)
def test_without_the_hub_its_cache_will_do_or_one_line_says_the_way_out(folder, variables, tmp_path):
    commit = "1" * 40
    in_cache(folder, tmp_path / "hub", commit)
    (in_cache(folder, tmp_path / "hub", commit, "half") / WEIGHTS_FILE).unlink()
    done = subprocess.run(
        [sys.executable, "-c", LOADS, "somebody/vae", "somebody/half", "somebody/other"],
        env={**os.environ, "HF_HOME": str(tmp_path), **variables}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, *refused = done.stdout.splitlines()
    assert found == commit and len(refused) == 2
    assert "somebody/half" in refused[0] and WEIGHTS_FILE in refused[0]
    assert "somebody/other: is not a local folder, and cannot be had" in refused[1]
    assert f"put its {CONFIG_FILE} and {WEIGHTS_FILE} into a folder" in refused[1]


def test_the_committed_vae_reconstructs_digits_and_its_latents_have_standard_deviation_1():
    vae = VAE.from_pretrained(COMMITTED)
    images = digits("held_out")
    error = (to_uint8(vae.decode(vae.encode(images))).double() - images.double()).square().mean(dim=(1, 2, 3))
    assert (10 * torch.log10(255**2 / error)).mean() >= 30  # PSNR in dB
    latents = vae.encode(digits("train"))
    assert latents.shape[1:] == vae.latent_shape(32) == (4, 8, 8)
    assert latents.std() == pytest.approx(1, abs=1e-3)
