"""The papers' networks. Names are imported when they are used: diffusers, their base, takes a second."""

import importlib

_HOMES = {
    "Generator": "drift.models.generator",
    "LatentMAE": "drift.models.mae",
    "SinkhornMAE": "drift.models.sinkhorn_mae",
    "ImageClassifier": "drift.models.classifier",
}
__all__ = ["Generator", "ImageClassifier", "LatentMAE", "SinkhornMAE"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
