"""One process, or torchrun: who am I, which device, and how a stage ends.

A stage's `main()` checks its settings and inputs, then calls `spawn`, which starts the stage again under
torch.distributed.run where more than one process is wanted; the processes enter `join` and get a `Ranks`.
Under an existing torchrun `spawn` does nothing, so `torchrun --nnodes ... -m stages.drift` just joins.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from drift.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over all processes, in place; the same bits on each."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            # An all-reduce rather than dist.barrier: it needs no guess of the device
            dist.all_reduce(torch.zeros(1, device=self.device))

    def share(self, count: int, what: str) -> slice:
        """This process's part of `count` things that must split evenly.

        Raises `UserError` if they do not.
        """
        if count % self.world_size:
            raise UserError(
                f"{what} = {count} does not split evenly over {self.world_size} processes: "
                f"change {what} or run with --nproc N where N divides it"
            )
        part = count // self.world_size
        return slice(self.rank * part, (self.rank + 1) * part)


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def wanted_processes(nproc: int | None, processes: int | None) -> int:
    """Processes to start: the command line's `--nproc`, else the setting, else one per CUDA device."""
    return nproc or processes or max(1, torch.cuda.device_count())


def spawn(module: str, arguments: Sequence[str], processes: int) -> int | None:
    """Run `python -m module arguments` in several processes of this machine, and wait for them.

    Returns the exit code, or None where nothing was to be started: one process is wanted, or torchrun
    is already there.
    """
    if processes == 1 or under_torchrun():
        return None
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    # What torchrun does after it has read its command line, which would take some of ours for its own.
    # 127.0.0.1 and a free port: nothing outside this machine is listened to.
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=module,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", module, *arguments)
    except ChildFailedError as error:
        codes = [failure.exitcode for failure in error.failures.values()]
        if 2 in codes:  # a rank has already printed its one line
            return 2
        raise
    return 0


@contextmanager
def join() -> Iterator[Ranks]:
    """Enter the process group, if there is one, and leave it at the end."""
    if not under_torchrun():
        yield Ranks(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def stage_parser(description: str | None) -> argparse.ArgumentParser:
    """The command line that every stage has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="settings (params.yaml)")
    parser.add_argument("--nproc", type=_positive, help="processes on this machine")
    parser.add_argument("--fresh", action="store_true", help="throw away unfinished work and start over")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: a whole number of at least 1 is needed")
    return int(text)


def run_stage(main: Callable[[], int | None]) -> None:
    """Run a stage's or command's `main` and exit: 0, or 2 after one line for a mistake of the user."""
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)
