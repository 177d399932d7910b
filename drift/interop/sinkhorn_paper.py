"""Encoders of the Sinkhorn paper's code (arXiv 2603.12366, PyTorch) as models of ours.

Its `ckpt_final.pt` is read with `weights_only`: nothing in it is executed.
"""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from drift.interop.release import fill, rename, translate
from drift.models.base import uninitialized
from drift.models.sinkhorn_mae import SinkhornMAE
from drift.runtime.errors import UserError
from drift.runtime.files import check_writable, without_wrappers

_KEYS = {"in_ch": "in_channels", "base_width": "base_channels", "blocks_per_stage": "layers"}
# That code's words for parts of our parameters' names, put in their place one after the other
_WORDS = {
    "encoder.stem.conv": "encoder.conv1",
    "encoder.stem.norm": "encoder.gn1",
    **{f"stages.{s}": f"stage{s + 1}" for s in range(4)},
    "shortcut": "down",
    "bridge.conv": "init.0",
    "bridge.norm": "init.1",
    **{f"ups.{i}": f"up{3 - i}" for i in range(3)},
    "proj.conv": "conv1",
    "proj.norm": "gn1",
    "refine.conv": "conv2",
    "refine.norm": "gn2",
    ".norm": ".gn",
    "head": "out",
}


def import_sinkhorn_mae(checkpoint: str | Path, destination: str | Path) -> SinkhornMAE:
    """Write the EMA weights of the MAE `checkpoint` (`ckpt_final.pt`) as a folder of ours.

    Returns the model, which `LatentMAE.from_pretrained` loads from there. Raises `UserError` if the file is
    missing or damaged, if it does not hold exactly the parameters of its `mae_cfg`, or if `destination`
    cannot be written.
    """
    checkpoint = Path(checkpoint)
    content = _load_checkpoint(checkpoint)
    try:
        config, shadow = dict(content["mae_cfg"]), dict(content["ema"]["shadow"])
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{checkpoint}: has no mae_cfg and ema.shadow, so it is no MAE of the Sinkhorn paper's code; "
            "name its ckpt_final.pt"
        ) from None
    try:
        sizes = translate(config, _KEYS, {"conv1_stride": 1}, set(), "mae_cfg")
        model = uninitialized(lambda: SinkhornMAE(**sizes))
        views = {rename(name, _WORDS): value for name, value in model.named_parameters()}
        params = {name: value.float().numpy() for name, value in without_wrappers(shadow).items()}
        fill(model, views, params, "mae_cfg")
    except UserError as error:
        raise UserError(f"{checkpoint}: {error}") from None
    check_writable(destination)
    model.save_pretrained(destination)
    return model


def _load_checkpoint(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; name a ckpt_final.pt")
    try:
        # Mapped, since the optimizer's state in it is twice as large as the weights that are read
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError:
        raise UserError(
            f"{path}: damaged, or it holds objects that only executing code would load, which is refused; "
            "get a fresh copy, or save its 'ema' and 'mae_cfg' alone where you trust it"
        ) from None
    except (OSError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]  # a paragraph of advice follows
        raise UserError(f"{path}: damaged, or no checkpoint ({reason}); get a fresh copy") from None
    return content if isinstance(content, Mapping) else {}
