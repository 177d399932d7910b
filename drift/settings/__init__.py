"""`params.yaml` -> typed, frozen settings. Every complaint about a setting is made here, before any work.

Every file has all top-level keys and all sections, as DVC demands. Inside a section, a key that is left out
has its default (`drift/settings/sections.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_type_hints

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetPydanticSchema,
    ValidationError,
    create_model,
)

from drift.data.views import VIEW_OPTIONS
from drift.features import ENCODERS, EncoderOptions, LatentOptions, MAEOptions
from drift.field.couplings import COUPLINGS
from drift.field.settings import CONVENTIONS, FieldSettings, contradictions, without_effect
from drift.runtime.errors import UserError
from drift.runtime.yaml_files import one_line, read_settings
from drift.settings.sections import (
    ROUNDING_KEYS,
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
    name_in,
    repeats,
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
_MEMBERS: dict[str, Any] = {
    key: (hint, None)
    for key, hint in get_type_hints(FieldSettings).items()
    if key not in (*FIELD_KEYS, "options", "classes_per_part")
}
FieldChanges = create_model("FieldChanges", __config__=ConfigDict(frozen=True, extra="allow"), **_MEMBERS)
"""The section `field`: members of `FieldSettings` but for `FIELD_KEYS`, and options of the coupling.

