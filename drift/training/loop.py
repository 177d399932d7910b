"""The training loop that MAE and generator share: AdamW, clip, EMA, log, checkpoint, resume.

Nothing in it remembers: every number that a step draws is a function of (seed, step), so a run that goes
on from a checkpoint computes what the uninterrupted run would have: to the bit on a CPU, and on a GPU with
`hardware.deterministic`; otherwise but for the rounding of sums whose order the GPU leaves open.
"""

import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from drift.models.ema import EMA
from drift.runtime.errors import Stopped
from drift.runtime.processes import Ranks
from drift.runtime.signals import Asked, Signals
from drift.runtime.sums import PairwiseSum
from drift.settings import ROUNDING_KEYS, Hardware, Optimizer
from drift.training.checkpoint import load_optimizer, optimizer_tensors, save_checkpoint, shared_checkpoint
from drift.training.log import RunLog, Tree, to_numbers
from drift.training.prefetch import Prefetch
from drift.training.schedule import learning_rate

LOG_FILE = "logs.jsonl"
_BUCKET = 2**23
"""Numbers that are sent together, 32 MB: little enough that the first are on their way soon, and that few are
left to send after the backward pass. DDP takes 25 MB; other sizes have not been measured on GPUs."""
Batch = TypeVar("Batch")


