"""drift export"""

import argparse
from pathlib import Path

from drift.cli.command import GENERATOR, Run, generator_source


def add(parser: argparse.ArgumentParser) -> Run:
    """a generator as a folder to hand on: DriftPipeline, VAE and model card"""
    parser.description = """\
Write a generator of the stage drift as a folder of DriftPipeline: model_index.json,
generator/, vae/, and README.md, a model card with how to load it, its settings, its
metrics, how they were measured, and the fields that the Hugging Face hub reads.
Configs are JSON and weights safetensors: who loads the folder executes nothing from
it. The folder can be uploaded as it is (hf upload NAME FOLDER)."""
    parser.epilog = """\
examples:
  drift export outputs/drift-digits --name drift-digits --license mit
  drift export outputs/b2 --generator artifacts/generator --vae-by-reference
  drift export outputs/old --rev experiment-1 --no-metrics"""
    parser.add_argument("destination", metavar="FOLDER", type=Path, help="where to write; must not exist yet")
    parser.add_argument("--generator", metavar="SOURCE", default=GENERATOR, help=f"({GENERATOR})")
    parser.add_argument("--rev", metavar="REVISION", help="take SOURCE as of this Git revision, by DVC")
    parser.add_argument(
        "--weights", default="model", metavar="NAME", help="model, or an EMA copy: ema_0999 (model)"
    )
    parser.add_argument("--vae", metavar="VAE", help="folder or hub id, where SOURCE names none or another")
    parser.add_argument(
        "--vae-by-reference", action="store_true", help="only name the VAE, which must be a hub id then"
    )
    parser.add_argument(
        "--metrics", type=Path, default=Path("reports/protocol.json"), help="(reports/protocol.json)"
    )
    parser.add_argument("--no-metrics", action="store_true", help="leave them out")
    parser.add_argument("--picture", type=Path, default=Path("plots/samples.png"), help="(plots/samples.png)")
    parser.add_argument("--name", help="of the model, in the card (the folder's name)")
    parser.add_argument(
        "--license", default="other", metavar="ID", help="of the weights, an identifier of the hub (other)"
    )
    parser.add_argument("--dataset", metavar="ID", help="that it was trained on, an identifier of the hub")
    parser.add_argument("--force", action="store_true", help="replace FOLDER if it exists")

    def run(args: argparse.Namespace) -> None:
        from drift.interop.card import export_pipeline

        files = export_pipeline(
            generator_source(args.generator, args.rev),
            args.destination,
            weights=args.weights,
            vae=args.vae,
            include_vae=not args.vae_by_reference,
            metrics=None if args.no_metrics else args.metrics,
            picture=args.picture,
            name=args.name or args.destination.resolve().name,
            license=args.license,
            dataset=args.dataset,
            force=args.force,
        )
        for file, size in files:
            print(f"{size / 1e6:10.2f} MB  {file}")
        print(f"wrote {args.destination}")

    return run
