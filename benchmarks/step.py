"""Steps of the stage drift (or mae) on synthetic latents: how fast, and what takes the time.

    python -m benchmarks.step                                       # the ablation preset, on a GPU
    python -m benchmarks.step --classes 2 --samples 4 --width 32    # reduced, for a CPU
    python -m benchmarks.step --stage mae --batch 4 --width 32
    python -m benchmarks.step --estimate --classes-per-pass 64 16 4 # what would fit, counted on a CPU

It runs the stage's own training loop, with random latents and an encoder of random weights, and splits the
very steps that it times, compiled as they are: on a GPU by events that wait for nothing, on a CPU by the
clock. FLOPs are counted by torch.utils.flop_counter, without what is computed again to save memory, and set
against the rate of large square matrix products in the same precision, measured before and after. On request:
a trace, the plain step beside it, a long run, and memory and speed for several numbers of classes at once.
`--estimate` counts the memory instead, without a GPU. benchmarks/README.md says how to read it all.
"""

import argparse
import contextlib
import json
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from ruamel.yaml import YAML

from benchmarks.memory import estimate
from benchmarks.timing import (
    Split,
    free,
    in_child,
    limit_memory,
    machine,
    matmul_rate,
    peak_memory,
    resident_memory,
    restart_peak,
    synchronize,
    time_meter,
)
from benchmarks.training import FIELD, NEVER, Case, Enough, no_plain_field, plain_case, run, step_flops
from drift.settings import Settings, load_settings

WARM_UP = 3  # steps before those that count
TRACED = 3  # steps
COSTLIEST = 10
PLAIN_STEPS = 2
TABLE_STEPS = 3
NO_ROOM = "out of memory: give fewer --classes-per-pass, or --set hardware.activation_checkpointing=true"


def measure(case: Case, steps: int, *, warm_up: int = WARM_UP, trace: Path | None = None) -> dict[str, Any]:
    """Time of `steps` steps by part, and peak memory of all; `trace` takes a trace of some more."""
    device = case.torch_device
    split = Split(time_meter(device))
    began = ended = 0.0
    profiler = None

    def on_step(done: int) -> None:
        nonlocal began, ended, profiler
        if done == warm_up:
            synchronize(device)
            began = time.perf_counter()
            split.start()
        elif done == warm_up + steps:
            split.stop()
            synchronize(device)
            ended = time.perf_counter()
            if trace is not None:
                profiler = _start_profiler(device)
        elif done == warm_up + steps + TRACED:
            profiler.stop()

    free(device)
    restart_peak(device)
    run(case, warm_up + steps + (TRACED if trace else 0), on_step, split)
    seconds = (ended - began) / steps
    result = {
        "steps": steps,
        "steps_per_s": 1 / seconds,
        "step_ms": 1000 * seconds,
        "ms_per_step": {name: 1000 * spent / steps for name, spent in split.totals().items()},
        **peak_memory(device),
    }
    if profiler is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
        result["trace"] = {"file": str(trace), "steps": TRACED, "costliest": _costliest(profiler, device)}
    return result


def _start_profiler(device: torch.device) -> torch.profiler.profile:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    profiler.start()
    return profiler


def _costliest(profiler: torch.profiler.profile, device: torch.device) -> list[dict[str, Any]]:
    """Kernels (on a CPU operators) by their own time."""
    rows = list(profiler.key_averages())
    if device.type == "cuda":
        rows = [row for row in rows if row.device_type == torch.autograd.DeviceType.CUDA]
        spent = {row.key: row.self_device_time_total for row in rows}
    else:
        spent = {row.key: row.self_cpu_time_total for row in rows}
    calls, total = {row.key: row.count for row in rows}, sum(spent.values())
    return [
        {
            "name": name,
            "ms_per_step": spent[name] / 1000 / TRACED,
            "calls_per_step": calls[name] / TRACED,
            "share": spent[name] / total,
        }
        for name in sorted(spent, key=spent.get, reverse=True)[:COSTLIEST]
    ]


def measure_plain(case: Case, implementation: str) -> dict[str, Any]:
    """The plain step, with as many classes at once as there is memory for."""
    classes = case.settings.drift.classes_per_step
    at_once = min(case.settings.hardware.classes_per_pass or classes, classes)
    while True:
        with contextlib.suppress(torch.OutOfMemoryError):
            result = measure(plain_case(case, implementation, at_once), PLAIN_STEPS, warm_up=1)
            return {"field": implementation, "classes_per_pass": at_once, **result}
        if at_once == 1:
            return {"field": implementation, "classes_per_pass": None}
        at_once //= 2


