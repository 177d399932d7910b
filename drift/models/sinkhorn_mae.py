"""The prior's feature encoder (arXiv 2603.12366), for its checkpoints.

It is the ResNet of `LatentMAE` by other conventions: no GroupNorm after a stage, eps 1e-5, no class head, a
decoder without the stem's skip and without norms on what it concatenates; its feature sets leave out the stem
and hold mean and std together.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drift.models.base import PretrainedModel, require_at_least
from drift.models.mae import BasicBlock, ConvNormReLU, LatentMAE
from drift.models.pooling import feature_sets
from drift.runtime.errors import UserError

_EPS = 1e-5  # prior: of every GroupNorm (PyTorch's default)
_NORM_GROUPS = 32  # prior: fixed; a layer with fewer channels has one group per channel


@dataclass(frozen=True, kw_only=True)
class PriorMAEConfig:
    """Sizes of a `PriorMAE`; those of the prior's checkpoints by default."""

    in_channels: int = 4
    """Channels of the latents."""
    base_channels: int = 256
    """Width of the first stage; the others are 2, 4 and 8 times as wide."""
    layers: tuple[int, ...] = (3, 4, 6, 3)
    """Residual blocks of each of the four stages."""
    patch_size: int = 2
    """Side of the squares that are masked together."""
    num_classes: int = 0
    """There is no class head."""
    input_patch_size: int = 1
    """Nothing is folded."""

    def __post_init__(self):
        require_at_least(1, self, "in_channels", "base_channels", "patch_size")
        if len(self.layers) != 4 or min(self.layers) < 1:
            raise UserError(f"layers is {list(self.layers)}: give the blocks of four stages, at least 1 each")
        if self.base_channels % min(_NORM_GROUPS, self.base_channels):
            raise UserError(
                f"base_channels is {self.base_channels}, which {_NORM_GROUPS} groups do not divide"
            )
        if self.num_classes or self.input_patch_size != 1:
            raise UserError("num_classes and input_patch_size are 0 and 1 in the prior's encoder")

    @property
    def norm_groups(self) -> int:
        """Groups of every GroupNorm."""
        return _NORM_GROUPS

    @property
    def folded_channels(self) -> int:
        """Channels that the network sees."""
        return self.in_channels


class PriorEncoder(nn.Module):
    """Stem without stride, then four stages of basic blocks; stages 2 to 4 halve the map."""

    def __init__(self, config: PriorMAEConfig):
        super().__init__()
        width = channels = config.base_channels
        self.stem = ConvNormReLU(config.in_channels, width, _NORM_GROUPS, _EPS)
        self.stages = nn.ModuleList()
        for stage, depth in enumerate(config.layers):
            blocks = nn.ModuleList()
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(BasicBlock(channels, width * 2**stage, stride, _NORM_GROUPS, _EPS))
                channels = width * 2**stage
            self.stages.append(blocks)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The maps that have features (every 2nd block of a stage, and its last), and the stages' outputs."""
        x = self.stem(x)
        maps, outputs = [], []
        for blocks in self.stages:
            for number, block in enumerate(blocks, start=1):
                x = block(x)
                if number % 2 == 0 or number == len(blocks):
                    maps.append(x)
            outputs.append(x)
        return maps, outputs


class PriorUpBlock(nn.Module):
    """Resize to the size of a skip connection, concatenate it, and mix with two 3x3 convolutions."""

    def __init__(self, in_channels: int, skip_channels: int):
        super().__init__()
        self.proj = ConvNormReLU(in_channels + skip_channels, skip_channels, _NORM_GROUPS, _EPS)
        self.refine = ConvNormReLU(skip_channels, skip_channels, _NORM_GROUPS, _EPS)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
        return self.refine(self.proj(torch.cat([x, skip], dim=1)))


class PriorDecoder(nn.Module):
    """U-Net decoder from stage 4 back to the input, with skips from stages 3, 2 and 1."""

    def __init__(self, config: PriorMAEConfig):
        super().__init__()
        width = config.base_channels
        self.bridge = ConvNormReLU(8 * width, 8 * width, _NORM_GROUPS, _EPS)
        self.ups = nn.ModuleList(PriorUpBlock(2 * skip, skip) for skip in (4 * width, 2 * width, width))
        self.head = nn.Conv2d(width, config.in_channels, 1)

    def forward(self, outputs: list[Tensor]) -> Tensor:
        x = self.bridge(outputs[3])
        for up, skip in zip(self.ups, reversed(outputs[:3]), strict=True):
            x = up(x, skip)
        return self.head(x)


class PriorMAE(LatentMAE):
    """The prior's masked autoencoder, in the place of a `LatentMAE`; cannot be trained by the stage `mae`."""

    config_class = PriorMAEConfig

    def __init__(self, config: PriorMAEConfig):
        PretrainedModel.__init__(self, config)
        self.encoder = PriorEncoder(config)
        self.decoder = PriorDecoder(config)

    def encode(self, latents: Tensor, drop_duplicates: bool = False) -> dict[str, Tensor]:
        """Every feature set of `latents [B, C, H, W]`, each `[B, L, C_j]` in float32, by the prior's names.

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
