"""The drifting loss, and the naive loop, against the numbers of the three authors' codes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from field_inputs import relative_error
from oracle import naive_drifting_loss

from drift.field import FieldSettings, drifting_loss

GOLDEN = Path(__file__).parents[1] / "golden"
NUMBERS = {"prior": 25, "release": 4, "wflow": 10}
"""Of files; "prior" is the Sinkhorn paper's code."""
PATHS = [path for code in NUMBERS for path in sorted(GOLDEN.glob(f"{code}_loss_*.npz"))]
RENAMED = {"impl": "alg2_impl", "vanilla": "unit_scale"}
every_case = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem.replace("_loss", ""))


def read(path):
    """x, pos, uncond, omega, a second batch or None, the settings, and what to expect."""
    with np.load(path) as arrays:
        golden = dict(arrays)
    temps = tuple(round(float(tau), 6) for tau in golden["temps"])  # 0.02 rather than float32(0.02)
    knobs = json.loads(str(golden["settings"])) if "settings" in golden else {}
    knobs = {"temps": temps} | {RENAMED.get(key, key): value for key, value in knobs.items()}
    if path.stem.startswith("prior"):
        inputs = [torch.from_numpy(golden[key])[None] for key in ("x", "pos", "uncond", "omega")]
        return [*inputs, None], FieldSettings.sinkhorn(**knobs), golden
    # Problems are classes of one location
    x, pos, uncond = (torch.from_numpy(golden[key])[:, :, None] for key in ("gen", "pos", "uncond"))
    if path.stem.startswith("release"):
        weight = golden["uncond_weight"].astype(np.float64)
        omega = torch.from_numpy(1 + weight * uncond.shape[1] / (x.shape[1] - 1))
        return [x, pos, uncond, omega, None], FieldSettings(**knobs), golden
    knobs["dist_metric"] = "l2_sq" if knobs.pop("quadratic_cost") else "l2"
    second = torch.from_numpy(golden["second"])[:, :, None] if "second" in golden else None
    return [x, pos, uncond, torch.from_numpy(golden["omega"]), second], FieldSettings.wflow(**knobs), golden


def test_every_case_is_here():
    assert {code: sum(path.stem.startswith(code) for path in PATHS) for code in NUMBERS} == NUMBERS


@every_case
def test_numbers(path):
    """Value, gradient, S and every lambda; W-Flow's `l2` has a softened root, hence 2e-5."""
    (x, pos, uncond, omega, second), settings, golden = read(path)
    x = x.clone().requires_grad_()
    loss, statistics = drifting_loss(x, pos, uncond, omega, settings, negatives=second)
    loss.backward()
    of_class = path.stem.startswith("prior")
    root = 1 if of_class else x.shape[-1] ** 0.5  # the others print S before the division by it
    assert relative_error(loss.detach(), golden["loss"]) < 2e-5
    assert relative_error(x.grad[0] if of_class else x.grad[:, :, 0], golden["grad"]) < 2e-5
    assert relative_error(statistics["scale"] * root, golden["scale"]) < 2e-5
    for tau, rms in zip(settings.temps, statistics["drift_rms"], strict=True):
        if not of_class:
            assert relative_error(rms.square(), golden[f"force_ms_{tau}"]) < 3e-5
    if not of_class:
        drift = x.grad * x.numel() / 2 * float(golden["scale"]) / root
        assert relative_error(drift.square().mean(dim=(1, 2, 3)), golden["loss_per_problem"]) < 3e-5


@every_case
def test_naive_loop_has_the_numbers(path):
    """So that it can stand in for them where they have none."""
    (*inputs, second), settings, golden = read(path)
    of_class = path.stem.startswith("prior")
    naive = naive_drifting_loss(*inputs, settings, second)
    root = 1 if of_class else inputs[0].shape[-1] ** 0.5
    assert relative_error(naive.loss, golden["loss"]) < 1e-5
    assert relative_error(naive.grad[0] if of_class else naive.grad[:, :, 0], golden["grad"]) < 1.5e-5
    assert relative_error(naive.scale * root, golden["scale"]) < 1e-5