def measure_endurance(case: Case, minutes: float) -> dict[str, Any]:
    """A run of so many minutes: speed and memory of its first and its last tenth."""
    device = case.torch_device
    read, difference = time_meter(device)
    readings, used, resident = [], [], []
    until = 0.0

    def on_step(done: int) -> None:
        nonlocal until
        if done < WARM_UP:
            return
        if done == WARM_UP:
            synchronize(device)
            until = time.perf_counter() + 60 * minutes
        else:
            used.append(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)
        readings.append(read())
        resident.append(resident_memory())
        restart_peak(device)
        if len(readings) > 2 and time.perf_counter() >= until:
            raise Enough

    free(device)
    run(case, NEVER, on_step)
    synchronize(device)
    steps = len(readings) - 1
    tenth = max(1, steps // 10)

    def part(first: int) -> dict[str, float]:
        facts = {
            "steps_per_s": tenth / difference(readings[first], readings[first + tenth]),
            "resident_bytes": max(resident[first : first + tenth + 1]),
        }
        if device.type == "cuda":
            facts["peak_bytes"] = max(used[first : first + tenth])
        return facts

    tenths = {"first": part(0), "last": part(steps - tenth)}
    ratios = {name: tenths["last"][name] / tenths["first"][name] for name in tenths["first"]}
    return {"steps": steps, "seconds": difference(readings[0], readings[-1]), **tenths, "ratio": ratios}


def table_row(case: Case, memory_limit: float | None) -> dict[str, Any] | None:
    """Speed and peak memory of some steps; None if the device has no room for them."""
    limit_memory(case.torch_device, memory_limit)
    try:
        return measure(case, TABLE_STEPS, warm_up=2)
    except torch.OutOfMemoryError:
        return None


def memory_table(case: Case, numbers: list[int], memory_limit: float | None) -> list[dict[str, Any]]:
    """A row for each number of classes at once, each from a process of its own."""
    print(f"{'classes at once':>15} {'peak memory':>14} {'reserved':>14} {'step':>13}")
    rows = []
    for number in numbers:
        hardware = case.settings.hardware.model_copy(update={"classes_per_pass": number})
        settings = case.settings.model_copy(update={"hardware": hardware})
        try:
            measured = in_child(table_row, Case(case.stage, settings, case.device), memory_limit)
        except BrokenProcessPool:  # killed by the kernel
            measured = None
        row = {"classes_per_pass": number, "fits": measured is not None} | (measured or {})
        rows.append(row)
        if measured is None:
            print(f"{number:15} {'out of memory':>14}", flush=True)
        else:
            sizes = [row[key] / 2**30 for key in ("peak_bytes", "peak_reserved_bytes") if key in row]
            columns = "".join(f"{size:11.2f} GiB" for size in sizes).ljust(30)
            print(f"{number:15}{columns} {row['step_ms']:10.1f} ms", flush=True)
    return rows


def estimated_table(settings: Settings, numbers: list[int]) -> list[dict[str, Any]]:
    """A row of counted memory for each number of classes at once; nothing is run."""
    print(f"{'classes at once':>15} {'tensors':>10} {'with reserve':>13}   estimated, not measured")
    rows = []
    for number in numbers:
        hardware = settings.hardware.model_copy(update={"classes_per_pass": number})
        sizes = estimate(settings.model_copy(update={"hardware": hardware}))
        rows.append({"classes_per_pass": number, "estimated_bytes": sizes})
        print(f"{number:15} {sizes['total'] / 1e9:7.1f} GB {sizes['needed'] / 1e9:10.1f} GB", flush=True)
    return rows


def print_step(result: dict[str, Any]) -> None:
    """A step by part."""
    flops, rate, whole = result["flops"], result["matmul"]["flops_per_s"], result["step_ms"]
    memory = f"peak memory {result['peak_bytes'] / 2**30:.2f} GiB"
    if "peak_reserved_bytes" in result:
        memory += f" ({result['peak_reserved_bytes'] / 2**30:.2f} GiB with the allocator's reserve)"
    print(f"{result['steps_per_s']:.3f} steps/s, {whole:.1f} ms a step, {memory}")
    print(f"{'part':30} {'a step':>13} {'share':>7} {'GFLOP':>12} {'TFLOP/s':>9} {'of products':>12}")
    rows = sorted(result["ms_per_step"].items(), key=lambda row: -row[1])
    for name, spent in [*rows, ("whole step", whole)]:
        count = flops["step"] if name == "whole step" else flops["parts"].get(name, 0)
        line = f"{name:30} {spent:10.2f} ms {spent / whole:7.1%}"
        if count:
            line += f" {count / 1e9:12.4g} {count / spent / 1e9:9.3g} {count / spent * 1e3 / rate:12.1%}"
        print(line)
    print(
        f"matrix products of {result['matmul']['size']}^2 in {result['matmul']['precision']}: "
        f"{rate / 1e12:.3g} TFLOP/s; the step has {result['share_of_matmul']:.1%} of that"
    )


def print_more(result: dict[str, Any]) -> None:
    """What was asked for beside the step."""
    if "trace" in result:
        print(f"{COSTLIEST} costliest of {TRACED} more steps; trace in {result['trace']['file']}")
        for row in result["trace"]["costliest"]:
            print(f"{row['ms_per_step']:12.2f} ms {row['share']:7.1%} {row['calls_per_step']:9.1f} calls  "
                  f"{row['name'][:60]}")  # fmt: skip
    for plain in result.get("plain", []):
        if plain["classes_per_pass"] is None:
            print(f"plain step, {plain['field']} field: out of memory with one class at once")
            continue
        print(
            f"plain step, {plain['field']} field, {plain['classes_per_pass']} classes at once: "
            f"{plain['step_ms']:.1f} ms, {plain['peak_bytes'] / 2**30:.2f} GiB; "
            f"ours is {plain['ratio']:.2f}x as fast"
        )
    if "endurance" in result:
        run_, names = result["endurance"], {"peak_bytes": "peak", "resident_bytes": "resident"}
        print(f"{run_['steps']} steps in {run_['seconds'] / 60:.1f} minutes, first and last tenth:")
        print(f"{'steps/s':>9} {run_['first']['steps_per_s']:10.4f} {run_['last']['steps_per_s']:10.4f} "
              f"{run_['ratio']['steps_per_s']:8.3f}x")  # fmt: skip
        for key, name in names.items():
            if key in run_["first"]:
                first, last = (run_[which][key] / 2**20 for which in ("first", "last"))
                print(f"{name:>9} {first:6.0f} MiB {last:6.0f} MiB {run_['ratio'][key]:8.3f}x")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", type=Path, default=Path("presets/imagenet256_ablation.yaml"))
    add("--stage", choices=("drift", "mae"), default="drift")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--steps", type=int, default=10, help="that count (10)")
    add("--classes", type=int, help="classes per step, instead of the preset's")
    add("--samples", type=int, help="generated and positive samples per class; a quarter of it unconditional")
    add("--batch", type=int, help="latents per step of the stage mae")
    add("--width", type=int, help="of the encoder")
    add("--classes-per-pass", type=int, nargs="+", metavar="N",
        help="classes at once; several print only a table of memory and speed")  # fmt: skip
    add("--feature-batch", type=int)
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="any setting: hardware.compile=false")
    add("--estimate", action="store_true",
        help="count the memory of a step in the preset's precision on a GPU, without taking one")  # fmt: skip
    add("--memory-limit", type=float, metavar="GB",
        help="have no more than so many 10^9 bytes of the GPU, as a smaller one would")  # fmt: skip
    add("--trace", type=Path, help=f"write a Chrome trace of {TRACED} more steps there")
    add("--plain", nargs="*", choices=("vectorised", "literal"), metavar="FIELD",
        help="time the plain step too, with these fields of benchmarks.field (literal)")  # fmt: skip
    add("--minutes", type=float, help="then run for so long, and compare its first and last tenth")
    add("--json", type=Path, help="where to write all figures")
    args = parser.parse_args(argv)
    if args.stage == "mae" and (args.plain is not None or args.classes_per_pass):
        parser.error("--plain and --classes-per-pass belong to the stage drift")
    if args.stage == "mae" and args.estimate:
        parser.error("--estimate belongs to the stage drift")
    if args.plain == []:
        args.plain = ["literal"]
    return args


