"""The drifting loss, and the literal loop, against the numbers of the release and of the prior."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from field_inputs import relative_error
from naive_field import naive_drifting_loss

from drift.field import FieldSettings, drifting_loss

GOLDEN = Path(__file__).parents[1] / "golden"
PRIOR = sorted(GOLDEN.glob("prior_loss_*.npz"))
RELEASE = sorted(GOLDEN.glob("release_loss_*.npz"))

prior_cases = pytest.mark.parametrize("path", PRIOR, ids=lambda path: path.stem.removeprefix("prior_loss_"))
release_cases = pytest.mark.parametrize(
    "path", RELEASE, ids=lambda path: path.stem.removeprefix("release_loss_")
)


def prior_case(path):
    """x, pos, uncond and omega of one class, its settings, and what to expect."""
    with np.load(path) as arrays:
        golden = dict(arrays)
    knobs = json.loads(str(golden["settings"]))
    if "impl" in knobs:
        knobs["alg2_impl"] = knobs.pop("impl")
    inputs = [torch.from_numpy(golden[key])[None] for key in ("x", "pos", "uncond", "omega")]
    return inputs, FieldSettings.prior(temps=temperatures(golden), **knobs), golden


def release_case(path):
    """The same of the release; its problems are classes of one location."""
    with np.load(path) as arrays:
        golden = dict(arrays)
    inputs = [torch.from_numpy(golden[key])[:, :, None] for key in ("gen", "pos", "uncond")]
    n, u = inputs[0].shape[1], inputs[2].shape[1]
    omega = torch.from_numpy(1 + golden["uncond_weight"].astype(np.float64) * u / (n - 1))
    return [*inputs, omega], FieldSettings(temps=temperatures(golden)), golden


def temperatures(golden) -> tuple[float, ...]:
    return tuple(round(float(tau), 6) for tau in golden["temps"])  # 0.02 rather than float32(0.02)


def loss_and_grad(x, pos, uncond, omega, knobs):
    x = x.clone().requires_grad_()
    loss, statistics = drifting_loss(x, pos, uncond, omega, knobs)
    loss.backward()
    return loss, x.grad, statistics


def test_every_case_is_here():
    assert (len(PRIOR), len(RELEASE)) == (25, 4)


@prior_cases
def test_prior_numbers(path):
    inputs, knobs, golden = prior_case(path)
    loss, grad, statistics = loss_and_grad(*inputs, knobs)
    assert relative_error(loss.detach(), golden["loss"]) < 1e-5
    assert relative_error(statistics["loss"], golden["loss"]) < 1e-5
    assert relative_error(grad[0], golden["grad"]) < 2e-5
    assert relative_error(statistics["scale"], golden["scale"]) < 1e-5


@release_cases
def test_release_numbers(path):
    inputs, knobs, golden = release_case(path)
    loss, grad, statistics = loss_and_grad(*inputs, knobs)
    assert relative_error(loss.detach(), golden["loss"]) < 2e-5
    assert relative_error(statistics["loss"], golden["loss"]) < 2e-5
    assert relative_error(grad[:, :, 0], golden["grad"]) < 2e-5
    root_channels = inputs[0].shape[-1] ** 0.5
    assert relative_error(statistics["scale"] * root_channels, golden["scale"]) < 2e-5
    for tau, rms in zip(knobs.temps, statistics["drift_rms"], strict=True):
        assert relative_error(rms.square(), golden[f"force_ms_{tau}"]) < 2e-5
    drift = -grad * grad.numel() / 2 * float(golden["scale"]) / root_channels
    assert relative_error(drift.square().mean(dim=(1, 2, 3)), golden["loss_per_problem"]) < 2e-5


@prior_cases
def test_literal_loop_has_the_prior_numbers(path):
    inputs, knobs, golden = prior_case(path)
    naive = naive_drifting_loss(*inputs, knobs)
    assert relative_error(naive.loss, golden["loss"]) < 5e-6
    assert relative_error(naive.grad[0], golden["grad"]) < 5e-6
    assert relative_error(naive.scale, golden["scale"]) < 5e-6


@release_cases
def test_literal_loop_has_the_release_numbers(path):
    inputs, knobs, golden = release_case(path)
    naive = naive_drifting_loss(*inputs, knobs)
    assert relative_error(naive.loss, golden["loss"]) < 1e-5
    assert relative_error(naive.grad[:, :, 0], golden["grad"]) < 1e-5
    assert relative_error(naive.scale * inputs[0].shape[-1] ** 0.5, golden["scale"]) < 1e-5
