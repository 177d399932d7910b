"""What the benchmarks measure with: time by part, the rate of matrix products, memory, the machine."""

import argparse
import json
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml

from drift.settings import Settings, load_settings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """What takes a reading, and the seconds between two: on a GPU events; synchronise before the latter."""
    if device.type != "cuda":
        return time.perf_counter, lambda start, end: end - start

    def record() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return record, lambda start, end: start.elapsed_time(end) / 1000


class Split:
    """How much of a quantity belongs to which part, by readings between which it grows."""

    def __init__(self, read: Callable[[], Any], difference: Callable[[Any, Any], float]):
        self._read, self._difference = read, difference
        self.name = "rest"
        self._readings: list[tuple[str, Any]] = []  # what begins there; none before `start`

    def start(self) -> None:
        """Count from here on."""
        self._readings = [(self.name, self._read())]

    def switch(self, name: str) -> None:
        """From here on another part is at work."""
        self.name = name
        if self._readings:
            self._readings.append((name, self._read()))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is done in this context, and in no part within it, belongs to this part."""
        before = self.name
        self.switch(name)
        try:
            yield
        finally:
            self.switch(before)

    def totals(self) -> dict[str, float]:
        """By part, up to now."""
        self.switch(self.name)
        totals: dict[str, float] = defaultdict(float)
        for (name, start), (_, end) in pairwise(self._readings):
            totals[name] += self._difference(start, end)
        return dict(totals)


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int = 1) -> list[float]:
    """Seconds of each of `repeats` calls, each waited for."""
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def matmul_rate(device: torch.device, precision: str) -> float:
    """FLOP/s of square matrix products, the best of several sizes and moments."""
    rates = []
    for size in (4096, 8192, 16384) if device.type == "cuda" else (1024,):
        a, b = torch.randn(2, size, size, device=device).to(DTYPES[precision])
        best = min(seconds_of(lambda a=a, b=b: [a @ b for _ in range(10)], device, 5)[1:]) / 10
        rates.append(2 * size**3 / best)
    return max(rates)


def restart_peak(device: torch.device) -> None:
    """`peak_memory` starts again at what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark of the resident memory


def peak_memory(device: torch.device) -> int:
    """Most bytes in use since `restart_peak`: of tensors on a GPU, else of the process (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures belong to; prints it, too."""
    on_cpu = platform.processor() or platform.machine()
    facts = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    print("{device}, {threads} threads, {cores} cores, torch {torch}".format_map(facts))
    return facts


GPU_OR_CPU = "cuda" if torch.cuda.is_available() else "cpu"


def parser(description: str | None, preset: str | None = None) -> argparse.ArgumentParser:
    """The options that all have, or all with a `preset`: its default."""
    raw = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(description=description, formatter_class=raw)
    made.add_argument("--json", type=Path, help="where to write all figures")
    if preset is not None:
        made.add_argument("--preset", type=Path, default=preset, help="the settings (%(default)s)")
        made.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="any of the settings")
    return made


def read_settings(args: argparse.Namespace, changes: Mapping[str, Any]) -> Settings:
    """The preset with `changes` by dotted key, and with what the command line says."""
    content = load_settings(args.preset).model_dump(mode="json", exclude_unset=True)
    said = {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in args.set)}
    for key, value in {**changes, **said}.items():
        *sections, name = key.split(".")
        reduce(dict.__getitem__, sections, content)[name] = value
    return Settings.model_validate(content)


def write_settings(path: Path, settings: Settings) -> None:
    """What a stage takes as --params."""
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json", exclude_unset=True)))


def write(path: Path | None, content: Mapping[str, Any]) -> None:
    """All figures as JSON, where a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"wrote {path}")