def read_settings(args: argparse.Namespace) -> Settings:
    """The preset with what the command line changes; on a CPU uncompiled and in float32 unless it says so."""
    content = load_settings(args.preset).model_dump(mode="json")
    changes: dict[str, Any] = {
        "drift.classes_per_step": args.classes,
        "drift.generated": args.samples,
        "drift.positives": args.samples,
        "drift.unconditional": args.samples and max(1, args.samples // 4),
        "mae.batch_size": args.batch,
        "mae.width": args.width,
        "mae.norm_groups": args.width and min(content["mae"]["norm_groups"], args.width),
        "hardware.feature_batch": args.feature_batch,
    }
    if args.classes_per_pass and len(args.classes_per_pass) == 1:
        changes["hardware.classes_per_pass"] = args.classes_per_pass[0]
    if args.device == "cpu" and not args.estimate:
        changes |= {"hardware.compile": False, "drift.precision": "float32"}
    changes = {key: value for key, value in changes.items() if value is not None}
    for text in args.set:
        key, _, value = text.partition("=")
        changes[key] = YAML(typ="safe", pure=True).load(value)
    for key, value in changes.items():
        *section, name = key.split(".")
        place = content
        for part in section:
            place = place.get(part)
            if not isinstance(place, dict):
                sys.exit(f"--set {key}: there is no such setting")
        place[name] = value
    try:
        return Settings.model_validate(content)
    except ValidationError as error:
        sys.exit(f"{args.preset} with these changes: {error}")


def describe(case: Case) -> str:
    settings = case.settings
    if case.stage == "mae":
        return f"{settings.mae.batch_size} latents, encoder of width {settings.mae.width}"
    options = settings.drift
    return (
        f"{options.classes_per_step} classes of {options.generated} generated, {options.positives} positive, "
        f"{options.unconditional} unconditional samples, encoder of width {settings.mae.width}"
    )


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    settings = read_settings(args)
    case, device = Case(args.stage, settings, args.device), torch.device(args.device)
    if args.plain and (reason := no_plain_field(settings.field())):
        sys.exit(f"--plain: {reason}")
    result: dict[str, Any] = {
        **machine(device),
        "stage": args.stage,
        "preset": str(args.preset),
        "settings": settings.model_dump(mode="json"),
        "encoder_width": settings.mae.width,
        "memory_limit_gb": args.memory_limit,
    }
    where = f"{result['device']}, {result['threads']} threads, torch {result['torch']}"
    print(f"{where}, {args.preset}, {args.stage}: {describe(case)}", flush=True)
    if args.estimate:
        every = [settings.hardware.classes_per_pass or settings.drift.classes_per_step]
        result["memory_estimate"] = estimated_table(settings, args.classes_per_pass or every)
    elif args.classes_per_pass and len(args.classes_per_pass) > 1:
        result["memory_table"] = memory_table(case, args.classes_per_pass, args.memory_limit)
    else:
        limit_memory(device, args.memory_limit)
        result |= measure_all(case, args)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {args.json}")


def measure_all(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """The step, and what else is asked for, told as it comes."""
    device, precision = case.torch_device, case.settings.drift.precision
    parts = step_flops(case)
    flops = {"step": sum(parts.values()), "parts": parts}
    before = matmul_rate(device, precision)
    try:
        result = measure(case, args.steps, trace=args.trace)
    except torch.OutOfMemoryError:
        sys.exit(NO_ROOM)
    free(device)
    best = max(before, matmul_rate(device, precision), key=lambda rate: rate["flops_per_s"])
    result |= {"flops": flops, "matmul": {"precision": precision, **best}}
    result["share_of_matmul"] = flops["step"] * result["steps_per_s"] / best["flops_per_s"]
    if case.stage == "drift":
        result["field_share"] = result["ms_per_step"][FIELD] / result["step_ms"]
    print_step(result)
    more: dict[str, Any] = {"trace": result["trace"]} if args.trace else {}
    if args.plain:
        more["plain"] = [measure_plain(case, implementation) for implementation in args.plain]
        for plain in more["plain"]:
            if plain["classes_per_pass"] is not None:
                plain["ratio"] = plain["step_ms"] / result["step_ms"]
    if args.minutes:
        more["endurance"] = measure_endurance(case, args.minutes)
    print_more(more)
    return result | more


if __name__ == "__main__":
    main()
