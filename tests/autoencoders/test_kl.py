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
from safetensors.torch import load_file, save_file

from drift.autoencoders.kl import (
    CONFIG_FILE,
    VAE,
    WEIGHTS_FILE,
    decode_latents,
    known_scaling_factor,
    to_float,
    to_uint8,
)
from drift.data.datasets import open_images
from drift.data.views import center_view
from drift.runtime.errors import UserError
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
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=3,
        scaling_factor=0.4,
        shift_factor=0.25,
        mid_block_add_attention=False,
    ).eval()


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
    ends = torch.tensor([-2.0, -1.0, 1.0, 2.0]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert to_uint8(ends, "down")[0, :, :, 0].flatten().tolist() == [0, 0, 255, 255]


@torch.no_grad()
def test_moments_scale_and_decode(network, folder, images):
    vae = VAE.from_pretrained(folder)
    posterior = network.encode(to_float(images)).latent_dist
    mean, std = vae.moments(images)
    assert mean.shape == std.shape == (2, 3, 4, 6)
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(std, posterior.logvar.exp().sqrt())
    # scaled as in the pipelines of diffusers that know a shift
    latents = vae.scale(mean)
    torch.testing.assert_close(latents, (mean - 0.25) * 0.4)
    torch.testing.assert_close(vae.decode(latents), network.decode(mean).sample, rtol=1e-4, atol=1e-4)
    assert vae.scaling_factor == 0.4


NORMALISED = {"shift_factor": None, "latents_mean": [-1.5, 0.5, 2.0], "latents_std": [8.0, 0.5, 3.0]}


@torch.no_grad()
def test_latents_are_normalised_per_channel_as_in_stable_diffusion_xl(network, folder, images):
    """diffusers: `latents = (z - latents_mean) * scaling_factor / latents_std`, and back before decoding."""
    plain = VAE.from_pretrained(folder)
    edit_config(folder, **NORMALISED)
    vae = VAE.from_pretrained(folder)
    mean, _ = vae.moments(images)
    latents = vae.scale(mean)
    for channel, (shift, std) in enumerate(zip((-1.5, 0.5, 2.0), (8.0, 0.5, 3.0), strict=True)):
        np.testing.assert_allclose(latents[:, channel], (mean[:, channel] - shift) * 0.4 / std, rtol=1e-5)
    for decoded in (vae.decode(latents), decode_latents(vae.model, latents)):
        torch.testing.assert_close(decoded, network.decode(mean).sample, rtol=1e-4, atol=1e-4)
    assert vae.digest != plain.digest


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scaling_factor": None}, "scaling_factor is null where a positive number is wanted"),
        ({"scaling_factor": 0}, "scaling_factor is 0 where"),
        ({"scaling_factor": "0.18"}, 'scaling_factor is "0.18" where'),
        ({"shift_factor": [1, 2]}, r"shift_factor is \[1, 2\] where a number is wanted"),
        ({"latents_mean": [0.0] * 3}, "has shift_factor = 0.25 beside latents_mean"),
        (NORMALISED | {"latents_std": None}, "latents_std is null where a list of 3 positive numbers"),
        (
            NORMALISED | {"latents_std": [1.0, 0.0, 1.0]},
            "latents_std is .* where a list of 3 positive",
        ),
        (NORMALISED | {"latents_mean": [0.0] * 4}, "latents_mean is .* where a list of 3 numbers"),
    ],
)
def test_a_scale_that_cannot_be_is_refused_in_one_line(folder, changes, said):
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=f"{folder}: {said}") as caught:
        VAE.from_pretrained(folder)
    assert "\n" not in str(caught.value) and CONFIG_FILE in str(caught.value)
    if "scaling_factor" in changes:
        with pytest.raises(UserError, match=said):
            known_scaling_factor(folder)


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


def test_it_is_frozen(folder, images):
    vae = VAE.from_pretrained(folder)
    assert not vae.model.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    assert not vae.decode(vae.moments(images)[0].requires_grad_()).requires_grad


def test_latent_shape(folder):
    vae = VAE.from_pretrained(folder)
    mean, _ = vae.moments(torch.zeros(1, 10, 10, 3, dtype=torch.uint8))
    assert vae.latent_shape(10) == mean.shape[1:]
    with pytest.raises(UserError, match=r"image_size = 11: .*multiple of 2"):
        vae.latent_shape(11)


def test_half_precision_files_run_in_float32(network, tmp_path, images):
    network.save_pretrained(tmp_path)
    half = AutoencoderKL.from_pretrained(tmp_path, low_cpu_mem_usage=False).half()
    half.save_pretrained(tmp_path)
    mean, std = VAE.from_pretrained(tmp_path).moments(images)
    assert mean.dtype == std.dtype == torch.float32


