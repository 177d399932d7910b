"""train: one target and one metric -> W2^2 over training for every coupling, temperature and seed.

    python -m experiments.toy.train --target moons --dist-metric l2_sq --out artifacts/toy/moons-l2_sq

Writes OUT/curves.csv (W2^2 and mode coverage at each measurement; `real` is what points of the target
themselves get), OUT/samples.npz (points of the first seed's generators at the end) and settings.yaml. A run
that was killed goes on from its last checkpoint, and finished ones are not repeated.
"""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from drift.models.ema import EMA
from drift.runtime.files import atomic_write, check_output
from drift.runtime.processes import join, run_stage
from drift.runtime.progress import read_log
from drift.runtime.seeds import torch_generator
from drift.runtime.work import Work
from drift.settings import Hardware
from drift.training.loop import LOG_FILE, Measured, Run, Task, train
from experiments.common import load_section, script_parser, w2_squared, write_csv
from experiments.toy.field import field_settings, losses
from experiments.toy.networks import Networks
from experiments.toy.settings import Toy
from experiments.toy.targets import TARGETS, Target, mode_coverage

HARDWARE = Hardware(prefetch=0, checkpoint_every=1000)
REAL = "real"
"""In place of a coupling: points of the target against other points of it."""
PICTURE_POINTS, PICTURE_SEED = 1500, 123
SAMPLES_FILE = "samples.npy"


class Batch(NamedTuple):
    noise: Tensor
    """`[R, N, noise]`, of R seeds."""
    points: Tensor
    """Of the target, `[R, N, 2]`."""


class ToyTask(Task[Batch]):
    """All seeds of one coupling and temperature, side by side; each is trained as it would be alone."""

    ema_decays = (0.0,)  # the weights themselves
    at_once = None

    def __init__(self, settings: Toy, target: str, dist_metric: str, coupling: str, eps: float):
        t, n = settings.train, settings.network
        self.name = f"{target} {dist_metric} {coupling} {eps:g}"
        self.options, self.evaluate_every = t, t.evaluate_every
        self.seeds, self.count = seeds(settings), settings.seeds
        self.target, self.noise = TARGETS[target], n.noise
        self.model = Networks(n.noise, n.width, n.blocks, self.seeds)
        self.field = field_settings(
            coupling,
            dist_metric,
            eps,
            sinkhorn_iters=t.sinkhorn_iters,
            drift_tau_scale=t.drift_tau_scale,
        )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def prepare(self, step: int) -> Batch:
        generators = [torch_generator(seed, "toy/noise", step) for seed in self.seeds]
        noise = [torch.randn(self.options.batch, self.noise, generator=g) for g in generators]
        points = [self.target.sample(seed + step, self.options.batch) for seed in self.seeds]
        points = torch.from_numpy(np.stack(points))
        return Batch(torch.stack(noise).to(self.device), points.to(self.device))

    def loss(
        self, network: nn.Module, batch: Batch, part: slice, totals: None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = losses(network(batch.noise), batch.points, self.field)
        return loss, {"loss": loss.detach() / self.count}

    def evaluate(self, done: int, weights: Mapping[str, Tensor]) -> Measured:
        """W2^2 and mode coverage of every seed, as `measure` takes them."""
        noises = [torch.Generator().manual_seed(seed + 999) for seed in self.seeds]
        points = self.generate(weights, noises, self.options.points)
        of_seeds = [measure(x, self.target, seed, done) for x, seed in zip(points, self.seeds, strict=True)]
        return Measured({name: torch.tensor([one[name] for one in of_seeds]) for name in of_seeds[0]})

    @torch.no_grad()
    def generate(
        self, weights: Mapping[str, Tensor], generators: Sequence[torch.Generator], n: int
    ) -> np.ndarray:
        """Points `[R, n, 2]`, each network's from noise of its own generator."""
        noise = torch.stack([torch.randn(n, self.noise, generator=g) for g in generators])
        return torch.func.functional_call(self.model, dict(weights), (noise.to(self.device),)).cpu().numpy()


def seeds(settings: Toy) -> range:
    return range(settings.seed, settings.seed + settings.seeds)


def measure(points: np.ndarray, target: Target, seed: int, step: int) -> dict[str, float]:
    """W2^2 of points against as many fresh ones of the target; of a target with modes how it covers them."""
    found = {"w2": w2_squared(points, target.sample(seed + 10_000 + step, len(points)))}
    if target.centres is not None:
        found["near_modes"], found["modes"] = mode_coverage(points, target)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__, "toy")
    parser.add_argument("--target", required=True, choices=TARGETS)
    parser.add_argument("--dist-metric", required=True, choices=("l2", "l2_sq"))
    parser.add_argument("--fresh", action="store_true", help="start over, and set aside what is there")
    args = parser.parse_args(argv)

    settings = load_section(args.params, Toy)
    check_output(args.out)
    runs = [(coupling, eps) for coupling in settings.couplings for eps in settings.temps]
    decides = {"target": args.target, "dist_metric": args.dist_metric} | settings.model_dump(
        mode="json", exclude={"targets", "dist_metrics", "particles"}
    )
    with join(HARDWARE.time_limit) as ranks, Work("toy", decides, fresh=args.fresh) as work:
        rows, samples = real_points(settings, args.target)
        took: list[float] = []
        for number, (coupling, eps) in enumerate(runs, start=1):
            left = f", {np.mean(took) * (len(runs) - number + 1) / 60:.1f} minutes left" if took else ""
            print(f"setting {number} of {len(runs)}{left}", flush=True)
            start = time.monotonic()
            task = ToyTask(settings, args.target, args.dist_metric, coupling, eps)
            task.model.to(ranks.device)
            run = Run(settings.seed, HARDWARE, ranks, work.folder / f"{coupling}-{eps:g}")
            samples[f"{coupling}-{eps:g}"] = finish(task, run)
            rows += curve(run.folder, task.seeds, coupling, eps)
            took.append(time.monotonic() - start)
        export = work.folder / "export"
        export.mkdir(exist_ok=True)
        first = {"target": args.target, "dist_metric": args.dist_metric}
        write_csv(export / "curves.csv", [first | row for row in rows])
        with atomic_write(export / "samples.npz") as file:
            np.savez(file, **samples)
        work.publish(export, args.out)
    return 0


