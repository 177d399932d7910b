"""MNIST -> the autoencoder whose latents the generators learn, and the classifier that reads their digits.

    python -m experiments.mnist.prepare --out artifacts/mnist/networks

What was trained stays in .work: a run that was killed goes on, and one that is there is not trained again.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from drift.data import bank
from drift.data.bank import batch_rows
from drift.runtime.files import check_output
from drift.runtime.processes import run_stage
from drift.runtime.seeds import derive_seed
from drift.training.log import Tree
from drift.training.loop import Run, Task
from experiments.common import load_section, script_parser
from experiments.mnist import networks
from experiments.mnist.digits import Digits, open_digits
from experiments.mnist.settings import Adam, Autoencoder, Classifier, Settings
from experiments.training import publish, train_once


class Supervised(Task[Tensor]):
    """A network that learns from batches of digits; each epoch has its own order."""

    ema_decays = ()
    at_once = None

    def __init__(self, model: nn.Module, digits: Digits, options: Adam, run: Run):
        self.options, self.count, self._digits, self._run = options, options.batch_size, digits, run
        self.model = model.train().to(run.ranks.device)

    def prepare(self, step: int) -> Tensor:
        """The rows of a batch, `[B]`."""
        rows = batch_rows(step, self.options.batch_size, len(self._digits.labels), self._run.seed)
        return torch.from_numpy(rows)

    def loss(self, network: nn.Module, batch: Tensor, part: slice, totals: None) -> tuple[Tensor, Tree]:
        rows, device = batch[part], self._run.ranks.device
        images, labels = self._digits.inputs(rows).to(device), self._digits.labels[rows].to(device)
        return self.error(network(images), images, labels), {}

    def error(self, output: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError


class AutoencoderTraining(Supervised):
    """Mean squared error of the pixels."""

    name = "autoencoder"

    def __init__(self, digits: Digits, options: Autoencoder, run: Run):
        torch.manual_seed(derive_seed(run.seed, "mnist/autoencoder"))
        super().__init__(networks.Autoencoder(options.latent_dim), digits, options, run)

    def error(self, output: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.mse_loss(output, images)


class ClassifierTraining(Supervised):
    name = "classifier"

    def __init__(self, digits: Digits, options: Classifier, run: Run):
        torch.manual_seed(derive_seed(run.seed, "mnist/classifier"))
        super().__init__(networks.DigitClassifier(), digits, options, run)

    def error(self, output: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, labels)


def train_networks(settings: Settings, out: Path) -> None:
    """`out/autoencoder` and `out/classifier`."""
    digits = open_digits(settings.data, "train")
    kinds = {"classifier": ClassifierTraining, "autoencoder": AutoencoderTraining}
    code, found = (bank, networks, sys.modules[__name__]), {}
    if settings.autoencoder.source is not None:
        found["autoencoder"] = Path(settings.autoencoder.source)
        networks.Autoencoder.from_pretrained(
            found["autoencoder"]
        )  # or a line that says what is wrong with it
    for name in [name for name in kinds if name not in found]:
        options = getattr(settings, name)
        decides = {"digits": digits.digest} | options.model_dump(mode="json")
        make = partial(kinds[name], digits, options)
        found[name] = train_once(f"mnist/{name}", settings.seed, decides, code, make, settings.hardware)
    publish(found, out)


def main() -> None:
    args = script_parser(__doc__, "mnist").parse_args()
    check_output(args.out)
    train_networks(load_section(args.params, Settings), args.out)


if __name__ == "__main__":
    run_stage(main)
