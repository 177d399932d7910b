"""Learning rates at their corners, and omega's distribution against its numerical integral."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from drift.training.schedule import draw_omega, learning_rate


def rates(**changes):
    options = {
        "steps": 110,
        "peak": 2.0,
        "warmup_steps": 10,
        "warmup_start": 0.5,
        "schedule": "cosine",
        "final_share": 0.1,
    }
    options |= changes
    return [learning_rate(step, **options) for step in range(options["steps"] + 1)]


def test_warm_up_is_a_line_from_its_start_to_the_peak():
    np.testing.assert_allclose(rates()[:11], np.linspace(0.5, 2.0, 11))


def test_cosine_is_half_way_down_in_the_middle_and_ends_at_its_share():
    all_rates = rates()
    assert all_rates[60] == pytest.approx((2.0 + 0.2) / 2)
    assert all_rates[110] == pytest.approx(0.2)
    assert all(before >= after for before, after in pairwise(all_rates[10:]))


def test_constant_stays_at_the_peak():
    assert set(rates(schedule="constant")[10:]) == {2.0}


def test_no_warm_up():
    assert rates(warmup_steps=0)[0] == 2.0


@pytest.mark.parametrize("exponent", [0.0, 1.0, 3.0, 5.0])
def test_omega_follows_its_density(exponent):
    omega = draw_omega(
        100_000,
        low=1.0,
        high=4.0,
        exponent=exponent,
        no_guidance_fraction=0.0,
        generator=torch.Generator().manual_seed(0),
    ).numpy()
    assert omega.min() >= 1 and omega.max() <= 4
    whole, _ = quad(lambda w: w**-exponent, 1, 4)
    for bound in (1.2, 1.7, 2.5, 3.5):
        below, _ = quad(lambda w: w**-exponent, 1, bound)
        assert (omega < bound).mean() == pytest.approx(below / whole, abs=0.006)


def test_some_omegas_are_one():
    omega = draw_omega(
        10_000,
        low=2.0,
        high=3.0,
        exponent=3.0,
        no_guidance_fraction=0.5,
        generator=torch.Generator().manual_seed(0),
    )
    assert (omega == 1).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert omega[omega != 1].min() >= 2
