"""One process, or torchrun: which rank and device this is, and how a stage ends.

A stage's `main()` checks its settings and inputs, then calls `spawn`, which starts the stage again in several
processes if more than one is wanted; the processes enter `join` and get a `Ranks`. Under an existing torchrun
`spawn` does nothing, so `torchrun --nnodes ... -m stages.drift` just joins.
"""

import argparse
import errno
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

import psutil
import torch
import torch.distributed as dist

from drift.runtime.errors import Stopped, UserError, escape_output
from drift.runtime.signals import SAVE, STOP, when_parent_ends

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

T = TypeVar("T")
USER_ERROR, _PEER_LOST = 2, 3  # exit codes
_GRACE = 2.0  # seconds in which the process that is the cause ends first, is named, and ends the others
_SPAWNED = "DRIFT_SPAWNED"  # environment variable, for processes that `spawn` starts, with its process number
_MISTAKE = "DRIFT_MISTAKE"  # environment variable, with the file in which these leave a mistake of the user
_KILLED_BY = {
    "SIGKILL": "by hand, or by the kernel for want of memory",
    "SIGBUS": "a file that it had mapped is gone or has become shorter",
    "SIGTERM": "before its first step or after its last",
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
        """`tensor` summed over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def highest(self, numbers: Sequence[int]) -> list[int]:
        """Each number's highest value over all processes, without a GPU."""
        tensor = torch.tensor(numbers)
        if self.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()

    def from_first(self, value: T) -> T:
        """The first process's `value`, whatever the others pass."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def barrier(self) -> None:
        """Wait for all processes: what each has written before, all can read afterwards.

        Uses the group on CPUs, as a collective on a GPU returns to the host before it has run.
        """
        self.highest([0])

    def share(self, count: int, what: str) -> slice:
        """This process's part of `count` things. Raises `UserError` if they do not split evenly."""
        if count % self.world_size:
            raise UserError(
                f"{what} = {count} does not split evenly over {self.world_size} processes: "
                f"change {what} or run with --nproc N where N divides it"
            )
        part = count // self.world_size
        return slice(self.rank * part, (self.rank + 1) * part)


def spawn(module: str, arguments: Sequence[str], processes: int | None) -> int | None:
    """Run `python -m module arguments` in several processes of this machine, and wait for them.

    `processes` None: one per CUDA device. Returns the exit code, or None if there was nothing to start: one
    process is wanted, or torchrun runs already. Passes SIGTERM, SIGINT and SIGUSR1 on to the processes, which
    take the time that they need. A process that fails ends the others; the cause is printed once. Raises
    `UserError` if the machine has CUDA devices, but fewer than `processes`.
    """
    processes = processes or max(1, torch.cuda.device_count())
    if processes == 1 or dist.is_torchelastic_launched():
        return None
    _require_a_device_each(processes, "lower hardware.processes or --nproc")
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    # As torchrun calls it; torchrun's command line would take some of our arguments for its own.
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
        signals_to_handle="SIGHUP,SIGQUIT",  # not ours: it kills whoever writes a checkpoint after 30 s
    )
    folder = tempfile.TemporaryDirectory()
    mistake = Path(folder.name, "mistake")
    os.environ |= {_SPAWNED: str(os.getpid()), _MISTAKE: str(mistake)}
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    before = {number: signal.signal(number, _pass_on) for number in (*STOP, SAVE)}
    try:
        elastic_launch(config, sys.executable)("-u", "-m", module, *arguments)
    except ChildFailedError as error:
        if mistake.exists():  # whatever the others have seen of it
            return _user_error(mistake.read_text("utf-8", "surrogateescape"))
        return _report(list(error.failures.values()))
    finally:
        folder.cleanup()
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            child.send_signal(number)


def _report(failures: "Sequence[ProcessFailure]") -> int:
    """Print the cause, unless the process has printed it; the exit code of the whole."""
    # torchrun ends the other processes by SIGTERM, and some notice first that a peer is lost
    consequences = (None, _PEER_LOST, -signal.SIGTERM)
    cause = min(
        failures, key=lambda f: consequences.index(f.exitcode if f.exitcode in consequences else None)
    )
    code, process = cause.exitcode, f"process {cause.local_rank}"
    if code < 0:
        name = signal.Signals(-code).name
        print(
            f"error: {process} was killed by {name} ({_KILLED_BY.get(name, 'a crash')}); "
            "run the stage again to resume from what was saved",
            file=sys.stderr,
        )
    elif code != _PEER_LOST and code - 128 not in STOP:
        print(f"error: {process} failed; its traceback is above", file=sys.stderr)
    return 128 - code if code < 0 else code


