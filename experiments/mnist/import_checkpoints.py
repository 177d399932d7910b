"""The published checkpoints of Sinkhorn drifting on MNIST as models of ours, to be measured like our own.

    python -m experiments.mnist.import_checkpoints SOURCE FOLDER

SOURCE has the authors' ae_final.pt and generators (mnist_*.pt; pretrained/ in their repository). FOLDER gets
autoencoder/ and generators/, with the EMA weights. The files are read as data: nothing is executed.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from drift.models.base import PretrainedModel
from drift.runtime.errors import UserError
from drift.runtime.files import check_writable, write_json
from drift.runtime.processes import run_stage
from experiments.mnist.networks import Autoencoder, LatentGenerator
from experiments.mnist.runs import RUN_FILE, SweepRun

AUTOENCODER, GENERATORS = "ae_final.pt", "mnist_*.pt"
_SIZES = {"hidden_dim": "hidden", "num_layers": "layers"}


def import_all(source: Path, destination: Path) -> list[SweepRun]:
    """Convert what is in `source`; raises `UserError` naming a file that is missing, damaged or another's."""
    paths = sorted(source.glob(GENERATORS))
    if not paths:
        raise UserError(f"{source}: has no {GENERATORS}; name the folder of the published checkpoints")
    check_writable(destination)
    content = read_checkpoint(source / AUTOENCODER, "model", "latent_dim")
    sizes = {"latent_dim": content["latent_dim"]}
    convert(Autoencoder, sizes, content["model"], source / AUTOENCODER, destination / "autoencoder")
    return [import_generator(path, destination / "generators") for path in paths]


def import_generator(path: Path, destination: Path) -> SweepRun:
    """The EMA of one generator, in a folder in `destination` that its run names."""
    content = read_checkpoint(path, "ema_state", "gen_config", "args")
    try:
        args = content["args"]
        run = SweepRun(args["coupling"], args["dist_metric"], float(args["temps"][0]), args["seed"])
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise UserError(f"{path}: its args have no {error}; it is no generator of that experiment") from None
    sizes = {_SIZES.get(key, key): value for key, value in content["gen_config"].items()}
    folder = destination / run.name
    convert(LatentGenerator, sizes, content["ema_state"], path, folder)
    write_json(folder / RUN_FILE, run._asdict())
    return run


def convert(
    kind: type[PretrainedModel], sizes: Mapping[str, Any], weights: Mapping, source: Path, folder: Path
) -> None:
    """Write a model with exactly these weights; raises `UserError` if they do not fit its sizes."""
    try:
        model = kind(**sizes)
        model.load_state_dict(weights)
    except (UserError, RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{source}: does not fit a {kind.__name__} ({reason})") from None
    model.save_pretrained(folder)


def read_checkpoint(path: Path, *keys: str) -> Mapping[str, Any]:
    """The content of a checkpoint that has all of `keys`."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"{path}: there is no such file; name the folder of the published checkpoints"
        ) from None
    except UnpicklingError:
        raise UserError(f"{path}: damaged, or it holds objects that only executing code would load") from None
    except (OSError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise UserError(f"{path}: damaged, or no checkpoint ({reason}); get a fresh copy") from None
    missing = [key for key in keys if not isinstance(content, Mapping) or key not in content]
    if missing:
        raise UserError(f"{path}: has no {missing[0]}, so it is no checkpoint of that experiment")
    return content


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE", type=Path)
    parser.add_argument("destination", metavar="FOLDER", type=Path)
    args = parser.parse_args()
    runs = import_all(args.source, args.destination)
    print(f"autoencoder and {len(runs)} generators: wrote {args.destination}")


if __name__ == "__main__":
    run_stage(main)
