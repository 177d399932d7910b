"""8-bit levels <-> floats in [-1, 1]: of images inside networks, and of pixels that are stored as latents."""

from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["nearest", "down"]


def from_levels(levels: Tensor) -> Tensor:
    """uint8 of any shape -> float32 in [-1, 1]."""
    return levels.float().div_(127.5).sub_(1)


def to_levels(values: Tensor, rounding: Rounding = "nearest") -> Tensor:
    """Floats around [-1, 1], of any shape -> uint8: the values that a PNG would hold.

    `nearest` is the inverse of `from_levels`. `down` cuts off what is beyond 8 bits, as both papers' codes
    do: half a level darker on average.
    """
    to_whole = {"nearest": torch.round, "down": torch.floor}[rounding]
    return to_whole((values.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """uint8 `[B, H, W, 3]` -> float32 in [-1, 1], `[B, 3, H, W]`."""
    return from_levels(images.permute(0, 3, 1, 2))


def to_uint8(images: Tensor, rounding: Rounding = "nearest") -> Tensor:
    """Floats around [-1, 1], `[B, 3, H, W]` -> uint8 `[B, H, W, 3]`, by `to_levels`."""
    return to_levels(images, rounding).permute(0, 2, 3, 1).contiguous()
