"""Take latents that were handed on as files for the output of encode@VIEW.

SOURCE holds for the split train, and for any others:
  <split>_latents.npy   float16 [N, C, H, W]; uint8 where encode.autoencoder is pixels
  <split>_labels.npy    int64 [N], from 0 to data.classes - 1
  <split>_meta.json     what they were made from; may lack every key
or a file per training image, in the order of torchvision's ImageFolder:
  000000.npy            [C, H, W]; may lie in folders of five digits, such as 00000/
All values, shapes, counts and statements are checked. What the meta file does not
state is taken from params.yaml; settings.yaml beside the latents says what was.

examples:
  drift adopt latents gdrive:latents/center --view center
  drift adopt latents /mnt/usb/latents_aug --view augmented --force
  drift adopt latents /mnt/rae_latents --view center --images data/imagenet
"""

import argparse
from pathlib import Path

from drift.cli.options import add_params, check_committable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="folder, or NAME:PATH of an rclone remote")
    parser.add_argument("--view", choices=("center", "augmented"), required=True, help="which view they are")
    parser.add_argument("--images", metavar="ROOT", help="of a file per image: the images (data.root)")
    add_params(parser)
    parser.add_argument("--force", action="store_true", help="replace latents that are there")
    parser.add_argument("--no-commit", action="store_true", help="leave dvc commit to you")


def run(args: argparse.Namespace) -> None:
    from drift.settings import load_settings
    from drift.sharing.adopt import adopt_latents, run_dvc

    check_committable(args.params, args.no_commit)
    out, stage = Path("artifacts/latents") / args.view, f"encode@{args.view}"
    settings, how = load_settings(args.params), {"images": args.images, "force": args.force}
    for line in adopt_latents(args.source, args.view, settings, out, **how):
        print(line)
    print(f"wrote {out}", flush=True)
    if args.no_commit:
        print(f"DVC does not know it yet: dvc commit -f {stage}")
    else:
        run_dvc("commit", "-f", stage)
        print(f"wrote dvc.lock: {stage} counts as run; git add dvc.lock, and dvc push to hand it on")