class Stateful(Protocol):
    """Something beside the model whose tensors belong into a checkpoint, such as the sample queue."""

    def state_after(self, steps: int) -> dict[str, Tensor]:
        """The state after so many steps; it may itself be ahead of them, as data are read in advance."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


class Backward(Protocol):
    """Takes the gradient of a part's loss, summed over what it consists of (latents, or classes)."""

    def __call__(self, loss: Tensor, *, last: bool) -> None:
        """`last`: no other part follows in this step, so gradients go to the other processes as they come."""


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
    no checkpoint is written after such a step. Raises Stopped after SIGTERM or SIGINT (see `drift.runtime.signals`),
    with a checkpoint of the step that was being taken.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay, fused=True
    )
    emas = [EMA(model, decay) for decay in ema_decays]
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=options.precision == "float16")
    gradients = _Gradients(parameters, scaler, ranks)

    def state(steps: int) -> dict[str, Tensor]:
        parts = {"model": model.state_dict(), "optimizer": optimizer_tensors(optimizer)}
        parts |= {f"ema_{i}": ema.state_dict() for i, ema in enumerate(emas)}
        if extra is not None:
            parts["extra"] = extra.state_after(steps)
        return {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}

    def resume() -> int:
        """Steps that were taken before; a function, as the whole checkpoint is let go of when it returns."""
        checkpoint = shared_checkpoint(folder, ranks)
        if checkpoint is None:
            return 0
        model.load_state_dict(checkpoint.require("model", model.state_dict()))
        for i, ema in enumerate(emas):
            ema.load_state_dict(checkpoint.require(f"ema_{i}", ema.state_dict()))
        load_optimizer(optimizer, checkpoint.part("optimizer"))
        if extra is not None:
            extra.load_state_dict(checkpoint.require("extra", extra.state_after(checkpoint.step)))
        if checkpoint.state["scaler"]:  # empty if it was not in use
            scaler.load_state_dict(checkpoint.state["scaler"])
        if ranks.first:
            print(f"{what}: going on from step {checkpoint.step} ({checkpoint.path})", flush=True)
            _tell_of_rounding(what, checkpoint.state.get("rounding", rounding), rounding)
        return checkpoint.step

    rounding = _what_rounds(hardware, ranks)
    start = resume()
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
            statistics = compute(step, batches.get(step), gradients.backward)
            gradients.average(count)
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
                        {"scaler": scaler.state_dict(), "rounding": rounding},
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
    """The gradient of a step from those of its parts, summed over processes during the last backward pass.

    A bucket is sent as soon as its gradients are complete and the buckets before it are sent, on a GPU in a
    stream of its own. All processes need the same order for that: as in DDP it is the one in which the first
    process gets the gradients of the first step. It changes no bit of them.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], scaler: torch.amp.GradScaler, ranks: Ranks):
        self._parameters, self._scaler, self._ranks = parameters, scaler, ranks
        self._stream = torch.cuda.Stream(ranks.device) if ranks.device.type == "cuda" else None
        self._buckets: list[list[int]] = []  # indices of parameters
        if ranks.world_size > 1:
            self._buckets = self._in_buckets(reversed(range(len(parameters))))
        self._order_is_known = ranks.world_size == 1
        self._start()

    def _start(self) -> None:
        self._sum = PairwiseSum()
        self._complete: dict[int, Tensor] = {}  # by index, as they come
        self._sent = 0  # buckets

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Take in the gradient of a part."""
        for parameter in self._parameters:
            parameter.grad = None
        if not last:
            self._scaler.scale(loss).backward()
            self._sum.add([_gradient(parameter) for parameter in self._parameters])
            return
        hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._finish, index))
            for index, parameter in enumerate(self._parameters)
        ]
        try:
            self._scaler.scale(loss).backward()
        finally:
            for hook in hooks:
                hook.remove()
        for index, parameter in enumerate(self._parameters):
            if index not in self._complete:  # the loss does not depend on it
                self._finish(index, parameter)
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def _finish(self, index: int, parameter: nn.Parameter) -> None:
        """Complete the sum over parts for one parameter, and send what can be sent."""
        self._complete[index] = self._sum.finish(index, _gradient(parameter))
        parameter.grad = None
        while self._sent < len(self._buckets) and self._complete.keys() >= set(self._buckets[self._sent]):
            self._send([self._complete[i] for i in self._buckets[self._sent]])
            self._sent += 1

    def _send(self, bucket: Sequence[Tensor]) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        # Tensors are held until `backward` has waited for the stream: no memory is reused too early
        with torch.cuda.stream(self._stream):
            flat = self._ranks.sum(torch.cat([gradient.reshape(-1) for gradient in bucket]))
            sums = flat.split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, sums, strict=True):
                gradient.copy_(part.view_as(gradient))

    def average(self, count: int) -> None:
        """Set every parameter's gradient, summed over parts and processes and divided by `count`."""
        assert self._complete, "no part was the last"
        total = [self._complete[index] for index in range(len(self._parameters))]
        torch._foreach_div_(total, count)
        for parameter, gradient in zip(self._parameters, total, strict=True):
            parameter.grad = gradient
        if not self._order_is_known:
            self._buckets = self._in_buckets(self._ranks.from_first(list(self._complete)))
            self._order_is_known = True
        self._start()

    def _in_buckets(self, order: Iterable[int]) -> list[list[int]]:
        """Parameters in groups of at most `_BUCKET` numbers, but for a parameter that has more."""
        buckets: list[list[int]] = []
        room = 0
        for index in order:
            size = self._parameters[index].numel()
            if not buckets or size > room:
                buckets.append([])
                room = _BUCKET
            buckets[-1].append(index)
            room -= size
        return buckets


def _what_rounds(hardware: Hardware, ranks: Ranks) -> dict[str, Any]:
    """By name, what decides how the numbers of a step are rounded, and nothing else of them."""
    settings = {f"hardware.{key}": getattr(hardware, key) for key in ROUNDING_KEYS}
    return {
        **settings,
        "processes": ranks.world_size,
        "device": ranks.device.type,
        "torch": torch.__version__,
    }


def _tell_of_rounding(what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Tell rather than start over: a result of other rounding is as good, and the change may be wanted."""
    changes = [f"{key} was {before.get(key)} and is {now[key]}" for key in now if before.get(key) != now[key]]
    if changes:
        print(
            f"{what}: {', '.join(changes)}: the result will differ by rounding from that of a run without a "
            "change",
            flush=True,
        )


def _gradient(parameter: nn.Parameter) -> Tensor:
    return parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)


def _require_finite(first_bad: Tensor, scaler: torch.amp.GradScaler) -> None:
    if (step := int(first_bad)) >= 0:
        raise FloatingPointError(f"step {step}: the loss or its gradient is not finite")
    if scaler.is_enabled() and scaler.get_scale() < 1:
        raise FloatingPointError("the gradient does not fit into float16 however small the loss is made")
