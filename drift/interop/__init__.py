"""Other people's weights and formats. Names are imported when they are used, since they bring diffusers."""

import importlib

_HOMES = {
    "DriftPipeline": "drift.interop.pipeline",
    "import_release": "drift.interop.release",
    "import_sinkhorn_mae": "drift.interop.sinkhorn_paper",
}
__all__ = ["DriftPipeline", "import_release", "import_sinkhorn_mae"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
