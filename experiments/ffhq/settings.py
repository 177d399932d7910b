"""`params.yaml` of this experiment. The defaults are the paper's (arXiv 2603.12366, section 5.4)."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from drift.field.couplings import COUPLINGS
from drift.settings import Hardware, Optimizer
from drift.settings.sections import Count, CountOrZero, Decay, NotNegative, Positive, Section, Share, Text


class Data(Section):
    train: Text
    """An `.npz` with latents `[n, C]` of each class (`latents.CLASSES`)."""
    test: Text


class StandIn(Section):
    """Latents of nobody's face, for want of the paper's, which are not published."""

    dimensions: Count = 512
    train: Count = 1000
    """Of each class."""
    test: Count = 512
    """Of each class; also the most that training is watched with."""


class Train(Optimizer):
    hidden: Count = 1024
    layers: Count = 3
    generated: Annotated[int, Field(strict=True, ge=2)] = 682
    """Of each class and step; all latents of the class attract them."""
    steps: Count = 1000
    lr: Positive = 3e-4
    embedding_lr: Positive = 1e-3
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    lr_final: Share = 1 / 30
    warmup_steps: CountOrZero = 0
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: NotNegative = 0.0
    grad_clip: Positive = 5.0
    sinkhorn_iters: Count = 30
    evaluate_every: Count = 50
    """Steps between two looks at the transport cost to test latents."""


class Evaluation(Section):
    samples: Count = 1000
    """Of each class, generated and real ones."""
    decoder: Text | None = None
    """TorchScript file of ALAE's decoder, latents `[B, C]` -> images `[B, 3, H, W]` in [-1, 1], for the FID;
    null measures none. Its code runs, so trust its source."""
    inception: Text | None = None
    """Inception's weights for the FID; null is PyTorch's cache, into which they are downloaded."""


class Settings(Section):
    seed: CountOrZero
    """The first of them."""
    seeds: Count
    """Runs of each setting, with seeds one after the other."""
    couplings: Annotated[tuple[Literal[tuple(COUPLINGS)], ...], Field(min_length=1)]
    temps: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """Entropic temperatures eps of the squared distance."""
    data: Data
    stand_in: StandIn
    train: Train
    evaluation: Evaluation
    hardware: Hardware

    @model_validator(mode="after")
    def _each_once(self):
        for key in ("couplings", "temps"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key} = {list(values)}: allowed: each once")
        return self
