"""Lets torchvision be imported beside a torch build that its compiled part does not fit.

A CPU build of torch next to the CUDA build of torchvision cannot load `torchvision/_C.so`; the import
then fails because two operators have no schema to hang their fake kernels on. clean-fid and diffusers
import torchvision but use none of its compiled operators, so declaring the two schemas is enough.
Call `ensure_torchvision()` before importing either of them.
"""

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library: torch.library.Library | None = None  # keeps the declared schemas alive


def _compiled_part_loads() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        raise ModuleNotFoundError("torchvision is not installed")
    for folder in spec.submodule_search_locations or ():
        for path in sorted(Path(folder).glob("_C*.so")) + sorted(Path(folder).glob("_C*.pyd")):
            try:
                torch.ops.load_library(path)
            except (ImportError, OSError):
                continue
            return True
    return False


def ensure_torchvision() -> bool:
    """Make `import torchvision` work; True if schemas had to be declared.

    Does nothing where the compiled part of torchvision loads, or on a second call.
    """
    global _library
    if _library is not None:
        return True
    if _compiled_part_loads():
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    _library = library
    return True
