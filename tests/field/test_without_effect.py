"""Knobs that change nothing beside the others: found by turning each, and declared where they are."""

from dataclasses import replace

import pytest
from field_inputs import draw, loss_and_grad, relative_error
from test_properties import KINDS

from drift.field import FieldSettings
from drift.field.couplings import COUPLINGS
from drift.field.settings import contradictions, without_effect

TURNED = {
    "coupling": list(COUPLINGS),
    "drift_form": ["alg2_joint", "split"],
    "dist_metric": ["l2", "l2_sq"],
    "temps": [(0.005, 0.3), (0.3,)],
    "mask_self_neg": [True, False],
    "alg2_impl": ["logspace", "kernel"],
    "sinkhorn_iters": [20, 2, 0],
    "sinkhorn_tolerance": [0.0, 0.5],
    "sinkhorn_marginal": ["weighted_cols", "none", "post_guidance"],
    "sinkhorn_agg_kernel": [False, True],
    "drift_unit_vec": [False, True],
    "drift_tau_scale": [False, True],
    "normalize_drift_theta": [True, False],
    "normalization_scope": ["batch", "class"],
    "classes_per_part": [None, 1],
    "guidance": ["distribution", "velocity"],
    "scale_statistic": ["mean", "rms", "mean_length"],
    "generated_in_scale": [False, True],
    "cost_factor": [1.0, 0.5],
    "uncond_weighting": ["affinity", "logit"],
    "affinity_floor": [1e-6, 1e-2],
    "self_in_scale": [True, False],
    "unit_scale": [False, True],
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
    {"unit_scale": True, "self_in_scale": False},
    {"normalize_drift_theta": False, "affinity_floor": 0.0, "normalization_scope": "part"},
]
CASES = [
    *((kind, base) for kind in KINDS for base in BASES),
    *(
        (kind, {"sinkhorn_iters": 0, "temps": (0.3, 1.0)})
        for kind in KINDS
        if COUPLINGS[kind["coupling"]].transport and kind["drift_form"] == "split"
    ),
]
ROUNDING = 1e-5


def compared(one: FieldSettings, other: FieldSettings, inputs) -> float:
    """The larger relative difference of loss and gradient."""
    (loss, grad, _), (other_loss, other_grad, _) = (loss_and_grad(*inputs, s) for s in (one, other))
    return max(relative_error(other_loss, loss), relative_error(other_grad, grad))


@pytest.mark.parametrize("unconditional", [3, 0])
@pytest.mark.parametrize(("kind", "base"), CASES, ids=str)
def test_exactly_the_declared_knobs_change_nothing(kind, base, unconditional):
    settings = FieldSettings(**{"temps": (0.005, 0.3)} | base | kind)
    assert not list(contradictions(settings))
    x, pos, uncond, omega, second = draw(n=6, u=3, channels=6)
    inputs = x, pos, uncond[:, :unconditional], omega + 0.5, second
    silent, asked = set(), set()
    for key, values in TURNED.items():
        if key in ("alg2_impl", "cost_factor") and not settings.mask_self_neg:
            continue  # at this temperature a row that is not masked holds the self-pair alone
        turned = [replace(settings, **{key: value}) for value in values if value != getattr(settings, key)]
        turned = [other for other in turned if not list(contradictions(other))]
        if turned:
            asked.add(key)
            if max(compared(settings, other, inputs) for other in turned) < ROUNDING:
                silent.add(key)
    assert silent == without_effect(settings, unconditional > 0).keys() & asked


ELSEWHERE = {"conventions", "feature_sets", "options"}
"""Guards of degenerate numbers, what the objective reads, and options of one coupling each."""


def test_every_setting_is_turned():
    assert TURNED.keys() | ELSEWHERE == FieldSettings.__dataclass_fields__.keys()
