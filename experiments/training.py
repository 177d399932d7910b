"""How the experiments train: each model once, by the library's loop; sweeps with the time that is left."""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from drift.models import ema
from drift.runtime import seeds
from drift.runtime.files import link_folder, remove, replace_folder
from drift.runtime.processes import join
from drift.settings import Hardware
from drift.training import loop, schedule
from drift.training.loop import LOG_FILE, Run, Task, train
from experiments.common import once

R = TypeVar("R")
TRAINING = (ema, loop, schedule, seeds)
"""Modules that decide what every training makes; for `once`."""


def train_once(
    what: str,
    seed: int,
    decides: Mapping[str, Any],
    code: Sequence[ModuleType],
    make: Callable[[Run], Task],
    hardware: Hardware,
) -> Path:
    """The folder of the model that a task has trained, now or earlier: its first EMA, where it has one."""

    def work(folder: Path, result: Path) -> None:
        with join(hardware.time_limit) as ranks:
            run = Run(seed, hardware, ranks, folder)
            task = make(run)
            averages = train(task, run)
        if averages:
            averages[0].copy_to(task.model)
        task.model.save_pretrained(result)
        shutil.copyfile(folder / LOG_FILE, result / LOG_FILE)

    return once(what, {"seed": seed, **decides}, [*TRAINING, *code], work)


def with_eta(runs: Sequence[R]) -> Iterator[R]:
    """The runs of a sweep, each announced with the time that the rest will take."""
    started = time.monotonic()
    for done, run in enumerate(runs):
        left = (time.monotonic() - started) / max(1, done) * (len(runs) - done)
        print(
            f"run {done + 1} of {len(runs)}{f', {timedelta(seconds=round(left))} left' if done else ''}: "
            f"{run}",
            flush=True,
        )
        yield run


def publish(folders: Mapping[str, Path], out: Path) -> None:
    """Put folders into `out`, by hard links, which has nothing else then."""
    draft = out.with_name(f".{out.name}.draft")
    remove(draft)
    draft.mkdir(parents=True)
    for name, folder in folders.items():
        link_folder(folder, draft / name)
    replace_folder(draft, out)
    print(f"wrote {out}", flush=True)
