"""Small encoders and a small autoencoder with random weights, saved by the libraries that they come from."""

import pytest
import torch

from drift.features import ENCODERS, EncoderOptions
from drift.runtime.torchvision import ensure_torchvision

ensure_torchvision()


def randomized(network: torch.nn.Module) -> torch.nn.Module:
    """With noise on every weight: libraries start some at 0, which would hide what they multiply."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def saved(factory, name: str, network: torch.nn.Module):
    """The folder of a network with noise on its weights."""
    folder = factory.mktemp(name)
    randomized(network).save_pretrained(folder)
    return folder


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


@pytest.fixture(scope="session")
def convnext_folder(tmp_path_factory):
    from transformers import ConvNextV2Config, ConvNextV2Model

    torch.manual_seed(0)
    config = ConvNextV2Config(depths=[1, 1, 2, 1], hidden_sizes=[4, 4, 8, 8])
    return saved(tmp_path_factory, "convnext", ConvNextV2Model(config))


@pytest.fixture(scope="session")
def dinov2_folder(tmp_path_factory):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=70)
    return saved(tmp_path_factory, "dinov2", Dinov2Model(config))


@pytest.fixture(scope="session")
def registers_folder(tmp_path_factory):
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 14}
    config = Dinov2WithRegistersConfig(**sizes, image_size=28, num_register_tokens=3)
    return saved(tmp_path_factory, "registers", Dinov2WithRegistersModel(config))


@pytest.fixture(scope="session")
def moco_file(tmp_path_factory):
    """A checkpoint as MoCo-v2 writes it, with what else it has beside the encoder."""
    from torchvision.models import resnet50

    torch.manual_seed(0)
    weights = {}
    for encoder in ("encoder_q", "encoder_k"):
        network = resnet50(num_classes=128)
        network.fc = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), network.fc)
        weights |= {f"module.{encoder}.{name}": tensor for name, tensor in network.state_dict().items()}
    weights = {name: tensor for name, tensor in weights.items() if "_k." not in name or ".conv1" in name}
    path = tmp_path_factory.mktemp("moco") / "moco_v2_800ep_pretrain.pth.tar"
    content = {"epoch": 800, "arch": "resnet50", "state_dict": weights, "optimizer": {"state": {}}}
    torch.save(content, path)
    return path


SOURCES = {"convnext": "convnext_folder", "dinov2": "dinov2_folder", "moco": "moco_file"}
"""The fixture of each encoder that needs a source."""


@pytest.fixture
def options_of(request):
    """Options by the name of an encoder, with the weights of a small one."""

    def build(name: str) -> EncoderOptions:
        source = {"source": str(request.getfixturevalue(SOURCES[name]))} if name in SOURCES else {}
        return ENCODERS[name](encoder=name, **source)

    return build
