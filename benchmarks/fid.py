"""The fid stage: images per second and peak memory for different numbers of images.

    python -m benchmarks.fid --images 1000 20000 --omegas 1

Runs the stage itself, in a process of its own, on a generator that is there (artifacts/generator), with the
settings of params.yaml otherwise, and writes nothing but into a temporary folder. Memory that grows with the
number of images would show as a ratio above 1 in the last column.

The networks alone are measured in the same run: generator, VAE decoder and feature network, in the stage's
own batches, on tensors that lie in the device's memory. The stage's ratio to them counts its start, reference
and report; that of the images by which the last run exceeds the first does not, and means something where
these take much longer than the start.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import get_args

import psutil
import torch
from ruamel.yaml import YAML

from benchmarks.timing import call_seconds, in_child, machine
from drift.autoencoders.kl import VAE, VAEPrecision, to_uint8
from drift.evaluation.batches import in_batches
from drift.evaluation.networks import load_feature_network
from drift.evaluation.sample import balanced_labels, draw_inputs
from drift.models.generator import Generator
from drift.settings import Settings, load_settings
from drift.training.compile import Compiled

REPEATS = 5


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 20_000])
    parser.add_argument("--omegas", type=float, nargs="+", default=[1.0])
    parser.add_argument("--generator", type=Path, default=Path("artifacts/generator"))
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--vae-precision", choices=get_args(VAEPrecision), help="(that of --params)")
    parser.add_argument("--batches", type=int, default=4, help="of the networks alone, at once (4)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args(argv)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # as the stage chooses
    facts = machine(device)
    settings = load_settings(args.params)
    if args.vae_precision is not None:
        fid = settings.fid.model_copy(update={"precision": args.vae_precision})
        settings = settings.model_copy(update={"fid": fid})
    networks = in_child(network_rates, settings, args.generator, str(device), args.batches)
    print(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}; networks alone: "
          + ", ".join(f"{name} {rate:.0f}" for name, rate in networks.items()) + " images/s",
          flush=True)  # fmt: skip
    rows = []
    for images in args.images:
        row = measure(args, images)
        rows.append(row | {"of_networks": row["images_per_s"] / networks["all"]})
        growth = row["peak_mib"] / rows[0]["peak_mib"]
        print(
            f"{images:>7} images x {len(args.omegas)} omegas: {row['seconds']:7.1f} s, "
            f"{row['images_per_s']:7.0f} images/s ({rows[-1]['of_networks']:.2f} of the networks), "
            f"peak memory {row['peak_mib']:6.0f} MiB ({growth:.2f} of the first)",
            flush=True,
        )
    content = {
        **facts,
        "vae_precision": settings.fid.precision,
        "networks_images_per_s": networks,
        "rows": rows,
    }
    further, longer = (rows[-1][name] - rows[0][name] for name in ("images", "seconds"))
    if further > 0 and longer > 0:
        rate = further * len(args.omegas) / longer
        content["without_start"] = {"images_per_s": rate, "of_networks": rate / networks["all"]}
        ratio = f"{rate / networks['all']:.2f} of the networks"
        print(f"without what every run does once: {rate:.0f} images/s, {ratio}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=2) + "\n")
        print(f"wrote {args.json}")


@torch.inference_mode()
def network_rates(settings: Settings, generator_folder: Path, device: str, batches: int) -> dict[str, float]:
    """Images per second of each network of the stage alone, and of one after the other (`all`)."""
    where = torch.device(device)
    fid, hardware = settings.fid, settings.hardware
    generator = Generator.from_pretrained(generator_folder).to(where).eval()
    encode = settings.encode
    vae = VAE.from_pretrained(encode.vae, encode.vae_revision, where, fid.precision)
    if hardware.compile and where.type == "cuda":  # as the stage does
        vae.compile_with(Compiled)
    network = load_feature_network(fid.features, fid.mode, where, hardware.workers, fid.inception)
    count = hardware.sample_batch
    noise, style = draw_inputs(range(count), generator.config, settings.seed, where)
    labels = torch.from_numpy(balanced_labels(count, generator.config.num_classes)).to(where)
    inputs = (noise, labels, torch.ones(count, device=where), style)
    latents = in_batches(generator, *inputs)

    def decode() -> torch.Tensor:
        return to_uint8(in_batches(vae.decode, latents, size=hardware.decode_batch))

    resized = network.resized(decode()).to(where)
    seconds = {}
    for name, call in (
        ("generator", lambda: in_batches(generator, *inputs)),
        ("VAE", decode),
        ("features", lambda: network.features(resized)),
    ):
        call()
        several = call_seconds(lambda call=call: [call() for _ in range(batches)], where, REPEATS)
        seconds[name] = statistics.median(several) / (batches * count)
    rates = {name: 1 / spent for name, spent in seconds.items()}
    return rates | {"all": 1 / sum(seconds.values())}


def measure(args: argparse.Namespace, images: int) -> dict:
    """One run of the stage."""
    yaml = YAML(typ="safe", pure=True)
    settings = yaml.load(args.params)
    settings["fid"] |= {"images": images, "omegas": args.omegas}
    if args.vae_precision is not None:
        settings["fid"]["precision"] = args.vae_precision
    with tempfile.TemporaryDirectory(prefix="fid-") as name:
        folder = Path(name)
        yaml.dump(settings, folder / "params.yaml")
        command = [sys.executable, "-m", "stages.fid", "--params", str(folder / "params.yaml")]
        command += ["--generator", str(args.generator), "--out", str(folder / "fid.json")]
        command += ["--plots", str(folder / "plots"), "--report", str(folder / "index.html")]
        began = time.perf_counter()
        process = subprocess.Popen(
            command,
            env=os.environ | {"DRIFT_WORK_DIR": str(folder / "work")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        peak = _watch(process)
        seconds = time.perf_counter() - began
        if process.returncode:
            sys.exit(f"the stage ended with {process.returncode}: {' '.join(command)}")
    return {
        "images": images,
        "omegas": len(args.omegas),
        "seconds": round(seconds, 1),
        "images_per_s": round(images * len(args.omegas) / seconds, 1),
        "peak_mib": round(peak / 2**20, 1),
    }


def _watch(process: subprocess.Popen) -> int:
    """Peak resident memory in bytes of a process and its children, looked at ten times a second."""
    peak = 0
    done = threading.Event()

    def look() -> None:
        nonlocal peak
        while not done.wait(0.1):
            try:
                tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                peak = max(peak, sum(each.memory_info().rss for each in tree))
            except psutil.NoSuchProcess:
                pass

    thread = threading.Thread(target=look)
    thread.start()
    process.wait()
    done.set()
    thread.join()
    return peak


if __name__ == "__main__":
    main()
