"""Networks. Names are imported when they are used, so that `drift.autoencoders.kl` does not load the rest."""

import importlib

_HOMES = {"Generator": "drift.models.generator", "LatentMAE": "drift.models.mae"}
__all__ = ["Generator", "LatentMAE"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
