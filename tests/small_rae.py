"""A small representation autoencoder with random weights."""

from contextlib import nullcontext

import torch

from drift.autoencoders.rae import siglip_nested
from drift.runtime.torchvision import ensure_torchvision

ensure_torchvision()
from diffusers import AutoencoderRAE  # noqa: E402


def small_rae(encoder_type="dinov2", pixels=32, side=2, channels=64, **changes):
    """It maps images of `pixels` to latents `[channels, side, side]`; a head has 64 channels."""
    torch.manual_seed(0)
    patch = 14 if encoder_type == "dinov2" else 16
    with siglip_nested() if encoder_type == "siglip2" else nullcontext():
        return AutoencoderRAE(**{
            "encoder_type": encoder_type, "encoder_hidden_size": channels, "encoder_patch_size": patch,
            "encoder_num_hidden_layers": 1, "encoder_input_size": patch * side, "patch_size": pixels // side,
            "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 32, "latents_mean": torch.randn(channels, 1, 1),
            "latents_std": torch.rand(channels, 1, 1) + 0.5, **changes,
        }).eval()  # fmt: skip
