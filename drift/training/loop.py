"""The training loop that MAE and generator share: AdamW, clip, EMA, log, checkpoint, resume.

Nothing in it remembers: every number that a step draws is a function of (seed, step), so a run that goes
on from a checkpoint computes what the uninterrupted run would have, to the bit on the same machine.
"""

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from drift.data.prefetch import Prefetch
from drift.errors import Stopped
from drift.launch import Ranks
from drift.models.ema import EMA
from drift.params import Hardware, Optimizer
from drift.signals import Asked, Signals
from drift.sums import PairwiseSum
from drift.training.checkpoint import load_optimizer, optimizer_tensors, save_checkpoint, shared_checkpoint
from drift.training.log import RunLog, Tree, to_numbers
from drift.training.schedule import learning_rate

LOG_FILE = "logs.jsonl"
_BUCKET = 2**25  # numbers that are sent together
Batch = TypeVar("Batch")


class Stateful(Protocol):
    """Something beside the model whose tensors belong into a checkpoint, such as the sample queue."""

    def state_after(self, steps: int) -> dict[str, Tensor]:
        """The state after so many steps; it may itself be ahead of them, as data are read in advance."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


Backward = Callable[[Tensor], None]
"""Takes the gradient of a part's loss, summed over what it consists of (latents, or classes)."""


def autocast(ranks: Ranks, precision: str) -> AbstractContextManager:
    """Mixed precision of the networks; `float32` is none."""
    dtype = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
    return torch.autocast(ranks.device.type, dtype, enabled=dtype is not None)


