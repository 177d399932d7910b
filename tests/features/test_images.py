"""Encoders of images: what they see of latents, the gradient on its way back, and how much is kept of it."""

import shutil

import numpy as np
import pytest
import torch
from complaints import complaint
from imports import ROOT
from torch import Tensor
from torchvision.transforms import functional as reference

from drift.autoencoders.kl import VAE
from drift.data.latents import LatentStore, write_latents
from drift.features import EncoderOptions, ImageEncoder, load_encoders
from drift.field import FieldSettings
from drift.settings import load_settings
from drift.training.compile import Compiled
from drift.training.inputs import load_autoencoder
from drift.training.objective import Execution, drift_objective


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Colours(ImageEncoder):
    """The mean colour and every pixel."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        pixels = self.prepared(images, 12).flatten(2).transpose(1, 2)
        return {"colours": pixels.square().mean(1, keepdim=True), "colours_of_pixels": pixels}


class Edges(ImageEncoder):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"edges": images.diff(dim=3).flatten(1)[:, None]}


class Large(ImageEncoder):
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"large": self.prepared(images, 24).flatten(1)[:, None]}


class Options(EncoderOptions):
    needs_decoder = True
    kind: type[ImageEncoder]

    def load(self, *, mae=None, autoencoder=None):
        return self.kind(autoencoder)


def counting(folder, precision: str = "float32"):
    """An autoencoder that remembers how many it decodes at once, and whether for a gradient."""
    vae = VAE.from_pretrained(folder, precision=precision)
    decode, vae.calls = vae.decode, []

    def remembering(latents: Tensor) -> Tensor:
        vae.calls.append((len(latents), torch.is_grad_enabled()))
        return decode(latents)

    vae.decode = remembering
    return vae


@pytest.fixture
def vae(vae_folder):
    return counting(vae_folder)


def encoder_of(vae, *kinds: type[ImageEncoder]):
    return load_encoders([Options(encoder=kind.__name__, kind=kind) for kind in kinds], autoencoder=vae)


@pytest.mark.parametrize("shape", [(16, 16), (9, 9), (12, 12), (40, 24)])
def test_images_are_resized_as_torchvision_does_it(shape):
    images = draw(2, 3, *shape)
    resized = reference.resize(images, [12, 12], antialias=True)
    expected = reference.normalize(resized, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(Colours().prepared(images, 12), expected)


def test_latents_are_seen_decoded_and_nothing_is_clipped(vae):
    latents = 3 * draw(2, 3, 8, 8)
    with torch.no_grad():
        images = (vae.model.decode(latents / 0.4).sample + 1) / 2
    assert images.min() < 0 and images.max() > 1
    sets = encoder_of(vae, Colours).encode(latents)
    assert all(torch.equal(sets[name], of) for name, of in Colours()(images).items())


def test_the_gradient_is_that_of_differences_and_the_decoder_learns_nothing(vae):
    encoder = encoder_of(vae, Edges)
    latents, direction = draw(2, 3, 8, 8).requires_grad_(), draw(2, 3, 8, 8, seed=1)

    def value(shift: float) -> Tensor:
        return encoder.encode(latents + shift * direction)["edges"].double().square().sum()

    value(0.0).backward()
    with torch.no_grad():
        slope = (value(1e-3) - value(-1e-3)) / 2e-3
    assert float((latents.grad * direction).sum()) == pytest.approx(float(slope), rel=1e-3)
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())


def test_latents_are_decoded_once_for_all_encoders(vae):
    sets = encoder_of(vae, Colours, Edges).encode(draw(2, 3, 8, 8))
    assert [*sets] == ["colours", "colours_of_pixels", "edges"] and len(vae.calls) == 1


def test_the_digest_is_that_of_all_weights(vae):
    digests = {encoder_of(vae, Edges).digest, encoder_of(None, Edges).digest}
    vae.model.decoder.conv_out.bias.data[0] += 1
    assert len(digests | {encoder_of(vae, Edges).digest}) == 3


def step(vae, **options) -> tuple[Tensor, Tensor]:
    generated = draw(2, 4, 3, 8, 8).requires_grad_()
    rest = draw(2, 3, 3, 8, 8, seed=1), draw(2, 2, 3, 8, 8, seed=2), torch.tensor([1.0, 2.0])
    loss, statistics = drift_objective(
        generated, *rest, encoder_of(vae, Colours, Edges), FieldSettings(), execution=Execution(**options)
    )
    assert {value.dtype for of_set in statistics.values() for value in of_set.values()} == {torch.float32}
    loss.backward()
    return loss.detach(), generated.grad


def test_decoding_is_within_the_feature_batch_and_real_samples_need_no_graph(vae):
    loss, gradient = step(vae)
    assert vae.calls == [(10, False), (8, True)] and gradient.abs().sum() > 0
    vae.calls.clear()
    in_parts = step(vae, feature_batch=3)
    once = [(3, False)] * 3 + [(1, False)] + [(3, True), (3, True), (2, True)]
    assert vae.calls == [*once, (2, True), (3, True), (3, True)]  # decoded again in the backward pass
    torch.testing.assert_close(in_parts, (loss, gradient), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("feature_batch", [None, 3])
def test_in_bfloat16_the_gradient_is_near_that_of_float32(vae, vae_folder, feature_batch):
    _, expected = step(vae)
    half = counting(vae_folder, "bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        _, gradient = step(half, feature_batch=feature_batch, feature_dtype=torch.bfloat16)
    assert gradient.dtype == torch.float32
    assert 1e-5 < float((gradient - expected).norm() / expected.norm()) < 0.1


def test_the_autoencoder_must_be_that_of_the_latents(vae_folder, tmp_path):
    settings = load_settings(ROOT / "presets/digits.yaml")
    source = settings.encode.autoencoder.model_copy(update={"source": str(vae_folder)})
    encode = settings.encode.model_copy(update={"autoencoder": source})
    data = settings.data.model_copy(update={"image_size": 16})
    settings = settings.model_copy(update={"encode": encode, "data": data})

    def load(shape=(3, 8, 8), **meta):
        latents = np.zeros((4, *shape), np.float16)
        write_latents(tmp_path, "train", latents, np.arange(4), meta)
        return load_autoencoder(LatentStore.open(tmp_path), settings, "bfloat16")

    vae = load()
    assert vae.precision == "bfloat16" and load(vae_sha256=vae.digest).digest == vae.digest
    assert "other weights" in complaint(lambda: load(vae_sha256="0" * 64))
    assert "[4, 8, 8]" in complaint(lambda: load(shape=(4, 8, 8)))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_encoders_have_the_same_values_and_gradients(vae):
    """By the real compiler: of decoder and network in one graph, the gradient was 0."""
    torch.compiler.reset()
    encoder, latents = encoder_of(vae, Large), draw(2, 3, 8, 8).requires_grad_()

    def values_and_gradient(encode):
        pixels = encode(latents)["large"]
        return pixels, torch.autograd.grad(pixels, latents, draw(*pixels.shape, seed=1))[0]

    compiled = Compiled(encoder.encode, "encoder")
    found, expected = values_and_gradient(compiled), values_and_gradient(encoder.encode)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert compiled._fast is not None
