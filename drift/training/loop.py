"""The training loop that MAE and generator share: AdamW, clip, EMA, log, checkpoint, resume.

Nothing in it remembers: every number that a step draws is a function of (seed, step), so a run that goes
on from a checkpoint computes what the uninterrupted run would have, to the bit on the same machine.
"""

import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from drift.errors import Stopped
from drift.launch import Ranks
from drift.models.ema import EMA
from drift.params import Hardware, Optimizer
from drift.signals import Asked, Signals
from drift.training.checkpoint import load_checkpoint, load_optimizer, optimizer_tensors, save_checkpoint
from drift.training.log import RunLog, Tree, to_numbers
from drift.training.schedule import learning_rate

LOG_FILE = "logs.jsonl"


class Stateful(Protocol):
    """Something beside the model whose tensors belong into a checkpoint, such as the sample queue."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


def autocast(ranks: Ranks, precision: str) -> AbstractContextManager:
    """Mixed precision of the networks; `float32` is none."""
    return torch.autocast(ranks.device.type, torch.bfloat16, enabled=precision == "bfloat16")


def train(
    model: nn.Module,
    compute: Callable[[int], tuple[Tensor, Tree]],
    *,
    options: Optimizer,
    ema_decays: Sequence[float],
    hardware: Hardware,
    ranks: Ranks,
    folder: Path,
    what: str,
    extra: Stateful | None = None,
) -> list[EMA]:
    """Take `options.steps` optimizer steps of `model`, or those that are left of them.

    `compute(step)` gives this process's loss, whose mean over processes is the loss of the step, and
    statistics of the whole step to log, that `loss` among them. Checkpoints and `logs.jsonl` go to
    `folder`. Returns one EMA per decay. Raises FloatingPointError naming the first step with a loss or
    gradient that is not finite; no checkpoint is written after such a step. Raises Stopped after SIGTERM
    or SIGINT (see `drift.signals`), with a checkpoint of the step that was being taken.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay
    )
    emas = [EMA(model, decay) for decay in ema_decays]

    def state() -> dict[str, Tensor]:
        parts = {"model": model.state_dict(), "optimizer": optimizer_tensors(optimizer)}
        parts |= {f"ema_{i}": ema.state_dict() for i, ema in enumerate(emas)}
        if extra is not None:
            parts["extra"] = extra.state_dict()
        return {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}

    start = 0
    checkpoint = load_checkpoint(folder, ranks.device)
    if checkpoint is not None:
        start = checkpoint.step
        model.load_state_dict(checkpoint.require("model", model.state_dict()))
        for i, ema in enumerate(emas):
            ema.load_state_dict(checkpoint.require(f"ema_{i}", ema.state_dict()))
        load_optimizer(optimizer, checkpoint.part("optimizer"))
        if extra is not None:
            extra.load_state_dict(checkpoint.require("extra", extra.state_dict()))
        if ranks.first:
            print(f"{what}: going on from step {start} ({checkpoint.path})", flush=True)

    log = RunLog(folder / LOG_FILE, what=what, steps=options.steps, start=start, active=ranks.first)
    first_bad = torch.full((), -1, dtype=torch.int64, device=ranks.device)
    with Signals() as signals:
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
            loss, statistics = compute(step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            _average_gradients(parameters, ranks)
            norm = nn.utils.clip_grad_norm_(parameters, options.grad_clip)
            bad = ~torch.isfinite(norm + statistics["loss"])
            first_bad = torch.where(bad & (first_bad < 0), step, first_bad)  # looked at only now and then
            optimizer.step()
            for ema in emas:
                ema.update(model)
            log.step()
            last = step + 1 == options.steps
            if step % hardware.log_every == 0 or last:
                _require_finite(first_bad)
                log.write(step, {**to_numbers({**statistics, "grad_norm": norm}), "lr": rate})
            asked = Asked(*ranks.highest(signals.look()))
            if (step + 1) % hardware.checkpoint_every == 0 or last or asked.stop or asked.save:
                _require_finite(first_bad)
                if ranks.first:
                    save_checkpoint(folder, step + 1, state(), keep_every=hardware.checkpoint_keep_every)
            if asked.stop and not last:
                log.close()
                ranks.barrier()
                name = signal.Signals(asked.stop).name
                told = (
                    f"{what}: {name} after step {step + 1} of {options.steps}; saved, run it again to go on"
                )
                raise Stopped(told if ranks.first else "", asked.stop)
    log.close()
    ranks.barrier()
    return emas


def _average_gradients(parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Replace every gradient by its mean over processes, in one collective."""
    if ranks.world_size == 1:
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = ranks.sum(torch.cat([g.reshape(-1) for g in gradients])) / ranks.world_size
    for parameter, mean in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
        parameter.grad = mean.view_as(parameter)


def _require_finite(first_bad: Tensor) -> None:
    if (step := int(first_bad)) >= 0:
        raise FloatingPointError(f"step {step}: the loss or its gradient is not finite")
