"""How fast images become latents: decoding alone, the VAE alone, and both at once.

    python -m benchmarks.encode [--images ROOT] [--vae FOLDER] [--device cuda] [--json benchmarks/encode.json]

"both" is `encode_view` from start to finish, files included; "decode" is the same with a network that does
nothing; "VAE" is the network on pictures that lie in its device's memory, after a first batch whose extra
time is the warm-up. "of VAE" is the ratio of "both" to the network alone; "of slower" that to the slower of
the two: 1 where they overlap fully, less where they compete for cores or the run is too short for its start.
Images are the first of ROOT/train, or without --images synthetic ones of ImageNet's usual size.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.timing import call_seconds, machine
from drift.autoencoders.kl import VAE, VAEPrecision
from drift.data.datasets import FolderImages
from drift.data.views import Augmented, Center
from drift.runtime.processes import Ranks
from drift.training.compile import Compiled
from drift.training.encode import EncodeOptions, encode_view

WIDTH, HEIGHT = 500, 375  # the most frequent size in ImageNet
VAE_BATCHES = 5


class Images(FolderImages):
    """The first so many images of `root`/train, or all that there are."""

    def __init__(self, root: str, count: int):
        super().__init__(root, "train")
        self.labels, self._files = self.labels[:count], self._files[:count]


class NoNetwork:
    """A VAE whose latents are zeros, at once."""

    def __init__(self, vae: VAE):
        self._vae = vae

    def __getattr__(self, name: str):
        return getattr(self._vae, name)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return torch.zeros(len(images), *self.latent_shape(images.shape[1]), device=self.device)


def write_images(root: Path, count: int) -> None:
    """JPEGs of about 100 KB, as ImageNet's are: smooth shapes under a little noise."""
    rng = np.random.default_rng(0)
    folder = root / "train" / "synthetic"
    folder.mkdir(parents=True)
    for number in range(count):
        shapes = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
        shapes = np.asarray(shapes.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
        pixels = (shapes + rng.normal(0, 12, shapes.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06}.JPEG", quality=92)


def encode_rate(source: Images, vae: VAE | NoNetwork, workers: int, args: argparse.Namespace) -> float:
    """Images per second of one whole run."""
    crops = Augmented(crops=args.crops, crop_scale=(0.2, 1.0), crop_ratio=(3 / 4, 4 / 3), flip=True)
    options = EncodeOptions(
        view=crops if args.view == "augmented" else Center(mirror=False),
        image_size=args.image_size,
        posterior="sample",
        seed=0,
        on_bad_image="error",
    )
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        encode_view(
            source, vae, folder, options, Ranks(0, 1, vae.device), batch_size=args.batch, workers=workers
        )
        return len(source) / (time.perf_counter() - start)


def vae_rate(vae: VAE, per_image: int, args: argparse.Namespace) -> tuple[float, float]:
    """Images per second of the network, and the seconds that the first batch takes longer than others."""
    shape = (args.batch, args.image_size, args.image_size, 3)
    pictures = torch.randint(256, shape, dtype=torch.uint8, device=vae.device)
    seconds = call_seconds(lambda: vae.moments(pictures), vae.device, 1 + VAE_BATCHES)
    steady = statistics.median(seconds[1:])
    return args.batch / per_image / steady, seconds[0] - steady


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", help="folder with train/<class>/<file>")
    parser.add_argument("--count", type=int, default=512, help="how many of the images (512)")
    parser.add_argument("--vae", default="pretrained/digits_vae", help="folder or hub id")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vae-precision", choices=get_args(VAEPrecision), default="float32")
    parser.add_argument("--compile", action="store_true", help="the VAE, by torch.compile")
    parser.add_argument("--view", choices=("center", "augmented"), default="center")
    parser.add_argument("--crops", type=int, default=4, help="per image, in the augmented view")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64, help="hardware.encode_batch")
    parser.add_argument("--workers", type=int, nargs="+", help="counts (0, 1, 2, 4 ... up to the cores)")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    args = parser.parse_args(argv)

    cores = os.cpu_count() or 1
    workers = args.workers or [0, *(2**n for n in range(cores.bit_length()) if 2**n <= cores)]
    facts = machine(torch.device(args.device))
    vae = VAE.from_pretrained(args.vae, device=args.device, precision=args.vae_precision)
    if args.compile:
        vae.compile_with(Compiled)
    with ExitStack() as stack:
        if args.images is None:
            args.images = stack.enter_context(tempfile.TemporaryDirectory())
            write_images(Path(args.images), args.count)
        source = Images(args.images, args.count)
        sizes = [Path(source.name(index)).stat().st_size for index in range(len(source))]
        print(
            f"{facts['device']}, {cores} cores, torch {facts['torch']}; {len(source)} files of "
            f"{statistics.mean(sizes) / 1000:.0f} KB, {args.view} at {args.image_size}, batch {args.batch}"
        )
        network, warm_up = vae_rate(vae, args.crops if args.view == "augmented" else 1, args)
        how = args.vae_precision + (", compiled" if args.compile else "")
        print(f"VAE ({how}) alone {network:.1f} images/s; its first batch takes {warm_up:.2f} s longer")
        print(f"{'workers':>7} {'decode':>13} {'both':>12} {'of VAE':>7} {'of slower':>9}")
        rows = []
        for count in workers:
            decode = encode_rate(source, NoNetwork(vae), count, args)
            both = encode_rate(source, vae, count, args)
            row = {"workers": count, "decode": decode, "both": both}
            row |= {"of_vae": both / network, "share": both / min(decode, network)}
            rows.append(row)
            print(f"{count:7} {decode:8.1f} im/s {both:7.1f} im/s {row['of_vae']:7.2f} {row['share']:9.2f}",
                  flush=True)  # fmt: skip
    if args.json:
        content = {
            **facts,
            "vae": args.vae,
            "vae_precision": args.vae_precision,
            "compile": args.compile,
            "images": len(source),
            "mean_bytes": statistics.mean(sizes),
            "view": args.view,
            "image_size": args.image_size,
            "batch": args.batch,
            "vae_images_per_s": network,
            "vae_warm_up_s": warm_up,
            "rows": rows,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(content, indent=1) + "\n")
        print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
