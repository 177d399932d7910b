"""Draw images of classes at a CFG strength, as a grid or as files.

A row of the grid is a class. Column i has the noise of the fid stage's sample number
i for the same seed, whatever else is drawn. SOURCE is a folder that the stage drift
or drift export has written, or a hub id of the latter.

examples:
  drift sample --classes 3 7 --count 8
  drift sample --rev main --classes 0 1 2 --omega 2 --out before.png
  drift sample outputs/exported --classes "golden retriever" 360 --omega 1.5
  drift sample imported/latent_L --vae stabilityai/sd-vae-ft-mse --classes 207
  drift sample --files --out outputs/png --count 100       a file per sample
"""

import argparse
from pathlib import Path

from drift.cli.options import (
    add_drawing,
    class_number,
    count,
    find_source,
    positive,
    usable_device,
)
from drift.runtime.errors import UserError

_AT_ONCE = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_drawing(parser)
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="numbers or names (the first ten)")
    parser.add_argument("--omega", type=positive, default=1.0, help="CFG strength; 1 is none (1)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    parser.add_argument("--count", type=count, default=8, metavar="N", help="samples of each class (8)")
    parser.add_argument("--files", action="store_true", help="OUT/<class>/<number>.png instead of a grid")
    parser.add_argument("--out", type=Path, help="(outputs/samples.png, or the folder outputs/samples)")


def run(args: argparse.Namespace) -> None:
    import numpy as np
    from tqdm import tqdm

    from drift.evaluation.pictures import image_grid, save_png, visible_scale
    from drift.interop.pipeline import DriftPipeline
    from drift.runtime.files import check_writable

    out = args.out or Path("outputs/samples" if args.files else "outputs/samples.png")
    if not args.files and out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: the picture's name must end in .png (or ask for --files)")
    check_writable(out if args.files else out.parent)
    pipe = DriftPipeline.from_pretrained(
        find_source(args.source, args.rev), vae=args.vae, variant=args.weights, revision=args.revision
    ).to(usable_device(args.device))
    labels = [
        class_number(pipe, name) for name in args.classes or range(min(10, pipe.generator.config.num_classes))
    ]
    rows = []
    for label in tqdm(labels, desc="classes", disable=len(labels) < 2):
        for start in range(0, args.count, _AT_ONCE):
            indices = range(start, min(start + _AT_ONCE, args.count))
            generators = pipe.sample_generators(args.seed, indices)
            images = pipe([label] * len(indices), omega=args.omega, generator=generators)[0]
            if args.files:
                (out / str(label)).mkdir(parents=True, exist_ok=True)
                for index, image in zip(indices, images, strict=True):
                    save_png(out / str(label) / f"{index:06d}.png", image)
            else:
                rows += [np.asarray(image) for image in images]
    names = [pipe.id2label.get(label, str(label)).split(",")[0] for label in labels]
    if rows:
        scale = visible_scale(len(rows[0]))
        save_png(out, image_grid(np.stack(rows), args.count, scale=scale, row_labels=names))
    drawn = ", ".join(f"{name} ({label})" for name, label in zip(names, labels, strict=True))
    print(f"{args.count} of each: {drawn}; omega {args.omega:g}, seed {args.seed}: wrote {out}")
