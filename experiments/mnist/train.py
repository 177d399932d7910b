"""MNIST -> autoencoder and classifier; their latents -> the generators of the sweep.

    python -m experiments.mnist.train networks --out artifacts/mnist/networks
    python -m experiments.mnist.train sweep --out artifacts/mnist/generators

What was trained stays in .work: a run that was killed goes on, and one that is there is not trained again.
"""

import argparse
from functools import partial
from pathlib import Path

import drift.field
from drift.data import bank
from drift.runtime.files import check_output, sha256, write_json
from drift.runtime.processes import run_stage
from experiments.common import load_section, publish, train_once, with_eta
from experiments.mnist import networks, tasks
from experiments.mnist.digits import open_digits
from experiments.mnist.measure import encode
from experiments.mnist.networks import Autoencoder
from experiments.mnist.runs import RUN_FILE, runs_of
from experiments.mnist.settings import Settings
from experiments.mnist.tasks import AutoencoderTraining, ClassifierTraining, GeneratorTraining, field_settings

CODE = (drift.field, bank, networks, tasks)
"""What decides what is trained, beside the settings and the training loop."""
WEIGHTS = "diffusion_pytorch_model.safetensors"


def train_networks(settings: Settings, out: Path) -> None:
    """`out/autoencoder` and `out/classifier`."""
    digits = open_digits(settings.data, "train")
    kinds = {"classifier": ClassifierTraining, "autoencoder": AutoencoderTraining}
    found = {}
    if settings.autoencoder.source is not None:
        found["autoencoder"] = Path(settings.autoencoder.source)
        Autoencoder.from_pretrained(found["autoencoder"])  # or a line that says what is wrong with it
    for name in [name for name in kinds if name not in found]:
        options = getattr(settings, name)
        decides = {"digits": digits.digest} | options.model_dump(mode="json")
        make = partial(kinds[name], digits, options)
        found[name] = train_once(f"mnist/{name}", settings.seed, decides, CODE, make, settings.hardware)
    publish(found, out)


def train_sweep(settings: Settings, folder: Path, out: Path) -> None:
    """`out/<run>` of every run of the sweep."""
    digits, autoencoder = open_digits(settings.data, "train"), folder / "autoencoder"
    latents = encode(Autoencoder.from_pretrained(autoencoder), digits.inputs())
    options, found = settings.generator, {}
    decides = {"digits": digits.digest, "autoencoder": sha256(autoencoder / WEIGHTS)}
    decides |= options.model_dump(mode="json")
    for run in with_eta(list(runs_of(settings.sweep))):
        field = field_settings(run.coupling, run.metric, run.tau, options.sinkhorn_iters)
        make = partial(GeneratorTraining, latents, digits.labels, field, options)
        decides |= run._asdict()
        found[run.name] = train_once("mnist/generator", run.seed, decides, CODE, make, settings.hardware)
        write_json(found[run.name] / RUN_FILE, run._asdict())
    publish(found, out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["networks", "sweep"])
    parser.add_argument("--params", type=Path, default=Path("experiments/mnist/params.yaml"))
    parser.add_argument("--networks", type=Path, default=Path("artifacts/mnist/networks"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    settings = load_section(args.params, Settings)
    check_output(args.out)
    if args.what == "networks":
        train_networks(settings, args.out)
    else:
        train_sweep(settings, args.networks, args.out)


if __name__ == "__main__":
    run_stage(main)
