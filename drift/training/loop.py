"""The training loop of every network here: AdamW, gradient clipping, EMA, log, checkpoints, resume.

A `Task` says what is trained and on what; `train` takes its steps. The loop knows neither images nor latents.

The loop remembers nothing. A task draws every number as a function of (seed, step), so a resumed run computes
what the uninterrupted run would have: to the bit on a CPU, and on a GPU with `hardware.deterministic`.
Without it, a GPU leaves the order of sums open, and results differ by rounding.
"""

import signal
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from drift.models.ema import EMA
from drift.runtime.errors import Stopped
from drift.runtime.processes import Ranks
from drift.runtime.signals import Signals
from drift.settings import ROUNDING_KEYS, Hardware, Optimizer
from drift.training.checkpoint import Checkpoints, Saved, load, optimizer_tensors
from drift.training.compile import Compiled
from drift.training.log import RunLog, Tree, flattened, rebuilt, to_numbers
from drift.training.schedule import learning_rate

LOG_FILE = "logs.jsonl"
Batch = TypeVar("Batch")


class Run(NamedTuple):
    """How and where a task is trained."""

    seed: int
    hardware: Hardware
    ranks: Ranks
    folder: Path
    """For checkpoints and `logs.jsonl`. Only the first process reads and writes it."""


class Measured(NamedTuple):
    """What an evaluation while training has found."""

    numbers: Tree
    picture: Image.Image | None = None


class Task(ABC, Generic[Batch]):
    """What is trained, and on what.

    A step may be taken in parts, to save memory: of `count` units (classes or samples, for instance), the
    loss of `at_once` is computed at a time. A task that always takes its steps whole leaves both alone.
    """

    name: str
    model: nn.Module
    """`train` moves it to the device."""
    options: Optimizer
    ema_decays: Sequence[float] = ()
    count: int = 1
    """Units of one step in this process, the same number in every process."""
    at_once: int | None = None
    """None is all of them."""
    evaluate_every: int | None = None
    """Steps between two calls of `evaluate`; it is called after the last step as well."""

    @abstractmethod
    def prepare(self, step: int) -> Batch:
        """Read and draw what a step needs. Another thread calls this, in the order of the steps."""

    def totals(self, network: nn.Module, batch: Batch, parts: Sequence[slice]) -> Any:
        """What the loss of each part needs to know about all parts."""
        return None

    @abstractmethod
    def loss(self, network: nn.Module, batch: Batch, part: slice, totals: Any) -> tuple[Tensor, Tree]:
        """The mean loss of a part, and other means to log.

        `network` computes `model`: call it for whatever needs gradients.
        """

    def summary(self, means: Tree) -> Tree:
        """What to log of the loss and the other means, averaged over parts and processes."""
        return means

    def evaluate(self, done: int, weights: Mapping[str, Tensor]) -> Measured:
        """Measure the first EMA's weights after `done` steps; a kill meanwhile loses no step."""
        raise NotImplementedError


