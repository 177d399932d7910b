"""Encoders whose weights transformers loads."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from drift.runtime.errors import UserError
from drift.runtime.hub import download
from drift.runtime.torchvision import ensure_torchvision

_CONFIG, _WEIGHTS = "config.json", "model*.safetensors*"


def transformers_model(source: str | Path, revision: str | None, classes: Mapping[str, str]) -> Any:
    """The model in a folder or on the hub, in float32 and evaluation mode; a head that it has is left out.

    `classes` maps each `model_type` that will do to its class in transformers. Only safetensors are read, and
    no code is executed. Raises `UserError` if transformers, the model or part of its weights is not there.
    """
    ensure_torchvision()  # which transformers imports
    try:
        import transformers
    except ImportError as error:
        way_out = "pip install -c constraints.txt -e '.[features]'"
        raise UserError(f"{source}: needs transformers ({error}): {way_out}") from None
    folder = Path(source)
    if not folder.is_dir():
        what = f"{source}: is not a local folder, and"
        way_out = f"put its {_CONFIG} and model.safetensors into a folder and name that as source"
        folder = download(str(source), revision, [_CONFIG, _WEIGHTS], what=what, way_out=way_out)
    transformers.logging.set_verbosity_error()  # all that matters is raised
    transformers.logging.disable_progress_bar()
    try:
        kind = json.loads((folder / _CONFIG).read_text(encoding="utf-8")).get("model_type")
        if kind not in classes:
            raise ValueError(f"a model of type {kind}, not {' or '.join(classes)}")
        model, report = getattr(transformers, classes[kind]).from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # whose message would name none
        )
        unfit = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
        if unfit:
            raise ValueError(f"{min(unfit)} is missing or of another shape, and {len(unfit) - 1} more")
    except Exception as error:  # of any type: safetensors, huggingface_hub and transformers have their own
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{source}: cannot be loaded ({reason}); name another source or fetch it anew"
        ) from None
    return model.eval()
