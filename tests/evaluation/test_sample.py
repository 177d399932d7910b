from types import SimpleNamespace

import numpy as np
import pytest
import torch
from overflow import Overflowing
from standins import settings

from drift.autoencoders.kl import VAE
from drift.evaluation import sample as module
from drift.evaluation.pictures import draw_images
from drift.evaluation.sample import ImageDecoder, draw_inputs, sample_labels, sample_latents
from drift.models.generator import Generator

SIZES = {
    "in_channels": 4, "input_size": 4, "num_classes": 3, "hidden_size": 32, "depth": 2, "num_heads": 2,
    "patch_size": 2, "mlp_ratio": 2.0, "context_tokens": 2, "style_codebooks": 3, "style_entries": 8,
}  # fmt: skip


class Decoder:
    """Stands in for a VAE: the first three channels, enlarged."""

    def decode(self, latents):
        return latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3).tanh()


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    model = Generator(**SIZES).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the last layer starts at zero
            parameter.normal_(0, 0.2)
    return model


def test_inputs_of_a_sample_do_not_depend_on_its_company():
    noise, style = draw_inputs(range(10), SIZES, 3)
    assert (noise.shape, style.shape) == ((10, 4, 4, 4), (10, 3))
    for order in ([4], [9, 4, 0]):
        part = draw_inputs(order, SIZES, 3)
        for whole, some in zip((noise, style), part, strict=True):
            assert torch.equal(whole[order], some)
    assert not torch.equal(noise, draw_inputs(range(10), SIZES, 4)[0])


def labels(kind, count, seed=0):
    return sample_labels(settings(seed, fid={"labels": kind, "images": count}))


def test_labels_of_a_split_are_of_all_its_classes_however_few(monkeypatch):
    of_split = np.repeat(np.arange(50), [100] * 25 + [60] * 25)  # 4000, class after class
    monkeypatch.setattr(module, "open_images", lambda *args: SimpleNamespace(labels=of_split))
    few = np.bincount(labels("val", 1000, seed=3), minlength=50)
    # The first thousand would be of 10 classes. What a class has is hypergeometric, with a spread of 4.3
    assert (abs(few - np.repeat([25, 15], 25)) < 4 * 4.3).all()
    whole = labels("val", 9000, seed=3)
    assert np.bincount(whole[:4000]).tolist() == np.bincount(of_split).tolist()
    assert np.array_equal(whole[4000:8000], whole[:4000])
    assert not np.array_equal(whole, labels("val", 9000, seed=4))


def test_other_labels_are_in_turn_or_uniform_and_independent():
    assert labels("balanced", 25).tolist() == [*range(10), *range(10), *range(5)]
    found = labels("random", 20_000, seed=1)
    counts = np.bincount(found, minlength=10)
    # Chi squared with 9 degrees of freedom: 21.7 is exceeded once in a hundred times, 2.1 fallen short of
    assert 2.1 < ((counts - 2000) ** 2 / 2000).sum() < 21.7
    assert (found[1:] == found[:-1]).mean() == pytest.approx(0.1, abs=0.01)


def test_inputs_are_independent_standard_draws():
    noise, style = draw_inputs(range(2000), SIZES, 0)
    numbers = noise.flatten(1)  # [2000, 64]
    assert abs(numbers.mean()) < 0.02 and abs(numbers.std() - 1) < 0.02
    assert abs((numbers[1:] * numbers[:-1]).mean()) < 0.02  # samples next to each other
    counts = torch.bincount(style.flatten(), minlength=8)
    assert counts.shape == (8,) and abs(counts / counts.sum() - 1 / 8).max() < 0.02


def images(generator, indices, batch_size):
    wanted = [(i % 3, i, 1.5) for i in indices]
    return draw_images(generator, ImageDecoder(Decoder(), 5), wanted, 7, batch_size)


def test_an_image_does_not_depend_on_its_company(generator):
    whole = images(generator, range(20), 3)
    assert whole.dtype == torch.uint8 and whole.shape == (20, 8, 8, 3)
    for indices in (range(0, 20, 2), [19, 4], [7]):
        for batch_size in (1, 7, 64):
            assert torch.equal(images(generator, indices, batch_size), whole[list(indices)])


def inputs(count):
    noise, style = draw_inputs(range(count), SIZES, 1)
    return noise, torch.arange(count) % 3, style


class Small:
    """A device that has the memory for three images, and says what it was asked for."""

    def __init__(self, most=3):
        self.most, self.asked = most, []

    def decode(self, latents):
        self.asked.append(len(latents))
        if len(latents) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return Decoder().decode(latents)


def test_decoding_backs_off_and_remembers(capsys):
    latents = torch.randn(13, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    vae = Small()
    decode = ImageDecoder(vae, 12)
    images = decode(latents)
    assert torch.equal(images, ImageDecoder(Decoder(), 13)(latents))
    assert vae.asked == [12, 6, 3, 3, 3, 3, 3]  # of one shape
    assert "hardware.decode_batch: 3" in capsys.readouterr().out
    decode(latents[:3])
    assert vae.asked[-1] == 3
    with pytest.raises(torch.OutOfMemoryError):
        ImageDecoder(Small(most=0), 4)(latents)


def latents_of_which_two_overflow():
    latents = torch.rand(11, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 1.9 - 0.95
    latents[[2, 10], 1, 3, 3] = 1.0
    return latents


def test_images_that_overflow_in_bfloat16_are_decoded_in_float32(capsys):
    latents = latents_of_which_two_overflow()
    exact = ImageDecoder(VAE(Overflowing(), "stub"), 4)(latents)
    vae = VAE(Overflowing(), "stub", precision="bfloat16")
    assert vae.decode(latents).isfinite().flatten(1).all(1).tolist() == [i not in (2, 10) for i in range(11)]
    images = ImageDecoder(vae, 4)(latents)
    assert torch.equal(images[[2, 10]], exact[[2, 10]])
    assert not torch.equal(images, exact)  # the others are those of bfloat16 ...
    assert (images.int() - exact.int()).abs().max() <= 1  # ... which has a spacing of half a level below 1
    assert vae.recomputed == 2
    out = capsys.readouterr().out
    assert out.count("overflowed in bfloat16") == 1 and "precision: float32 in encode or fid" in out
    # not one pixel depends on the company
    for some in (slice(0, 3), slice(2, 3), slice(9, 11)):
        assert torch.equal(ImageDecoder(vae, 4)(latents[some]), images[some])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_images_that_are_not_finite_in_float32_are_not_rounded_to_pictures(precision):
    latents = latents_of_which_two_overflow()
    latents[5, 0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="the VAE's images are not finite"):
        ImageDecoder(VAE(Overflowing(), "stub", precision=precision), 4)(latents)


def test_latents_that_are_not_finite_are_not_rounded_to_a_picture():
    def diverged(noise, labels, omega, style_indices):
        return torch.where(noise > 2, torch.nan, noise)

    with pytest.raises(FloatingPointError, match=r"omega 1\.5"):
        sample_latents(diverged, *inputs(20), omega=1.5)
