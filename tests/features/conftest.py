"""Small encoders and a small autoencoder with random weights, saved by the libraries that they come from."""

import pytest
import torch

from drift.runtime.torchvision import ensure_torchvision

ensure_torchvision()


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory):
    """An autoencoder with latents `[3, 8, 8]` of images of 16 pixels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    network = AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2, latent_channels=3, scaling_factor=0.4,
        mid_block_add_attention=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vae")
    network.save_pretrained(folder)
    return folder
