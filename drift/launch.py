"""One process, or torchrun: who am I, which device, and how a stage ends.

A stage's `main()` checks its settings and inputs, then calls `spawn`, which starts the stage again under
torch.distributed.run where more than one process is wanted; the processes enter `join` and get a `Ranks`.
Under an existing torchrun `spawn` does nothing, so `torchrun --nnodes ... -m stages.drift` just joins.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil
import torch
import torch.distributed as dist

from drift.errors import Stopped, UserError
from drift.signals import STOP


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    """A group on CPUs for what no GPU should wait for; None is the default group."""

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over all processes, in place; the same bits on each."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def highest(self, numbers: Sequence[int]) -> list[int]:
        """Each number's highest value over all processes, without a GPU."""
        if self.world_size == 1:
            return list(numbers)
        tensor = torch.tensor(numbers)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()

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
    is already there. SIGTERM and SIGINT are passed on to the processes, which have 30 s to finish a step
    and save it; so is SIGUSR1.
    """
    if processes == 1 or under_torchrun():
        return None
    from torch.distributed.elastic.multiprocessing.api import SignalException
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
    before = signal.signal(signal.SIGUSR1, _pass_on)
    try:
        elastic_launch(config, sys.executable)("-u", "-m", module, *arguments)
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        for code in (2, *(128 + number for number in STOP)):
            if code in codes:  # a rank has already printed its one line
                return code
        raise
    finally:
        signal.signal(signal.SIGUSR1, before)
    return 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    for child in psutil.Process().children():
        child.send_signal(number)


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
        control = dist.new_group(backend="gloo")
    else:
        device, control = torch.device("cpu"), None
        dist.init_process_group("gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device, control)
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
    """Run a stage's or command's `main` and exit: 0, or after one line 2 for a mistake of the user or 128 and
    the number of the signal that stopped it."""
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except Stopped as stopped:
        if str(stopped):
            print(stopped, file=sys.stderr)
        code = stopped.code
    sys.exit(code)
