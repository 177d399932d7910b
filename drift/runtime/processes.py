"""One process, or torchrun: who am I, which device, and how a stage ends.

A stage's `main()` checks its settings and inputs, then calls `spawn`, which starts the stage again under
torch.distributed.run where more than one process is wanted; the processes enter `join` and get a `Ranks`.
Under an existing torchrun `spawn` does nothing, so `torchrun --nnodes ... -m stages.drift` just joins.
"""

import argparse
import errno
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

import psutil
import torch
import torch.distributed as dist

from drift.runtime.errors import PeerLost, Stopped, UserError, escape_output
from drift.runtime.signals import SAVE, STOP, when_parent_ends
from drift.runtime.sums import pairwise_sum

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

T = TypeVar("T")
USER_ERROR, _PEER_LOST = 2, 3  # exit codes
_SPAWNED = "DRIFT_SPAWNED"  # environment variable, for processes that `spawn` starts, with its process number
_KILLED_BY = {
    "SIGKILL": "by hand, or by the kernel for want of memory",
    "SIGBUS": "a file that it had mapped is gone or has become shorter",
    "SIGTERM": "before it had begun, or after its last step",
}


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
        """`tensor` summed over all processes, in place; the same bits on each, and see `drift.runtime.sums`."""
        if self.world_size == 2:
            with self.peers():
                dist.all_reduce(tensor)  # a + b is b + a
        elif self.world_size > 2:
            self._sum_in_order(tensor)
        return tensor

    def _sum_in_order(self, tensor: torch.Tensor) -> None:
        """Each process sums a part, in the order of the processes, which an all-reduce does not keep.

        What is sent is as much as in a ring all-reduce.
        """
        part = -(-tensor.numel() // self.world_size)
        mine = tensor.new_zeros(self.world_size, part)
        mine.view(-1)[: tensor.numel()] = tensor.reshape(-1)
        received = torch.empty_like(mine)
        with self.peers():
            dist.all_to_all_single(received, mine)
            dist.all_gather_into_tensor(mine.view(-1), pairwise_sum(received.unbind()))
        tensor.copy_(mine.view(-1)[: tensor.numel()].view_as(tensor))

    def highest(self, numbers: Sequence[int]) -> list[int]:
        """Each number's highest value over all processes, without a GPU."""
        if self.world_size == 1:
            return list(numbers)
        tensor = torch.tensor(numbers)
        with self.peers():
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()

    def from_first(self, value: T) -> T:
        """The value that the first process has; what the others pass is not looked at."""
        if self.world_size == 1:
            return value
        values = [value]
        with self.peers():
            dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def tensors_from_first(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`from_first` for tensors by name, which arrive on the device of each process."""
        if self.world_size == 1:
            return dict(tensors)
        received = {}
        for name, dtype, shape in self.from_first([(n, t.dtype, t.shape) for n, t in tensors.items()]):
            tensor = tensors[name] if self.first else torch.empty(shape, dtype=dtype)
            received[name] = tensor.to(self.device)
            with self.peers():
                dist.broadcast(received[name], src=0)
        return received

    def barrier(self) -> None:
        """Wait for all processes: what each has written before, all can read after.

        By the group on CPUs, as a collective on a GPU returns to the host before it has begun.
        """
        self.highest([0])

    @contextmanager
    def peers(self) -> Iterator[None]:
        """Tells a peer that is gone or silent beyond the time limit from mistakes of this process."""
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):  # gloo has no type for it
                raise
            reason = str(error).splitlines()[0].split(". ")[0]
            raise PeerLost(f"process {self.rank}: the others are gone or silent ({reason})") from error

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
    is already there. SIGTERM, SIGINT and SIGUSR1 are passed on to the processes, which take the time that
    they need. A process that fails takes the others down; mistakes of the user are told once, whichever
    processes have noticed them. Raises `UserError` if the machine has CUDA devices, but fewer.
    """
    if processes == 1 or under_torchrun():
        return None
    _require_a_device_each(processes, "lower hardware.processes or --nproc")
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
        signals_to_handle="SIGHUP,SIGQUIT",  # not ours: it kills what is at its checkpoint after 30 s
    )
    os.environ[_SPAWNED] = str(os.getpid())
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)  # see _told
    before = {number: signal.signal(number, _pass_on) for number in (*STOP, SAVE)}
    try:
        elastic_launch(config, sys.executable)("-u", "-m", module, *arguments)
    except ChildFailedError as error:
        return _told(error.failures)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            child.send_signal(number)


