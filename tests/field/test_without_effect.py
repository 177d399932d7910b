"""Knobs that change nothing beside the others: found by turning each, and declared where they are."""

from dataclasses import replace

import pytest
from field_inputs import draw, loss_and_grad, relative_error
from test_properties import KINDS

from drift.field import FieldSettings
from drift.field.settings import contradiction, without_effect

TURNED = {
    "coupling": ["row", "partial_two_sided", "sinkhorn"],
    "drift_form": ["alg2_joint", "split"],
    "dist_metric": ["l2", "l2_sq"],
    "temps": [(0.005, 0.3), (0.3,)],
    "mask_self_neg": [True, False],
    "alg2_impl": ["logspace", "kernel"],
    "sinkhorn_iters": [20, 2],
    "sinkhorn_tolerance": [0.0, 0.5],
    "sinkhorn_marginal": ["weighted_cols", "none", "post_guidance"],
    "sinkhorn_agg_kernel": [False, True],
    "drift_unit_vec": [False, True],
    "drift_tau_scale": [False, True],
    "normalize_drift_theta": [True, False],
    "normalization_scope": ["batch", "class"],
    "uncond_weighting": ["affinity", "logit"],
    "affinity_floor": [1e-6, 1e-2],
    "self_in_scale": [True, False],
    "vanilla": [False, True],
    "negatives": ["self", "second_batch"],
}
BASES = [
    {},
    {
        "affinity_floor": 0.0,
        "self_in_scale": False,
        "uncond_weighting": "logit",
        "normalization_scope": "class",
    },
    {"negatives": "second_batch"},
    {"mask_self_neg": False, "temps": (0.005,)},
    {"temps": (0.005,)},
    {"vanilla": True, "self_in_scale": False},
    {"normalize_drift_theta": False, "affinity_floor": 0.0},
]
ROUNDING = 1e-5


def compared(one: FieldSettings, other: FieldSettings, inputs) -> float:
    """The larger relative difference of loss and gradient."""
    (loss, grad, _), (other_loss, other_grad, _) = (loss_and_grad(*inputs, s) for s in (one, other))
    return max(relative_error(other_loss, loss), relative_error(other_grad, grad))


@pytest.mark.parametrize("unconditional", [3, 0])
@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind.values()))
def test_exactly_the_declared_knobs_change_nothing(kind, base, unconditional):
    settings = FieldSettings(**{"temps": (0.005, 0.3)} | base | kind)
    assert contradiction(settings) is None
    x, pos, uncond, omega, second = draw(n=6, u=3, channels=6)
    inputs = x, pos, uncond[:, :unconditional], omega + 0.5, second
    silent, asked = set(), set()
    for key, values in TURNED.items():
        if key == "alg2_impl" and not settings.mask_self_neg:
            continue  # it matters where a row underflows, and a self-pair keeps it from that
        turned = [replace(settings, **{key: value}) for value in values if value != getattr(settings, key)]
        turned = [other for other in turned if contradiction(other) is None]
        if turned:
            asked.add(key)
            if max(compared(settings, other, inputs) for other in turned) < ROUNDING:
                silent.add(key)
    assert silent == without_effect(settings, unconditional > 0).keys() & asked


def test_every_knob_is_turned():
    assert TURNED.keys() == FieldSettings.__dataclass_fields__.keys()


def test_what_sinkhorn_does_not_do_is_named():
    told = without_effect(FieldSettings(coupling="sinkhorn"))
    assert {key for key, why in told.items() if why == "coupling is sinkhorn"} == {
        "mask_self_neg",
        "uncond_weighting",
        "affinity_floor",
    }
    # The prior's S leaves out self-pairs by that knob, so it does something there
    assert "mask_self_neg" not in without_effect(FieldSettings.prior(coupling="sinkhorn"))
