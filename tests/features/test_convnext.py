"""ConvNeXt-V2 against the release's numbers, against transformers, and in a step of the objective."""

import json

import numpy as np
import pytest
import torch
from golden_weights import GOLDEN, golden_numbers, relative_error
from transformers import ConvNextV2Config, ConvNextV2Model

from drift.autoencoders.kl import VAE
from drift.features import ConvNextFeatures, ConvNextOptions, load_encoders
from drift.field import FieldSettings
from drift.training.objective import Execution, drift_objective

MOMENTS = [f"convnext_stage_{stage}_{moment}" for stage in range(4) for moment in ("mean", "std")]
SETS = [f"convnext_stage_{stage}" for stage in (1, 2, 3)] + MOMENTS
SETS += ["convnext_global_mean", "convnext_global_std"]


@pytest.fixture(scope="module")
def golden_encoder():
    folder = GOLDEN / "release_convnext"
    model = ConvNextV2Model(ConvNextV2Config(**json.loads((folder / "config.json").read_text())))
    weights = golden_numbers("release_convnext", "weights.npz").items()
    prefix = "convnextv2."
    model.load_state_dict({k.removeprefix(prefix): torch.from_numpy(v) for k, v in weights if prefix in k})
    return ConvNextFeatures(model)


@pytest.mark.parametrize("size", ["small", "large"])
def test_release_numbers(golden_encoder, size):
    golden = golden_numbers("release_convnext")
    images = torch.from_numpy(golden[f"{size}/x"]).permute(0, 3, 1, 2).requires_grad_()
    sets = golden_encoder(images)
    assert {*sets} == {*SETS} and len(sets) == 13
    for name, found in sets.items():
        theirs = name.replace("convnext_stage", "convenxt_stage").replace("convnext_global", "global")
        expected = torch.from_numpy(golden[f"{size}/act/{theirs}"])
        assert relative_error(found[:, :200], expected) < 1e-5, name
        assert float(found.detach().square().mean().sqrt()) == pytest.approx(
            golden[f"{size}/rms/{theirs}"], rel=1e-5
        )
    sum(x.square().mean() for x in sets.values()).backward()
    expected = torch.from_numpy(golden[f"{size}/grad_of_mean_squares"]).permute(0, 3, 1, 2)
    assert relative_error(images.grad, expected) < 1e-4


@torch.no_grad()
def test_the_maps_are_those_of_transformers(convnext_folder):
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    encoder, network = ConvNextFeatures(convnext_folder), ConvNextV2Model.from_pretrained(convnext_folder)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    theirs = network.eval()((images - mean) / std, output_hidden_states=True)
    sets = encoder(images)
    torch.testing.assert_close(sets["convnext_global_mean"], theirs.pooler_output[:, None])
    for stage, side in ((1, 28), (2, 14), (3, 7)):
        feature_map = theirs.hidden_states[-4:][stage].double().numpy()  # [B, C, H, W]
        vectors = feature_map.reshape(*feature_map.shape[:2], side**2).transpose(0, 2, 1)
        apart = vectors - vectors.mean(axis=2, keepdims=True)
        expected = apart / (np.sqrt(np.mean(apart**2, axis=2, keepdims=True)) + 1e-3)
        np.testing.assert_allclose(sets[f"convnext_stage_{stage}"], expected, rtol=1e-3, atol=1e-4)


def test_a_step_from_latents_through_the_decoder(vae_folder, convnext_folder):
    """The gradient reaches the generated latents; in batches it is the same."""
    draw = torch.Generator().manual_seed(0)
    generated, positives, unconditional = (torch.randn(2, n, 3, 8, 8, generator=draw) for n in (3, 4, 1))
    options = [ConvNextOptions(source=str(convnext_folder))]
    encoder = load_encoders(options, autoencoder=VAE.from_pretrained(vae_folder))

    def step(feature_batch):
        x = generated.clone().requires_grad_()
        loss, statistics = drift_objective(
            x, positives, unconditional, torch.tensor([1.0, 2.0]), encoder, FieldSettings(),
            execution=Execution(feature_batch=feature_batch),
        )  # fmt: skip
        loss.backward()
        assert {*statistics} == {*SETS}
        return loss.detach(), x.grad

    (loss, gradient), (in_batches, gradient_in_batches) = step(None), step(2)
    assert (gradient.flatten(2).norm(dim=2) > 0).all()
    torch.testing.assert_close(in_batches, loss)
    assert relative_error(gradient_in_batches, gradient) < 1e-3