def _told(failures: Mapping[int, "ProcessFailure"]) -> int:
    """Say why the first processes have failed, where they have not done so; the exit code of the whole."""
    for consequence in (-signal.SIGTERM, _PEER_LOST):  # torchrun ends by SIGTERM the processes that are left
        failures = {rank: f for rank, f in failures.items() if f.exitcode != consequence} or failures
    codes = {failure.exitcode for failure in failures.values()}
    if USER_ERROR in codes:
        messages = (f.message for f in failures.values() if f.exitcode == USER_ERROR)
        for message in dict.fromkeys(messages):
            print(f"error: {message}", file=sys.stderr)
        return USER_ERROR
    for number in STOP:
        if 128 + number in codes:  # the first process has told how far it came
            return 128 + number
    for rank, failure in sorted(failures.items()):
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            print(
                f"error: process {rank} was killed by {name} ({_KILLED_BY.get(name, 'a crash')}); "
                "run the stage again to go on from what was saved",
                file=sys.stderr,
            )
        else:
            print(f"error: process {rank} failed, as its output above tells", file=sys.stderr)
    return max(128 - code if code < 0 else code for code in codes)


def _require_a_device_each(processes: int, way_out: str) -> None:
    """Refuse what NCCL would: two processes on one CUDA device. Raises `UserError`."""
    devices = torch.cuda.device_count()
    if torch.cuda.is_available() and processes > devices:
        raise UserError(
            f"{processes} processes on a machine with {devices} CUDA device{'s' if devices > 1 else ''}: "
            f"each needs one of its own; {way_out}, or compute on CPUs (CUDA_VISIBLE_DEVICES= hides them)"
        )


@contextmanager
def join(time_limit: float, *, deterministic: bool = False) -> Iterator[Ranks]:
    """Enter the process group, if there is one, and leave it at the end.

    A process that has waited `time_limit` minutes for the others gives up. With `deterministic`, this process
    uses deterministic algorithms alone, from here to its end. Raises `UserError` if there are fewer CUDA
    devices on this machine than processes, if there are any.
    """
    if deterministic:
        make_deterministic()
    if not under_torchrun():
        yield Ranks(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    if _SPAWNED in os.environ:
        # It has a session of its own, so a SIGKILL of the starter's process group would leave it at work
        when_parent_ends(signal.SIGKILL)
        if os.getppid() != int(os.environ[_SPAWNED]):  # gone before that
            sys.exit(_PEER_LOST)
    local_rank, limit = int(os.environ["LOCAL_RANK"]), timedelta(minutes=time_limit)
    if torch.cuda.is_available():
        _require_a_device_each(int(os.environ["LOCAL_WORLD_SIZE"]), "lower torchrun's --nproc-per-node")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=limit)
        control = dist.new_group(backend="gloo", timeout=limit)
    else:
        device, control = torch.device("cpu"), None
        dist.init_process_group("gloo", timeout=limit)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device, control)
    finally:
        dist.destroy_process_group()


def make_deterministic() -> None:
    """Same inputs, same bits, on a GPU too; must come before CUDA's first use in the process.

    An operation that cannot be computed so raises RuntimeError.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as PyTorch's notes on reproducibility ask
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def stage_parser(description: str | None) -> argparse.ArgumentParser:
    """The command line that every stage has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="settings (params.yaml)")
    parser.add_argument("--nproc", type=_positive, help="processes on this machine")
    parser.add_argument("--fresh", action="store_true", help="start over, and set aside what is there")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: a whole number of at least 1 is needed")
    return int(text)


def run_stage(main: Callable[[], int | None], *, memory: str = "the batch") -> None:
    """Run a stage's or command's `main` and exit.

    With 0; after one line with 2 for a mistake of the user, a full disk, or a device (a CPU as well) out of
    memory, for which `memory` says what to make smaller; with 128 and its number for a signal. Bugs keep
    their traceback.
    """
    if "DVC_STAGE" in os.environ and _SPAWNED not in os.environ:
        when_parent_ends(signal.SIGTERM)  # a DVC that is killed tells its command nothing
    escape_output()
    try:
        code = main() or 0
    except UserError as error:
        code = _user_error(str(error))
    except Stopped as stopped:
        if str(stopped):
            print(stopped, file=sys.stderr)
        code = stopped.code
    except PeerLost as lost:
        print(lost, file=sys.stderr)
        code = _PEER_LOST
    except KeyboardInterrupt:  # before the first step or after the last
        code = 128 + signal.SIGINT
    except (RuntimeError, MemoryError) as error:
        of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not of_memory and "DefaultCPUAllocator" not in str(error):
            raise
        reason = str(error).splitlines()[0].rpartition("DefaultCPUAllocator: ")[2]
        code = _user_error(f"out of memory ({reason}); lower {memory} and run again: what was saved is whole")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{error.filename}: " if error.filename else ""
        code = _user_error(
            f"{where}{error.strerror}; make room or move the work folder (DRIFT_WORK_DIR), and run again: "
            "what was saved is whole"
        )
    sys.exit(code)


def _user_error(message: str) -> int:
    """Tell a mistake of the user: by a line, or to the process that started this one and its peers."""
    if _SPAWNED in os.environ and under_torchrun():
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": message}))
    else:
        print(f"error: {message}", file=sys.stderr)
    return USER_ERROR
