"""Latents of MNIST -> a generator for every coupling, kernel, temperature and seed.

    python -m experiments.mnist.train --out artifacts/mnist/generators

What was trained stays in .work: a run that was killed goes on, and one that is there is not trained again.
"""

import math
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import drift.field
from drift.field import FieldSettings, drifting_loss
from drift.field.couplings import COUPLINGS
from drift.runtime.files import check_output, sha256, write_json
from drift.runtime.processes import run_stage
from drift.runtime.seeds import derive_seed, torch_generator
from drift.training.log import Tree
from drift.training.loop import Run, Task
from drift.training.schedule import draw_omega
from experiments.common import load_section, script_parser
from experiments.mnist import networks
from experiments.mnist.digits import open_digits
from experiments.mnist.measure import encode
from experiments.mnist.networks import CLASSES, Autoencoder, LatentGenerator
from experiments.mnist.runs import RUN_FILE, runs_of
from experiments.mnist.settings import Generator, Settings
from experiments.training import publish, train_once, with_eta

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Batch(NamedTuple):
    """What is drawn for a step, of C = latent_dim channels."""

    noise: Tensor
    """`[10, N, noise_dim]`"""
    positives: Tensor
    """`[10, P, 1, C]`"""
    unconditional: Tensor
    """`[10, U, 1, C]`"""
    omega: Tensor
    """`[10]`; one value for all classes."""


class GeneratorTraining(Task[Batch]):
    """One generator of the sweep: all ten classes in every step."""

    name, count, at_once = "generator", CLASSES, None

    def __init__(self, latents: Tensor, labels: Tensor, field: FieldSettings, options: Generator, run: Run):
        self.options, self.ema_decays, self._run = options, [options.ema_decay], run
        self._latents, self._field = latents[:, None], field
        self._rows = [torch.from_numpy(np.flatnonzero(labels == label)) for label in range(CLASSES)]
        torch.manual_seed(derive_seed(run.seed, "mnist/generator"))
        self.model = LatentGenerator(options.noise_dim, latents.shape[1], options.hidden, options.layers)
        self.model.train().to(run.ranks.device)

    def prepare(self, step: int) -> Batch:
        """A function of (seed, step): runs that differ in their field alone see the same numbers."""
        options, generator = self.options, torch_generator(self._run.seed, "mnist/step", step)
        noise = torch.randn(CLASSES, options.generated, options.noise_dim, generator=generator)
        positives = [
            rows[torch.randint(len(rows), (options.positives,), generator=generator)] for rows in self._rows
        ]
        shape = CLASSES, options.unconditional
        unconditional = torch.randint(len(self._latents), shape, generator=generator)
        omega = draw_omega(1, options, generator).expand(CLASSES)
        return Batch(noise, self._latents[torch.stack(positives)], self._latents[unconditional], omega)

    def loss(self, network: nn.Module, batch: Batch, part: slice, totals: None) -> tuple[Tensor, Tree]:
        device = self._run.ranks.device
        noise, positives, unconditional, omega = (values[part].to(device) for values in batch)
        labels = torch.arange(CLASSES, device=device)[part]
        inputs = labels[:, None].expand(noise.shape[:2]), omega[:, None].expand(noise.shape[:2])
        x = network(noise.flatten(0, 1), *(values.flatten() for values in inputs))
        x = x.unflatten(0, noise.shape[:2])[:, :, None]  # [classes, N, 1, C]
        return drifting_loss(x, positives, unconditional, omega, self._field)


def field_settings(
    coupling: str, metric: str, tau: float, channels: int, sinkhorn_iters: int
) -> FieldSettings:
    """The field of one run, as the Sinkhorn paper's checkpoints for MNIST were trained.

    Plans take cross minus self and leave the diagonal in; others take Algorithm 2 and mask it. S is a length
    for both metrics, unlike in that paper's code for ImageNet. The logits are -(d / S)^p / (tau sqrt(C)) with
    p = 1 or 2, where the library's are -(d / (S sqrt(C)))^p / tau.
    """
    plan = COUPLINGS[coupling].transport
    unit = math.sqrt(channels) if metric == "l2_sq" else 1.0
    return FieldSettings.sinkhorn(
        coupling=coupling,
        drift_form="split" if plan else "alg2_joint",
        dist_metric=metric,
        temps=(tau / unit,),
        mask_self_neg=not plan,
        sinkhorn_iters=sinkhorn_iters,
        sinkhorn_marginal="weighted_cols",
        scale_statistic="mean_length",
    )


def train_sweep(settings: Settings, folder: Path, out: Path) -> None:
    """`out/<run>` of every run of the sweep."""
    digits, autoencoder = open_digits(settings.data, "train"), folder / "autoencoder"
    latents = encode(Autoencoder.from_pretrained(autoencoder), digits.inputs())
    options, code, found = settings.generator, (drift.field, networks, sys.modules[__name__]), {}
    decides = {"digits": digits.digest, "autoencoder": sha256(autoencoder / WEIGHTS)}
    decides |= options.model_dump(mode="json")
    for run in with_eta(list(runs_of(settings.sweep))):
        field = field_settings(run.coupling, run.metric, run.tau, latents.shape[1], options.sinkhorn_iters)
        make = partial(GeneratorTraining, latents, digits.labels, field, options)
        decides |= run._asdict()
        found[run.name] = train_once("mnist/generator", run.seed, decides, code, make, settings.hardware)
        write_json(found[run.name] / RUN_FILE, run._asdict())
    publish(found, out)


def main() -> None:
    parser = script_parser(__doc__, "mnist")
    parser.add_argument("--networks", type=Path, default=Path("artifacts/mnist/networks"))
    args = parser.parse_args()
    check_output(args.out)
    train_sweep(load_section(args.params, Settings), args.networks, args.out)


if __name__ == "__main__":
    run_stage(main)
