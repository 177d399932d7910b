"""The ResNet-50 of MoCo-v2, as the Sinkhorn paper's code had it in an earlier version (imagenet/models)."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from drift.autoencoders import Autoencoder
from drift.features.base import EncoderOptions, ImageEncoder, register
from drift.models.pooling import feature_sets
from drift.runtime.errors import UserError
from drift.runtime.files import without_wrappers
from drift.runtime.torchvision import ensure_torchvision

RESIZED, SIDE = 256, 224  # images are resized, and their centre is what the network sees
_PREFIX = "encoder_q."


class MoCoFeatures(ImageEncoder):
    """Nine maps, each with its feature sets of paper A.5.

    `moco_layer<s>_blk<b>` is the output of every second block of stage s, `moco_layer<s>` that of the stage,
    where its number of blocks is odd. Which sets that code made of the maps is not settled: its README has
    each map as one vector.
    """

    def __init__(self, network: nn.Module, autoencoder: Autoencoder | None = None):
        """`network` is a ResNet of torchvision."""
        super().__init__(autoencoder)
        self.network = network.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        edge, network = (RESIZED - SIDE) // 2, self.network
        x = self.prepared(images.clamp(0, 1), RESIZED)[:, :, edge:-edge, edge:-edge]
        for layer in ("conv1", "bn1", "relu", "maxpool"):
            x = getattr(network, layer)(x)
        sets = {}
        for s in range(1, 5):
            blocks = list(getattr(network, f"layer{s}").children())
            for b, block in enumerate(blocks, start=1):
                x = block(x)
                if b % 2 == 0:
                    sets |= feature_sets(f"moco_layer{s}_blk{b}", x)
                elif b == len(blocks):
                    sets |= feature_sets(f"moco_layer{s}", x)
        return sets


def load_resnet50(path: Path) -> nn.Module:
    """The query encoder in a checkpoint of MoCo-v2, without its head; `UserError` if it is not whole."""
    ensure_torchvision()
    from torchvision.models import resnet50

    if not path.is_file():
        raise UserError(f"{path}: there is no such file; name a checkpoint of MoCo-v2 as source")
    network = resnet50()
    network.add_module("fc", nn.Identity())
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        weights = without_wrappers(content["state_dict"])
        names = (
            name for name in weights if name.startswith(_PREFIX) and not name.startswith(f"{_PREFIX}fc.")
        )
        network.load_state_dict({name.removeprefix(_PREFIX): weights[name] for name in names})
    except Exception as error:  # of any type: a pickle that is damaged, or is no checkpoint, raises many
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: damaged, or no checkpoint of MoCo-v2's ResNet-50 ({reason})") from None
    return network


@register
class MoCoOptions(EncoderOptions):
    """MoCo-v2's ResNet-50 on decoded images, which are clamped to [0, 1]."""

    needs_decoder = True
    encoder: Literal["moco"] = "moco"
    source: str
    """The checkpoint, as github.com/facebookresearch/moco gives it: `moco_v2_800ep_pretrain.pth.tar`."""

    def load(self, *, mae: Path | None = None, autoencoder: Autoencoder | None = None) -> ImageEncoder:
        return MoCoFeatures(load_resnet50(Path(self.source)), autoencoder)
