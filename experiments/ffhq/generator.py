"""The generator of the FFHQ experiment, what it generates, and which of them there are."""

import itertools
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from drift.models.base import PretrainedModel, require_at_least
from drift.runtime.seeds import torch_generator
from experiments.ffhq.latents import CLASSES
from experiments.ffhq.settings import Settings

EMBEDDING = 64
EMBEDDING_STD = 0.01


class LatentGenerator(PretrainedModel):
    """Noise and class -> a latent, by an MLP.

    Args:
        dimensions: of the noise and of the latents.
        hidden, layers: width and number of the hidden layers.
        embedding_scale: what the table of classes is multiplied by. Adam's steps do not depend on the scale
            of a gradient, so that this is the ratio of the table's learning rate to that of the layers.
    """

    @register_to_config
    def __init__(
        self, dimensions: int = 512, hidden: int = 1024, layers: int = 3, embedding_scale: float = 1.0
    ):
        super().__init__()
        require_at_least(1, dimensions=dimensions, hidden=hidden, layers=layers)
        self.class_emb = nn.Embedding(len(CLASSES), EMBEDDING)
        widths = [dimensions + EMBEDDING, *[hidden] * layers]
        pairs = (layer for sizes in pairwise(widths) for layer in (nn.Linear(*sizes), nn.ReLU()))
        self.mlp = nn.Sequential(*pairs, nn.Linear(hidden, dimensions))
        nn.init.normal_(self.class_emb.weight, 0, EMBEDDING_STD / embedding_scale)
        for layer in self.mlp[::2]:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Latents `[B, dimensions]` of `noise [B, dimensions]` and `labels [B]`."""
        embedded = self.config.embedding_scale * self.class_emb(labels)
        return self.mlp(torch.cat([noise, embedded], dim=1))


class FfhqRun(NamedTuple):
    """One generator."""

    coupling: str
    eps: float
    seed: int

    def __str__(self) -> str:
        """The name of its folder."""
        return f"{self.coupling}-eps{self.eps:g}-seed{self.seed}"


def runs_of(settings: Settings) -> Iterator[FfhqRun]:
    seeds = range(settings.seed, settings.seed + settings.seeds)
    for seed, eps, coupling in itertools.product(seeds, settings.temps, settings.couplings):
        yield FfhqRun(coupling, eps, seed)


@torch.no_grad()
def generate(
    network: Callable[[Tensor, Tensor], Tensor],
    counts: list[int],
    dimensions: int,
    seed: int,
    device: str | torch.device = "cpu",
) -> list[Tensor]:
    """So many latents of each class, on the CPU."""
    found = []
    for label, count in enumerate(counts):
        noise = torch.randn(count, dimensions, generator=torch_generator(seed, "ffhq/samples", label))
        found.append(network(noise.to(device), torch.full((count,), label, device=device)).cpu())
    return found
