"""Work in several processes that know each other, as under torchrun."""

import multiprocessing
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from drift.runtime.processes import Ranks


def in_processes(
    work: Callable[[Ranks, Path], None], count: int, folder: Path, *, like_nccl: bool = False
) -> list[int | None]:
    """Call `work(ranks, folder)` in each; the exit codes.

    `like_nccl`: collectives return to the host at once, but for those of the group on CPUs.
    """
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_enter, args=(work, rank, count, folder, like_nccl)) for rank in range(count)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(90)
    finally:
        for process in processes:
            process.kill()
    return [process.exitcode for process in processes]


def _enter(work: Callable[[Ranks, Path], None], rank: int, count: int, folder: Path, like_nccl: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting-{count}", rank=rank, world_size=count)
    control = dist.new_group(backend="gloo") if like_nccl else None
    with _LikeNCCL() if like_nccl else nullcontext():
        work(Ranks(rank, count, torch.device("cpu"), control), folder)
    dist.destroy_process_group()


class _LikeNCCL(TorchFunctionMode):
    """Collectives of the default group are begun and not waited for, until tensors are next looked at."""

    def __init__(self):
        super().__init__()
        self.begun = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        while self.begun:
            self.begun.pop(0)[0].wait()
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        for name in ("all_reduce", "all_to_all_single", "all_gather_into_tensor", "broadcast"):
            setattr(dist, name, self._begin(getattr(dist, name)))
        return super().__enter__()

    def _begin(self, collective):
        def begin(*tensors, group=None, **options):
            if group is not None:
                return collective(*tensors, group=group, **options)
            self.begun.append((collective(*tensors, async_op=True, **options), tensors))

        return begin
