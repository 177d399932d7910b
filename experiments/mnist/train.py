"""MNIST -> autoencoder and classifier; their latents -> the generators of the sweep.

    python -m experiments.mnist.train networks --out artifacts/mnist/networks
    python -m experiments.mnist.train sweep --out artifacts/mnist/generators

What was trained stays in .work: a run that was killed goes on, and one that is there is not trained again.
"""

import argparse
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

import drift.field
from drift.data import bank
from drift.models import ema
from drift.runtime import seeds
from drift.runtime.files import check_output, link_folder, remove, replace_folder, sha256, write_json
from drift.runtime.processes import join, run_stage
from drift.training import loop, schedule
from drift.training.loop import LOG_FILE, Run, Task, train
from experiments.common import load_section, once
from experiments.mnist import networks, tasks
from experiments.mnist.digits import open_digits
from experiments.mnist.measure import encode
from experiments.mnist.networks import Autoencoder
from experiments.mnist.runs import RUN_FILE, SweepRun, runs_of
from experiments.mnist.settings import Settings
from experiments.mnist.tasks import AutoencoderTraining, ClassifierTraining, GeneratorTraining, field_settings

CODE = [drift.field, bank, ema, loop, networks, schedule, seeds, tasks]
"""What decides what is trained, beside the settings."""
WEIGHTS = "diffusion_pytorch_model.safetensors"


def train_once(
    what: str, seed: int, decides: dict[str, Any], make: Callable[[Run], Task], settings: Settings
) -> Path:
    """The folder of the model that a task trains; its EMA, where it has one."""

    def work(folder: Path, result: Path) -> None:
        with join(settings.hardware.time_limit) as ranks:
            run = Run(seed, settings.hardware, ranks, folder)
            task = make(run)
            averages = train(task, run)
        if averages:
            averages[0].copy_to(task.model)
        task.model.save_pretrained(result)
        shutil.copyfile(folder / LOG_FILE, result / LOG_FILE)

    return once(f"mnist/{what}", {"seed": seed, **decides}, CODE, work)


def train_networks(settings: Settings, out: Path) -> None:
    """`out/autoencoder` and `out/classifier`."""
    digits = open_digits(settings.data, "train")
    decides = {"digits": digits.digest}
    classifier = train_once(
        "classifier",
        settings.seed,
        decides | settings.classifier.model_dump(mode="json"),
        lambda run: ClassifierTraining(digits, settings.classifier, run),
        settings,
    )
    if settings.autoencoder.source is not None:
        autoencoder = Path(settings.autoencoder.source)
        Autoencoder.from_pretrained(autoencoder)  # or a line that says what is wrong with it
    else:
        autoencoder = train_once(
            "autoencoder",
            settings.seed,
            decides | settings.autoencoder.model_dump(mode="json"),
            lambda run: AutoencoderTraining(digits, settings.autoencoder, run),
            settings,
        )
    publish({"autoencoder": autoencoder, "classifier": classifier}, out)


def train_sweep(settings: Settings, folder: Path, out: Path) -> None:
    """`out/<run>` of every run of the sweep."""
    digits, autoencoder = open_digits(settings.data, "train"), folder / "autoencoder"
    latents = encode(Autoencoder.from_pretrained(autoencoder), digits.inputs())
    decides = {"digits": digits.digest, "autoencoder": sha256(autoencoder / WEIGHTS)}
    decides |= settings.generator.model_dump(mode="json")
    runs, started, found = list(runs_of(settings.sweep)), time.monotonic(), {}
    for done, run in enumerate(runs):
        left = (time.monotonic() - started) / max(1, done) * (len(runs) - done)
        eta = f", {timedelta(seconds=round(left))} left" if done else ""
        print(f"run {done + 1} of {len(runs)}{eta}: {run.name}", flush=True)
        found[run.name] = train_run(run, latents, digits.labels, decides, settings)
    publish(found, out)


def train_run(
    run: SweepRun, latents: torch.Tensor, labels: torch.Tensor, decides: dict, settings: Settings
) -> Path:
    options = settings.generator
    field = field_settings(run.coupling, run.metric, run.tau, options.sinkhorn_iters)
    folder = train_once(
        "generator",
        run.seed,
        decides | run._asdict(),
        lambda of: GeneratorTraining(latents, labels, field, options, of),
        settings,
    )
    write_json(folder / RUN_FILE, run._asdict())
    return folder


def publish(folders: dict[str, Path], out: Path) -> None:
    """Put folders into `out`, which has nothing else then."""
    draft = out.with_name(f".{out.name}.draft")
    remove(draft)
    draft.mkdir(parents=True)
    for name, folder in folders.items():
        link_folder(folder, draft / name)
    replace_folder(draft, out)
    print(f"wrote {out}", flush=True)


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