@torch.no_grad()
def test_float32_has_the_bits_of_diffusers(network, folder, images):
    """One image at a time, so that the threads that `moments` takes do not matter."""
    vae, threads = VAE.from_pretrained(folder), torch.get_num_threads()
    torch.set_num_threads(1)
    posterior = network.encode(to_float(images[:1])).latent_dist
    mean, std = vae.moments(images[:1])
    assert torch.equal(mean, posterior.mean) and torch.equal(std, posterior.std)
    z = vae.scale(mean) / 0.4 + 0.25
    assert torch.equal(vae.decode(vae.scale(mean)), network.decode(z).sample)
    torch.set_num_threads(threads)


def test_bfloat16_is_near_float32():
    """Mantissas of 8 bits through the committed VAE, whose latents have a spread of 1."""
    exact, rough = (VAE.from_pretrained(COMMITTED, precision=p) for p in ("float32", "bfloat16"))
    images = digits("held_out")
    (mean, std), (rough_mean, rough_std) = exact.moments(images), rough.moments(images)
    assert rough_mean.dtype == rough_std.dtype == torch.float32 == next(rough.parameters()).dtype
    latents, rough_latents = exact.scale(mean), rough.scale(rough_mean)
    error = (rough_latents - latents).abs()
    assert 1e-3 < error.square().mean().sqrt() < 0.012 and error.max() < 0.1
    torch.testing.assert_close(rough_std, std, rtol=0.04, atol=0)
    assert exact.digest == rough.digest

    pixels, rough_pixels = exact.decode(latents), rough.decode(latents)
    assert rough_pixels.dtype == torch.float32 and not torch.equal(pixels, rough_pixels)
    levels = (to_uint8(pixels).int() - to_uint8(rough_pixels).int()).abs()
    assert levels.max() <= 3 and levels.float().mean() < 0.25


def test_other_precisions_are_refused(network):
    with pytest.raises(ValueError, match="'float16': allowed: float32, bfloat16"):
        VAE(network, "vae", precision="float16")


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
    latents = plain.scale(plain.moments(images)[0])
    with torch.inference_mode():  # as fid does
        torch.testing.assert_close(vae.decode(latents), plain.decode(latents))
    assert calls == [("VAE's encoder", 2), ("VAE's encoder", 2), ("VAE's decoder", 2)]
    calls.clear()
    again = vae.in_float32()
    again.decode(latents), again.moments(images)
    assert not calls and again.precision == "float32"


def test_digest_is_of_the_weights_and_the_scale(folder, tmp_path):
    digest = VAE.from_pretrained(folder).digest
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert VAE.from_pretrained(copy).digest == digest

    edit_config(copy, scaling_factor=0.5)
    assert VAE.from_pretrained(copy).digest != digest

    changed = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False)
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1
    changed.save_pretrained(copy)
    assert VAE.from_pretrained(copy).digest != digest


def cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda folder: (folder / CONFIG_FILE).unlink(), f"no {CONFIG_FILE}"),
        (lambda folder: (folder / WEIGHTS_FILE).unlink(), f"no {WEIGHTS_FILE}"),
        (lambda folder: (folder / CONFIG_FILE).write_text("{"), "not a valid JSON file"),
        (lambda folder: cut(folder / WEIGHTS_FILE, 0.9), "Unable to load weights"),
        (lambda folder: cut(folder / WEIGHTS_FILE, 0), "Unable to load weights"),
        (lambda folder: edit_config(folder, latent_channels=4), "size mismatch"),
        (lambda folder: edit_config(folder, norm_num_groups=3), "divisible"),
        (lambda folder: edit_config(folder, layers_per_block=2), "do not belong together"),
        (lambda folder: edit_config(folder, mid_block_add_attention=True), "do not belong together"),
    ],
)
def test_a_damaged_folder_is_named(folder, damage, said):
    damage(folder)
    with pytest.raises(UserError, match=said) as caught:
        VAE.from_pretrained(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_wrappers_are_taken_off(folder, prefix):
    digest, file = VAE.from_pretrained(folder).digest, folder / WEIGHTS_FILE
    save_file({prefix + name: tensor for name, tensor in load_file(file).items()}, file)
    assert VAE.from_pretrained(folder).digest == digest


def test_hub_ids_go_through_the_hub(folder, monkeypatch):
    def snapshot_download(repo_id, *, revision, allow_patterns):
        assert (repo_id, revision) == ("somebody/vae", "main")
        assert set(allow_patterns) == {CONFIG_FILE, WEIGHTS_FILE}
        return str(folder.rename(folder.parent / "31f26fdeee1355a5c34592e401dd41e45d25a493"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    vae = VAE.from_pretrained("somebody/vae", "main")
    assert (vae.id, vae.revision) == ("somebody/vae", "31f26fdeee1355a5c34592e401dd41e45d25a493")


def test_a_folder_is_never_looked_for_on_the_hub(folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(folder.parent)
    vae = VAE.from_pretrained("vae", "main")
    assert (vae.id, vae.revision) == ("vae", None)


def test_scaling_factor_of_a_folder(folder):
    assert known_scaling_factor(folder) == 0.4 == VAE.from_pretrained(folder).scaling_factor
    (folder / WEIGHTS_FILE).unlink()
    assert known_scaling_factor(str(folder), "main") == 0.4


def test_scaling_factor_of_a_config_without_one_is_that_of_diffusers(folder):
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text())
    del config["scaling_factor"]
    path.write_text(json.dumps(config))
    assert known_scaling_factor(folder) == VAE.from_pretrained(folder).scaling_factor != 0.4


def test_scaling_factor_from_the_cache_of_the_hub(folder, tmp_path, monkeypatch):
    """The cache's layout: a folder per commit, and files that say which commit a branch is at."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cache, old, new = tmp_path / "hub/models--somebody--vae", "1" * 40, "2" * 40
    for commit, scaling_factor in ((old, 0.5), (new, 0.75)):
        edit_config(folder, scaling_factor=scaling_factor)
        shutil.copytree(folder, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(new)
    assert known_scaling_factor("somebody/vae") == known_scaling_factor("somebody/vae", "main") == 0.75
    assert known_scaling_factor("somebody/vae", old) == 0.5
    assert known_scaling_factor("somebody/vae", "3" * 40) is None
    assert known_scaling_factor("somebody/other") is None


def test_scaling_factor_that_cannot_be_known(folder):
    assert known_scaling_factor(folder.parent / "folders/that/are/gone") is None
    (folder / CONFIG_FILE).write_text("{")
    assert known_scaling_factor(folder) is None
    (folder / CONFIG_FILE).unlink()
    assert known_scaling_factor(folder) is None


LOADS_FROM_THE_HUB = """
import time
from drift.runtime.errors import UserError
from drift.autoencoders.kl import VAE

started = time.monotonic()
try:
    VAE.from_pretrained("stabilityai/sd-vae-ft-mse", "v1")
except UserError as error:
    print(error)
assert time.monotonic() - started < 20
"""


# The first is how a cluster without a network is set up; the second meets a port where nobody listens
@pytest.mark.parametrize("variables", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_without_the_hub_one_line_tells_the_way_out(variables, tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path), **variables}
    done = subprocess.run(
        [sys.executable, "-c", LOADS_FROM_THE_HUB], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("VAE stabilityai/sd-vae-ft-mse: is not a local folder, and cannot be had")
    assert "revision v1" in line and f"put its {CONFIG_FILE} and {WEIGHTS_FILE} into a folder" in line


LOADS_FROM_THE_CACHE = """
from drift.autoencoders.kl import VAE
print(VAE.from_pretrained("somebody/vae").revision)
try:
    VAE.from_pretrained("somebody/half")
except Exception as error:
    print(error)
"""


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_proxy_that_cannot_be_used_does_not_matter_if_the_cache_is_whole(folder, tmp_path, offline):
    """Without a package for SOCKS the hub's client gives up before it looks into its cache."""
    commit = "1" * 40
    for name in ("vae", "half"):
        cache = tmp_path / f"hub/models--somebody--{name}"
        shutil.copytree(folder, cache / "snapshots" / commit)
        (cache / "refs").mkdir()
        (cache / "refs/main").write_text(commit)
    (cache / "snapshots" / commit / WEIGHTS_FILE).unlink()
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": offline}
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        environment[name] = "socks5h://127.0.0.1:1"
    done = subprocess.run(
        [sys.executable, "-c", LOADS_FROM_THE_CACHE], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found, refused = done.stdout.splitlines()
    assert found == commit
    assert refused.startswith("VAE somebody/half: is not a local folder, and cannot be had")


def test_committed_vae_reconstructs_held_out_digits():
    vae = VAE.from_pretrained(COMMITTED)
    images = digits("held_out")
    decoded = to_uint8(vae.decode(vae.scale(vae.moments(images)[0])))
    error = (decoded.double() - images.double()).square().mean(dim=(1, 2, 3))
    assert (10 * torch.log10(255**2 / error)).mean() >= 30  # PSNR in dB


def test_committed_scale_makes_latents_of_standard_deviation_1():
    vae = VAE.from_pretrained(COMMITTED)
    latents = vae.scale(vae.moments(digits("train"))[0])
    assert latents.shape[1:] == vae.latent_shape(32) == (4, 8, 8)
    assert latents.std() == pytest.approx(1, abs=1e-3)
