"""What the benchmarks measure with: time and FLOPs by part, the rate of matrix products, peak memory."""

import functools
import gc
import multiprocessing
import os
import platform
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

Result = TypeVar("Result")
Meter = tuple[Callable[[], Any], Callable[[Any, Any], float]]
"""What takes a reading, and the difference of two readings."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MATMUL_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192, 16384)}
MATMUL_SECONDS = 0.2
"""How long one measurement of a product lasts, about."""
MATMUL_MEASUREMENTS = 5


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_meter(device: torch.device) -> Meter:
    """Seconds of the device: by its own events, which wait for nothing, and on a CPU by the clock.

    Synchronise before differences of events are taken.
    """
    if device.type != "cuda":
        return time.perf_counter, lambda start, end: end - start

    def record() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return record, lambda start, end: start.elapsed_time(end) / 1000


def flop_meter(counter: FlopCounterMode) -> Meter:
    """FLOPs that an entered `counter` has counted."""
    return counter.get_total_flops, lambda start, end: end - start


class Split:
    """How much of a meter's quantity belongs to which part; a part within another is not counted twice.

    Readings are kept and looked at in the end, so nothing waits for a GPU in between.
    """

    def __init__(self, meter: Meter):
        self._read, self._difference = meter
        self._names = ["rest"]
        self._since: Any = None
        self._readings: list[tuple[str, Any, Any]] = []

    def start(self) -> None:
        """Count from here on."""
        self._since, self._readings = self._read(), []

    def stop(self) -> None:
        """Count no further."""
        self._turn()
        self._since = None

    def totals(self) -> dict[str, float]:
        """By part."""
        totals: dict[str, float] = defaultdict(float)
        for name, start, end in self._readings:
            totals[name] += self._difference(start, end)
        return dict(totals)

    def at_work(self, name: str) -> bool:
        """Whether the part `name` is at work, or one within it."""
        return name in self._names

    def _turn(self) -> None:
        if self._since is not None:
            now = self._read()
            self._readings.append((self._names[-1], self._since, now))
            self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is done in this context belongs to the part `name`."""
        self._turn()
        self._names.append(name)
        try:
            yield
        finally:
            self._turn()
            self._names.pop()

    def cut(self, name: str) -> None:
        """From now on the part at work goes by another name."""
        if self._names[-1] != name:
            self._turn()
            self._names[-1] = name

    def wrapped(self, name: str, call: Callable[..., Result]) -> Callable[..., Result]:
        """`call` as a part."""

        @functools.wraps(call)
        def wrapper(*args: Any, **kwargs: Any) -> Result:
            with self.part(name):
                return call(*args, **kwargs)

        return wrapper


def matmul_rate(device: torch.device, precision: str) -> dict[str, float]:
    """FLOP/s of square matrix products, and the side of those with the highest: best of several."""
    dtype, best = DTYPES[precision], {"size": 0, "flops_per_s": 0.0}
    for size in MATMUL_SIZES[device.type]:
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        out = torch.empty_like(a)
        read, difference = time_meter(device)

        def seconds(repeats: int, a=a, b=b, out=out, read=read, difference=difference) -> float:
            start = read()
            for _ in range(repeats):
                torch.mm(a, b, out=out)
            end = read()
            synchronize(device)
            return difference(start, end)

        seconds(1)
        repeats = max(1, round(MATMUL_SECONDS / seconds(1)))
        shortest = min(seconds(repeats) for _ in range(MATMUL_MEASUREMENTS)) / repeats
        if (rate := 2 * size**3 / shortest) > best["flops_per_s"]:
            best = {"size": size, "flops_per_s": rate}
    return best


def call_seconds(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of each of `repeats` calls, each waited for."""
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def free(device: torch.device) -> None:
    """Give back what nothing refers to any more, compiled networks of earlier runs among it."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def restart_peak(device: torch.device) -> None:
    """The peaks of `peak_memory` start again at what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (clear := Path("/proc/self/clear_refs")).exists():
        clear.write_text("5")  # Linux: the high-water mark of the resident memory


def peak_memory(device: torch.device) -> dict[str, int]:
    """Most bytes in use since `restart_peak`.

    On a GPU `peak_bytes` of tensors and `peak_reserved_bytes` with what the allocator holds in reserve; on a
    CPU the resident memory of the process (outside Linux, since its start).
    """
    if device.type == "cuda":
        return {
            "peak_bytes": torch.cuda.max_memory_allocated(device),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
        }
    if (status := Path("/proc/self/status")).exists():
        (kib,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return {"peak_bytes": int(kib) * 1024}
    unit = 1 if platform.system() == "Darwin" else 1024
    return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def resident_memory() -> int:
    """Bytes of this process in the machine's memory."""
    return psutil.Process().memory_info().rss


def limit_memory(device: torch.device, gigabytes: float | None) -> None:
    """Let this process have no more of a GPU's memory than that, in 10^9 bytes; None is all of it."""
    if gigabytes is not None and device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        total = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total), index)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures belong to."""
    facts = {
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        facts |= {
            "device": torch.cuda.get_device_name(device),
            "device_bytes": torch.cuda.get_device_properties(device).total_memory,
            "cuda": torch.version.cuda,
        }
    return facts


def in_child(call: Callable[..., Result], *args: Any) -> Result:
    """`call(*args)` in a process of its own, whose memory is gone afterwards."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, *args).result()
