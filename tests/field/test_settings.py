"""Which knobs contradict each other, and that all others go together."""

import dataclasses
from dataclasses import replace

import pytest

from drift.field import FieldSettings
from drift.field.settings import contradiction

CONTRADICTIONS = [
    (
        {"coupling": "sinkhorn", "alg2_impl": "kernel"},
        [{"alg2_impl": "logspace"}],
    ),
    (
        {"coupling": "sinkhorn", "sinkhorn_marginal": "post_guidance", "drift_form": "alg2_joint"},
        [{"drift_form": "split"}, {"sinkhorn_marginal": "weighted_cols"}],
    ),
    (
        {"sinkhorn_agg_kernel": True, "coupling": "row"},
        [{"coupling": "sinkhorn"}, {"sinkhorn_agg_kernel": False}],
    ),
    (
        {"coupling": "sinkhorn", "sinkhorn_agg_kernel": True, "drift_tau_scale": True},
        [{"sinkhorn_agg_kernel": False}, {"drift_tau_scale": False}],
    ),
    (
        {"drift_unit_vec": True, "dist_metric": "l2_sq"},
        [{"dist_metric": "l2"}, {"drift_unit_vec": False}],
    ),
]


@pytest.mark.parametrize(("knobs", "ways_out"), CONTRADICTIONS, ids=str)
def test_contradiction_names_the_knobs_and_ways_out(knobs, ways_out):
    settings = FieldSettings(**knobs)
    line = contradiction(settings)
    assert "\n" not in line
    for way_out in ways_out:
        [(knob, value)] = way_out.items()
        assert knob in line
        assert str(value).lower() in line
        assert contradiction(replace(settings, **way_out)) is None


@pytest.mark.parametrize("settings", [FieldSettings(), FieldSettings.prior()], ids=["release", "prior"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"coupling": "row", "alg2_impl": "kernel"},
        {"coupling": "sinkhorn"},
        {"coupling": "sinkhorn", "sinkhorn_marginal": "none"},
        {"coupling": "sinkhorn", "sinkhorn_marginal": "post_guidance", "drift_form": "split"},
        {"coupling": "sinkhorn", "sinkhorn_agg_kernel": True, "drift_unit_vec": True},
        {"dist_metric": "l2_sq", "drift_tau_scale": True},
        {"negatives": "second_batch", "vanilla": True, "normalize_drift_theta": False},
    ],
    ids=str,
)
def test_others_go_together(settings, changes):
    assert contradiction(replace(settings, **changes)) is None


def test_prior_differs_from_release_where_the_method_says():
    release, prior = (dataclasses.asdict(s) for s in (FieldSettings(), FieldSettings.prior(coupling="row")))
    assert {key for key in release if release[key] != prior[key]} == {
        "coupling",
        "normalization_scope",
        "uncond_weighting",
        "affinity_floor",
        "self_in_scale",
    }


@pytest.mark.parametrize(
    "key", ["coupling", "dist_metric", "sinkhorn_marginal", "uncond_weighting", "negatives"]
)
@pytest.mark.parametrize("make", [FieldSettings, FieldSettings.prior], ids=["release", "prior"])
def test_misspelt_values_are_refused(make, key):
    """Without `params.yaml` in between, where one of two branches would take them for the other value."""
    with pytest.raises(ValueError, match=f"{key} = 'L2': allowed: .* or "):
        make(**{key: "L2"})


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FieldSettings().coupling = "row"
