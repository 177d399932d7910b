"""Latent-MAE: the frozen feature encoder of the drifting loss, with its decoder and class head (paper A.3).

A ResNet of basic blocks with GroupNorm and a U-Net decoder, at the release's conventions, but channels-first.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from drift.models.base import PretrainedModel, require_at_least
from drift.models.pooling import feature_sets, root_mean_square
from drift.runtime.errors import UserError

_EPS = 1e-6  # release: of every GroupNorm


class ConvNormReLU(nn.Module):
    """3x3 convolution, GroupNorm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int, eps: float = _EPS):
        super().__init__()
        self.conv = _conv3x3(in_channels, out_channels)
        self.norm = _group_norm(out_channels, norm_groups, eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm_groups: int, eps: float = _EPS):
        super().__init__()
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.norm1 = _group_norm(out_channels, norm_groups, eps)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.norm2 = _group_norm(out_channels, norm_groups, eps)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                _group_norm(out_channels, norm_groups, eps),
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(x)) + shortcut)


class Encoder(nn.Module):
    """Stem without stride, then four stages of basic blocks, each twice as wide as the one before.

    Each stage but the first halves the map, and with `stage_norms` each ends in a GroupNorm.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        layers: Sequence[int],
        norm_groups: int,
        eps: float = _EPS,
        stage_norms: bool = True,
    ):
        super().__init__()
        self.stem = ConvNormReLU(in_channels, width, norm_groups, eps)
        self.stages, self.stage_norms = nn.ModuleList(), nn.ModuleList()
        before = width
        for stage, depth in enumerate(layers):
            channels, stride = width * 2**stage, 1 if stage == 0 else 2
            blocks = [BasicBlock(before, channels, stride, norm_groups, eps)]
            blocks += [BasicBlock(channels, channels, 1, norm_groups, eps) for _ in range(depth - 1)]
            self.stages.append(nn.ModuleList(blocks))
            norm = _group_norm(channels, norm_groups, eps) if stage_norms else nn.Identity()
            self.stage_norms.append(norm)
            before = channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The maps that have features, in the order in which they arise, under the release's names.

        `conv1` is the stem's output, `layer<s>_blk<b>` that of every second block of stage s, `layer<s>`
        that of the stage, after its norm.
        """
        x = self.stem(x)
        maps = {"conv1": x}
        for s, (blocks, norm) in enumerate(zip(self.stages, self.stage_norms, strict=True), start=1):
            for b, block in enumerate(blocks.children(), start=1):
                x = block(x)
                if b % 2 == 0:
                    maps[f"layer{s}_blk{b}"] = x
            x = norm(x)
            maps[f"layer{s}"] = x
        return maps


class UpBlock(nn.Module):
    """Resize to the size of a skip connection, concatenate it, and mix with two 3x3 convolutions."""

    def __init__(
        self, in_channels: int, skip_channels: int, norm: nn.Module, norm_groups: int, eps: float = _EPS
    ):
        super().__init__()
        self.norm = norm  # of the concatenation
        self.proj = ConvNormReLU(in_channels + skip_channels, skip_channels, norm_groups, eps)
        self.refine = ConvNormReLU(skip_channels, skip_channels, norm_groups, eps)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        if x.shape[-2:] != skip.shape[-2:]:
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
        return self.refine(self.proj(self.norm(torch.cat([x, skip], dim=1))))


class Decoder(nn.Module):
    """U-Net decoder from stage 4 back to the input, with skips from stages 3, 2, 1 and the stem."""

    def __init__(self, width: int, out_channels: int, norm_groups: int):
        super().__init__()

        def up(in_channels: int, skip_channels: int) -> UpBlock:
            norm = _group_norm(in_channels + skip_channels, norm_groups)
            return UpBlock(in_channels, skip_channels, norm, norm_groups)

        self.bridge = ConvNormReLU(8 * width, 8 * width, norm_groups)
        self.up43 = up(8 * width, 4 * width)
        self.up32 = up(4 * width, 2 * width)
        self.up21 = up(2 * width, width)
        self.up10 = up(width, width)
        self.head = nn.Conv2d(width, out_channels, 1)

    def forward(self, maps: dict[str, Tensor]) -> Tensor:
        x = self.bridge(maps["layer4"])
        x = self.up43(x, maps["layer3"])
        x = self.up32(x, maps["layer2"])
        x = self.up21(x, maps["layer1"])
        x = self.up10(x, maps["conv1"])
        return self.head(x)


