"""How fast images become latents, beside the autoencoder alone.

    python -m benchmarks.encode [--images ROOT] [--set encode.autoencoder=FOLDER] [--json FILE]

"stage" is the stage encode from start to finish, files included; "VAE" is the network on pictures that lie in
its device's memory. Their ratio is 1 where reading and decoding images hides behind the network, and less
where they compete for cores or the run is too short for its start. Images are the first of ROOT/train, or
without --images synthetic ones of ImageNet's usual size.
"""

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
from PIL import Image

import stages.encode
from benchmarks.timing import GPU_OR_CPU, machine, parser, read_settings, seconds_of, write, write_settings
from drift.settings import Settings

WIDTH, HEIGHT = 500, 375  # the most frequent size in ImageNet


def write_images(folder: Path, count: int) -> None:
    """JPEGs of about 100 KB, as ImageNet's are: smooth shapes under a little noise."""
    rng = np.random.default_rng(0)
    for number in range(count):
        shapes = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
        shapes = np.asarray(shapes.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
        pixels = (shapes + rng.normal(0, 12, shapes.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06}.JPEG", quality=92)


def stage_rate(folder: Path, settings: Settings, count: int) -> float:
    """Images per second of one whole run."""
    write_settings(folder / "params.yaml", settings)
    out = folder / f"latents-{settings.hardware.workers}"
    began = time.perf_counter()
    with patch.dict(os.environ, DRIFT_WORK_DIR=str(folder / "work")), contextlib.redirect_stdout(None):
        arguments = [
            "--view",
            "center",
            "--params",
            str(folder / "params.yaml"),
            "--out",
            str(out),
            "--fresh",
        ]
        stages.encode.main(arguments)
    return count / (time.perf_counter() - began)


def vae_rate(settings: Settings, device: torch.device) -> float:
    """Images per second of the autoencoder alone, uncompiled."""
    encode, batch, side = settings.encode, settings.hardware.encode_batch, settings.data.image_size
    vae = encode.autoencoder.load(encode.precision, device)
    pictures = torch.randint(256, (batch, side, side, 3), dtype=torch.uint8, device=device)
    return batch / statistics.median(seconds_of(lambda: vae.encode(pictures), device, 6)[1:])


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, "presets/imagenet256_ablation.yaml")
    options.add_argument("--images", type=Path, help="folder with train/<class>/<file>")
    options.add_argument("--count", type=int, default=512, help="how many of the images (512)")
    options.add_argument(
        "--workers", type=int, nargs="+", default=[0, os.cpu_count() or 1], help="hardware.workers"
    )
    args = options.parse_args(argv)
    device = torch.device(GPU_OR_CPU)  # as the stage chooses
    facts, rows = machine(device), []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name, "images")
        images = root / "train" / "all"
        images.mkdir(parents=True)
        if args.images is None:
            write_images(images, args.count)
        else:
            files = (path for path in sorted((args.images / "train").glob("*/*")) if path.is_file())
            for path in itertools.islice(files, args.count):
                (images / f"{path.parent.name}-{path.name}").symlink_to(path.resolve())
        count = len(list(images.iterdir()))
        changes = {"data.dataset": "folder", "data.root": str(root), "data.classes": 1}
        changes |= {"drift.classes_per_step": 1, "fid.picture_classes": 1, "hardware.processes": 1}
        settings = read_settings(args, changes)
        network = vae_rate(settings, device)
        print(f"VAE alone {network:.1f} images/s")
        for workers in args.workers:
            hardware = settings.hardware.model_copy(update={"workers": workers})
            rate = stage_rate(Path(name), settings.model_copy(update={"hardware": hardware}), count)
            rows.append({"workers": workers, "images_per_s": rate, "of_vae": rate / network})
            print(f"{workers:3} workers: {rate:8.1f} images/s, {rate / network:.2f} of the VAE", flush=True)
    how = {"settings": settings.model_dump(mode="json"), "images": count}
    write(args.json, {**facts, **how, "vae_images_per_s": network, "rows": rows})


if __name__ == "__main__":
    main()
