"""drift sample"""

import argparse
import math
from pathlib import Path

from drift.cli.command import GENERATOR, Run, generator_source
from drift.runtime.errors import UserError


def add(parser: argparse.ArgumentParser) -> Run:
    """images of classes at a CFG strength, as a grid or as files"""
    parser.description = """\
Draw samples of a generator: COUNT of each class, in one forward pass each. A row
of the grid is a class, and a column shares its noise. Column i has the noise of
the fid stage's sample number i for the same seed, whatever else is drawn.

SOURCE is a folder that the stage drift or drift export has written, or a hub id
of the latter. With --rev it is a folder that DVC tracks, as of a Git revision
(branch, tag, commit or experiment); it is fetched from DVC's cache or remote and
kept in the work folder for the next time."""
    parser.epilog = """\
examples:
  drift sample --classes 3 7 --count 8
  drift sample --rev main --classes 0 1 2 --omega 2 --out before.png
  drift sample outputs/exported --classes "golden retriever" 360 --omega 1.5
  drift sample imported/latent_L --vae stabilityai/sd-vae-ft-mse --classes 207
  drift sample --files --out outputs/png --count 100       a file per sample"""
    parser.add_argument("source", metavar="SOURCE", nargs="?", default=GENERATOR, help=f"({GENERATOR})")
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="numbers or names (the first ten)")
    parser.add_argument("--omega", type=float, default=1.0, help="CFG strength; 1 is none (1)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    parser.add_argument("--count", type=int, default=8, metavar="N", help="samples of each class (8)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--grid", action="store_true", help="one picture, a row per class; the default")
    how.add_argument("--files", action="store_true", help="OUT/<class>/<number>.png for every sample")
    parser.add_argument(
        "--out",
        type=Path,
        help="the picture, or with --files the folder (outputs/samples.png, outputs/samples)",
    )
    parser.add_argument("--rev", metavar="REVISION", help="take SOURCE as of this Git revision, by DVC")
    parser.add_argument(
        "--weights", default="model", metavar="NAME", help="model, or an EMA copy: ema_0999 (model)"
    )
    parser.add_argument("--vae", metavar="VAE", help="folder or hub id, where SOURCE names none or another")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--device", help="cuda, cpu, ... (cuda where there is one)")

    def run(args: argparse.Namespace) -> None:
        if args.count < 1:
            raise UserError(f"--count {args.count}: give a number of at least 1")
        if not 0 < args.omega < math.inf:
            raise UserError(f"--omega {args.omega:g}: give a number above 0; 1 is no guidance")
        if args.out is not None and not args.files and args.out.suffix.lower() != ".png":
            raise UserError(f"--out {args.out}: the picture's name must end in .png (or ask for --files)")

        import numpy as np
        import torch
        from PIL import Image
        from tqdm import tqdm

        from drift.evaluation.pictures import VISIBLE_SIDE, image_grid, save_png
        from drift.interop.pipeline import DriftPipeline
        from drift.runtime.files import check_writable

        out = args.out or Path("outputs/samples" if args.files else "outputs/samples.png")
        check_writable(out if args.files else out.parent)
        source = generator_source(args.source, args.rev)
        try:
            device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {args.device}: {str(error).splitlines()[0]}") from None
        pipe = DriftPipeline.from_pretrained(
            source, vae=args.vae, variant=args.weights, revision=args.revision
        ).to(device)
        classes = pipe.generator.config.num_classes
        wanted = args.classes or [str(label) for label in range(min(10, classes))]
        # A name first, as one may look like a number
        labels = [
            int(text) if text.isdecimal() and text not in pipe.labels else pipe.get_label_ids(text)[0]
            for text in wanted
        ]
        for label in labels:
            if label >= classes:
                raise UserError(f"--classes {label}: the classes are 0 to {classes - 1}")

        rows = []
        for label in tqdm(labels, desc="classes", disable=len(labels) < 2):
            made = []
            for start in range(0, args.count, 64):
                indices = range(start, min(start + 64, args.count))
                found = pipe(
                    [label] * len(indices),
                    omega=args.omega,
                    generator=pipe.sample_generators(args.seed, indices),
                ).images
                made += [np.asarray(image) for image in found]
            if args.files:
                folder = out / str(label)
                folder.mkdir(parents=True, exist_ok=True)
                for index, image in enumerate(made):
                    save_png(folder / f"{index:06d}.png", Image.fromarray(image))
            else:
                rows += made
        names = [pipe.id2label.get(label, str(label)).split(",")[0] for label in labels]
        if args.files:
            what = f"{args.count} samples of each of {len(labels)} classes"
        else:
            grid = np.stack(rows)
            scale = -(-VISIBLE_SIDE // grid.shape[1])
            save_png(out, image_grid(grid, args.count, scale=scale, row_labels=names))
            what = "a row for each of: " + ", ".join(
                name if name == str(label) else f"{name} ({label})"
                for name, label in zip(names, labels, strict=True)
            )
        print(f"{what}; omega {args.omega:g}, seed {args.seed}, {pipe.generator.device}: wrote {out}")

    return run
