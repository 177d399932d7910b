"""Makes torchvision importable beside a torch build that its compiled part does not fit."""

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None  # keeps the declared schemas alive


def ensure_torchvision() -> None:
    """Import torchvision; call this before clean-fid or diffusers import it.

    A CPU build of torch cannot load the compiled part of torchvision's CUDA build. The import then fails
    because two operators have no schema. clean-fid and diffusers call no compiled operator of torchvision,
    so declaring the schemas is enough.
    """
    global _library
    try:
        import torchvision
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            _library.define(schema)
        import torchvision  # noqa: F401
