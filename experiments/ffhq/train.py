"""Latents of six classes -> a generator for every coupling, temperature and seed.

    python -m experiments.ffhq.train --out artifacts/ffhq/generators

What was trained stays in .work: a run that was killed goes on, and one that is there is not trained again.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.func import functional_call

import drift.field
from drift.field import FieldSettings, drifting_loss
from drift.models.base import PretrainedModel, require_at_least
from drift.runtime.files import check_output, sha256
from drift.runtime.processes import run_stage
from drift.runtime.seeds import derive_seed, torch_generator
from drift.training.log import Tree
from drift.training.loop import Run, Task
from experiments.common import load_section, publish, train_once, w2_squared, with_eta
from experiments.ffhq.latents import CLASSES, read_latents
from experiments.ffhq.settings import Settings, Train

EMBEDDING = 64
EMBEDDING_STD = 0.01
WATCHED = 512
"""Test latents of a class, at most, that training is watched with."""


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


def field_settings(coupling: str, eps: float, dimensions: int, sinkhorn_iters: int) -> FieldSettings:
    """V = P(x, y) y - P(x, x) x by rows P of a coupling of exp(-||x - y||^2 / eps), with nothing masked.

    The library's logits are -d / (S sqrt(C) tau); here S = 1, so that tau = eps / sqrt(C).
    """
    return FieldSettings.sinkhorn(
        coupling=coupling,
        drift_form="split",
        dist_metric="l2_sq",
        temps=(eps / math.sqrt(dimensions),),
        mask_self_neg=False,
        sinkhorn_iters=sinkhorn_iters,
        unit_scale=True,
        normalize_drift_theta=False,
    )


class FfhqTraining(Task[Tensor]):
    """All classes in every step, one after the other, as each has its own number of latents."""

    name, count, at_once = "generator", len(CLASSES), 1
    ema_decays = (0.0,)  # the weights themselves

    def __init__(
        self, train: list[Tensor], test: list[Tensor], field: FieldSettings, options: Train, run: Run
    ):
        self.options, self._run, self._field = options, run, field
        self.evaluate_every = options.evaluate_every
        self._train, self._test = train, [latents[:WATCHED] for latents in test]
        torch.manual_seed(derive_seed(run.seed, "ffhq/generator"))
        self.model = LatentGenerator(
            train[0].shape[1], options.hidden, options.layers, options.embedding_lr / options.lr
        )
        self.model.train().to(run.ranks.device)

    def prepare(self, step: int) -> Tensor:
        """Noise `[6, N, C]`."""
        shape = len(CLASSES), self.options.generated, self._train[0].shape[1]
        return torch.randn(shape, generator=torch_generator(self._run.seed, "ffhq/noise", step))

    def loss(self, network: nn.Module, batch: Tensor, part: slice, totals: None) -> tuple[Tensor, Tree]:
        """Of one class, the sum of V^2 over samples and channels, divided by the number of samples."""
        device, label = self._run.ranks.device, part.start
        noise, positives = batch[label].to(device), self._train[label].to(device)[None, :, None]
        x = network(noise, torch.full((len(noise),), label, device=device))[None, :, None]
        omega = torch.ones(1, device=device)
        loss, statistics = drifting_loss(x, positives, positives[:, :0], omega, self._field)
        loss = loss * x.shape[-1]
        return loss, {**statistics, "loss": loss}

    @torch.no_grad()
    def evaluate(self, weights: Mapping[str, Tensor]) -> Tree:
        """W2^2 to as many test latents, the mean over the classes."""
        counts = [len(latents) for latents in self._test]
        made = generate(
            lambda *inputs: functional_call(self.model, dict(weights), inputs),
            counts,
            self._test[0].shape[1],
            self._run.seed,
            self._run.ranks.device,
        )
        costs = [w2_squared(x.numpy(), y.numpy()) for x, y in zip(made, self._test, strict=True)]
        return {"emd": torch.tensor(costs).mean()}


@torch.no_grad()
def generate(network, counts: list[int], dimensions: int, seed: int, device="cpu") -> list[Tensor]:
    """So many latents of each class, on the CPU."""
    found = []
    for label, count in enumerate(counts):
        noise = torch.randn(count, dimensions, generator=torch_generator(seed, "ffhq/samples", label))
        found.append(network(noise.to(device), torch.full((count,), label, device=device)).cpu())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", type=Path, default=Path("experiments/ffhq/params.yaml"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    settings = load_section(args.params, Settings)
    check_output(args.out)
    train_all(settings, args.out)


def train_all(settings: Settings, out: Path) -> None:
    """`out/<run>` of every run."""
    data, options, found = settings.data, settings.train, {}
    train, test = read_latents(data.train, "data.train"), read_latents(data.test, "data.test")
    decides = options.model_dump(mode="json") | {"train": sha256(data.train)}
    for run in with_eta(list(runs_of(settings))):
        field = field_settings(run.coupling, run.eps, train[0].shape[1], options.sinkhorn_iters)
        make = partial(FfhqTraining, train, test, field, options)
        code = (drift.field, sys.modules[__name__])
        decides |= run._asdict()
        found[str(run)] = train_once("ffhq/generator", run.seed, decides, code, make, settings.hardware)
    publish(found, out)


if __name__ == "__main__":
    run_stage(main)
