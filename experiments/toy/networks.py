"""The generators of the 2-D experiments: residual MLPs, one per seed, trained side by side."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from drift.runtime.seeds import derive_seed

RESIDUAL = 0.9


class Block(nn.Module):
    """x + 0.9 h(x), with twice the width inside."""

    def __init__(self, width: int):
        super().__init__()
        self.h = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.LayerNorm(2 * width),
            nn.SiLU(),
            nn.Linear(2 * width, width),
            nn.LayerNorm(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + RESIDUAL * self.h(x)


def network(noise: int, width: int, blocks: int, seed: int) -> nn.Sequential:
    """Noise `[N, noise]` -> points `[N, 2]`, which all begin near the origin."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "toy/init"))
        stem = [nn.Linear(noise, width), nn.LayerNorm(width), nn.SiLU()]
        head = nn.Linear(width, 2)
        nn.init.normal_(head.weight, std=0.001)
        nn.init.zeros_(head.bias)
        return nn.Sequential(*stem, *(Block(width) for _ in range(blocks)), head)


class Networks(nn.Module):
    """One network per seed; they share nothing."""

    def __init__(self, noise: int, width: int, blocks: int, seeds: Sequence[int]):
        super().__init__()
        self.members = nn.ModuleList(network(noise, width, blocks, seed) for seed in seeds)

    def forward(self, noise: Tensor) -> Tensor:
        """Noise of each `[R, N, noise]` -> points of each `[R, N, 2]`."""
        return torch.stack([member(z) for member, z in zip(self.members, noise, strict=True)])
