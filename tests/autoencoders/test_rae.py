import json
import sys

import huggingface_hub
import numpy as np
import pytest
import torch
from complaints import complaint
from imports import ROOT
from safetensors.torch import load_file, save_file
from small_rae import AutoencoderRAE, small_rae

from drift.autoencoders import AUTOENCODERS, RAE, VAE, DiffusersAutoencoder
from drift.autoencoders.base import CONFIG_FILE
from drift.autoencoders.rae import siglip_nested
from drift.data.levels import to_uint8
from drift.models.base import WEIGHTS_FILE
from drift.settings.sections import Encode


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(small_rae(), tmp_path_factory.mktemp("rae") / "rae")


@pytest.fixture
def folder(tmp_path):
    return save(small_rae(), tmp_path / "rae")


@pytest.fixture
def images():
    return torch.randint(256, (3, 32, 32, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def save(model, folder):
    model.save_pretrained(folder)
    return folder


def edit_config(folder, **changes):
    path = folder / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, change):
    weights = change(load_file(folder / WEIGHTS_FILE))
    save_file(weights, folder / WEIGHTS_FILE)


@torch.no_grad()
@pytest.mark.parametrize("encoder", ["dinov2", "siglip2", "mae"])
def test_encode_and_decode_are_those_of_diffusers(tmp_path, images, encoder):
    """To the bit: diffusers' own loader, its pixels in [0, 1], and its normalisation alone."""
    folder = save(small_rae(encoder), tmp_path / "rae")
    with siglip_nested():
        network = AutoencoderRAE.from_pretrained(folder, low_cpu_mem_usage=False).eval()
    rae = AUTOENCODERS["rae"].from_pretrained(folder)
    latents = network.encode(images.permute(0, 3, 1, 2) / 255).latent
    assert torch.equal(rae.encode(images), latents) and torch.equal(rae.encode(images, latents), latents)
    assert latents.shape[1:] == rae.latent_shape(32) == (64, 2, 2)
    decoded = network.decode(latents).sample
    assert torch.equal(rae.decode(latents), 2 * decoded - 1)
    assert torch.equal(rae.decode_by(network, latents), 2 * decoded - 1)
    levels = (decoded * 255).round().clamp(0, 255).permute(0, 2, 3, 1)
    assert (to_uint8(rae.decode(latents)) - levels).abs().max() <= 1  # one, where rounding is a tie
    assert (rae.scaling_factor, rae.storage_dtype, rae.has_posterior) == (1.0, np.float16, False)


def test_frozen_weights_and_a_gradient_to_the_latents(saved, images):
    rae = RAE.from_pretrained(saved)
    assert not rae.model.training and not any(parameter.requires_grad for parameter in rae.parameters())
    latents = rae.encode(images)
    assert not latents.requires_grad
    rae.decode(latents.requires_grad_()).square().sum().backward()
    assert latents.grad.any()


@torch.no_grad()
def test_bfloat16_is_near_float32(saved, images):
    exact, rough = (RAE.from_pretrained(saved, precision=p) for p in ("float32", "bfloat16"))
    latents, rough_latents = exact.encode(images), rough.encode(images)
    assert rough_latents.dtype == torch.float32
    assert 0 < (rough_latents - latents).abs().max() < 0.1 < latents.abs().max()
    assert 0 < (rough.decode(latents) - exact.decode(latents)).abs().max() < 0.05
    assert torch.equal(rough.in_float32().decode(latents), exact.decode(latents))
    assert exact.digest == rough.digest


# Names as transformers 4.57 wrote them, and the middle of those that the installed version may have
FORMER = {
    "dinov2": {
        "encoder.encoder.layer.0.attention.attention.query.weight": ".attention.q_proj.weight",
        "encoder.encoder.layer.0.attention.attention.key.bias": ".attention.k_proj.bias",
        "encoder.encoder.layer.0.attention.attention.value.weight": ".attention.v_proj.weight",
        "encoder.encoder.layer.0.attention.output.dense.weight": ".attention.o_proj.weight",
    },
    "mae": {
        "encoder.encoder.layer.0.attention.attention.query.weight": ".attention.q_proj.weight",
        "encoder.encoder.layer.0.attention.output.dense.bias": ".attention.o_proj.bias",
        "encoder.encoder.layer.0.intermediate.dense.weight": ".mlp.fc1.weight",
        "encoder.encoder.layer.0.output.dense.weight": ".mlp.fc2.weight",
        "encoder.encoder.layer.0.layernorm_before.weight": ".layernorm_before.weight",
    },
    "siglip2": {
        "encoder.vision_model.embeddings.patch_embedding.weight": "embeddings.patch_embedding.weight",
        "encoder.vision_model.encoder.layers.0.self_attn.q_proj.weight": ".self_attn.q_proj.weight",
        "encoder.vision_model.head.mlp.fc1.weight": "head.mlp.fc1.weight",
    },
}


@torch.no_grad()
@pytest.mark.parametrize("encoder", FORMER)
def test_files_of_earlier_versions_are_read(tmp_path, images, encoder):
    """Also with the decoder's position embedding, which is computed now."""
    folder = save(small_rae(encoder), tmp_path / "rae")
    rae = RAE.from_pretrained(folder)

    def former(weights):
        for old, new in FORMER[encoder].items():
            (name,) = (n for n in weights if n.endswith(new) and n.startswith("encoder."))
            weights[old] = weights.pop(name)
        return weights | {"decoder.decoder_pos_embed": torch.zeros(1, 5, 16)}

    edit_weights(folder, former)
    other = RAE.from_pretrained(folder)
    assert other.digest == rae.digest and torch.equal(other.encode(images), rae.encode(images))
    assert torch.equal(other.decode(other.encode(images)), rae.decode(rae.encode(images)))


def test_digest_is_of_all_that_latents_and_images_depend_on(folder):
    digest = RAE.from_pretrained(folder).digest
    edit_config(folder, noise_tau=0.8, encoder_norm_mean=[0.0, 0.0, 0.0])  # of training; in the file
    assert RAE.from_pretrained(folder).digest == digest
    digests = {digest}
    for changes in ({"decoder_num_attention_heads": 4}, {"scaling_factor": 2.0}):
        edit_config(folder, **changes)
        digests.add(RAE.from_pretrained(folder).digest)
    edit_weights(folder, lambda weights: weights | {"_latents_std": 2 * weights["_latents_std"]})
    assert len(digests | {RAE.from_pretrained(folder).digest}) == 4


def test_shape_and_scale_are_known_without_weights(folder):
    (folder / WEIGHTS_FILE).unlink()
    assert RAE.known(folder, None, 32) == (1.0, (64, 2, 2))
    assert "image_size = 64: RAE" in complaint(lambda: RAE.known(folder, None, 64))
    assert "makes images of 32 pixels" in complaint(lambda: RAE.known(folder, None, 64))
    edit_config(folder, reshape_to_2d=False)
    assert "reshape_to_2d is false" in complaint(lambda: RAE.known(folder, None, 32))
    assert RAE.known(folder / "gone", None, 32) is VAE.known(folder, None, 32) is None


def test_the_posterior_has_no_effect():
    encode = Encode(autoencoder={"kind": "rae", "source": "somewhere"}, posterior="sample")
    assert encode.posterior_used == "mean" and encode.without_effect() == {"posterior": "autoencoder is rae"}
    assert Encode(posterior="sample").posterior_used == "sample" and not Encode().without_effect()


def test_what_cannot_be_loaded_is_one_line(folder, monkeypatch):
    assert "is an AutoencoderRAE, not an AutoencoderKL" in complaint(lambda: VAE.from_pretrained(folder))
    assert isinstance(DiffusersAutoencoder.from_pretrained(folder), RAE)
    message = complaint(lambda: RAE.from_pretrained(ROOT / "pretrained/digits_vae"))
    assert message.startswith(f"RAE {ROOT}/pretrained/digits_vae: is an AutoencoderKL, not an AutoencoderRAE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = complaint(lambda: RAE.from_pretrained("somebody/rae", "main"))
    assert message.startswith("RAE somebody/rae: somebody/rae: is not a local folder, and cannot be had")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "transformers", None)
        message = complaint(lambda: RAE.from_pretrained(folder))
    assert message.startswith(f"RAE {folder}: its encoder needs transformers: pip install")
    edit_weights(folder, lambda weights: {name: weights[name] for name in list(weights)[1:]})
    assert f"{WEIGHTS_FILE}: does not fit {CONFIG_FILE}" in complaint(lambda: RAE.from_pretrained(folder))
    edit_config(folder, encoder_type="clip")
    assert "Unknown encoder_type='clip'" in complaint(lambda: RAE.from_pretrained(folder))
