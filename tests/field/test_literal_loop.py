"""The drifting loss against a literal loop in float64, where no reference has numbers."""

from dataclasses import replace

import pytest
import torch
from field_inputs import draw, loss_and_grad, relative_error
from naive_field import naive_drifting_loss

from drift.field import FieldSettings
from drift.field.settings import contradiction

BOTH_SCOPES = {"release": FieldSettings(), "prior": FieldSettings.prior()}
COUPLINGS = [
    *(
        {"coupling": c, "uncond_weighting": w}
        for c in ("row", "partial_two_sided")
        for w in ("affinity", "logit")
    ),
    *({"coupling": "sinkhorn", "sinkhorn_marginal": m} for m in ("none", "weighted_cols", "post_guidance")),
]
COUPLINGS_AND_FORMS = [
    (coupling, form)
    for coupling in COUPLINGS
    for form in ("alg2_joint", "split")
    if not contradiction(FieldSettings(**coupling, drift_form=form))
]
every_coupling_and_form = pytest.mark.parametrize(
    ("coupling", "form"),
    COUPLINGS_AND_FORMS,
    ids=["-".join((*coupling.values(), form)) for coupling, form in COUPLINGS_AND_FORMS],
)
SWITCHES = [
    {"alg2_impl": "kernel"},
    {"alg2_impl": "kernel", "coupling": "row", "affinity_floor": 1e-4},
    {"coupling": "sinkhorn", "sinkhorn_iters": 3},
    {"coupling": "sinkhorn", "sinkhorn_iters": 200, "sinkhorn_tolerance": 0.02},
    {"coupling": "sinkhorn", "sinkhorn_agg_kernel": True},
    {"coupling": "sinkhorn", "sinkhorn_agg_kernel": True, "normalize_drift_theta": False},
    {"coupling": "sinkhorn", "drift_unit_vec": True},
    {"drift_unit_vec": True},
    {"drift_unit_vec": True, "coupling": "row", "mask_self_neg": False, "negatives": "second_batch"},
    {"drift_tau_scale": True},
    {"normalize_drift_theta": False},
    {"normalize_drift_theta": False, "drift_tau_scale": True},
    {"normalize_drift_theta": False, "drift_tau_scale": True, "dist_metric": "l2_sq"},
    {"mask_self_neg": False},
    {"mask_self_neg": False, "self_in_scale": True, "dist_metric": "l2_sq"},
    {"self_in_scale": True},
    {"self_in_scale": False},
    {"self_in_scale": False, "coupling": "sinkhorn"},
    {"self_in_scale": False, "negatives": "second_batch"},
    {"affinity_floor": 0.0},
    {"affinity_floor": 1e-2},
    {"affinity_floor": 1e-2, "coupling": "row", "uncond_weighting": "logit"},
    {"vanilla": True},
    {"vanilla": True, "dist_metric": "l2_sq", "temps": (10.0, 100.0)},
    {"temps": (0.3,)},
]


def agree(inputs, knobs, loss_tolerance=2e-5, grad_tolerance=5e-5):
    x, pos, uncond, omega, second = inputs
    naive = naive_drifting_loss(
        x, pos, uncond, omega, knobs, second if knobs.negatives == "second_batch" else None
    )
    loss, grad, statistics = loss_and_grad(*inputs, knobs)
    assert relative_error(loss, naive.loss) < loss_tolerance
    assert relative_error(grad, naive.grad) < grad_tolerance
    assert statistics.keys() == {"loss", "scale", "drift_rms", "neighbours"} | (
        {"marginal_error"} if knobs.coupling == "sinkhorn" else set()
    )
    for name in ("loss", "scale", "drift_rms", "neighbours"):
        assert statistics[name].shape == getattr(naive, name).shape
        assert relative_error(statistics[name], getattr(naive, name)) < loss_tolerance, name
    if naive.marginal_error is not None:
        torch.testing.assert_close(
            statistics["marginal_error"].double(), naive.marginal_error, rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("channels", [7, 40], ids=["short_vectors", "long_vectors"])
@pytest.mark.parametrize("negatives", ["self", "second_batch"])
@pytest.mark.parametrize("scope", BOTH_SCOPES)
@pytest.mark.parametrize("metric", ["l2", "l2_sq"])
@every_coupling_and_form
def test_couplings(coupling, form, metric, scope, negatives, channels):
    knobs = replace(
        BOTH_SCOPES[scope],
        drift_form=form,
        dist_metric=metric,
        negatives=negatives,
        temps=(0.05, 0.2, 1.0),
        **coupling,
    )
    agree(draw(channels=channels), knobs)


@pytest.mark.parametrize("channels", [7, 40], ids=["short_vectors", "long_vectors"])
@pytest.mark.parametrize("scope", BOTH_SCOPES)
@pytest.mark.parametrize("form", ["alg2_joint", "split"])
@pytest.mark.parametrize(
    "switches", SWITCHES, ids=lambda knobs: "-".join(f"{k}={v}" for k, v in knobs.items())
)
def test_switches(switches, form, scope, channels):
    agree(
        draw(channels=channels),
        replace(BOTH_SCOPES[scope], drift_form=form, **{"temps": (0.1, 0.4)} | switches),
    )


@every_coupling_and_form
def test_smallest_problems(coupling, form):
    """Two generated vectors of one channel, one positive, no unconditional sample."""
    knobs = replace(BOTH_SCOPES["release"], drift_form=form, temps=(0.05, 0.2, 1.0), **coupling)
    agree(draw(n=2, p=1, u=0, locations=1, channels=1), knobs)
