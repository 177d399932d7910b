"""`params.yaml` of the 2-D experiments -> typed settings; the defaults are the published sizes."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from drift.field.couplings import COUPLINGS
from drift.settings.sections import (
    Count,
    CountOrZero,
    Decay,
    Optimizer,
    Positive,
    Section,
    Switch,
)
from experiments.toy.targets import TARGETS

Couplings = Annotated[tuple[Literal[tuple(COUPLINGS)], ...], Field(min_length=1)]
Temperatures = Annotated[tuple[Positive, ...], Field(min_length=1)]
Metric = Literal["l2", "l2_sq"]


class Network(Section):
    noise: Count = 16
    """Dimensions of the noise."""
    width: Count = 256
    blocks: CountOrZero = 6


class Train(Optimizer):
    steps: Count = 5000
    batch: Annotated[int, Field(strict=True, ge=2)] = 1024
    """Generated points, and fresh points of the target, in a step."""
    warmup_steps: CountOrZero = 0
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    grad_clip: Positive = 1e9
    """As good as none."""
    evaluate_every: Count = 100
    """Steps between two measurements of W2^2."""
    points: Count = 1000
    """Points on either side of it."""
    sinkhorn_iters: Count = 20
    drift_tau_scale: Switch = False
    """Multiply V by the slope of its log kernel, 2 / eps (l2_sq) or 1 / eps (l2)."""


class Particles(Section):
    """Points that follow the field themselves, without a network."""

    count: Annotated[int, Field(strict=True, ge=2)] = 100
    """Particles, and as many points of the target."""
    steps: Count = 2000
    step_size: Positive = 0.1
    temps: Temperatures = (10.0, 1.0, 0.1, 0.01)
    dist_metric: Metric = "l2_sq"
    sinkhorn_iters: Count = 100
    mask_self_neg: Switch = True
    """Keep a particle from repelling itself, but in plans."""
    frames: Annotated[int, Field(strict=True, ge=2)] = 60
    """Of the animation; they lie closer together at the start, where things move."""


class Toy(Section):
    """All of `params.yaml`."""

    seed: CountOrZero
    """The first of them; also that of the particles."""
    seeds: Count
    """Runs of each setting, with seeds one after the other."""
    targets: Annotated[tuple[Literal[tuple(TARGETS)], ...], Field(min_length=1)]
    dist_metrics: Annotated[tuple[Metric, ...], Field(min_length=1)]
    couplings: Couplings
    temps: Temperatures
    """Entropic temperatures eps of the plain distance or its square."""
    network: Network
    train: Train
    particles: Particles

    @model_validator(mode="after")
    def _each_once(self):
        for key in ("targets", "dist_metrics", "couplings", "temps"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key} = {list(values)}: allowed: each once")
        return self
