"""How the numbers in a model card were measured, from `protocol.json` of the stage fid."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LABELS = {"balanced": "balanced", "random": "random"}
_ROUNDING = {"nearest": "rounded to 8 bits", "down": "cut off to 8 bits"}


def shown(value: Any) -> Any:
    """`value`, or the last part of an absolute path: a card does not tell where things lie on a machine."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def metric_arguments(measured: Mapping[str, Any]) -> dict[str, Any]:
    """What the best point's numbers depend on, for the metadata of a card."""
    best, protocol = measured["best"], measured["protocol"]
    keys = ("features", "reference", "reference_images", "labels", "rounding", "seed")
    values = {"omega": best["omega"], "ema_decay": best["ema_decay"], "images": measured["images"]}
    values |= {key: shown(protocol[key]) for key in keys}
    if protocol["features"] == "inception":
        values["mode"] = protocol["mode"]
    return {key: value for key, value in values.items() if value is not None}


def in_words(measured: Mapping[str, Any]) -> str:
    """How the best point was measured, in sentences."""
    best, protocol = measured["best"], measured["protocol"]
    features = f"`{shown(protocol['features'])}`"
    if protocol["features"] == "inception":
        features = f"Inception-v3 (clean-fid, mode {protocol['mode']})"
    weights = "" if best["ema_decay"] is None else f" and EMA {best['ema_decay']:g}"
    count = f"{protocol['reference_images']} images of " if protocol["reference_images"] else ""
    labels = _LABELS.get(protocol["labels"], f"those of `{protocol['labels']}`")
    words = (
        f"FID {best['fid']:.2f} is the Fréchet distance between {measured['images']} samples, at omega "
        f"{best['omega']:g}{weights}, and {count}`{shown(protocol['reference'])}`, in features of "
        f"{features}. Labels of the samples are {labels}, their seed is {protocol['seed']}, and pixels are "
        f"{_ROUNDING[protocol['rounding']]}."
    )
    if len(measured["sweep"]) > 1:
        words += f" It is the smallest of {len(measured['sweep'])} distances, by which omega was chosen."
    return words
