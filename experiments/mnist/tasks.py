"""What the experiment trains, for the library's training loop: autoencoder, classifier, generators."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from drift.data.bank import batch_rows
from drift.field import FieldSettings, drifting_loss
from drift.field.couplings import COUPLINGS
from drift.runtime.seeds import derive_seed, torch_generator
from drift.training.log import Tree
from drift.training.loop import Run, Task
from drift.training.schedule import draw_omega
from experiments.mnist import settings
from experiments.mnist.digits import Digits
from experiments.mnist.networks import CLASSES, Autoencoder, DigitClassifier, LatentGenerator


class Supervised(Task[Tensor]):
    """A network that learns from batches of digits; each epoch has its own order."""

    ema_decays = ()
    at_once = None

    def __init__(self, model: nn.Module, digits: Digits, options: settings.Adam, run: Run):
        self.options, self.count, self._digits, self._run = options, options.batch_size, digits, run
        self.model = model.train().to(run.ranks.device)

    def prepare(self, step: int) -> Tensor:
        """The rows of a batch, `[B]`."""
        rows = batch_rows(step, self.options.batch_size, len(self._digits.labels), self._run.seed)
        return torch.from_numpy(rows)

    def loss(self, network: nn.Module, batch: Tensor, part: slice, totals: None) -> tuple[Tensor, Tree]:
        rows, device = batch[part], self._run.ranks.device
        images, labels = self._digits.inputs(rows).to(device), self._digits.labels[rows].to(device)
        loss = self.error(network(images), images, labels)
        return loss, {"loss": loss}

    def error(self, output: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError


class AutoencoderTraining(Supervised):
    """Mean squared error of the pixels."""

    name = "autoencoder"

    def __init__(self, digits: Digits, options: settings.Autoencoder, run: Run):
        torch.manual_seed(derive_seed(run.seed, "mnist/autoencoder"))
        super().__init__(Autoencoder(options.latent_dim), digits, options, run)

    def error(self, output: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.mse_loss(output, images)


class ClassifierTraining(Supervised):
    name = "classifier"

    def __init__(self, digits: Digits, options: settings.Classifier, run: Run):
        torch.manual_seed(derive_seed(run.seed, "mnist/classifier"))
        super().__init__(DigitClassifier(), digits, options, run)

    def error(self, output: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, labels)


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

    def __init__(
        self, latents: Tensor, labels: Tensor, field: FieldSettings, options: settings.Generator, run: Run
    ):
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


def field_settings(coupling: str, metric: str, tau: float, sinkhorn_iters: int) -> FieldSettings:
    """The field of one run, as the Sinkhorn paper's code has it on MNIST.

    Plans take cross minus self and leave the diagonal in; others take Algorithm 2 and mask it.
    """
    plan = COUPLINGS[coupling].transport
    return FieldSettings.sinkhorn(
        coupling=coupling,
        drift_form="split" if plan else "alg2_joint",
        dist_metric=metric,
        temps=(tau,),
        mask_self_neg=not plan,
        sinkhorn_iters=sinkhorn_iters,
        sinkhorn_marginal="weighted_cols",
    )