def parts(count: int, size: int | None) -> list[slice]:
    """`count` things in runs of at most `size`; None is one run."""
    size = size or max(1, count)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def train(
    model: nn.Module,
    prepare: Callable[[int], Batch],
    compute: Callable[[int, Batch, Backward], Tree],
    *,
    count: int,
    options: Optimizer,
    ema_decays: Sequence[float],
    hardware: Hardware,
    ranks: Ranks,
    folder: Path,
    what: str,
    extra: Stateful | None = None,
    evaluate: Callable[[Mapping[str, Tensor]], Tree] | None = None,
    evaluate_every: int = 1,
) -> list[EMA]:
    """Take `options.steps` optimizer steps of `model`, or those that are left of them.

    `prepare(step)` reads the batch of `compute(step, batch, backward)`; it is called in the order of the
    steps, ahead of them and in another thread where `hardware.prefetch` is not 0. `compute` hands the losses
    of its parts to `backward`, each a sum; what they add up to in all processes, divided by `count`, is the
    loss of the step. It returns statistics of the whole step to log, that `loss` among them. `evaluate` gets
    the weights of the first EMA every `evaluate_every` steps and after the last, and returns more to log. All
    processes call both.

    Gradients of equal parts add up to the same bits however many processes have computed them, if the number
    of parts in each is a power of two.

    Checkpoints and `logs.jsonl` go to `folder`, which only the first process reads and writes. Returns one
    EMA per decay. Raises FloatingPointError naming the first step with a loss or gradient that is not finite;
    no checkpoint is written after such a step. Raises Stopped after SIGTERM or SIGINT (see `drift.signals`),
    with a checkpoint of the step that was being taken.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay, fused=True
    )
    emas = [EMA(model, decay) for decay in ema_decays]
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=hardware.precision == "float16")

    def state(steps: int) -> dict[str, Tensor]:
        parts = {"model": model.state_dict(), "optimizer": optimizer_tensors(optimizer)}
        parts |= {f"ema_{i}": ema.state_dict() for i, ema in enumerate(emas)}
        if extra is not None:
            parts["extra"] = extra.state_after(steps)
        return {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}

    start = 0
    checkpoint = shared_checkpoint(folder, ranks)
    if checkpoint is not None:
        start = checkpoint.step
        model.load_state_dict(checkpoint.require("model", model.state_dict()))
        for i, ema in enumerate(emas):
            ema.load_state_dict(checkpoint.require(f"ema_{i}", ema.state_dict()))
        load_optimizer(optimizer, checkpoint.part("optimizer"))
        if extra is not None:
            extra.load_state_dict(checkpoint.require("extra", extra.state_after(start)))
        if checkpoint.state["scaler"]:  # empty if it was not in use
            scaler.load_state_dict(checkpoint.state["scaler"])
        if ranks.first:
            print(f"{what}: going on from step {start} ({checkpoint.path})", flush=True)

    log = RunLog(folder / LOG_FILE, what=what, steps=options.steps, start=start, active=ranks.first)
    first_bad = torch.full((), -1, dtype=torch.int64, device=ranks.device)
    with (
        closing(log),  # an error is told on a line of its own, not behind the bar
        Signals() as signals,
        Prefetch(prepare, start, options.steps, hardware.prefetch) as batches,
    ):
        for step in range(start, options.steps):
            rate = learning_rate(
                step,
                steps=options.steps,
                peak=options.lr,
                warmup_steps=options.warmup_steps,
                warmup_start=options.warmup_start_lr,
                schedule=options.lr_schedule,
                final_share=options.lr_final,
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            gradients = _Gradients(parameters, scaler)
            statistics = compute(step, batches.get(step), gradients.backward)
            gradients.average(count, ranks)
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(parameters, options.grad_clip)
            # Scaled gradients may overflow: the scaler leaves that step out and lowers its scale
            bad = ~torch.isfinite(statistics["loss"] if scaler.is_enabled() else norm + statistics["loss"])
            first_bad = torch.where(bad & (first_bad < 0), step, first_bad)  # looked at only now and then
            scaler.step(optimizer)
            scaler.update()
            for ema in emas:
                ema.update(model)
            log.step()
            last = step + 1 == options.steps
            measured = {}
            if evaluate is not None and ((step + 1) % evaluate_every == 0 or last):
                measured = evaluate(emas[0].state_dict())
            if step % hardware.log_every == 0 or last or measured:
                _require_finite(first_bad, scaler)
                log.write(step, {**to_numbers({**statistics, "grad_norm": norm, **measured}), "lr": rate})
            asked = Asked(*ranks.highest(signals.look()))
            if (step + 1) % hardware.checkpoint_every == 0 or last or asked.stop or asked.save:
                _require_finite(first_bad, scaler)
                if ranks.first:
                    save_checkpoint(
                        folder,
                        step + 1,
                        state(step + 1),
                        {"scaler": scaler.state_dict()},
                        keep_every=hardware.checkpoint_keep_every,
                    )
            if asked.stop and not last:
                ranks.barrier()
                name = signal.Signals(asked.stop).name
                told = (
                    f"{what}: {name} after step {step + 1} of {options.steps}; saved, run it again to go on"
                )
                raise Stopped(told if ranks.first else "", asked.stop)
    ranks.barrier()
    return emas


class _Gradients:
    """The gradient of a step from those of its parts."""

    def __init__(self, parameters: Sequence[nn.Parameter], scaler: torch.amp.GradScaler):
        self._parameters, self._scaler = parameters, scaler
        self._sum = PairwiseSum()

    def backward(self, loss: Tensor) -> None:
        """Take in the gradient of a part."""
        for parameter in self._parameters:
            parameter.grad = None
        self._scaler.scale(loss).backward()
        self._sum.add([p.grad if p.grad is not None else torch.zeros_like(p) for p in self._parameters])

    def average(self, count: int, ranks: Ranks) -> None:
        """Set every parameter's gradient, summed over parts and processes and divided by `count`."""
        total = self._sum.total()
        if ranks.world_size > 1:
            for bucket in _buckets(total):
                flat = ranks.sum(torch.cat([gradient.reshape(-1) for gradient in bucket]))
                sums = flat.split([gradient.numel() for gradient in bucket])
                for gradient, part in zip(bucket, sums, strict=True):
                    gradient.copy_(part.view_as(gradient))
        torch._foreach_div_(total, count)
        for parameter, gradient in zip(self._parameters, total, strict=True):
            parameter.grad = gradient


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in groups that are sent together, so that little memory is needed beside them."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    yield bucket


def _require_finite(first_bad: Tensor, scaler: torch.amp.GradScaler) -> None:
    if (step := int(first_bad)) >= 0:
        raise FloatingPointError(f"step {step}: the loss or its gradient is not finite")
    if scaler.is_enabled() and scaler.get_scale() < 1:
        raise FloatingPointError("the gradient does not fit into float16 however small the loss is made")