A member replaces what `conventions` sets.
"""


def checked_as(kind: Any) -> GetPydanticSchema:
    """Makes pydantic check a field as `kind`, which is made from a registry and no type checker can read."""
    return GetPydanticSchema(lambda _, handler: handler(kind))


Features = Annotated[
    EncoderOptions,
    checked_as(Annotated[Union[tuple(ENCODERS.values())], Field(discriminator="encoder")]),  # noqa: UP007
    BeforeValidator(lambda value: {"encoder": value} if isinstance(value, str) else value),
]
"""An encoder by its name, or as `{encoder: NAME, ...}` with its options (`drift/features/`)."""


class Settings(Section):
    """All of `params.yaml`."""

    seed: CountOrZero
    conventions: Annotated[str, name_in(CONVENTIONS)]
    """Whose code is followed in S, lambda, weights, guards and self-pairs (`drift.field.settings`)."""
    coupling: Annotated[str, name_in(COUPLINGS)]
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
    sinkhorn_iters: CountOrZero
    field: Annotated[BaseModel, checked_as(FieldChanges)]
    """Single members of the conventions, and options of the coupling."""
    features: Annotated[tuple[Features, ...], Field(min_length=1)]
    """What the drift is computed in; feature sets of several encoders are added."""
    views: Annotated[tuple[Literal["center", "augmented"], ...], Field(min_length=1)]
    """The views that encode makes; `mae.view` and `drift.view` say who trains on which."""
    data: Data
    encode: Encode
    mae: Mae
    drift: Drift
    fid: Fid
    hardware: Hardware

    def complaints(self) -> Iterator[str]:
        field = self.field_settings()
        yield from contradictions(field, self.drift.generated)
        yield from self._inputs_that_dvc_empties()
        if field.drift_tau_scale and field.normalize_drift_theta:
            yield (
                "field.drift_tau_scale = true: cancels, as normalize_drift_theta divides every V_tau by its "
                "own RMS; set one of them to false"
            )
        yield from self._infeasible_marginals()
        missing = [decay for decay in self.fid.ema_decays if decay not in self.drift.ema_decays]
        trained = f"those of drift.ema_decays ({', '.join(map(str, self.drift.ema_decays))})"
        at_most_classes = f"at most data.classes ({self.data.classes})"
        no_root = self.data.dataset == "folder" and self.data.root is None
        scale, ratio = self.encode.crop_scale, self.encode.crop_ratio
        part, per_pass = field.classes_per_part or 1, self.hardware.classes_per_pass or 0
        over_parts = f"a multiple of drift.classes_per_part ({part}), the classes that share S and lambda"
        if repeats(names := [one.encoder for one in self.features]):
            yield f"features = {', '.join(names)}: allowed: each encoder once"
        yield from self.broken(
            (repeats(self.temps), "temps", "each temperature once"),
            (self.drift.view not in self.views, "views", f"a list with {self.drift.view} (drift.view)"),
            (self.mae.view not in self.views, "views", f"a list with {self.mae.view} (mae.view)"),
            (no_root, "data.root", "a folder, where data.dataset is folder"),
            (scale[0] > scale[1], "encode.crop_scale", "the smaller number first"),
            (ratio[0] > ratio[1], "encode.crop_ratio", "the smaller number first"),
            (scale[1] > 1, "encode.crop_scale", "at most 1"),
            (self.drift.classes_per_step > self.data.classes, "drift.classes_per_step", at_most_classes),
            (self.drift.classes_per_step % part, "drift.classes_per_step", over_parts),
            (per_pass % part, "hardware.classes_per_pass", over_parts),
            (missing, "fid.ema_decays", trained),
            (self.fid.picture_classes > self.data.classes, "fid.picture_classes", at_most_classes),
        )

    def _inputs_that_dvc_empties(self) -> Iterator[str]:
        """Inputs that lie in an output of a stage: DVC may remove them before they are read."""
        inputs = {
            "data.root": self.data.root,
            "encode.autoencoder": self.encode.autoencoder.source,
            "mae.source": self.mae.source,
            "drift.init_from": self.drift.init_from,
            "fid.features": self.fid.features,
            "fid.inception": self.fid.inception,
            "fid.reference": self.fid.reference,
            **{f"features: {one.encoder}.source": getattr(one, "source", None) for one in self.features},
        }
        for key, value in inputs.items():
            if value is not None and (output := output_around(value)):
                yield (
                    f"{key} = {value!r}: allowed: outside of {output}, which DVC empties for the stage that "
                    f"writes it; copy it to a folder of its own (dvc checkout {output}, if it is empty now)"
                )

    def _infeasible_marginals(self) -> Iterator[str]:
        """A uniform marginal over unconditional negatives, where these may have no weight at all."""
        drift, field = self.drift, self.field_settings()
        plan = COUPLINGS[field.coupling].transport and field.guidance == "distribution"
        if not plan or field.sinkhorn_marginal != "none" or not drift.unconditional:
            return
        if drift.omega_min <= 1 or drift.no_guidance_fraction > 0:
            yield (
                f"field.sinkhorn_marginal = 'none': at omega = 1 (drift.omega_min = {drift.omega_min:g}, "
                f"drift.no_guidance_fraction = {drift.no_guidance_fraction:g}) unconditional negatives weigh "
                "nothing and cannot have a uniform marginal; set it to weighted_cols, or omega_min above "
                "1 and no_guidance_fraction to 0"
            )

    def with_features(self, encoders: Sequence[str]) -> "Settings":
        """The same with other encoders: by name, with the options that these settings have for it if they do,
        or in braces as in `features`.

        Raises `UserError` if an encoder or an option of it is wrong.
        """
        own = {one.encoder: one.model_dump() for one in self.features}
        content = self.model_dump(mode="json", exclude_unset=True)
        try:
            content["features"] = [own.get(text) or yaml.safe_load(text) for text in encoders]
            return Settings.model_validate(content)
        except yaml.YAMLError:
            raise UserError(
                f"{' '.join(encoders)}: not YAML; give names, or {{encoder: NAME, ...}}"
            ) from None
        except ValidationError as error:
            raise UserError(one_line(error, _all_keys(), RENAMED)) from None

    @property
    def needs_mae(self) -> bool:
        """Whether an encoder of `features` is the MAE; without one the mae stage trains nothing."""
        return any(one.needs_mae for one in self.features)

    @property
    def needs_decoder(self) -> bool:
        """Whether an encoder of `features` sees images, so that the drift stage needs the autoencoder."""
        return any(one.needs_decoder for one in self.features)

    @property
    def decoder_precision(self) -> str:
        """That of the decoder under encoders of images; in float16, which `drift` may have, some overflow."""
        return "bfloat16" if self.drift.precision == "bfloat16" else "float32"

    @property
    def drops_duplicates(self) -> bool:
        """Whether the MAE leaves out feature sets that equal another."""
        return any(isinstance(one, MAEOptions) and one.duplicates == "drop" for one in self.features)

    def field_settings(self) -> FieldSettings:
        """The settings of the drifting field: conventions, then the keys at the top, then `field`."""
        top = {key: getattr(self, key) for key in FIELD_KEYS}
        members = self.field.model_dump(exclude_unset=True)
        options = {key: members.pop(key) for key in self.field.model_extra or ()}
        if "options" in options:
            raise ValueError("field.options: name each option of the coupling itself")
        if double := [key for key in FIELD_KEYS if key in options]:
            raise ValueError(f"field.{double[0]}: is a key of its own at the top level")
        if "classes_per_part" in options:
            raise ValueError("field.classes_per_part: is drift.classes_per_part")
        try:
            field = FieldSettings.of(**top, **members, options=options)
        except (ValueError, TypeError) as error:
            raise ValueError(f"field.{error}") from None
        in_parts = field.normalization_scope == "part"
        return replace(field, classes_per_part=self.drift.classes_per_part) if in_parts else field

    def without_effect(self) -> dict[str, str]:
        """The dotted keys, of all sections, that change nothing beside the others, and why."""
        found = without_effect(self.field_settings(), self.drift.unconditional > 0)
        given = self.field.model_fields_set
        places = {key: key for key in FIELD_KEYS} | {"classes_per_part": "drift.classes_per_part"}
        places |= {key: f"field.{key}" for key in given}
        found = {places[key]: why for key, why in found.items() if key in places}
        for view in VIEW_OPTIONS.keys() - set(self.views):
            keys = (f"encode.{key}" for key in VIEW_OPTIONS[view])
            found |= dict.fromkeys(keys, f"views is without {view}")
        if not self.encode.autoencoder.needs_source:
            found["fid.precision"] = f"encode.autoencoder is {self.encode.autoencoder.kind}"
        for name in ("data", "encode", "mae", "drift", "fid"):
            found |= {f"{name}.{key}": why for key, why in getattr(self, name).without_effect().items()}
        return found

    def in_force(self, stage: str) -> dict[str, Any]:
        """What decides the result of a stage, defaults included; for `drift`, the field too.

        Keys that have no effect beside the others are left out. Values are as JSON holds them.
        """
        idle = self.without_effect()
        section = getattr(self, stage).model_dump(mode="json").items()
        found: dict[str, Any] = {stage: {key: v for key, v in section if f"{stage}.{key}" not in idle}}
        if stage == "drift":
            field = self.field_settings()
            idle = without_effect(field, self.drift.unconditional > 0)
            found["features"] = [one.model_dump(mode="json") for one in self.features]
            found["field"] = {key: value for key, value in asdict(field).items() if key not in idle}
        return found

    def deciding(self, stage: str) -> dict[str, Any]:
        """The part of `in_force` that differs from the defaults; a fingerprint is made of it.

        So neither a new key with a default nor a change of what has no effect makes it another run. Nor does
        how it is evaluated while it trains: that may change in the middle.
        """
        section, found = type(getattr(self, stage)), self.in_force(stage)
        defaults = {
            stage: section.model_construct().model_dump(mode="json"),
            "field": asdict(FieldSettings()),
        }
        for part in found.keys() & defaults.keys():
            found[part] = {k: value for k, value in found[part].items() if value != defaults[part].get(k)}
        if self.features == (MAEOptions(),):
            found.pop("features", None)
        found[stage] = {k: v for k, v in found[stage].items() if not k.startswith("evaluate_")}
        return found

    def remarks(self, stage: str) -> list[str]:
        """A line about the settings of a stage that change nothing, and one about a choice to regret."""
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
        found = [f"without effect here: {reasons}"] if reasons else []
        field, one_set = self.field_settings(), self.features == (LatentOptions(),)
        if stage == "drift" and field.scale_is_square and not field.unit_scale and not one_set:
            found.append(
                "warning: with dist_metric l2_sq, S is a squared length here, so that feature sets with the "
                "smallest S drown the others; -S +field.scale_statistic=mean_length makes it a length"
            )
        return found


RENAMED = {
    "drift.duplicate_features": "features: [{encoder: mae, duplicates: keep | drop}]",
    "drift.queue_push": "drift.push_per_step, which counts the images of all processes together",
    **{key: f"field.{key}" for key in _MEMBERS if key != "unit_scale"},
    "encode.vae": "encode.autoencoder",
    "encode.vae_revision": "encode.autoencoder: {source: ..., revision: ...}",
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
    return read_settings(path, Settings, "presets/ holds complete files to copy", _all_keys(), RENAMED)


def _all_keys() -> list[str]:
    """Dotted, those at the top level first."""
    kinds = {name: field.annotation for name, field in Settings.model_fields.items()} | {
        "field": FieldChanges
    }
    sections = {
        name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, BaseModel)
    }
    return [*kinds, *(f"{name}.{key}" for name, kind in sections.items() for key in kind.model_fields)]
