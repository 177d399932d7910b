"""How fast images become latents, beside the autoencoder alone.

    python -m benchmarks.encode [--images ROOT] [--vae FOLDER] [--json benchmarks/encode.json]

"stage" is the stage encode from start to finish, files included; "VAE" is the network on pictures that lie in
its device's memory. Their ratio is 1 where reading and decoding images hides behind the network, and less
where they compete for cores or the run is too short for its start. Images are the first of ROOT/train, or
without --images synthetic ones of ImageNet's usual size.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import yaml
from PIL import Image

import stages.encode
from benchmarks.timing import GPU_OR_CPU, machine, parser, seconds_of, write
from drift.autoencoders.kl import VAE
from drift.settings import load_settings

PRESET = "presets/imagenet256_ablation.yaml"
WIDTH, HEIGHT = 500, 375  # the most frequent size in ImageNet


def write_images(folder: Path, count: int) -> None:
    """JPEGs of about 100 KB, as ImageNet's are: smooth shapes under a little noise."""
    rng = np.random.default_rng(0)
    for number in range(count):
        shapes = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
        shapes = np.asarray(shapes.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
        pixels = (shapes + rng.normal(0, 12, shapes.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06}.JPEG", quality=92)


def write_settings(path: Path, root: Path, workers: int, args: argparse.Namespace) -> None:
    content = load_settings(PRESET).model_dump(mode="json", exclude_unset=True)
    content["data"] |= {"dataset": "folder", "root": str(root), "image_size": args.image_size, "classes": 1}
    content["encode"] |= {"autoencoder": args.vae, "precision": args.precision}
    content["drift"]["classes_per_step"] = content["fid"]["picture_classes"] = 1
    hardware = {"encode_batch": args.batch, "workers": workers, "compile": args.compile, "processes": 1}
    content["hardware"] |= hardware
    path.write_text(yaml.safe_dump(content))


def stage_rate(folder: Path, workers: int, args: argparse.Namespace) -> float:
    """Images per second of one whole run."""
    write_settings(folder / "params.yaml", folder / "images", workers, args)
    out = ["--params", str(folder / "params.yaml"), "--out", str(folder / f"latents-{workers}"), "--fresh"]
    began = time.perf_counter()
    with patch.dict(os.environ, DRIFT_WORK_DIR=str(folder / "work")), contextlib.redirect_stdout(None):
        stages.encode.main(["--view", "center", *out])
    return args.count / (time.perf_counter() - began)


def vae_rate(args: argparse.Namespace, device: torch.device) -> float:
    """Images per second of the network, uncompiled."""
    vae = VAE.from_pretrained(args.vae, device=device, precision=args.precision)
    shape = (args.batch, args.image_size, args.image_size, 3)
    pictures = torch.randint(256, shape, dtype=torch.uint8, device=device)
    return args.batch / statistics.median(seconds_of(lambda: vae.moments(pictures), device, 6)[1:])


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__)
    add = options.add_argument
    add("--images", type=Path, help="folder with train/<class>/<file>")
    add("--count", type=int, default=512, help="how many of the images (512)")
    add("--vae", default="pretrained/digits_vae", help="folder or hub id")
    add("--precision", default="float32", help="of the VAE: float32 or bfloat16")
    add("--compile", action="store_true", help="the VAE in the stage, on a GPU")
    add("--image-size", type=int, default=256)
    add("--batch", type=int, default=64, help="hardware.encode_batch")
    add("--workers", type=int, nargs="+", default=[0, os.cpu_count() or 1], help="hardware.workers")
    args = options.parse_args(argv)
    device = torch.device(GPU_OR_CPU)  # as the stage chooses
    facts, network, rows = machine(device), vae_rate(args, device), []
    print(
        f"{facts['device']}, {facts['cores']} cores, torch {facts['torch']}; VAE alone {network:.1f} images/s"
    )
    with tempfile.TemporaryDirectory() as name:
        images = Path(name, "images", "train", "all")
        images.mkdir(parents=True)
        if args.images is None:
            write_images(images, args.count)
        else:
            files = (path for path in sorted((args.images / "train").glob("*/*")) if path.is_file())
            for path in itertools.islice(files, args.count):
                (images / f"{path.parent.name}-{path.name}").symlink_to(path.resolve())
        args.count = len(list(images.iterdir()))
        for workers in args.workers:
            rate = stage_rate(Path(name), workers, args)
            rows.append({"workers": workers, "images_per_s": rate, "of_vae": rate / network})
            print(f"{workers:3} workers: {rate:8.1f} images/s, {rate / network:.2f} of the VAE", flush=True)
    how = {"vae": args.vae, "precision": args.precision, "compile": args.compile, "images": args.count}
    write(args.json, {**facts, **how, "batch": args.batch, "vae_images_per_s": network, "rows": rows})


if __name__ == "__main__":
    main()
