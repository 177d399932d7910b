"""Latents of six classes -> a generator for every coupling, temperature and seed.

    python -m experiments.ffhq.train --out artifacts/ffhq/generators

What was trained stays in .work: a run that was killed goes on, and one that is there is not trained again.
"""

import math
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

import drift.field
from drift.field import FieldSettings, drifting_loss
from drift.runtime.files import check_output, sha256
from drift.runtime.processes import run_stage
from drift.runtime.seeds import derive_seed, torch_generator
from drift.training.log import Tree
from drift.training.loop import Measured, Run, Task
from experiments.common import load_section, script_parser, w2_squared
from experiments.ffhq import generator
from experiments.ffhq.generator import LatentGenerator, generate, runs_of
from experiments.ffhq.latents import CLASSES, read_latents
from experiments.ffhq.settings import Settings, Train
from experiments.training import publish, train_once, with_eta

WATCHED = 512
"""Test latents of a class, at most, that training is watched with."""


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
        return loss * x.shape[-1], statistics

    @torch.no_grad()
    def evaluate(self, done: int, weights: Mapping[str, Tensor]) -> Measured:
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
        return Measured({"emd": torch.tensor(costs).mean()})


def main() -> None:
    args = script_parser(__doc__, "ffhq").parse_args()
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
        code = (drift.field, generator, sys.modules[__name__])
        decides |= run._asdict()
        found[str(run)] = train_once("ffhq/generator", run.seed, decides, code, make, settings.hardware)
    publish(found, out)


if __name__ == "__main__":
    run_stage(main)
