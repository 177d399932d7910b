"""The registry of feature encoders, and what each of them gives."""

import pytest
import torch
from pydantic import ValidationError

from drift.autoencoders.kl import VAE
from drift.features import ENCODERS, Encoder, EncoderOptions, LatentOptions, MAEOptions, load_encoders
from drift.models.mae import LatentMAE
from drift.runtime.errors import UserError

LATENTS = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mae(tmp_path):
    torch.manual_seed(0)
    config = {
        "in_channels": 3,
        "base_channels": 8,
        "layers": (1, 1, 1, 1),
        "num_classes": 2,
        "norm_groups": 2,
    }
    LatentMAE(**config).save_pretrained(tmp_path / "mae")
    return tmp_path / "mae"


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_gives_vectors_with_gradients_and_learns_nothing(name, mae, vae_folder, options_of):
    options, vae = options_of(name), VAE.from_pretrained(vae_folder)
    encoder = load_encoders([options], mae=mae, autoencoder=vae)
    assert isinstance(options, EncoderOptions) and isinstance(encoder, Encoder)
    latents = LATENTS[:2].clone().requires_grad_()
    sets = encoder.encode(latents)
    assert all(x.ndim == 3 and len(x) == 2 and x.dtype == torch.float32 for x in sets.values())
    sum(x.sin().sum() for x in sets.values()).backward()
    assert latents.grad.abs().sum() > 0
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("name", [name for name, kind in ENCODERS.items() if kind.needs_decoder])
def test_an_encoder_of_images_names_its_sets_after_itself(name, vae_folder, options_of):
    """So that no other encoder has sets of the same name."""
    encoder = options_of(name).load(autoencoder=VAE.from_pretrained(vae_folder))
    images = torch.rand(1, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    sets = encoder(images)
    assert all(set_name == name or set_name.startswith(f"{name}_") for set_name in sets)
    assert all(x.isfinite().all() and x.std() > 0 for x in sets.values())


def test_the_mae_gives_its_sets_and_the_whole_latent(mae):
    network = LatentMAE.from_pretrained(mae)
    for duplicates in ("keep", "drop"):
        sets = load_encoders([MAEOptions(duplicates=duplicates)], mae=mae).encode(LATENTS)
        expected = network.encode(LATENTS, drop_duplicates=duplicates == "drop")
        assert [*sets] == [*expected, "global"]
        assert all(torch.equal(sets[name], x) for name, x in expected.items())


def test_the_whole_latent_is_one_set_and_never_twice(mae):
    alone = load_encoders([LatentOptions()]).encode(LATENTS)
    assert [*alone] == ["global"] and torch.equal(alone["global"], LATENTS.reshape(3, 1, -1))
    both = load_encoders([MAEOptions(), LatentOptions()], mae=mae).encode(LATENTS)
    assert both.keys() == load_encoders([MAEOptions()], mae=mae).encode(LATENTS).keys()


def test_what_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValidationError):
        MAEOptions(duplicates="unheard-of")
    with pytest.raises(UserError, match="nowhere"):
        load_encoders([MAEOptions()], mae=tmp_path / "nowhere")
