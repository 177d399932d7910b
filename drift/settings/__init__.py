"""`params.yaml` -> typed, frozen settings. Every complaint about a setting is made here, before any work.

The keys at the top level and the sections stand in every file, as DVC demands. A key of a section that is
left out has its default (`drift/settings/sections.py`).
"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_type_hints

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from drift.features import ENCODERS, MAEFeatures
from drift.field.couplings import COUPLINGS
from drift.field.settings import CONVENTIONS, FieldSettings, contradictions, unused, without_effect
from drift.runtime.errors import UserError
from drift.runtime.yaml_files import one_line, read_yaml
from drift.settings.sections import (
    ROUNDING_KEYS,
    Count,
    CountOrZero,
    Data,
    Drift,
    Encode,
    Fid,
    Hardware,
    Mae,
    Optimizer,
    Positive,
    Section,
)

__all__ = [
    "ROUNDING_KEYS",
    "Data",
    "Drift",
    "Encode",
    "Fid",
    "Hardware",
    "Mae",
    "Optimizer",
    "Settings",
    "load_settings",
]

OUTPUTS = ("artifacts/latents", "artifacts/mae", "artifacts/generator", "reports")
"""Folders that the stages write."""


FIELD_KEYS = (
    "conventions",
    "coupling",
    "drift_form",
    "dist_metric",
    "temps",
    "negatives",
    "guidance",
    "sinkhorn_iters",
)
"""Settings of the field at the top level: what people vary. The others are members of the section `field`."""
FieldChanges = create_model(
    "FieldChanges",
    __config__=ConfigDict(frozen=True, extra="allow"),
    **{
        key: (hint, None)
        for key, hint in get_type_hints(FieldSettings).items()
        if key not in (*FIELD_KEYS, "options")
    },
)
"""The section `field`: members of `FieldSettings` beside the conventions, and options of the coupling."""


Features = Annotated[
    Union[tuple(ENCODERS.values())],  # noqa: UP007
    Field(discriminator="encoder"),
    BeforeValidator(lambda value: {"encoder": value} if isinstance(value, str) else value),
]
"""An encoder by its name, or as `{encoder: NAME, ...}` with its options (`drift/features/`)."""


class Settings(Section):
    """All of `params.yaml`."""

    seed: CountOrZero
    conventions: Literal[tuple(CONVENTIONS)]
    """Whose code is followed in S, lambda, weights, guards and self-pairs (`drift.field.settings`)."""
    coupling: Literal[tuple(COUPLINGS)]
    """How logits become weights (`drift.field.couplings`)."""
    drift_form: Literal["alg2_joint", "split"]
    """How weights become a drift."""
    dist_metric: Literal["l2", "l2_sq"]
    temps: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """Kernel temperatures tau."""
    negatives: Literal["self", "second_batch"]
    """What repels generated samples: they themselves, or a second batch of the same class (arXiv 2605.11755),
    which costs another forward pass of generator and encoder."""
    guidance: Literal["distribution", "velocity"]
    """How unconditional samples enter: among the negatives, or by a field of their own (W-Flow)."""
    sinkhorn_iters: Count
    field: FieldChanges
    """Single members of the conventions, and options of the coupling."""
    features: Annotated[tuple[Features, ...], Field(min_length=1)]
    """What the drift is computed in; feature sets of several encoders are added."""
    views: Annotated[tuple[Literal["center", "augmented"], ...], Field(min_length=1)]
    """The views that encode makes: `center` for the generator, `augmented` for the training of the MAE."""
    data: Data
    encode: Encode
    mae: Mae
    drift: Drift
    fid: Fid
    hardware: Hardware

    @model_validator(mode="after")
    def _consistent(self):
        if complaint := next(contradictions(self.field_settings()), None):
            raise ValueError(complaint)
        self._require_inputs_of_its_own()
        self._require_a_difference()
        self._require_feasible_marginals()
        for needed, by in (("center", "the generator trains"), (self.mae.view, "mae.view")):
            if needed not in self.views:
                raise ValueError(f"views = {list(self.views)}: allowed: with {needed} ({by})")
        if self.data.dataset == "folder" and self.data.root is None:
            raise ValueError("data.root = null: allowed: a folder, where data.dataset is folder")
        for key in ("crop_scale", "crop_ratio"):
            low, high = getattr(self.encode, key)
            if low > high:
                raise ValueError(f"encode.{key} = {[low, high]}: allowed: the smaller number first")
        if self.encode.crop_scale[1] > 1:
            raise ValueError(f"encode.crop_scale = {list(self.encode.crop_scale)}: allowed: at most 1")
        if self.drift.classes_per_step > self.data.classes:
            raise ValueError(
                f"drift.classes_per_step = {self.drift.classes_per_step}: "
                f"allowed: at most data.classes ({self.data.classes})"
            )
        if missing := [decay for decay in self.fid.ema_decays if decay not in self.drift.ema_decays]:
            raise ValueError(
                f"fid.ema_decays = {list(self.fid.ema_decays)}: allowed: those of drift.ema_decays "
                f"({', '.join(map(str, self.drift.ema_decays))}), without {missing[0]}"
            )
        if self.fid.picture_classes > self.data.classes:
            raise ValueError(
                f"fid.picture_classes = {self.fid.picture_classes}: "
                f"allowed: at most data.classes ({self.data.classes})"
            )
        return self

    def _require_inputs_of_its_own(self) -> None:
        """Refuse inputs that DVC may remove before the stage that reads them has begun."""
        inputs = {
            "data.root": self.data.root,
            "encode.vae": self.encode.vae,
            "mae.source": self.mae.source,
            "fid.features": self.fid.features,
            "fid.inception": self.fid.inception,
            "fid.reference": self.fid.reference,
        }
        for key, value in inputs.items():
            if value is not None and (output := output_around(value)):
                raise ValueError(
                    f"{key} = {value!r}: allowed: outside of {output}, which DVC empties for the stage that "
                    f"writes it; copy it to a folder of its own (dvc checkout {output}, if it is empty now)"
                )

    def _require_a_difference(self) -> None:
        """Refuse what would train for days and end as another run does."""
        field = self.field_settings()
        if field.drift_tau_scale and field.normalize_drift_theta:
            raise ValueError(
                "field.drift_tau_scale = true: cancels, as normalize_drift_theta divides every V_tau by "
                "its own RMS; set one of them to false"
            )
        if len(set(self.temps)) < len(self.temps):
            raise ValueError(f"temps = {list(self.temps)}: allowed: each temperature once")

    def _require_feasible_marginals(self) -> None:
        """Refuse uniform marginals of unconditional negatives that may have no weight at all."""
        drift, field = self.drift, self.field_settings()
        plan = COUPLINGS[field.coupling].transport and field.guidance == "distribution"
        if not plan or field.sinkhorn_marginal != "none" or not drift.unconditional:
            return
        if drift.omega_min <= 1 or drift.no_guidance_fraction > 0:
            raise ValueError(
                f"field.sinkhorn_marginal = 'none': at omega = 1 (drift.omega_min = {drift.omega_min:g}, "
                f"drift.no_guidance_fraction = {drift.no_guidance_fraction:g}) unconditional negatives weigh "
                "nothing and cannot have a uniform marginal; set it to weighted_cols, or omega_min above "
                "1 and no_guidance_fraction to 0"
            )

    @property
    def needs_mae(self) -> bool:
        """Whether an encoder of `features` is the MAE; without one the mae stage trains nothing."""
        return any(one.needs_mae for one in self.features)

    @property
    def drops_duplicates(self) -> bool:
        """Whether the MAE leaves out feature sets that equal another."""
        return any(isinstance(one, MAEFeatures) and one.duplicates == "drop" for one in self.features)

    def field_settings(self) -> FieldSettings:
        """The settings of the drifting field: conventions, then the keys at the top, then `field`."""
        top = {key: getattr(self, key) for key in FIELD_KEYS}
        members = self.field.model_dump(exclude_unset=True)
        options = {key: members.pop(key) for key in self.field.model_extra}
        if double := [key for key in (*FIELD_KEYS, "options") if key in options]:
            raise ValueError(f"field.{double[0]}: is a key of its own at the top level")
        try:
            return FieldSettings.of(**top, **members, options=options)
        except (ValueError, TypeError) as error:
            raise ValueError(f"field.{error}") from None

    def without_effect(self) -> dict[str, str]:
        """The dotted keys of all sections."""
        found = without_effect(self.field_settings(), self.drift.unconditional > 0)
        given = self.field.model_fields_set
        found = {
            key if key in FIELD_KEYS else f"field.{key}": why
            for key, why in found.items()
            if key in FIELD_KEYS or key in given
        }
        found |= unused(
            (
                "augmented" not in self.views,
                "views is without augmented",
                "encode.crops encode.crop_scale encode.crop_ratio encode.flip",
            )
        )
        for name in ("data", "encode", "mae", "drift", "fid"):
            found |= {f"{name}.{key}": why for key, why in getattr(self, name).without_effect().items()}
        return found

    def deciding(self, stage: str) -> dict[str, Any]:
        """What decides the result of a stage, as JSON holds it: where its section differs from the defaults.

        For `drift` also where the field differs from the release's. A new key with a default, and a change
        of what has no effect, is therefore no other run.
        """
        idle = {key.rpartition(".")[2] for key in self.without_effect() if key.startswith(f"{stage}.")}
        section = getattr(self, stage)
        found = {stage: _differences(section.model_dump(mode="json"), type(section), idle)}
        if stage == "drift":
            field, default = asdict(self.field_settings()), asdict(FieldSettings())
            idle = without_effect(self.field_settings(), self.drift.unconditional > 0)
            if self.features != (MAEFeatures(),):
                found["features"] = [one.model_dump(mode="json") for one in self.features]
            found["field"] = {
                key: value for key, value in field.items() if value != default[key] and key not in idle
            }
        return found

    def remarks(self, stage: str) -> list[str]:
        """A line about the settings of a stage that change nothing; empty if there are none."""
        idle = self.without_effect()
        places = {"encode": ("data", "encode"), "drift": ("", "field", "drift")}.get(stage, (stage,))
        by_reason: dict[str, list[str]] = {}
        for key, why in idle.items():
            section, _, name = key.rpartition(".")
            given = getattr(self, section).model_fields_set if section else {name}
            off = getattr(getattr(self, section) if section else self, name) in (None, False)
            if section in places and name in given and not off:
                by_reason.setdefault(why, []).append(key)
        reasons = "; ".join(f"{', '.join(keys)} ({why})" for why, keys in by_reason.items())
        return [f"without effect here: {reasons}"] if reasons else []


def _differences(values: dict[str, Any], section: type[Section], idle: set[str]) -> dict[str, Any]:
    defaults = {
        key: None if field.is_required() else field.get_default()
        for key, field in section.model_fields.items()
    }
    listed = {key: list(v) if isinstance(v, tuple) else v for key, v in defaults.items()}
    return {key: value for key, value in values.items() if value != listed[key] and key not in idle}


RENAMED = {
    "drift.duplicate_features": "features: [{encoder: mae, duplicates: keep | drop}]",
    "drift.queue_push": "drift.push_per_step, which counts the images of all processes together",
    **{
        key: f"field.{key}"
        for key in get_type_hints(FieldSettings)
        if key not in (*FIELD_KEYS, "options", "unit_scale")
    },
    "vanilla": "field.unit_scale",
    "hardware.precision": "mae.precision and drift.precision",
    "hardware.vae_precision": "encode.precision and fid.precision",
}
"""Keys of earlier files, and what has become of them."""


def output_around(path: str | Path) -> str | None:
    """The output of a stage that `path` is or lies in."""
    here = Path(path).resolve()
    return next((output for output in OUTPUTS if here.is_relative_to(Path(output).resolve())), None)


def load_settings(path: str | Path) -> Settings:
    """Read and check a `params.yaml`.

    Raises `UserError` with one line if the file is missing or not YAML, or a key or a value is wrong.
    """
    content = read_yaml(path, "presets/ holds complete files to copy")
    try:
        return Settings.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {one_line(error, _all_keys(), RENAMED)}") from None


def _all_keys() -> list[str]:
    """Dotted, those at the top level first."""
    keys = list(Settings.model_fields)
    for name, field in Settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += [f"{name}.{key}" for key in field.annotation.model_fields]
    return keys
