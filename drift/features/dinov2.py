"""DINOv2 through transformers, with and without registers."""

from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from drift.autoencoders import Autoencoder
from drift.features.base import EncoderOptions, ImageEncoder, register
from drift.features.pretrained import transformers_model
from drift.models.pooling import feature_sets

SIDE = 224  # of the images that the network sees: 16 patches of 14 pixels
_CLASSES = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}


class DINOv2Features(ImageEncoder):
    """The patch tokens after the network's last norm, as a map: its feature sets of paper A.5.

    `dinov2` are the tokens, the other sets their moments over the map and over 2x2 and 4x4 of them. The class
    token and registers are left out.
    """

    def __init__(self, model: Any, autoencoder: Autoencoder | None = None, revision: str | None = None):
        """`model` is a `Dinov2Model` or `Dinov2WithRegistersModel`, the folder of one, or a hub id."""
        super().__init__(autoencoder)
        if isinstance(model, str | Path):
            model = transformers_model(model, revision, _CLASSES)
        self.network = model.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        config = self.network.config
        tokens = self.network(self.prepared(images, SIDE)).last_hidden_state
        patches = tokens[:, 1 + getattr(config, "num_register_tokens", 0) :]  # [B, side * side, C]
        side = SIDE // config.patch_size
        return feature_sets("dinov2", patches.transpose(1, 2).unflatten(2, (side, side)))


@register
class DINOv2Options(EncoderOptions):
    """DINOv2 on decoded images; needs the extra `features`."""

    needs_decoder = True
    encoder: Literal["dinov2"] = "dinov2"
    source: str = "facebook/dinov2-base"
    """A folder, or an id on the Hugging Face hub, such as `facebook/dinov2-with-registers-base`."""
    revision: str | None = None
    """Revision on the hub; null is its default branch."""

    def load(self, *, mae: Path | None = None, autoencoder: Autoencoder | None = None) -> ImageEncoder:
        return DINOv2Features(self.source, autoencoder, self.revision)