class Learner:
    """What training changes: weights, AdamW's moments, EMAs, and the loss scale of float16."""

    def __init__(self, task: Task, ranks: Ranks):
        options = task.options
        self.model, self._options = task.model.to(ranks.device), options
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
        """One step of the optimizer, then of the EMAs; returns the gradient's norm and the learning rate."""
        rate = learning_rate(step, self._options)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self._parameters, self._options.grad_clip)
        # Scaled gradients may overflow: the scaler then skips the step and lowers its scale
        bad = ~torch.isfinite(loss if self.scaler.is_enabled() else norm + loss)
        self._first_bad = torch.where(bad & (self._first_bad < 0), step, self._first_bad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for ema in self.emas:
            ema.update(self.model)
        return {"grad_norm": norm, "lr": rate}

    def require_finite(self) -> None:
        """Raise FloatingPointError if a loss or gradient so far was not finite, naming the first such step.

        The host waits for the device.
        """
        if (step := int(self._first_bad)) >= 0:
            raise FloatingPointError(f"step {step}: the loss or its gradient is not finite")
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            raise FloatingPointError("the gradient does not fit into float16 however small the loss is made")

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, not copied."""
        optimizer = optimizer_tensors(self.model, self.optimizer)
        parts = {"model": self.model.state_dict(), "optimizer": optimizer}
        parts |= {f"ema_{i}": ema.state_dict() for i, ema in enumerate(self.emas)}
        return {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}

    def resume(self, checkpoints: Checkpoints, ranks: Ranks) -> Saved | None:
        """Load the newest checkpoint, which the first process reads for all."""
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
    """Train `task.model`, from the newest checkpoint on; returns one EMA per decay.

    Raises FloatingPointError naming the first step with a loss or gradient that is not finite; no checkpoint
    is written after such a step. On SIGTERM or SIGINT, finishes the step, saves, and raises Stopped (see
    `drift.runtime.signals`).
    """
    _, hardware, ranks, folder = run
    learner, steps, rounding = Learner(task, ranks), task.options.steps, _what_rounds(run)
    checkpoints = Checkpoints(folder, keep_every=hardware.checkpoint_keep_every, group=ranks.control)
    saved = learner.resume(checkpoints, ranks)
    start = saved.step if saved else 0
    if saved and ranks.first:
        print(f"{task.name}: going on from step {start} ({saved.path})", flush=True)
        was = saved.state["rounding"]
        changes = [f"{k} was {was.get(k)} and is {now}" for k, now in rounding.items() if was.get(k) != now]
        if changes:  # no reason to start over: the result is no worse
            print(f"{task.name}: {', '.join(changes)}: the result will differ by rounding", flush=True)
    network = _network(task, hardware, ranks)
    log = RunLog(folder / LOG_FILE, what=task.name, steps=steps, start=start, active=ranks.first)
    with (
        closing(log),  # so that an error stands on a line of its own, not behind the bar
        Signals() as signals,
        checkpoints,
        closing(batches(task.prepare, start, steps, hardware.prefetch)) as prepared,
    ):
        if saved and ranks.from_first(evaluates(task, start) and not log.evaluated(start - 1)):
            _evaluate(task, start, learner, log)  # a kill came in between
        for step, batch in zip(range(start, steps), prepared, strict=True):
            done, last = step + 1, step + 1 == steps
            means = _gradients(task, network, batch, learner, ranks)
            shown = {"loss": means["loss"], **task.summary(means), **learner.update(step, means["loss"])}
            log.step()
            if logs(task, step, hardware):
                learner.require_finite()
                log.write(step, to_numbers(shown))
            stop, save = ranks.highest(signals.look())
            if done % hardware.checkpoint_every == 0 or last or stop or save or evaluates(task, done):
                learner.require_finite()
                if ranks.first:
                    rest = {"scaler": learner.scaler.state_dict(), "rounding": rounding}
                    checkpoints.save(done, learner.tensors(), rest)
            if stop and not last:
                checkpoints.wait()
                ranks.barrier()
                name = signal.Signals(stop).name
                line = f"{task.name}: {name} after step {done} of {steps}; saved, run it again to go on"
                raise Stopped(line if ranks.first else "", stop)
            if evaluates(task, done):
                checkpoints.wait()
                _evaluate(task, done, learner, log)
        checkpoints.wait()
    ranks.barrier()
    return learner.emas


def logs(task: Task, step: int, hardware: Hardware) -> bool:
    """Whether a step gets a line of the log."""
    last = step + 1 == task.options.steps
    return step % hardware.log_every == 0 or last or evaluates(task, step + 1)


def evaluates(task: Task, done: int) -> bool:
    """Whether a task is evaluated after so many steps."""
    return bool(task.evaluate_every) and (done % task.evaluate_every == 0 or done == task.options.steps)


def _evaluate(task: Task, done: int, learner: Learner, log: RunLog) -> None:
    """Evaluate after `done` steps, in the memory that gradients and a step's activations leave."""
    learner.optimizer.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    measured = task.evaluate(done, learner.emas[0].state_dict())
    log.evaluation(done - 1, to_numbers(measured.numbers), measured.picture)


def batches(
    prepare: Callable[[int], Batch], start: int, stop: int, ahead: int
) -> Generator[Batch, None, None]:
    """`prepare(step)` for each step, by a thread that is at most `ahead` steps ahead."""
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
    """Cuts `count` units into parts of at most `size`; None is one part."""
    size = size or max(1, count)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def autocast(ranks: Ranks, precision: str) -> AbstractContextManager:
    """Mixed precision for the networks; none for `float32`."""
    dtype = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
    return torch.autocast(ranks.device.type, dtype, enabled=dtype is not None)


def _network(task: Task, hardware: Hardware, ranks: Ranks) -> nn.Module:
    """The model, compiled if asked for, and with gradients averaged over the processes."""
    network = Compiled(task.model, type(task.model).__name__) if hardware.compile else task.model
    if ranks.world_size == 1:
        return network
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=devices, gradient_as_bucket_view=True)


def _gradients(task: Task, network: nn.Module, batch: Any, learner: Learner, ranks: Ranks) -> Tree:
    """Accumulate the gradient of a step's mean loss over parts and processes; returns the means to log.

    DDP sends gradients during the backward pass of the last part.
    """
    learner.optimizer.zero_grad(set_to_none=True)
    slices, shares, means = parts(task.count, task.at_once), [], {}
    totals = task.totals(network, batch, slices)
    for part in slices:
        share = (part.stop - part.start) / task.count
        sync: AbstractContextManager = nullcontext()
        if isinstance(network, DistributedDataParallel) and part is not slices[-1]:
            sync = network.no_sync()
        with sync:
            loss, statistics = task.loss(network, batch, part, totals)
            learner.scaler.scale(share * loss).backward()
        means = {"loss": loss, **statistics}
        shares.append(share * flattened(means))
    return rebuilt(means, ranks.sum(torch.stack(shares).sum(dim=0)) / ranks.world_size)


def _what_rounds(run: Run) -> dict[str, Any]:
    """What the rounding of a step depends on."""
    of_machine = {"processes": run.ranks.world_size, "device": run.ranks.device.type}
    of_settings = {f"hardware.{key}": getattr(run.hardware, key) for key in ROUNDING_KEYS}
    return {**of_settings, **of_machine, "torch": torch.__version__}
