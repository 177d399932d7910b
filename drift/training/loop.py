"""The training loop that MAE and generator share: AdamW, clip, EMA, log, checkpoint, resume.

The loop remembers nothing. Every number that a step draws is a function of (seed, step), so a resumed run
computes what the uninterrupted run would have: to the bit on a CPU, and on a GPU with
`hardware.deterministic`. Without it, a GPU leaves the order of sums open, and results differ by rounding.
"""

import signal
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from drift.models.ema import EMA
from drift.runtime.errors import Stopped
from drift.runtime.processes import Ranks
from drift.runtime.signals import Asked, Signals
from drift.settings import ROUNDING_KEYS, Hardware, Optimizer
from drift.training.checkpoint import Checkpoints, Saved, load, optimizer_tensors
from drift.training.compile import Compiled
from drift.training.log import RunLog, Tree, leaves, rebuilt, to_numbers
from drift.training.schedule import learning_rate

LOG_FILE = "logs.jsonl"
Batch = TypeVar("Batch")


class Run(NamedTuple):
    """Seed, ways and place of a training run."""

    seed: int
    hardware: Hardware
    ranks: Ranks
    folder: Path
    """Of checkpoints and `logs.jsonl`; the first process alone reads and writes it."""


class Task(ABC, Generic[Batch]):
    """What is trained, and on what."""

    name: str
    model: nn.Module
    options: Optimizer
    ema_decays: Sequence[float]
    count: int
    """Classes or latents that a process has in a step; each has as many."""
    at_once: int | None
    """How many of them are computed at once; None is all."""
    evaluate_every: int | None = None

    @abstractmethod
    def prepare(self, step: int) -> Batch:
        """Read and draw what a step needs. Another thread calls it, in the order of the steps."""

    def totals(self, network: nn.Module, batch: Batch, parts: Sequence[slice]) -> Any:
        """What the loss of each part needs of all of them."""
        return None

    @abstractmethod
    def loss(self, network: nn.Module, batch: Batch, part: slice, totals: Any) -> tuple[Tensor, Tree]:
        """The mean loss of a part by `network`, which computes `model`, and statistics that are means too."""

    def summary(self, statistics: Tree) -> Tree:
        """What is logged of the statistics, averaged over parts and processes; the `loss` among it."""
        return statistics

    def evaluate(self, weights: Mapping[str, Tensor]) -> Tree:
        """What is measured of the first EMA's weights, every `evaluate_every` steps and after the last."""
        return {}


