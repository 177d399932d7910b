"""The fid stage: images per second and peak memory for different numbers of images.

    python -m benchmarks.fid --images 1000 20000 --omegas 1

Runs the stage itself, in a process of its own, on a generator that is there (artifacts/generator), with the
settings of params.yaml otherwise, and writes nothing but into a temporary folder. The last line leaves out
what every run does once, such as its start and the reference.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import torch
import yaml

from benchmarks.timing import GPU_OR_CPU, machine, parser, write


def measure(args: argparse.Namespace, images: int) -> dict[str, float]:
    """One run of the stage."""
    settings = yaml.safe_load(args.params.read_text())
    settings["fid"] = {**(settings.get("fid") or {}), "images": images, "omegas": args.omegas}
    with tempfile.TemporaryDirectory(prefix="fid-") as name:
        folder = Path(name)
        (folder / "params.yaml").write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "stages.fid", "--params", str(folder / "params.yaml")]
        command += ["--generator", str(args.generator), "--out", str(folder / "fid.json")]
        command += ["--plots", str(folder / "plots"), "--report", str(folder / "index.html")]
        environment = os.environ | {"DRIFT_WORK_DIR": str(folder / "work")}
        began = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        peak = watch(process)
        seconds = time.perf_counter() - began
    if process.returncode:
        sys.exit(f"the stage ended with {process.returncode}: {' '.join(command)}")
    return {"images": images, "seconds": seconds, "peak_bytes": peak}


def watch(process: subprocess.Popen) -> int:
    """Peak resident memory in bytes of a process and its children, looked at ten times a second."""
    peak = 0
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            first = psutil.Process(process.pid)
            tree = [first, *first.children(recursive=True)]
            peak = max(peak, sum(each.memory_info().rss for each in tree))
        time.sleep(0.1)
    return peak


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--images", type=int, nargs="+", default=[1000, 20_000])
    options.add_argument("--omegas", type=float, nargs="+", default=[1.0])
    options.add_argument("--generator", type=Path, default=Path("artifacts/generator"))
    options.add_argument("--params", type=Path, default=Path("params.yaml"))
    args = options.parse_args(argv)
    facts = machine(torch.device(GPU_OR_CPU))
    print(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}")
    rows, omegas = [], len(args.omegas)
    for images in args.images:
        rows.append(row := measure(args, images))
        rate, growth = images * omegas / row["seconds"], row["peak_bytes"] / rows[0]["peak_bytes"]
        print(f"{images:>7} images x {omegas} omegas: {row['seconds']:7.1f} s, {rate:7.0f} images/s, peak "
              f"memory {row['peak_bytes'] / 2**20:.0f} MiB ({growth:.2f} of the first)")  # fmt: skip
    further, longer = (rows[-1][name] - rows[0][name] for name in ("images", "seconds"))
    rate = further * omegas / longer if further > 0 and longer > 0 else None
    if rate:
        print(f"without what every run does once: {rate:.0f} images/s")
    write(args.json, {**facts, "omegas": args.omegas, "rows": rows, "without_start_images_per_s": rate})


if __name__ == "__main__":
    main()
