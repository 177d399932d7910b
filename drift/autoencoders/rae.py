"""The representation autoencoder (RAE, arXiv 2510.11690): a frozen vision model, and a decoder of its tokens.

diffusers' `AutoencoderRAE` encodes by DINOv2, SigLIP2 or MAE of transformers. It normalises latents with the
mean and standard deviation that its checkpoint holds, so nothing is scaled here. An image has one latent:
there is no posterior.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drift.autoencoders.base import DiffusersAutoencoder
from drift.runtime.errors import UserError

# Names of an encoder's weights, as transformers has had them, and as it has them from 5.x on
_RENAMED = [
    (re.compile(old), new)
    for old, new in (
        (r"^encoder\.vision_model\.", "encoder."),  # SigLIP2
        (r"^encoder\.encoder\.layer\.", "encoder.layers."),  # MAE; so DINOv2 still
        (r"\.attention\.attention\.(q|k|v)(?:uery|ey|alue)\.", r".attention.\1_proj."),
        (r"\.attention\.output\.dense\.", ".attention.o_proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"(\.layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    )
]
# What latents and images depend on, besides the weights and what their shapes tell
_KEYS = ("encoder_type", "encoder_input_size", "decoder_num_attention_heads", "scaling_factor")


class RAE(DiffusersAutoencoder):
    """An `AutoencoderRAE` of diffusers; its latents are maps of the encoder's patch tokens, normalised."""

    network = "AutoencoderRAE"
    called = "RAE"
    has_posterior = False

    @classmethod
    def scale_of(cls, config: Mapping[str, Any], source: str) -> float:
        """The model's own, which it applies itself."""
        return float(config.get("scaling_factor", 1.0))

    @classmethod
    def shape_of(cls, config: Mapping[str, Any], source: str, image_size: int) -> tuple[int, int, int]:
        side = config["encoder_input_size"] // config["encoder_patch_size"]
        pixels = config.get("image_size") or side * config["patch_size"]
        if image_size != pixels:
            raise UserError(
                f"image_size = {image_size}: RAE {source} makes images of {pixels} pixels; "
                f"set data.image_size to that, or name another RAE"
            )
        if not config.get("reshape_to_2d", True):
            raise UserError(f"RAE {source}: reshape_to_2d is false; latents must be maps")
        return config["encoder_hidden_size"], side, side

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """uint8 `images [B, H, W, 3]` -> latents; `noise` has no effect."""
        (latents,) = self._encoded(images)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        with self._autocast():
            return self._decode(latents.to(self.device, torch.float32)).float() * 2 - 1

    @staticmethod
    def decode_by(model: Any, latents: Tensor) -> Tensor:
        return model.decode(latents.to(model.dtype)).sample.float() * 2 - 1

    @staticmethod
    def _to_pixels(images: Tensor) -> Tensor:
        """To [0, 1], which the network takes and gives."""
        return images.permute(0, 3, 1, 2).float() / 255

    def _run_encoder(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return (self.model.encode(pixels).latent,)

    def _run_decoder(self, z: Tensor) -> Tensor:
        return self.model.decode(z).sample

    def _decides(self) -> str:
        return " ".join(str(self.model.config[key]) for key in _KEYS)

    @classmethod
    def _load(cls, config: Mapping[str, Any], folder: Path, variant: str | None) -> Any:
        try:
            import transformers  # noqa: F401
        except ImportError:
            raise UserError(
                "its encoder needs transformers: pip install -c constraints.txt -e '.[features]'"
            ) from None
        from diffusers.models.autoencoders.autoencoder_rae import AutoencoderRAE

        from drift.models.base import load_model

        network: Any = AutoencoderRAE
        with siglip_nested():
            build = lambda: network.from_config(config)  # noqa: E731
            return load_model(build, folder, variant, canonical=cls._canonical, on_meta=False)

    @staticmethod
    def _canonical(name: str) -> str:
        if name.startswith("encoder."):
            for old, new in _RENAMED:
                name = old.sub(new, name)
        return name


@contextmanager
def siglip_nested() -> Iterator[None]:
    """Let diffusers (0.42) build its SigLIP2 encoder from any version of transformers.

    It looks for the layers in `SiglipVisionModel.vision_model`, where transformers had them before 5.x.
    """
    from transformers import SiglipVisionModel
    from transformers.models.siglip import modeling_siglip

    flat = not hasattr(modeling_siglip, "SiglipVisionTransformer")
    if flat:
        SiglipVisionModel.vision_model = property(lambda self: self)  # pyright: ignore
    try:
        yield
    finally:
        if flat:
            del SiglipVisionModel.vision_model  # pyright: ignore