class LatentMAE(PretrainedModel):
    """Masked autoencoder whose encoder gives the features that the drifting loss compares.

    It works on SD-VAE latents or, with `input_patch_size` > 1, on pixels; "latents" below stands for both.
    The defaults are the paper's ablation encoder on SD-VAE latents of ImageNet.

    Args:
        in_channels: of the input: 4 for SD-VAE latents, 3 for pixels.
        base_channels: width of the first stage; the others are 2, 4 and 8 times as wide.
        layers: residual blocks of each of the four stages.
        patch_size: side of the squares that are masked together.
        input_patch_size: side of the squares that are folded into channels before the network: 1 for latents,
            8 for pixels.
        num_classes: classes of the linear head.
        norm_groups: groups of every GroupNorm; a layer with fewer channels has one group per channel. Such
            a norm gives maps of the same mean and std for every sample, so choose at most
            `base_channels / 2` for features that tell samples apart.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        base_channels: int = 256,
        layers: tuple[int, ...] = (3, 4, 6, 3),
        patch_size: int = 2,
        input_patch_size: int = 1,
        num_classes: int = 1000,
        norm_groups: int = 32,
    ):
        super().__init__()
        require_at_least(1, in_channels=in_channels, base_channels=base_channels, patch_size=patch_size)
        require_at_least(
            1, input_patch_size=input_patch_size, num_classes=num_classes, norm_groups=norm_groups
        )
        check_layers(layers)
        for multiple in (1, 2, 3, 4, 6, 8, 12):  # widths of the stages and of the decoder's concatenations
            channels = multiple * base_channels
            if channels % min(norm_groups, channels):
                raise UserError(
                    f"norm_groups is {norm_groups}, which does not divide a layer of {channels} channels: "
                    f"choose one that divides base_channels ({base_channels})"
                )
        self.patch_size, self.input_patch_size, self.norm_groups = patch_size, input_patch_size, norm_groups
        folded_channels = in_channels * input_patch_size**2
        self.encoder = Encoder(folded_channels, base_channels, layers, norm_groups)
        self.decoder = Decoder(base_channels, folded_channels, norm_groups)
        self.classifier = nn.Linear(8 * base_channels, num_classes)
        self.initialize_weights()

    @classmethod
    def family(cls) -> list[type["LatentMAE"]]:
        """This class, and the Sinkhorn paper's encoder, which takes its place."""
        from drift.models.sinkhorn_mae import SinkhornMAE

        return [LatentMAE, SinkhornMAE]

    def initialize_weights(self) -> None:
        """Flax's defaults, as the release trains: LeCun-normal kernels, zero biases, norms at identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                _lecun_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def encode(self, latents: Tensor, drop_duplicates: bool = False) -> dict[str, Tensor]:
        """Every feature set of `latents [B, C, H, W]`, each `[B, L, C_j]` in float32, row-major.

        `norm_x` is the per-channel RMS of the (folded) input, the other names are those of `Encoder` with
        the suffixes of `feature_sets`. `drop_duplicates` leaves out sets that repeat others by their shape.
        The whole latent as one vector (`global`) is not among them.
        """
        x = self.fold(latents)
        sets = {"norm_x": root_mean_square(x)}
        for name, feature_map in self.encoder(x).items():
            sets |= feature_sets(name, feature_map, drop_duplicates)
        return sets

    def reconstruct(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction and class logits `[B, num_classes]` of `latents [B, C, H, W]`, nothing masked.

        The reconstruction has the shape of the folded input, which for latents is `[B, C, H, W]`.
        """
        return self._decode(self.fold(latents))

    def forward(self, latents: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The training pass: reconstruct what `mask` hides (paper A.3).

        Args:
            latents: `[B, C, H, W]`.
            mask: bool `[B, h, w]` over squares of the folded input, with `(h, w) = mask_grid(H, W)`; True
                squares are zeroed.

        Returns:
            Per sample, the squared error summed over channels and masked positions of the folded input and
            divided by the number of those positions (release), in float32 and 0 where nothing is masked,
            `[B]`; and the class logits of the masked input `[B, num_classes]`.
        """
        x = self.fold(latents)
        assert mask.shape[1:] == self.mask_grid(*latents.shape[-2:]), (mask.shape, latents.shape)
        p = self.patch_size
        hidden = mask.repeat_interleave(p, dim=1).repeat_interleave(p, dim=2)[:, None]  # [B, 1, H, W]
        reconstruction, logits = self._decode(x.masked_fill(hidden, 0))
        error = (reconstruction.float() - x.float()).square() * hidden
        return error.sum(dim=(1, 2, 3)) / (hidden.sum(dim=(1, 2, 3)) + 1e-8), logits

    def mask_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the mask of inputs `[B, C, height, width]`."""
        side = self.input_patch_size * self.patch_size
        if height % side or width % side:
            raise UserError(
                f"inputs of {height}x{width} cannot be masked in squares of {side}x{side} (patch_size "
                f"{self.patch_size} x input_patch_size {self.input_patch_size}): "
                "choose a patch_size that divides them"
            )
        return height // side, width // side

    def fold(self, latents: Tensor) -> Tensor:
        """`[B, C, H, W]` -> `[B, p*p*C, H/p, W/p]`, channels ordered by row in patch, column in patch, C."""
        p = self.input_patch_size
        if p > 1:
            x = latents.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # [B, C, H/p, p, W/p, p]
            latents = x.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)
        return latents

    def unfold(self, x: Tensor) -> Tensor:
        """The inverse of `fold`."""
        p = self.input_patch_size
        if p > 1:
            x = x.unflatten(1, (p, p, -1)).permute(0, 3, 4, 1, 5, 2)  # [B, C, H/p, p, W/p, p]
            x = x.flatten(4, 5).flatten(2, 3)
        return x

    def _decode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.encoder(x)
        return self.decoder(maps), self.classifier(maps["layer4"].mean(dim=(2, 3)))


def draw_mask(shape: tuple[int, int, int], ratio: float, generator: torch.Generator) -> Tensor:
    """A bool mask `[B, h, w]` that hides every square independently with probability `ratio` (paper A.3)."""
    return torch.rand(shape, generator=generator, device=generator.device) < ratio


def check_layers(layers: Sequence[int]) -> None:
    """Raises `UserError` unless `layers` are the blocks of four stages."""
    if not isinstance(layers, list | tuple) or len(layers) != 4:
        raise UserError(f"layers is {layers}: give the blocks of four stages")
    require_at_least(1, layers=layers)


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


def _group_norm(channels: int, norm_groups: int, eps: float = _EPS) -> nn.GroupNorm:
    return nn.GroupNorm(min(norm_groups, channels), channels, eps=eps)


def _lecun_normal_(weight: Tensor) -> None:
    """Truncated normal of variance 1 / fan_in, cut at two of its untruncated standard deviations."""
    fan_in = weight[0].numel()
    std = fan_in**-0.5 / 0.87962566103423978  # the cut shrinks the standard deviation by this factor
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
