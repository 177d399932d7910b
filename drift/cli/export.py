"""Write a generator as a folder to hand on: DriftPipeline, VAE and model card.

It is JSON and safetensors, from which loading executes nothing. --push uploads it to
the Hugging Face hub, as whoever hf auth login or HF_TOKEN says: to a private
repository, or with --public to a public one. --onnx adds generator.onnx and
decoder.onnx, which onnxruntime runs without PyTorch, in a browser too.

examples:
  drift export outputs/drift-digits --name drift-digits --license mit
  drift export outputs/b2 --generator artifacts/generator --vae-by-reference
  drift export outputs/old --rev experiment-1 --no-metrics
  drift export outputs/mnist --license mit --push me/mnist         # then: drift sample me/mnist
  drift export outputs/mnist --license mit --push me/mnist --public --force
  drift export outputs/web --onnx
"""

import argparse
from pathlib import Path

from drift.cli.options import GENERATOR, add_versions, find_source
from drift.runtime.errors import UserError

METRICS, PICTURE = Path("reports/protocol.json"), Path("plots/samples.png")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("destination", metavar="FOLDER", type=Path, help="where to write")
    parser.add_argument("--force", action="store_true", help="replace FOLDER if it exists")
    parser.add_argument(
        "--generator", metavar="SOURCE", default=GENERATOR, help="the generator (%(default)s)"
    )
    add_versions(parser)
    parser.add_argument("--vae-by-reference", action="store_true", help="only name the VAE, by its hub id")
    parser.add_argument("--metrics", type=Path, default=METRICS, help="(%(default)s)")
    parser.add_argument("--no-metrics", action="store_true", help="leave them out")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="(%(default)s)")
    parser.add_argument("--name", help="name of the model in its card (that of FOLDER, or NAME)")
    parser.add_argument("--license", default="other", metavar="ID", help="of the weights, on the hub (other)")
    parser.add_argument("--dataset", metavar="ID", help="hub id of the data set that it was trained on")
    parser.add_argument("--onnx", action="store_true", help="the networks in ONNX too (extra [onnx])")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload FOLDER to this repository of the hub")
    parser.add_argument("--public", action="store_true", help="with --push: for everybody to see")


def run(args: argparse.Namespace) -> None:
    from drift.interop.push import check_push, push

    if args.push is not None:
        check_push(args.push, args.public)
    elif args.public:
        raise UserError("--public: there is nothing to publish; add --push OWNER/NAME, or leave it out")
    from drift.interop.card import Card, export_pipeline

    card = Card(
        name=args.name or Path(args.push or args.destination.resolve()).name,
        license=args.license,
        dataset=args.dataset,
        metrics=None if args.no_metrics else args.metrics,
        picture=args.picture,
        hub_id=args.push,
    )
    files = export_pipeline(
        find_source(args.generator, args.rev),
        args.destination,
        card,
        weights=args.weights,
        vae=args.vae,
        include_vae=not args.vae_by_reference,
        onnx=args.onnx,
        force=args.force,
    )
    for file, size in files:
        print(f"{size / 1e6:10.2f} MB  {file}")
    print(f"wrote {args.destination}")
    if args.push is not None:
        url = push(args.destination, args.push, args.public)
        print(f"pushed to {url} ({'public' if args.public else 'private'})")
