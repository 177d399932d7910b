"""What the statistics of the loss tell about the field."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from field_inputs import draw, loss_and_grad
from hypothesis import given, settings
from hypothesis import strategies as st

from drift.field import FieldSettings
from drift.field.couplings import COUPLINGS

SINKHORN_PAPER = FieldSettings.sinkhorn()
SINKHORN = FieldSettings.sinkhorn(coupling="sinkhorn", temps=(0.05, 0.2))

forms = pytest.mark.parametrize("form", ["alg2_joint", "split"])
marginals = pytest.mark.parametrize("marginal", ["none", "weighted_cols"])


def statistics_of(inputs, knobs):
    return loss_and_grad(*inputs, knobs)[2]


@forms
@marginals
@given(seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_marginal_error_falls_with_the_iterations(form, marginal, seed):
    inputs = draw(seed)
    knobs = replace(SINKHORN, drift_form=form, sinkhorn_marginal=marginal, temps=(0.2, 0.5))
    errors = [
        statistics_of(inputs, replace(knobs, sinkhorn_iters=iterations))["marginal_error"]
        for iterations in (1, 2, 5, 20, 300)
    ]
    for before, after in pairwise(errors):
        assert (after <= before + 1e-5).all()
    assert (errors[0] > 1e-2).all()
    assert (errors[-1] < 1e-4).all()


@forms
@marginals
@pytest.mark.parametrize("tolerance", [0.1, 0.01])
def test_iterations_stop_at_the_tolerance(form, marginal, tolerance):
    inputs = draw()
    knobs = replace(SINKHORN, drift_form=form, sinkhorn_marginal=marginal, sinkhorn_iters=2000)
    stopped = statistics_of(inputs, replace(knobs, sinkhorn_tolerance=tolerance))["marginal_error"]
    converged = statistics_of(inputs, knobs)["marginal_error"]
    assert (stopped <= 1.001 * tolerance).all()
    assert (stopped > tolerance / 50).all()
    assert (converged < tolerance / 100).all()


def test_columns_are_exact_where_the_first_iteration_suffices():
    """Every target at the same distance, tau such that K sums to one: rows are right before any iteration."""
    n, p, u = 4, 5, 2
    x, second, uncond, pos = torch.eye(n + n + u + p)[None, :, None].split([n, n, u, p], dim=1)
    knobs = replace(
        SINKHORN,
        negatives="second_batch",
        temps=(1 / torch.tensor(float(n * (n + u + p))).log().item(),),
        sinkhorn_tolerance=0.05,
    )
    statistics = statistics_of((x, pos, uncond, torch.tensor([4.0]), second), knobs)
    assert statistics["marginal_error"] < 1e-5


@pytest.mark.parametrize("coupling", ["row", "partial_two_sided", "sinkhorn"])
@forms
def test_neighbours_are_counted(coupling, form):
    """All positives attract at a high temperature, at a low one the nearest alone."""
    _, pos, *rest = draw(n=5, p=6)
    inputs = pos[:, :5] + 0.05, pos, *rest
    knobs = replace(SINKHORN_PAPER, coupling=coupling, drift_form=form, temps=(1e3, 1e-3))
    hot, cold = statistics_of(inputs, knobs)["neighbours"].tolist()
    assert hot == pytest.approx(6, rel=1e-3)
    assert 0.999 < cold < (3 if coupling == "sinkhorn" else 1.2)  # a plan spreads a row over several columns


VELOCITY = {"drift_form": "split", "guidance": "velocity"}
every_form = pytest.mark.parametrize(
    "form", [{"drift_form": "alg2_joint"}, {"drift_form": "split"}, VELOCITY]
)


@pytest.mark.parametrize("coupling", COUPLINGS)
@every_form
def test_attraction_of_positives_that_are_all_alike(coupling, form):
    n, p, u = 4, 5, 2
    x, uncond, pos = torch.eye(n + u + p)[None, :, None].split([n, u, p], dim=1)  # all at one distance
    knobs = FieldSettings(coupling=coupling, **form)
    found = statistics_of((x, pos, uncond, torch.tensor([2.0]), None), knobs)
    for name, value in {"neighbours": p, "row_entropy": math.log(p), "unused_positives": 0}.items():
        assert found[name].tolist() == pytest.approx([value] * len(knobs.temps), rel=1e-5), name


@pytest.mark.parametrize("coupling", COUPLINGS)
@every_form
def test_attraction_of_one_positive_that_takes_all(coupling, form):
    """Of a plan with marginals no positive is left out, were it ever so far and the iterations but one."""
    _, pos, *rest = draw(p=8)
    pos[:, 1:] += 100
    inputs = (
        pos[:, :1] + 0.1 * torch.randn(3, 5, 2, 7, generator=torch.Generator().manual_seed(0)),
        pos,
        *rest,
    )
    knobs = FieldSettings(coupling=coupling, temps=(0.01,), affinity_floor=0, sinkhorn_iters=1, **form)
    found = statistics_of(inputs, knobs)
    if coupling == "sinkhorn":
        assert found["unused_positives"] == 0 and found["row_entropy"] > 0.5
    else:
        for name, value in {"neighbours": 1, "row_entropy": 0, "unused_positives": 7 / 8}.items():
            assert found[name].tolist() == pytest.approx([value], abs=1e-3), name


@pytest.mark.parametrize(
    "knobs", [FieldSettings(), SINKHORN, FieldSettings.wflow()], ids=["joint", "plan", "velocity"]
)
def test_what_is_not_wanted_changes_nothing_else(knobs):
    *results, statistics = loss_and_grad(*draw(), knobs)
    *others, fewer = loss_and_grad(*draw(), knobs, attraction=False)
    assert statistics.keys() - fewer.keys() == {"neighbours", "row_entropy", "unused_positives"}
    torch.testing.assert_close((others, fewer), (results, {n: statistics[n] for n in fewer}), rtol=0, atol=0)


@pytest.mark.parametrize("coupling", ["row", "partial_two_sided", "sinkhorn"])
@forms
@pytest.mark.parametrize("distance", [2.0, 5.0, 10.0])
def test_neighbours_are_counted_among_weights_however_small(coupling, form, distance):
    """Positives that are much further away than the negatives get weights whose squares are no float32."""
    x, pos, uncond, omega, second = draw(p=6)
    pos = pos + distance
    neighbours = statistics_of(
        (x, pos, uncond, omega, second), replace(SINKHORN_PAPER, coupling=coupling, drift_form=form)
    )
    assert (neighbours["neighbours"] >= 0.999).all()
    assert (neighbours["neighbours"] <= 6.001).all()


@pytest.mark.parametrize("coupling", ["row", "partial_two_sided", "sinkhorn"])
@forms
def test_drift_is_larger_for_samples_that_are_off(coupling, form):
    """The loss is about the squared number of temperatures either way: its size is no sign of progress."""
    knobs = replace(
        SINKHORN_PAPER, coupling=coupling, drift_form=form, temps=(0.5,), negatives="second_batch"
    )
    good, bad = (statistics_of(draw(n=40, p=40, k=40, shift=shift), knobs) for shift in (0.0, 1.0))
    assert float(bad["drift_rms"]) > 1.5 * float(good["drift_rms"])
    assert float(good["loss"]) == pytest.approx(1, rel=1e-3)
    assert float(bad["loss"]) == pytest.approx(1, rel=1e-3)