def _require_a_device_each(processes: int, way_out: str) -> None:
    """Refuse two processes on one CUDA device, as NCCL would. Raises `UserError`."""
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
    uses only deterministic algorithms until it ends. Raises `UserError` if this machine has CUDA devices, but
    fewer than processes.
    """
    if deterministic:
        make_deterministic()
    if not dist.is_torchelastic_launched():
        yield Ranks(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    if _SPAWNED in os.environ:
        # This process has its own session, so a SIGKILL of the starter's process group would leave it running
        when_parent_ends(signal.SIGKILL)
        if os.getppid() != int(os.environ[_SPAWNED]):  # gone before that
            sys.exit(_PEER_LOST)
    limit = timedelta(minutes=time_limit)
    device, control = torch.device("cpu"), None
    if torch.cuda.is_available():
        _require_a_device_each(int(os.environ["LOCAL_WORLD_SIZE"]), "lower torchrun's --nproc-per-node")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=limit)
        control = dist.new_group(backend="gloo", timeout=limit)
        assert isinstance(control, dist.ProcessGroup)  # an int where this process is none of the group
    else:
        dist.init_process_group("gloo", timeout=limit)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device, control)
    except BaseException as error:
        if isinstance(error, UserError) and _SPAWNED in os.environ:
            _user_error(str(error))  # before the others can notice that this process leaves
        # A DistributedDataParallel in a frame of the traceback would outlive the group. The end of the group
        # then holds the GIL and waits for a thread that wants it
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        dist.destroy_process_group()


def make_deterministic() -> None:
    """Same inputs, same bits, on a GPU too; must come before CUDA's first use in the process.

    An operation that has no deterministic algorithm then raises RuntimeError.
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
    parser.add_argument(
        "--fresh", action="store_true", help="start over; what is there is set aside, not deleted"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: a whole number of at least 1 is needed")
    return int(text)


def run_stage(main: Callable[[], int | None], *, memory: str = "the batch") -> None:
    """Run a stage's or command's `main` and exit.

    The exit code is 0; 2 after one line for a mistake of the user, a full disk, or a device (or CPU) out of
    memory, for which `memory` says what to make smaller; 3 after one line for lost peers; 128 and its number
    for a signal. Bugs keep their traceback.
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
    except KeyboardInterrupt:  # before the first step or after the last
        code = 128 + signal.SIGINT
    except (RuntimeError, MemoryError, OSError) as error:
        code = _known_error(error, memory)
        if code is None:
            raise
    sys.exit(code)


def _known_error(error: Exception, memory: str) -> int | None:
    """Print what ran out or who is lost, and return the exit code; None for a bug."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    again = "and run again: what was saved is intact"
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in reason:
        reason = reason.rpartition("DefaultCPUAllocator: ")[2]
        return _user_error(f"out of memory ({reason}); lower {memory} {again}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f"{error.filename}: " if error.filename else ""
        return _user_error(
            f"{where}{error.strerror}; make room or move the work folder (DRIFT_WORK_DIR), {again}"
        )
    lost = isinstance(error, dist.DistError) or "/gloo/" in reason  # gloo's errors have no type
    if lost and dist.is_torchelastic_launched():
        reason = reason.split(". ")[0]
        time.sleep(_GRACE)
        if not os.path.exists(os.environ.get(_MISTAKE, "")):
            print(f"process {os.environ['RANK']}: the others are gone or silent ({reason})", file=sys.stderr)
        return _PEER_LOST
    return None


def _user_error(message: str) -> int:
    """Print a mistake of the user, or leave it to `spawn`, as the other processes may notice it as well."""
    if _SPAWNED in os.environ and dist.is_torchelastic_launched():
        Path(os.environ[_MISTAKE]).write_text(message, "utf-8", "surrogateescape")
    else:
        print(f"error: {message}", file=sys.stderr)
    return USER_ERROR
