"""A stand-in for an SD-VAE whose activations are beyond bfloat16, and not beyond float32."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parameter import Buffer

from drift.runtime.torchvision import ensure_torchvision

ensure_torchvision()
from diffusers.configuration_utils import FrozenDict  # noqa: E402
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution  # noqa: E402

HUGE = 1.7e38  # twice that is finite in float32 (3.4028e38), and rounds to infinity in bfloat16 (3.3895e38)


class Overflowing(nn.Module):
    """Pixels and latents are the same planes. A 1 or -1 there (white, black) overflows in bfloat16."""

    config = FrozenDict(
        scaling_factor=1.0, shift_factor=None, latents_mean=None, latents_std=None, latent_channels=3,
        block_out_channels=(1,),
    )  # fmt: skip
    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.weight = Buffer(HUGE * torch.eye(3).repeat(1, 2)[:, :, None, None])  # [3, 6, 1, 1]

    def _planes(self, x):
        return F.conv2d(torch.cat([x, x], 1), self.weight).float() / (2 * HUGE)

    def encode(self, x):
        mean = self._planes(x)
        return SimpleNamespace(latent_dist=DiagonalGaussianDistribution(torch.cat([mean, mean - 9], 1)))

    def decode(self, z):
        return SimpleNamespace(sample=self._planes(z))
