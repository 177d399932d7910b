"""Work in several processes that know each other, as under torchrun."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from drift.launch import Ranks


def in_processes(work: Callable[[Ranks, Path], None], count: int, folder: Path) -> list[int | None]:
    """Call `work(ranks, folder)` in each; the exit codes."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_enter, args=(work, rank, count, folder)) for rank in range(count)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(90)
    finally:
        for process in processes:
            process.kill()
    return [process.exitcode for process in processes]


def _enter(work: Callable[[Ranks, Path], None], rank: int, count: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting-{count}", rank=rank, world_size=count)
    work(Ranks(rank, count, torch.device("cpu")), folder)
    dist.destroy_process_group()
