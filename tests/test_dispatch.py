"""No name is silently taken for another: every dispatch by name refuses one that it does not know."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, get_origin, get_type_hints

import numpy as np
import pytest

from drift.data.views import make_view
from drift.field import FieldSettings
from drift.settings import load_settings
from drift.sharing.adopt import _expected
from drift.training.drift import RealSamples, feature_dtype
from drift.training.encode import EncodeOptions
from drift.training.schedule import learning_rate

SETTINGS = load_settings(Path(__file__).parents[1] / "presets" / "digits.yaml")
STORE = SimpleNamespace(
    labels=np.arange(400) % 10, num_classes=10, class_names=list("0123456789"), per_image=1
)


def rate(step: int):
    return lambda name: learning_rate(step, SETTINGS.drift.model_copy(update={"lr_schedule": name}))


def real_samples(**changes) -> RealSamples:
    return RealSamples(STORE, SETTINGS.drift.model_copy(update=changes), seed=0)


def encode_options(**changes) -> EncodeOptions:
    how = {"view": "center", "posterior": "mean", "on_bad_image": "error"} | changes
    return EncodeOptions(image_size=32, seed=0, **how | {"view": make_view(how["view"], SETTINGS.encode)})


DISPATCHES = {
    "schedule in the warm-up": rate(0),
    "schedule after it": rate(5),
    "precision": feature_dtype,
    "sampling": lambda name: real_samples(sampling=name),
    "class_sampling": lambda name: real_samples(class_sampling=name),
    "view": lambda name: encode_options(view=name),
    "posterior": lambda name: encode_options(posterior=name),
    "on_bad_image": lambda name: encode_options(on_bad_image=name),
    "adopted view": lambda name: _expected(name, SETTINGS),
    **{
        key: lambda name, key=key: replace(FieldSettings(), **{key: name})
        for key, kind in get_type_hints(FieldSettings).items()
        if get_origin(kind) is Literal or kind is bool
    },
}


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_an_unknown_name_is_refused(dispatch):
    with pytest.raises((ValueError, KeyError), match="unheard-of"):
        DISPATCHES[dispatch]("unheard-of")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temps", ()), ("temps", (0.02, 0.0)), ("sinkhorn_iters", -1), ("sinkhorn_tolerance", -1.0),
        ("affinity_floor", float("nan")), ("classes_per_part", 0),
    ],
)  # fmt: skip
def test_numbers_of_the_field_are_held_to_their_range(key, value):
    with pytest.raises(ValueError, match=f"{key} = .*: allowed"):
        FieldSettings(**{key: value})
