"""One training loop, the MAE and the generator. Names are imported when they are used."""

import importlib

_HOMES = {"drift_objective": "drift.training.objective"}
__all__ = ["drift_objective"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
