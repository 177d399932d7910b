"""Generators -> transport cost to real latents, FID where a decoder is given, a table and a figure.

    python -m experiments.ffhq.evaluate --out experiments/ffhq/results

OUT gets runs.csv (every run), table.csv (mean and spread over seeds), metrics.json (with the floor: test
latents in the place of generated ones) and samples.png. What was measured stays in .work.
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from drift.evaluation.moments import Moments, frechet_distance
from drift.evaluation.networks import FeatureNetwork, load_feature_network
from drift.runtime.errors import UserError
from drift.runtime.files import check_output, sha256, write_json
from drift.runtime.processes import run_stage
from drift.runtime.seeds import numpy_generator
from drift.settings.sections import Fid
from experiments import common
from experiments.common import (
    load_section,
    mean_and_std,
    once,
    save_figure,
    script_parser,
    w2_squared,
    write_csv,
)
from experiments.ffhq import generator
from experiments.ffhq.generator import FfhqRun, LatentGenerator, generate, runs_of
from experiments.ffhq.latents import CLASSES, read_latents
from experiments.ffhq.settings import Settings

WEIGHTS = "diffusion_pytorch_model.safetensors"
DECODED_AT_ONCE = 8
Decoder = Callable[[Tensor], Tensor]


class Judge:
    """Real latents of each class, and the networks of the FID where there is a decoder."""

    def __init__(
        self, real: list[Tensor], decoder: Decoder | None = None, network: FeatureNetwork | None = None
    ):
        self.real, self._decoder, self._network = real, decoder, network
        if decoder is not None:
            self._real = [self._moments(latents) for latents in real]

    @classmethod
    def of(cls, settings: Settings) -> "Judge":
        """Against training latents, as the paper measures."""
        real = read_latents(settings.data.train, "data.train")
        real = [choose(x, settings.evaluation.samples, settings.seed, label) for label, x in enumerate(real)]
        path = settings.evaluation.decoder
        if path is None:
            return cls(real)
        try:
            decoder = torch.jit.load(path, map_location="cpu").eval()
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"evaluation.decoder = {path}: no TorchScript file ({reason})") from None
        fid = Fid(features="inception", mode="legacy_pytorch", inception=settings.evaluation.inception)
        return cls(real, decoder, load_feature_network(fid, "cpu", workers=0))

    def measure(self, latents: list[Tensor]) -> dict[str, float]:
        """`emd`, which is W2^2, and `fid`: means over the classes."""
        costs = [w2_squared(x.numpy(), y.numpy()) for x, y in zip(latents, self.real, strict=True)]
        found = {"emd": float(np.mean(costs))}
        if self._decoder is not None:
            pairs = zip(map(self._moments, latents), self._real, strict=True)
            found["fid"] = float(np.mean([frechet_distance(*made, *real) for made, real in pairs]))
        return found

    @torch.inference_mode()
    def _moments(self, latents: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Of the features of the decoded images, cut off to bytes as the authors' code does."""
        moments = Moments(self._network.dimension)
        for part in latents.split(DECODED_AT_ONCE):
            pixels = ((self._decoder(part) + 1) / 2 * 255).clamp(0, 255).byte()
            moments.update(self._network(pixels.permute(0, 2, 3, 1)))
        return moments.mean.numpy(), moments.covariance.numpy()


def choose(latents: Tensor, count: int, seed: int, label: int) -> Tensor:
    """So many latents of a class, without replacement where there are enough."""
    replace = count > len(latents)
    rows = numpy_generator(seed, "ffhq/real", label).choice(len(latents), count, replace=replace)
    return latents[torch.from_numpy(rows)]


def measured(settings: Settings, judge: Judge, what: dict[str, Any], make: Callable[[], list[Tensor]]):
    """What `judge` says of latents, now or earlier; `what` tells them from others."""
    decides = what | settings.evaluation.model_dump(mode="json") | {"seed": settings.seed}
    decides["train"] = sha256(settings.data.train)

    def work(folder: Path, result: Path) -> None:
        write_json(result / "measured.json", judge.measure(make()))

    folder = once("ffhq/measured", decides, (common, generator, sys.modules[__name__]), work)
    return json.loads((folder / "measured.json").read_text())


def evaluate(settings: Settings, generators: Path, out: Path) -> None:
    judge, samples = Judge.of(settings), settings.evaluation.samples
    test = read_latents(settings.data.test, "data.test")
    floor = [choose(x, samples, settings.seed, label) for label, x in enumerate(test)]
    floor = measured(settings, judge, {"floor": sha256(settings.data.test)}, lambda: floor)
    counts, dimensions, lines, shown = [samples] * len(CLASSES), judge.real[0].shape[1], [], {}
    for run in tqdm(list(runs_of(settings)), desc="measured", ncols=100):
        folder = generators / str(run)
        made = generate(LatentGenerator.from_pretrained(folder), counts, dimensions, run.seed)
        found = measured(settings, judge, {"generator": sha256(folder / WEIGHTS)}, lambda made=made: made)
        lines.append(run._asdict() | found)
        if run.seed == settings.seed:
            shown[run] = made
    values = list(floor)
    rows = mean_and_std(lines, ("coupling", "eps"), values)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "runs.csv", lines)
    write_csv(out / "table.csv", rows)
    means = {f"{row['coupling']} {row['eps']:g}": {v: row[f"{v}_mean"] for v in values} for row in rows}
    write_json(out / "metrics.json", {"floor": floor, "runs": means})
    costs = {FfhqRun(line["coupling"], line["eps"], line["seed"]): line["emd"] for line in lines}
    save_figure(out / "samples.png", draw(judge.real, shown, costs))
    for row in rows:
        told = (f"{v} {row[f'{v}_mean']:.4g} ± {row[f'{v}_std']:.2g}" for v in values)
        print(f"{row['coupling']}, eps {row['eps']:g}:", ", ".join(told))
    print("floor:", ", ".join(f"{name} {value:.4g}" for name, value in floor.items()))


def draw(real: list[Tensor], shown: Mapping[FfhqRun, list[Tensor]], costs: Mapping[FfhqRun, float]) -> Figure:
    """Generated latents over real ones, in the plane of their two largest principal components."""
    points = torch.cat(real)
    centre = points.mean(0)
    _, _, axes = torch.linalg.svd(points - centre, full_matrices=False)
    flat = [((x - centre) @ axes[:2].T).numpy() for x in real]
    couplings = sorted({run.coupling for run in shown})
    temps = sorted({run.eps for run in shown})
    size = 3.2 * len(temps), 3.2 * len(couplings) + 0.4
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(couplings), len(temps), sharex=True, sharey=True, squeeze=False)
    for run, made in shown.items():
        panel = panels[couplings.index(run.coupling), temps.index(run.eps)]
        panel.set_title(f"{run.coupling}\neps {run.eps:g}: EMD {costs[run]:.3g}", fontsize="small")
        for label, (old, new) in enumerate(zip(flat, made, strict=True)):
            new = ((new - centre) @ axes[:2].T).numpy()
            panel.scatter(*old.T, s=2, color="lightgrey", linewidths=0, zorder=0)
            panel.scatter(*new.T, s=3, color=f"C{label}", linewidths=0, label=CLASSES[label])
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, markerscale=4
    )
    return figure


def main() -> None:
    parser = script_parser(__doc__, "ffhq")
    parser.add_argument("--generators", type=Path, default=Path("artifacts/ffhq/generators"))
    args = parser.parse_args()
    settings = load_section(args.params, Settings)
    check_output(args.out)
    evaluate(settings, args.generators, args.out)


if __name__ == "__main__":
    run_stage(main)
