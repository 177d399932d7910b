"""The feature encoder of the Sinkhorn paper's code (arXiv 2603.12366), for its checkpoints.

It is the ResNet of `LatentMAE` by other conventions: no GroupNorm after a stage, eps 1e-5, no class head, a
decoder without the stem's skip and without norms on what it concatenates; its feature sets leave out the stem
and hold mean and std together.
"""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from drift.models.base import PretrainedModel, require_at_least
from drift.models.mae import ConvNormReLU, LatentMAE, UpBlock, check_layers, residual_stages
from drift.models.pooling import feature_sets
from drift.runtime.errors import UserError

_EPS = 1e-5  # of every GroupNorm (PyTorch's default)
_NORM_GROUPS = 32  # a layer with fewer channels has one group per channel


class SinkhornEncoder(nn.Module):
    """Stem without stride, then four stages of basic blocks."""

    def __init__(self, in_channels: int, width: int, layers: Sequence[int]):
        super().__init__()
        self.stem = ConvNormReLU(in_channels, width, _NORM_GROUPS, _EPS)
        self.stages = residual_stages(width, layers, _NORM_GROUPS, _EPS)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The maps that have features (every 2nd block of a stage, and its last), and the stages' outputs."""
        x = self.stem(x)
        maps, outputs = [], []
        for blocks in self.stages:
            assert isinstance(blocks, nn.ModuleList)
            for number, block in enumerate(blocks, start=1):
                x = block(x)
                if number % 2 == 0 or number == len(blocks):
                    maps.append(x)
            outputs.append(x)
        return maps, outputs


class SinkhornDecoder(nn.Module):
    """U-Net decoder from stage 4 back to the input, with skips from stages 3, 2 and 1."""

    def __init__(self, width: int, out_channels: int):
        super().__init__()
        self.bridge = ConvNormReLU(8 * width, 8 * width, _NORM_GROUPS, _EPS)
        self.ups = nn.ModuleList(
            UpBlock(2 * skip, skip, nn.Identity(), _NORM_GROUPS, _EPS)
            for skip in (4 * width, 2 * width, width)
        )
        self.head = nn.Conv2d(width, out_channels, 1)

    def forward(self, outputs: list[Tensor]) -> Tensor:
        x = self.bridge(outputs[3])
        for up, skip in zip(self.ups, reversed(outputs[:3]), strict=True):
            x = up(x, skip)
        return self.head(x)


class SinkhornMAE(LatentMAE):
    """That code's masked autoencoder in the place of a `LatentMAE`; the stage `mae` does not train it.

    Args: see `LatentMAE`; the defaults are those of the published checkpoints.
    """

    former_name = "PriorMAE"
    former_keys = frozenset({"num_classes", "input_patch_size"})

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        base_channels: int = 256,
        layers: tuple[int, ...] = (3, 4, 6, 3),
        patch_size: int = 2,
    ):
        PretrainedModel.__init__(self)
        require_at_least(1, in_channels=in_channels, base_channels=base_channels, patch_size=patch_size)
        check_layers(layers)
        if base_channels % min(_NORM_GROUPS, base_channels):
            raise UserError(f"base_channels is {base_channels}, which {_NORM_GROUPS} groups do not divide")
        self.patch_size, self.input_patch_size, self.norm_groups = patch_size, 1, _NORM_GROUPS
        self.encoder = SinkhornEncoder(in_channels, base_channels, layers)
        self.decoder = SinkhornDecoder(base_channels, in_channels)

    def encode(self, latents: Tensor, drop_duplicates: bool = False) -> dict[str, Tensor]:
        """Every feature set of `latents [B, C, H, W]`, each `[B, L, C_j]` in float32, by that code's names.

        `input.x2` holds the mean squares of the input's channels. Of map i, `enc<i>.loc` holds the locations,
        `enc<i>.global_ms` the mean and below it the std of the whole map, `enc<i>.patch<p>_ms` the means and
        below them the stds of patches. `drop_duplicates` leaves out sets that repeat others by their shape.
        """
        sets = {"input.x2": latents.float().square().mean(dim=(2, 3))[:, None]}
        for i, feature_map in enumerate(self.encoder(latents)[0]):
            found = feature_sets("map", feature_map, drop_duplicates)
            sets[f"enc{i:02d}.loc"] = found["map"]
            for ours, theirs in (("", "global"), ("_2", "patch2"), ("_4", "patch4")):
                if f"map_mean{ours}" in found:
                    pair = [found[f"map_{moment}{ours}"] for moment in ("mean", "std")]
                    sets[f"enc{i:02d}.{theirs}_ms"] = torch.cat(pair, dim=1)
        return sets

    def _decode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The logits are `[B, 0]`."""
        outputs = self.encoder(x)[1]
        return self.decoder(outputs), x.new_zeros(len(x), 0)
