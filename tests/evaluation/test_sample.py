import pytest
import torch

from drift.evaluation.sample import draw_inputs, sample_images, sample_latents
from drift.models.generator import Generator, GeneratorConfig

CONFIG = GeneratorConfig(
    in_channels=4,
    input_size=4,
    num_classes=3,
    hidden_size=32,
    depth=2,
    num_heads=2,
    patch_size=2,
    mlp_ratio=2.0,
    context_tokens=2,
    style_codebooks=3,
    style_entries=8,
)


class Decoder:
    """Stands in for a VAE: the first three channels, enlarged."""

    def decode(self, latents):
        return latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3).tanh()


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    model = Generator(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the last layer starts at zero
            parameter.normal_(0, 0.2)
    return model


def everything(generator, *, batch_size, world_size=1, omega=1.5):
    """Labels and images of 20 samples by index, from all ranks."""
    found = {}
    for rank in range(world_size):
        parts = sample_images(
            generator, Decoder(), range(20), omega, 7, batch_size, classes=3, rank=rank, world_size=world_size
        )
        for indices, labels, images in parts:
            assert len(indices) <= batch_size
            for index, label, image in zip(indices, labels, images, strict=True):
                assert index not in found
                found[index] = (int(label), image)
    return found


def test_inputs_of_a_sample_do_not_depend_on_its_company():
    noise, labels, style = draw_inputs(range(10), CONFIG, 3, 3)
    assert (noise.shape, style.shape) == ((10, 4, 4, 4), (10, 3))
    for order in ([4], [9, 4, 0]):
        part = draw_inputs(order, CONFIG, 3, 3)
        for whole, some in zip((noise, labels, style), part, strict=True):
            assert torch.equal(whole[order], some)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert not torch.equal(noise, draw_inputs(range(10), CONFIG, 4, 3)[0])


def test_inputs_are_independent_standard_draws():
    noise, _, style = draw_inputs(range(2000), CONFIG, 0, 3)
    numbers = noise.flatten(1)  # [2000, 64]
    assert abs(numbers.mean()) < 0.02
    assert abs(numbers.std() - 1) < 0.02
    # Samples next to each other are as uncorrelated as their seeds should make them
    assert abs((numbers[1:] * numbers[:-1]).mean()) < 0.02
    counts = torch.bincount(style.flatten(), minlength=8)
    assert counts.shape == (8,)
    assert abs(counts / counts.sum() - 1 / 8).max() < 0.02


@pytest.mark.parametrize(("batch_size", "world_size"), [(7, 1), (3, 2), (7, 2), (1, 3)])
def test_batch_size_and_ranks_change_nothing(generator, batch_size, world_size):
    reference = everything(generator, batch_size=3)
    found = everything(generator, batch_size=batch_size, world_size=world_size)
    assert found.keys() == reference.keys() == set(range(20))
    for index, (label, image) in reference.items():
        assert found[index][0] == label == index % 3
        assert image.dtype == torch.uint8 and image.shape == (8, 8, 3)
        # Matrix products of another batch size may differ in the last bit, and so round to the next level
        assert (found[index][1].int() - image.int()).abs().max() <= 1


def test_latents_agree_across_batch_sizes_to_rounding(generator):
    inputs = draw_inputs(range(14), CONFIG, 1, 3)
    whole = sample_latents(generator, *inputs, omega=2.0)
    parts = [sample_latents(generator, *(x[i : i + 3] for x in inputs), omega=2.0) for i in range(0, 14, 3)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)


def test_omega_reaches_the_generator(generator):
    inputs = draw_inputs(range(4), CONFIG, 1, 3)
    low, high = (sample_latents(generator, *inputs, omega=omega) for omega in (1.0, 4.0))
    assert (low - high).abs().max() > 1e-3


def test_latents_that_are_not_finite_are_not_rounded_to_a_picture():
    def diverged(noise, labels, omega, style_indices):
        return torch.where(noise > 2, torch.nan, noise)

    with pytest.raises(FloatingPointError, match=r"omega 1\.5"):
        sample_latents(diverged, *draw_inputs(range(20), CONFIG, 1, 3), omega=1.5)
