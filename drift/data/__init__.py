"""Images and latents on disk, and what the trainers draw from them.

Names are imported when they are used, so that `drift.data.images` does not load the rest.
"""

import importlib

_HOMES = {
    "DigitImages": "drift.data.images",
    "DirectSampling": "drift.data.bank",
    "FolderImages": "drift.data.images",
    "ImageSource": "drift.data.images",
    "LatentReader": "drift.data.latents",
    "LatentStore": "drift.data.latents",
    "SampleQueue": "drift.data.bank",
    "augmented_view": "drift.data.images",
    "batch_rows": "drift.data.bank",
    "center_view": "drift.data.images",
    "check_meta": "drift.data.latents",
    "choose_classes": "drift.data.bank",
    "held_out_rows": "drift.data.bank",
    "open_images": "drift.data.images",
    "write_latents": "drift.data.latents",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
