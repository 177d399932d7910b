"""Memory that a step of the stage drift needs on a GPU, counted without one: `benchmarks.step --estimate`.

A part of a step is taken on fake tensors, which have a shape and no numbers, by the code that the stage runs,
in the precision of a GPU, uncompiled; every storage is counted from its first appearance until nothing
refers to it any more. What lies there all the time is counted from the networks. A compiled network keeps
less for its backward pass, an allocator holds more than what is in use, and CUDA, its libraries and their
workspaces take something of their own: `RESERVE` stands for the latter two.
"""

import weakref
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

import drift.training.objective
from benchmarks.training import latent_shape, let_tensors_be_fake
from drift.field.loss import CHUNK_BYTES, KEEP_BYTES
from drift.launch import Ranks
from drift.models import Generator, LatentMAE
from drift.params import Settings
from drift.training.drift import FrozenEncoder, feature_dtype, generator_config
from drift.training.loop import autocast, parts
from drift.training.mae import mae_config
from drift.training.objective import (
    FeatureEncoder,
    Samples,
    StepSums,
    _encode_batch,
    drift_objective,
    step_sums,
)

RESERVE = 1.5e9, 0.05
"""Bytes, and a share of the tensors, that an estimate leaves free: a guess, not measured."""
CPU = torch.device("cpu")


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations make while this is on, and the most that there were at once."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._count, result)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            weakref.finalize(storage, self._forget, key, size)
            self.live += size
            self.peak = max(self.peak, self.live)

    def ignore(self, tensor: Tensor) -> None:
        """Leave a tensor that was there before out of the count."""
        self._known.add(tensor.untyped_storage()._cdata)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def estimate(settings: Settings) -> dict[str, int]:
    """Bytes of a step by what they are for, and of all (`total`); the settings say how the step is taken."""
    options, hardware, shape = settings.drift, settings.hardware, latent_shape(settings)
    passes = parts(options.classes_per_step, hardware.classes_per_pass)
    store = SimpleNamespace(shape=(1, *shape), num_classes=settings.data.classes)
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        let_tensors_be_fake(stack)
        # On a CPU, couplings see their numbers; chunks and type of a GPU's field and norms
        for bounds in (CHUNK_BYTES, KEEP_BYTES):
            stack.enter_context(patch.dict(bounds, cpu=bounds["cuda"]))
        stack.enter_context(patch.object(drift.training.objective, "_encode", _encode_first_part))
        stack.enter_context(patch.object(F, "group_norm", _float32_group_norm(F.group_norm)))
        model = Generator(generator_config(options, store))
        model.activation_checkpointing = hardware.activation_checkpointing
        encoder = LatentMAE(mae_config(settings.mae, store))
        weights = _bytes(model)
        most = _part_of_a_step(model, FrozenEncoder(encoder, CPU, compile=False), settings, passes)
    # `PairwiseSum` holds a sum for each one in the binary number of parts before the last
    sums = (len(passes) - 1).bit_count()
    result = {
        "weights, moments, EMA": weights * (3 + len(options.ema_decays)),
        "encoder": _bytes(encoder.encoder),
        "gradients of earlier parts": weights * sums,
        "a part of the step": most,
    }
    result["total"] = sum(result.values())
    result["needed"] = int(result["total"] * (1 + RESERVE[1]) + RESERVE[0])
    return result


def _part_of_a_step(model: Generator, encoder: FrozenEncoder, settings: Settings, passes: list[slice]) -> int:
    """Peak of what the first part, the largest, needs beside the networks; its gradient is counted."""
    options, hardware, field = settings.drift, settings.hardware, settings.field()
    classes, n, shape = passes[0].stop, options.generated, latent_shape(settings)
    ranks = Ranks(0, 1, CPU)
    how = {
        "drop_duplicates": options.duplicate_features == "drop",
        "feature_batch": hardware.feature_batch,
        "feature_dtype": feature_dtype(options.precision),
    }

    def generate() -> Tensor:
        count = classes * n
        noise, labels = torch.zeros(count, *shape), torch.zeros(count, dtype=torch.int64)
        style = torch.zeros(count, options.style_codebooks, dtype=torch.int64)
        with autocast(ranks, options.precision):
            return model(noise, labels, torch.ones(count), style).unflatten(0, (classes, n))

    def samples() -> Samples:
        negatives = None
        if field.negatives == "second_batch":
            with torch.no_grad():
                negatives = generate()
        real = (torch.zeros(classes, k, *shape) for k in (options.positives, options.unconditional))
        return Samples(generate(), *real, torch.ones(classes), negatives)

    memory = LiveBytes()
    for network in (model, encoder._encoder):
        for tensor in network.parameters():
            memory.ignore(tensor)
    with memory:
        sums: StepSums | None = None
        if len(passes) > 1 and field.normalization_scope == "batch":
            with torch.no_grad():
                given = [samples()]
                # Those of the other parts, which wait beside them
                for _ in passes[1:]:
                    given.append(Samples(*(None if t is None else t.clone() for t in given[0])))
            with autocast(ranks, options.precision):
                sums = step_sums(given[:1], encoder, field, **how)
            del given
        *inputs, negatives = samples()
        with autocast(ranks, options.precision):
            loss, _ = drift_objective(*inputs, encoder, field, negatives=negatives, sums=sums, **how)
        loss.backward()
    return memory.peak


def _encode_first_part(
    encoder: FeatureEncoder, latents: Tensor, drop_duplicates: bool, batch: int | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """`_encode`, where all parts but the first appear at once as what comes out of them: there may be 64."""
    encode = partial(_encode_batch, encoder, drop_duplicates, dtype)
    if batch is None or len(latents) <= batch:
        return encode(latents)
    first, rest = latents[:batch], latents[batch:]
    learning = torch.is_grad_enabled() and latents.requires_grad
    sets = checkpoint(encode, first, use_reentrant=False) if learning else encode(first)
    names = list(sets)
    others = list(_Others.apply(rest, *(sets[name].detach() for name in names)))
    return {name: torch.cat([sets.pop(name), others.pop(0)]) for name in names}


class _Others(torch.autograd.Function):
    """Feature sets of the size of those of latents `[B, ...]`, like given ones."""

    @staticmethod
    def forward(ctx, latents: Tensor, *like: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(latents)
        return tuple(vectors.new_empty(len(latents), *vectors.shape[1:]) for vectors in like)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        return torch.zeros_like(ctx.saved_tensors[0]), *[None] * len(gradients)


def _float32_group_norm(group_norm):
    """As autocast does it on a GPU."""

    def wrapper(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return group_norm(x.float(), *args, **kwargs)

    return wrapper


def _bytes(network: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters())
