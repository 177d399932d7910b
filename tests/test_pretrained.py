import numpy as np
import pytest
import torch

from drift.autoencoders.kl import VAE
from drift.models.classifier import ImageClassifier
from drift.runtime.errors import UserError
from drift.runtime.seeds import torch_generator
from pretrained import train


@pytest.mark.parametrize("network, steps", [(train.train_vae, 15), (train.train_classifier, 30)])
def test_training_reduces_the_loss(network, steps):
    model, losses = network(train.TrainingImages("mnist5k"), steps)
    assert len(losses) == steps and not model.training
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])


@pytest.mark.parametrize("network, cls", [("vae", VAE), ("classifier", ImageClassifier)])
def test_the_command_writes_a_network_and_repeats_itself(network, cls, tmp_path):
    def run(name, *options):
        train.main([network, "--out", str(tmp_path / name), "--steps", "2", *options])
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    first = run("a")
    cls.from_pretrained(tmp_path / "a")
    assert run("b") == first
    assert run("a", "--seed", "1") != first  # and replaces what was there
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    with pytest.raises(UserError, match="--steps 0"):
        train.main([network, "--out", str(tmp_path / "c"), "--steps", "0"])


def test_moved_images_are_near_and_differ():
    side, count = 33, 200
    dot = torch.zeros(count, 1, side, side)
    dot[:, :, 16, 16] = 1
    moved = train.move_randomly(dot, torch_generator(0, "test"))
    rows, columns = torch.meshgrid(torch.arange(side) - 16.0, torch.arange(side) - 16.0, indexing="ij")
    mass = moved.sum(dim=(1, 2, 3))
    centre = torch.stack([(moved[:, 0] * axis).sum(dim=(1, 2)) / mass for axis in (rows, columns)])
    # The centre of the image moves by the shift alone, seen through a size of at most exp(0.2)
    assert centre.abs().max() <= 0.08 * side * np.exp(0.2) * 2**0.5
    assert (centre.std(dim=1) > 0.5).all() and len(mass.unique()) > count // 2
    flat = train.move_randomly(torch.full((50, 3, 32, 32), 200.0), torch_generator(0, "test"))
    torch.testing.assert_close(flat[:, :, 12:20, 12:20], torch.full((50, 3, 8, 8), 200.0))