class Learner:
    """What training changes: the weights, AdamW's moments, the averages, the scale of float16's loss."""

    def __init__(self, task: Task, ranks: Ranks):
        options = task.options
        self.model, self._options = task.model, options
        self._parameters = [p for p in task.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self._parameters,
            lr=options.lr,
            betas=options.betas,
            weight_decay=options.weight_decay,
            fused=True,
        )
        self.emas = [EMA(task.model, decay) for decay in task.ema_decays]
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=options.precision == "float16")
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=ranks.device)

    def update(self, step: int, loss: Tensor) -> dict[str, Any]:
        """Follow the gradients, whose norm and learning rate it returns."""
        rate = learning_rate(step, self._options)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self._parameters, self._options.grad_clip)
        # Scaled gradients may overflow: the scaler leaves that step out and lowers its scale
        bad = ~torch.isfinite(loss if self.scaler.is_enabled() else norm + loss)
        self._first_bad = torch.where(bad & (self._first_bad < 0), step, self._first_bad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for ema in self.emas:
            ema.update(self.model)
        return {"grad_norm": norm, "lr": rate}

    def require_finite(self) -> None:
        """Look at the losses and gradients so far, for which the host waits.

        Raises FloatingPointError naming the first step that was not finite.
        """
        if (step := int(self._first_bad)) >= 0:
            raise FloatingPointError(f"step {step}: the loss or its gradient is not finite")
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            raise FloatingPointError("the gradient does not fit into float16 however small the loss is made")

    def tensors(self) -> dict[str, Tensor]:
        """The state by name; not copies."""
        optimizer = optimizer_tensors(self.model, self.optimizer)
        parts = {"model": self.model.state_dict(), "optimizer": optimizer}
        parts |= {f"ema_{i}": ema.state_dict() for i, ema in enumerate(self.emas)}
        return {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}

    def resume(self, checkpoints: Checkpoints, ranks: Ranks) -> Saved | None:
        """Go on from the newest checkpoint, which the first process reads for all."""
        saved = ranks.from_first(checkpoints.newest() if ranks.first else None)
        if saved is None:
            return None
        tensors = self.tensors()
        if ranks.first:
            load(saved, tensors)
        if ranks.world_size > 1:
            for tensor in tensors.values():
                dist.broadcast(tensor, src=0)
        if saved.state["scaler"]:  # empty if it was not in use
            self.scaler.load_state_dict(saved.state["scaler"])
        return saved


def train(task: Task, run: Run) -> list[EMA]:
    """Take the steps of `task` that are left; one EMA per decay.

    Raises FloatingPointError naming the first step with a loss or gradient that is not finite; no checkpoint
    is written after such a step. Raises Stopped after SIGTERM or SIGINT (see `drift.runtime.signals`), with a
    checkpoint of the step that was being taken.
    """
    _, hardware, ranks, folder = run
    learner, steps, rounding = Learner(task, ranks), task.options.steps, _what_rounds(run)
    checkpoints = Checkpoints(folder, keep_every=hardware.checkpoint_keep_every, group=ranks.control)
    start = 0
    if saved := learner.resume(checkpoints, ranks):
        start, before = saved.step, saved.state["rounding"]
        changes = [
            f"{k} was {before.get(k)} and is {now}" for k, now in rounding.items() if before.get(k) != now
        ]
        if ranks.first:
            print(f"{task.name}: going on from step {start} ({saved.path})", flush=True)
        if ranks.first and changes:  # no reason to start over: such a result is as good
            print(f"{task.name}: {', '.join(changes)}: the result will differ by rounding", flush=True)
    network = _network(task, hardware, ranks)
    log = RunLog(folder / LOG_FILE, what=task.name, steps=steps, start=start, active=ranks.first)
    with (
        closing(log),  # an error is told on a line of its own, not behind the bar
        Signals() as signals,
        checkpoints,
        closing(batches(task.prepare, start, steps, hardware.prefetch)) as prepared,
    ):
        for step, batch in zip(range(start, steps), prepared, strict=True):
            done, last = step + 1, step + 1 == steps
            shown = task.summary(_gradients(task, network, batch, learner, ranks))
            shown = {**shown, **learner.update(step, shown["loss"])}
            log.step()
            measured = {}
            if task.evaluate_every and (done % task.evaluate_every == 0 or last):
                measured = task.evaluate(learner.emas[0].state_dict())
            if step % hardware.log_every == 0 or last or measured:
                learner.require_finite()
                log.write(step, to_numbers({**shown, **measured}))
            asked = Asked(*ranks.highest(signals.look()))
            if done % hardware.checkpoint_every == 0 or last or asked.stop or asked.save:
                learner.require_finite()
                if ranks.first:
                    rest = {"scaler": learner.scaler.state_dict(), "rounding": rounding}
                    checkpoints.save(done, learner.tensors(), rest)
            if asked.stop and not last:
                checkpoints.wait()
                ranks.barrier()
                name = signal.Signals(asked.stop).name
                line = f"{task.name}: {name} after step {done} of {steps}; saved, run it again to go on"
                raise Stopped(line if ranks.first else "", asked.stop)
        checkpoints.wait()
    ranks.barrier()
    return learner.emas


def batches(prepare: Callable[[int], Batch], start: int, stop: int, ahead: int) -> Iterator[Batch]:
    """`prepare(step)` of one step after the other, by a thread that is at most `ahead` steps ahead."""
    if not ahead:
        yield from map(prepare, range(start, stop))
        return
    thread, waiting = ThreadPoolExecutor(1, thread_name_prefix="prefetch"), deque[Future[Batch]]()
    try:
        for step in range(start, stop):
            waiting.append(thread.submit(prepare, step))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)


def parts(count: int, size: int | None) -> list[slice]:
    """`count` things in runs of at most `size`; None is one run."""
    size = size or max(1, count)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def autocast(ranks: Ranks, precision: str) -> AbstractContextManager:
    """Mixed precision of the networks; `float32` is none."""
    dtype = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
    return torch.autocast(ranks.device.type, dtype, enabled=dtype is not None)


def _network(task: Task, hardware: Hardware, ranks: Ranks) -> nn.Module:
    """What computes the model: compiled, and with gradients averaged over the processes."""
    name = type(task.model).__name__
    network = Compiled(task.model, name) if hardware.compile else task.model
    if ranks.world_size == 1:
        return network
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=devices, gradient_as_bucket_view=True)


def _gradients(task: Task, network: nn.Module, batch: Any, learner: Learner, ranks: Ranks) -> Tree:
    """Accumulate the gradient of a step's mean loss over parts and processes; means of the statistics.

    DDP sends gradients while the last part goes backward.
    """
    learner.optimizer.zero_grad(set_to_none=True)
    slices, gathered = parts(task.count, task.at_once), []
    totals = task.totals(network, batch, slices)
    for part in slices:
        share = (part.stop - part.start) / task.count
        alone = part is slices[-1] or ranks.world_size == 1
        with nullcontext() if alone else network.no_sync():
            loss, statistics = task.loss(network, batch, part, totals)
            learner.scaler.scale(share * loss).backward()
        gathered.append(share * torch.cat([leaf.detach().float().flatten() for leaf in leaves(statistics)]))
    means = ranks.sum(torch.stack(gathered).sum(dim=0)) / ranks.world_size
    return rebuilt(statistics, means)


def _what_rounds(run: Run) -> dict[str, Any]:
    """What the rounding of a step depends on."""
    settings = {f"hardware.{key}": getattr(run.hardware, key) for key in ROUNDING_KEYS}
    of_machine = {"processes": run.ranks.world_size, "device": run.ranks.device.type}
    return {**settings, **of_machine, "torch": torch.__version__}
