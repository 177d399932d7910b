"""Learning rates at their corners, and omega's distribution against its numerical integral."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from drift.settings import Drift
from drift.training.schedule import draw_omega, learning_rate, temperatures


def rates(**changes):
    cosine = {"lr_schedule": "cosine", "warmup_steps": 10, "warmup_start_lr": 0.5, "lr": 2.0, "lr_final": 0.1}
    options = Drift(**{"steps": 110, **cosine, **changes})
    return [learning_rate(step, options) for step in range(111)]


def test_learning_rates_at_their_corners():
    cosine = rates()
    np.testing.assert_allclose(cosine[:11], np.linspace(0.5, 2.0, 11))
    assert cosine[60] == pytest.approx((2.0 + 0.2) / 2) and cosine[110] == pytest.approx(0.2)
    assert all(before >= after for before, after in pairwise(cosine[10:]))
    assert set(rates(lr_schedule="constant")[10:]) == {2.0}
    assert rates(warmup_steps=0)[0] == 2.0


def test_temperatures_fall_by_the_same_factor_at_every_step():
    temps, options = (0.02, 0.3), Drift(steps=101, warmup_steps=0, temps_start=16.0)
    naive = [16.0 * tau for tau in temps]
    for step in range(101):
        assert temperatures(step, temps, options) == pytest.approx(naive, rel=1e-9)
        naive = [tau * math.exp(-math.log(16.0) / 100) for tau in naive]
    assert temperatures(50, temps, options) == pytest.approx([0.08, 1.2])
    assert temperatures(100, temps, options) == temps
    constant = Drift(steps=101, warmup_steps=0)
    assert {temperatures(step, temps, constant) for step in range(101)} == {temps}
    assert temperatures(0, temps, Drift(steps=1, warmup_steps=0, temps_start=2.0)) == (0.04, 0.6)


def omegas(count, **options):
    return draw_omega(count, Drift(**options), torch.Generator().manual_seed(0)).numpy()


@pytest.mark.parametrize("exponent", [0.0, 1.0, 3.0, 5.0])
def test_omega_follows_its_density(exponent):
    options = {"omega_min": 1.0, "omega_max": 4.0, "no_guidance_fraction": 0.0}
    omega = omegas(100_000, **options, omega_exponent=exponent)
    assert omega.min() >= 1 and omega.max() <= 4
    whole, _ = quad(lambda w: w**-exponent, 1, 4)
    for bound in (1.2, 1.7, 2.5, 3.5):
        below, _ = quad(lambda w: w**-exponent, 1, bound)
        assert (omega < bound).mean() == pytest.approx(below / whole, abs=0.006)


def test_some_omegas_are_one():
    omega = omegas(10_000, omega_min=2.0, omega_max=3.0, omega_exponent=3.0, no_guidance_fraction=0.5)
    assert (omega == 1).mean() == pytest.approx(0.5, abs=0.02)
    assert omega[omega != 1].min() >= 2
