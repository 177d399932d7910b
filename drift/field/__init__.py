"""The drifting field as pure tensor functions. Names are imported when they are used."""

import importlib

_HOMES = {"FieldSettings": "drift.field.settings", "drifting_loss": "drift.field.loss"}
__all__ = ["FieldSettings", "drifting_loss"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
