"""Which knobs the field computes, and how it refuses the others."""

import dataclasses

import pytest
import torch

from drift.errors import UserError
from drift.field import FieldSettings, drifting_loss
from drift.field.settings import unsupported


def test_defaults_are_supported():
    assert unsupported(FieldSettings()) is None


@pytest.mark.parametrize(
    "changes",
    [{"coupling": "row"}, {"mask_self_neg": False}, {"affinity_floor": 0.0}, {"temps": (0.1,)}],
    ids=str,
)
def test_available_values(changes):
    assert unsupported(FieldSettings(**changes)) is None


@pytest.mark.parametrize(
    ("knob", "value", "words"),
    [
        ("coupling", "sinkhorn", ("sinkhorn", "partial_two_sided", "row")),
        ("drift_form", "split", ("split", "alg2_joint")),
        ("normalize_drift_theta", False, ("false", "true")),
        ("vanilla", True, ("true", "false")),
    ],
)
def test_refusal_names_knob_value_and_way_out(knob, value, words):
    line = unsupported(FieldSettings(**{knob: value}))
    assert line.startswith(f"{knob} ")
    assert all(word in line for word in words)
    assert "\n" not in line


def test_loss_refuses():
    x = torch.randn(1, 2, 1, 3)
    with pytest.raises(UserError, match="coupling"):
        drifting_loss(x, x, x, torch.ones(1), FieldSettings(coupling="sinkhorn"))


def test_prior_differs_from_release_where_the_method_says():
    release, prior = (dataclasses.asdict(s) for s in (FieldSettings(), FieldSettings.prior(coupling="row")))
    assert {key for key in release if release[key] != prior[key]} == {
        "coupling",
        "normalization_scope",
        "uncond_weighting",
        "affinity_floor",
        "self_in_scale",
    }


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FieldSettings().coupling = "row"
