"""The fid stage: images per second and peak memory for different numbers of images.

    python -m benchmarks.fid --images 1000 20000 --set 'fid.omegas=[1]'

Runs the stage itself on a generator that is there (artifacts/generator), and writes nothing but into a
temporary folder. Memory is the most that one process of the stage has had resident. The last line leaves out
what every run does once, such as its start and the reference.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.timing import GPU_OR_CPU, machine, parser, read_settings, write, write_settings
from drift.settings import Settings


def measure(settings: Settings, generator: Path) -> dict[str, float]:
    """One run of the stage."""
    with tempfile.TemporaryDirectory(prefix="fid-") as name:
        folder = Path(name)
        write_settings(folder / "params.yaml", settings)
        command = [sys.executable, "-m", "stages.fid", "--params", str(folder / "params.yaml")]
        command += ["--generator", str(generator), "--out", str(folder / "fid.json")]
        command += ["--plots", str(folder / "plots"), "--report", str(folder / "index.html")]
        environment = os.environ | {"DRIFT_WORK_DIR": str(folder / "work")}
        began = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"the stage ended with {process.returncode}: {' '.join(command)}")
    return {"images": settings.fid.images, "seconds": seconds, "peak_bytes": 1024 * used.ru_maxrss}  # Linux


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, "params.yaml")
    options.add_argument("--images", type=int, nargs="+", default=[1000, 20_000])
    options.add_argument("--generator", type=Path, default=Path("artifacts/generator"))
    args = options.parse_args(argv)
    facts, rows, omegas = machine(torch.device(GPU_OR_CPU)), [], []
    for images in args.images:
        settings = read_settings(args, {"fid.images": images})
        omegas = settings.fid.omegas
        rows.append(row := measure(settings, args.generator))
        rate, growth = images * len(omegas) / row["seconds"], row["peak_bytes"] / rows[0]["peak_bytes"]
        print(f"{images:>7} images x {len(omegas)} omegas: {row['seconds']:7.1f} s, {rate:7.0f} images/s, "
              f"peak memory {row['peak_bytes'] / 2**20:.0f} MiB ({growth:.2f} of the first)")  # fmt: skip
    further, longer = (rows[-1][name] - rows[0][name] for name in ("images", "seconds"))
    rate = further * len(omegas) / longer if further > 0 and longer > 0 else None
    if rate:
        print(f"without what every run does once: {rate:.0f} images/s")
    write(args.json, {**facts, "omegas": omegas, "rows": rows, "without_start_images_per_s": rate})


if __name__ == "__main__":
    main()
