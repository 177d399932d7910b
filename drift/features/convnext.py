"""ConvNeXt-V2 through transformers: the release's 13 sets of images (its models/convnext.py)."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from drift.autoencoders import Autoencoder
from drift.features.base import EncoderOptions, ImageEncoder, register
from drift.features.pretrained import transformers_model
from drift.models.pooling import locations

SIDE = 224  # of the images that the network sees


class ConvNextFeatures(ImageEncoder):
    """Locations, and moments over the map, of each stage's output.

    A stage's output is first normalised over channels, each location by itself. `convnext_stage_<i>` are the
    locations, but for stage 0, `convnext_stage_<i>_mean` and `_std` the moments. `convnext_global_mean` is
    the last map's mean before that, by the network's own norm, and `convnext_global_std` the std of the last.
    """

    def __init__(self, model: Any, autoencoder: Autoencoder | None = None, revision: str | None = None):
        """`model` is a `ConvNextV2Model` of transformers, the folder of one, or a hub id."""
        super().__init__(autoencoder)
        if isinstance(model, str | Path):
            model = transformers_model(model, revision, {"convnextv2": "ConvNextV2Model"})
        self.network = model.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        sets: dict[str, Tensor] = {}
        feature_map = self.network.embeddings(self.prepared(images, SIDE))
        for index, stage in enumerate(self.network.encoder.stages):
            feature_map = stage(feature_map)  # [B, C, H, W]
            channels = feature_map.float()
            apart = channels - channels.mean(dim=1, keepdim=True)
            normal = apart / (apart.square().mean(dim=1, keepdim=True).sqrt() + 1e-3)
            variance, mean = torch.var_mean(normal, dim=(2, 3), correction=0)
            name, std = f"convnext_stage_{index}", (variance + 1e-6).sqrt()[:, None]
            sets |= {name: locations(normal)} if index else {}
            sets |= {f"{name}_mean": mean[:, None], f"{name}_std": std}
        last = self.network.layernorm(channels.mean(dim=(2, 3)))  # of all locations, [B, C]
        return sets | {"convnext_global_mean": last[:, None].float(), "convnext_global_std": std}


@register
class ConvNextOptions(EncoderOptions):
    """ConvNeXt-V2 on decoded images, with the feature sets of the release; needs the extra `features`."""

    needs_decoder = True
    encoder: Literal["convnext"] = "convnext"
    source: str = "facebook/convnextv2-base-22k-224"
    """A folder, or an id on the Hugging Face hub."""
    revision: str | None = None
    """Revision on the hub; null is its default branch."""

    def load(self, *, mae: Path | None = None, autoencoder: Autoencoder | None = None) -> ImageEncoder:
        return ConvNextFeatures(self.source, autoencoder, self.revision)
