"""The networks of the MNIST experiment; their parameters have the names of the authors' checkpoints."""

from itertools import pairwise

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from drift.models.base import PretrainedModel, require_at_least

CLASSES = 10


class Autoencoder(PretrainedModel):
    """Images `[B, 1, 28, 28]` in [0, 1] <-> latents `[B, latent_dim]`, the encoder's plain output."""

    @register_to_config
    def __init__(self, latent_dim: int = 6):
        super().__init__()
        require_at_least(1, latent_dim=latent_dim)
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 128),
            nn.ReLU(),
            nn.Linear(128, latent_dim),
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, 128),
            nn.ReLU(),
            nn.Linear(128, 64 * 7 * 7),
            nn.ReLU(),
            nn.Unflatten(1, (64, 7, 7)),
            nn.ConvTranspose2d(64, 32, 3, stride=2, padding=1, output_padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 1, 3, stride=2, padding=1, output_padding=1),
            nn.Sigmoid(),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Reconstructions `[B, 1, 28, 28]`."""
        return self.decoder(self.encoder(images))


class LatentGenerator(PretrainedModel):
    """Noise, class and CFG strength -> a latent, by an MLP.

    Args:
        noise_dim, latent_dim: channels of the noise and of the latents.
        hidden, layers: width and number of the hidden layers.
        num_classes: the table has one class more, which the authors' code never trains.
    """

    @register_to_config
    def __init__(
        self,
        noise_dim: int = 6,
        latent_dim: int = 6,
        hidden: int = 256,
        layers: int = 3,
        num_classes: int = CLASSES,
    ):
        super().__init__()
        require_at_least(
            1,
            noise_dim=noise_dim,
            latent_dim=latent_dim,
            hidden=hidden,
            layers=layers,
            num_classes=num_classes,
        )
        width = 32
        self.class_emb = nn.Embedding(num_classes + 1, width)
        self.omega_mlp = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        widths = [noise_dim + 2 * width, *[hidden] * layers]
        pairs = (layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.ReLU()))
        self.mlp = nn.Sequential(*pairs, nn.Linear(hidden, latent_dim))

    def forward(self, noise: Tensor, labels: Tensor, omega: Tensor) -> Tensor:
        """Latents `[B, latent_dim]` of `noise [B, noise_dim]`, `labels [B]` and `omega [B]`."""
        parts = [noise, self.class_emb(labels), self.omega_mlp(omega[:, None])]
        return self.mlp(torch.cat(parts, dim=1))


class DigitClassifier(PretrainedModel):
    """Class logits `[B, 10]` of images `[B, 1, 28, 28]` in [0, 1]."""

    @register_to_config
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128 * 7 * 7, 256),
            nn.ReLU(),
            nn.Linear(256, CLASSES),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)