def real_points(settings: Toy, name: str) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """The rows and the samples of the target itself: the floor of W2^2, that of sampling alone."""
    t, target = settings.train, TARGETS[name]
    steps = sorted({*range(t.evaluate_every, t.steps + 1, t.evaluate_every), t.steps})
    rows = [
        row(
            REAL,
            None,
            seed,
            step,
            measure(target.sample(seed + 20_000_000 + step, t.points), target, seed, step),
        )
        for step in steps
        for seed in seeds(settings)
    ]
    return rows, {REAL: target.sample(PICTURE_SEED, PICTURE_POINTS)}


def finish(task: ToyTask, run: Run) -> np.ndarray:
    """Train what is left to train; points `[1500, 2]` of the first seed's network."""
    done = run.folder / SAMPLES_FILE
    if not done.exists():
        (weights,) = train(task, run)
        points = pictured(task, weights)
        with atomic_write(done) as file:
            np.save(file, points)
        for checkpoint in run.folder.glob("step-*"):
            shutil.rmtree(checkpoint)
    return np.load(done)


def pictured(task: ToyTask, weights: EMA) -> np.ndarray:
    noise = [torch.Generator().manual_seed(PICTURE_SEED) for _ in task.seeds]
    return task.generate(weights.state_dict(), noise, PICTURE_POINTS)[0]


def curve(folder: Path, of: Sequence[int], coupling: str, eps: float) -> Iterator[dict[str, Any]]:
    """A row for each measurement of each seed, from the log of their training."""
    for line in read_log(folder / LOG_FILE):
        if "w2" in line:
            for index, seed in enumerate(of):
                measured = {name: line[name][index] for name in ("w2", "near_modes", "modes") if name in line}
                yield row(coupling, eps, seed, line["step"] + 1, measured)


def row(
    coupling: str, eps: float | None, seed: int, step: int, measured: Mapping[str, float]
) -> dict[str, Any]:
    values = {name: measured.get(name) for name in ("w2", "near_modes", "modes")}
    return {"coupling": coupling, "eps": eps, "seed": seed, "step": step} | values


if __name__ == "__main__":
    run_stage(main, memory="train.batch")
