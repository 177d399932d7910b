"""The one-step generator: a DiT from noise, class, CFG strength and style indices to a latent (paper A.2).

Follows the release, whose parameters `drift.interop.release` converts. Shape letters: B batch, C channels,
T tokens, D hidden size, S style codebooks.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from drift.models.base import PretrainedModel, require_at_least
from drift.runtime.errors import UserError

CLASSES_FILE = "classes.json"
"""Class names in the order of the labels, in the folder of a trained generator."""

_EPS = 1e-6  # release: of every RMSNorm
_MAX_PERIOD = 10_000.0  # release: of the omega sinusoid and of RoPE
_OMEGA_FREQUENCIES = 128  # release: 256 sinusoids, half of them cosines
_OMEGA_SCALE = 0.02  # release: of the normalised omega embedding, beside embeddings drawn from N(0, 0.02)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm's affine part: `[B, T, D]` by `[B, 1, D]`."""
    return x * (1 + scale) + shift


def patchify(images: Tensor, patch: int) -> Tensor:
    """`[B, C, H, W]` -> `[B, T, patch*patch*C]`: tokens row-major, inside them row, column, channel."""
    x = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # [B, C, h, p, w, p]
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor, patch: int, channels: int) -> Tensor:
    """The inverse of `patchify`, for a square."""
    side = math.isqrt(tokens.shape[1])
    x = tokens.unflatten(2, (patch, patch, channels)).unflatten(1, (side, side))  # [B, h, w, p, p, C]
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def rope(tokens: int, head_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[T, head_size / 2]` of rotary position embedding by place in the sequence."""
    places = torch.arange(tokens, device=device, dtype=torch.float32)
    angles = places[:, None] * _frequencies(head_size // 2, device)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `[..., T, d]` by the angles of `rope`; entry i forms a plane with entry i + d/2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _frequencies(count: int, device: torch.device) -> Tensor:
    """Geometric from 1 down to, exclusively, 1 / `_MAX_PERIOD`."""
    exponents = torch.arange(count, device=device, dtype=torch.float32) / count
    return torch.exp(-math.log(_MAX_PERIOD) * exponents)


class RMSNorm(nn.Module):
    """Root mean square normalisation of the last dimension, computed and returned in float32."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, _EPS)


class OmegaEmbedder(nn.Module):
    """CFG strength -> vector: sinusoids, an MLP, an RMSNorm, and a scale that keeps it small."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * _OMEGA_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.norm = RMSNorm(hidden_size)

    def forward(self, omega: Tensor) -> Tensor:  # [B]
        angles = omega.float()[:, None] * _frequencies(_OMEGA_FREQUENCIES, omega.device)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1)
        return _OMEGA_SCALE * self.norm(self.mlp(sinusoids.to(self.norm.weight.dtype)))  # [B, D]


class StyleEmbedder(nn.Module):
    """Sum over codebooks of the entry that each style index picks (paper A.2, "random style embeddings")."""

    def __init__(self, codebooks: int, entries: int, hidden_size: int):
        super().__init__()
        self.codebooks, self.entries = codebooks, entries
        self.weight = nn.Parameter(torch.empty(codebooks * entries, hidden_size))  # codebook after codebook

    def forward(self, indices: Tensor) -> Tensor:  # [B, S]
        first = torch.arange(self.codebooks, device=indices.device) * self.entries
        return F.embedding_bag(indices + first, self.weight, mode="sum")  # [B, D]


class Attention(nn.Module):
    """Multi-head self-attention with normalised queries and keys and rotary positions."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = RMSNorm(hidden_size // num_heads)
        self.k_norm = RMSNorm(hidden_size // num_heads)
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:  # [B, T, D]
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # [B, T, 3, heads, d]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, T, d] each
        q = rotate(self.q_norm(q), *rotation).to(v.dtype)
        k = rotate(self.k_norm(k), *rotation).to(v.dtype)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.output(x.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Two-layer perceptron whose hidden units are gated by SiLU."""

    def __init__(self, size: int, hidden_size: int):
        super().__init__()
        self.gate = nn.Linear(size, hidden_size)
        self.value = nn.Linear(size, hidden_size)
        self.output = nn.Linear(hidden_size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(F.silu(self.gate(x)) * self.value(x))


class Block(nn.Module):
    """Transformer block with adaLN-zero conditioning (DiT)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_hidden_size: int):
        super().__init__()
        self.norm1 = RMSNorm(hidden_size)
        self.attention = Attention(hidden_size, num_heads)
        self.norm2 = RMSNorm(hidden_size)
        self.mlp = SwiGLU(hidden_size, mlp_hidden_size)
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(self, x: Tensor, modulation: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation[:, None].chunk(6, dim=2)  # [B, 1, D] each
        x = x + gate1 * self.attention(modulate(self.norm1(x), shift1, scale1), rotation)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    """Tokens -> pixels of their patches, modulated like the blocks."""

    def __init__(self, hidden_size: int, out_features: int):
        super().__init__()
        self.norm = RMSNorm(hidden_size)
        self.modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.output = nn.Linear(hidden_size, out_features)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = modulation[:, None].chunk(2, dim=2)
        return self.output(modulate(self.norm(x), shift, scale))


class Generator(PretrainedModel):
    """`f(noise, class, omega, style indices) -> latent`, in one forward pass.

    The defaults are the paper's B/2 on SD-VAE latents of ImageNet-256.

    Args:
        in_channels: channels of noise and latents.
        input_size: side of noise and latents.
        num_classes: classes of the labels.
        hidden_size: D.
        depth: transformer blocks.
        num_heads: heads of each attention.
        patch_size: side of the squares that become one token.
        mlp_ratio: hidden size, relative to D, of an MLP without gate of as many parameters as the SwiGLU.
        context_tokens: conditioning tokens in front of the sequence.
        style_codebooks: S.
        style_entries: entries of each style codebook.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        input_size: int = 32,
        num_classes: int = 1000,
        hidden_size: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        patch_size: int = 2,
        mlp_ratio: float = 4.0,
        context_tokens: int = 16,
        style_codebooks: int = 32,
        style_entries: int = 64,
    ):
        super().__init__()
        _check_sizes(self.config)
        self.in_channels, self.patch_size, self.head_size = in_channels, patch_size, hidden_size // num_heads
        self.context_tokens = context_tokens
        self.style_codebooks, self.style_entries = style_codebooks, style_entries
        # Two thirds of the plain MLP's hidden size, rounded up to a multiple of 32 (release)
        mlp_hidden_size = math.ceil(int(hidden_size * mlp_ratio * 2 / 3) / 32) * 32

        self.class_embedding = nn.Embedding(num_classes, hidden_size)
        self.omega_embedder = OmegaEmbedder(hidden_size)
        self.style_embedder = None
        if style_codebooks:
            self.style_embedder = StyleEmbedder(style_codebooks, style_entries, hidden_size)
        self.patch_embedding = nn.Linear(patch_size**2 * in_channels, hidden_size)
        self.position_embedding = nn.Parameter(torch.empty(1, (input_size // patch_size) ** 2, hidden_size))
        self.context_projection = None
        if context_tokens:
            self.context_projection = nn.Linear(hidden_size, hidden_size)
            self.context_embedding = nn.Parameter(torch.empty(1, context_tokens, hidden_size))
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, mlp_hidden_size) for _ in range(depth))
        self.final = FinalLayer(hidden_size, patch_size**2 * in_channels)
        self.activation_checkpointing = False  # True trades time for memory: see torch.utils.checkpoint
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """As the release starts: Xavier-uniform linear layers with zero bias, but for the following."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

        # Embeddings, and what embeds omega, start equally small
        nn.init.normal_(self.class_embedding.weight, std=0.02)
        if self.style_embedder is not None:
            nn.init.normal_(self.style_embedder.weight, std=0.02)
        if self.context_projection is not None:
            nn.init.normal_(self.context_embedding, std=0.02)
        for layer in self.omega_embedder.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)

        # Learned from there on
        _, places, hidden_size = self.position_embedding.shape
        with torch.no_grad():
            self.position_embedding.copy_(sincos_positions(math.isqrt(places), hidden_size))

        # adaLN-zero: every block starts as the identity, and the output at zero
        for layer in [*(block.modulation for block in self.blocks), self.final.modulation, self.final.output]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        noise: Tensor,
        labels: Tensor,
        omega: Tensor,
        style_indices: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """One latent per noise.

        Args:
            noise: `[B, C, H, W]`, standard normal.
            labels: classes `[B]`.
            omega: CFG strength `[B]`, 1 is none; no second forward pass is needed for it.
            style_indices: `[B, S]`, each in `[0, style_entries)`; drawn with `generator` if not given.

        Returns:
            Latents `[B, C, H, W]` in float32.
        """
        if style_indices is None:
            style_indices = self.draw_style_indices(len(noise), generator).to(noise.device)
        with torch.autocast(noise.device.type, enabled=False):  # conditioning is float32 (release)
            cond = self.condition(labels, omega, style_indices)
            context = self.context(cond)
            act = F.silu(cond)
            # A ModuleList does not know the type of its members
            modulations = [block.modulation(act) for block in self.blocks]  # pyright: ignore[reportCallIssue]
            final_modulation = self.final.modulation(act)

        x = self.patch_embedding(patchify(noise, self.patch_size)) + self.position_embedding
        x = torch.cat([context, x], dim=1)  # [B, T, D]
        rotation = rope(x.shape[1], self.head_size, x.device)
        for block, modulation in zip(self.blocks, modulations, strict=True):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, modulation, rotation, use_reentrant=False)
            else:
                x = block(x, modulation, rotation)
        x = self.final(x[:, self.context_tokens :], final_modulation)
        return unpatchify(x.float(), self.patch_size, self.in_channels)

    def condition(self, labels: Tensor, omega: Tensor, style_indices: Tensor) -> Tensor:
        """Conditioning vector `[B, D]` of classes `[B]`, CFG strengths `[B]` and style indices `[B, S]`."""
        cond = self.class_embedding(labels) + self.omega_embedder(omega)
        if self.style_embedder is not None:
            cond = cond + self.style_embedder(style_indices)
        return cond.to(self.class_embedding.weight.dtype)

    def context(self, cond: Tensor) -> Tensor:
        """In-context conditioning tokens `[B, context_tokens, D]` from `cond [B, D]`."""
        if self.context_projection is None:
            return cond.new_empty(len(cond), 0, cond.shape[1])
        return self.context_projection(cond)[:, None] + self.context_embedding

    def draw_style_indices(self, batch: int, generator: torch.Generator | None = None) -> Tensor:
        """Style indices `[batch, S]`, uniform in each codebook, on the device of `generator`."""
        device = None if generator is None else generator.device
        shape = (batch, self.style_codebooks)
        return torch.randint(self.style_entries, shape, generator=generator, device=device)


def sincos_positions(side: int, size: int) -> Tensor:
    """The 2-D position embedding `[side * side, size]` of MAE and DiT: column half, then row half."""
    places = torch.arange(side, dtype=torch.float64)
    angles = places[:, None] * _frequencies(size // 4, places.device)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, size / 2]
    columns, rows = line.repeat(side, 1), line.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1)


def _check_sizes(sizes: Any) -> None:
    """Check a config, whose attributes diffusers makes of the arguments."""
    positive = ("in_channels", "input_size", "num_classes", "hidden_size", "depth", "num_heads", "patch_size")
    require_at_least(1, **{name: sizes[name] for name in (*positive, "style_entries")})
    require_at_least(0, context_tokens=sizes.context_tokens, style_codebooks=sizes.style_codebooks)
    if not sizes.mlp_ratio > 0:
        raise UserError(f"mlp_ratio is {sizes.mlp_ratio}: give a positive number")
    if sizes.hidden_size % (2 * sizes.num_heads):
        raise UserError(f"num_heads is {sizes.num_heads}: RoPE needs an even hidden_size / num_heads")
    if sizes.hidden_size % 4:
        raise UserError(
            f"hidden_size is {sizes.hidden_size}: the 2-D position embedding needs a multiple of 4"
        )
    if sizes.input_size % sizes.patch_size:
        raise UserError(
            f"patch_size is {sizes.patch_size}: choose a divisor of input_size ({sizes.input_size})"
        )


# The published sizes (paper Table 8); parameters: 133 M and 463 M
SIZES = {
    "B/2": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L/2": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
}


def read_class_names(folder: Path) -> list[str] | None:
    """The names of the classes of the generator in `folder`; None where no file tells them.

    Raises `UserError` if that file is damaged.
    """
    path = folder / CLASSES_FILE
    if not path.exists():
        return None
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(names, list) and all(isinstance(name, str) for name in names)
    except (OSError, ValueError, AssertionError):
        raise UserError(f"{path}: damaged; get the folder again (dvc pull)") from None
    return names
