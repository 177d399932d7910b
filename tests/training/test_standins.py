import numpy as np
import pytest
import torch

from drift.autoencoders.kl import VAE
from drift.models.classifier import ImageClassifier
from drift.runtime.errors import UserError
from drift.runtime.seeds import torch_generator
from drift.training import standins


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("train, steps", [(standins.train_vae, 15), (standins.train_classifier, 30)])
def test_training_reduces_the_loss(train, steps):
    model, losses = train(steps)
    assert len(losses) == steps and not model.training
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])


@pytest.mark.parametrize("network, cls", [("vae", VAE), ("classifier", ImageClassifier)])
def test_the_command_writes_a_network_and_repeats_itself(network, cls, tmp_path):
    def run(name, *options):
        standins.main([network, "--out", str(tmp_path / name), "--steps", "2", *options])
        return contents(tmp_path / name)

    first = run("a")
    cls.from_pretrained(tmp_path / "a")
    assert run("b") == first
    assert run("a", "--seed", "1") != first  # and replaces what was there
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_place_that_cannot_be_written_is_named_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setitem(standins.NETWORKS, "vae", (None, 1))  # training would fail
    with pytest.raises(UserError, match="file: cannot be written"):
        standins.main(["vae", "--out", str(tmp_path / "file" / "vae")])


def test_training_takes_at_least_one_step(tmp_path):
    with pytest.raises(UserError, match="--steps 0"):
        standins.main(["vae", "--out", str(tmp_path / "vae"), "--steps", "0"])


def test_moved_images_are_near_and_differ():
    side, count = 33, 200
    dot = torch.zeros(count, 1, side, side)
    dot[:, :, 16, 16] = 1
    moved = standins.move_randomly(dot, torch_generator(0, "test"))
    assert torch.equal(moved, standins.move_randomly(dot, torch_generator(0, "test")))
    rows, columns = torch.meshgrid(torch.arange(side) - 16.0, torch.arange(side) - 16.0, indexing="ij")
    mass = moved.sum(dim=(1, 2, 3))
    centre = torch.stack([(moved[:, 0] * axis).sum(dim=(1, 2)) / mass for axis in (rows, columns)])
    # The centre of the image moves by the shift alone, seen through a size of at most exp(0.2)
    assert centre.abs().max() <= 0.08 * side * np.exp(0.2) * 2**0.5
    assert (centre.std(dim=1) > 0.5).all()
    assert len(mass.unique()) > count // 2


def test_moving_keeps_the_value_of_flat_images():
    flat = torch.full((50, 3, 32, 32), 200.0)
    moved = standins.move_randomly(flat, torch_generator(0, "test"))
    torch.testing.assert_close(moved[:, :, 12:20, 12:20], flat[:, :, 12:20, 12:20])
    assert moved.min() == 0 and moved.max() <= 200.001  # the corners come in from outside
