"""The generators of a folder -> W2^2 and accuracy of each, a table beside the published one, two figures.

    python -m experiments.mnist.evaluate --out experiments/mnist/results

OUT gets sweep.csv (every run), table.csv (mean and spread over seeds), metrics.json (with the floor: real
training images in the place of generated ones), sweep.png and samples.png. What was measured stays in .work.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from drift.runtime import seeds
from drift.runtime.files import check_output, sha256, write_json
from drift.runtime.processes import run_stage
from experiments import common
from experiments.common import load_section, mean_and_std, once, save_figure, script_parser, write_csv
from experiments.mnist import figures, measure, networks
from experiments.mnist.digits import open_digits
from experiments.mnist.measure import Judge
from experiments.mnist.networks import Autoencoder, DigitClassifier, LatentGenerator
from experiments.mnist.runs import find_runs
from experiments.mnist.settings import Settings

PUBLISHED = Path(__file__).with_name("published.csv")
WEIGHTS = "diffusion_pytorch_model.safetensors"
KEYS = ("metric", "coupling", "tau")
MEASURES = ("w2_latent", "w2_image", "accuracy")
CODE = [common, measure, networks, seeds]
"""What decides what is measured, beside the settings."""
Measured = dict[str, float]


class Evaluation:
    """One autoencoder and classifier, and the images that generators are measured against."""

    def __init__(self, settings: Settings, autoencoder: Path, classifier: Path):
        self.train, test = (open_digits(settings.data, split) for split in ("train", "held_out"))
        loaded = Autoencoder.from_pretrained(autoencoder), DigitClassifier.from_pretrained(classifier)
        self.judge, self._settings = Judge.of(*loaded, test), settings
        self._decides = {"seed": settings.seed, "digits": [self.train.digest, test.digest]}
        self._decides |= {folder.name: sha256(folder / WEIGHTS) for folder in (autoencoder, classifier)}

    def of(self, folder: Path) -> Measured:
        """What the generator in `folder` is measured to be, now or earlier."""
        options, seed = self._settings.evaluation, self._settings.seed
        decides = {"generator": sha256(folder / WEIGHTS), "omega": options.omega, "samples": options.samples}

        def make(work: Path, result: Path) -> None:
            generator = LatentGenerator.from_pretrained(folder)
            found = self.judge.measure(generator, options.omega, options.samples, seed)
            write_json(result / "measured.json", found)

        return self._once("measured", decides, make)

    def floor(self) -> Measured:
        """What real training images are measured to be, and how the classifier reads the test images."""

        def make(work: Path, result: Path) -> None:
            found = self.judge.floor(self.train, self._settings.seed)
            real = self.judge.accuracy(self.judge.images)
            write_json(result / "measured.json", found | {"accuracy_of_test_images": real})

        return self._once("floor", {}, make)

    def _once(self, what: str, decides: dict[str, Any], make) -> Measured:
        folder = once(f"mnist/{what}", self._decides | decides, CODE, make)
        return json.loads((folder / "measured.json").read_text())

    def samples(self, folder: Path, count: int) -> Any:
        """Images `[10 * count, 1, 28, 28]` of all classes, one after the other."""
        generator, options = LatentGenerator.from_pretrained(folder), self._settings.evaluation
        latents = measure.generate(generator, options.omega, [count] * networks.CLASSES, self._settings.seed)
        return measure.decode(self.judge.autoencoder, torch.cat(latents))


def table(measured: Sequence[Mapping[str, Any]], published: Mapping[tuple, Measured]) -> list[dict[str, Any]]:
    """Mean and spread over the seeds of each metric, coupling and tau, and the published numbers."""
    rows = mean_and_std(measured, KEYS, MEASURES)
    for row in rows:
        theirs = published.get(tuple(row[key] for key in KEYS), {})
        row |= {f"published_{name}": theirs.get(name) for name in ("w2_latent", "accuracy")}
    return rows


def read_published(path: Path = PUBLISHED) -> dict[tuple, Measured]:
    """The table of the project page (mint-vu/SinkhornDrifting) by (metric, coupling, tau)."""
    with path.open(newline="") as file:
        return {
            (row["metric"], row["coupling"], float(row["tau"])): {
                name: float(row[name]) for name in ("w2_latent", "accuracy")
            }
            for row in csv.DictReader(file)
        }


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as the README has it: a row per temperature, a column per metric and coupling."""
    columns = sorted(
        {(row["metric"], row["coupling"]) for row in rows}, key=lambda pair: (-len(pair[0]), pair[1])
    )
    cells = {(row["metric"], row["coupling"], row["tau"]): row for row in rows}

    def cell(row: Mapping[str, Any] | None) -> str:
        if row is None:
            return ""
        spread = f" ± {row['w2_latent_std']:.2f}" if row["runs"] > 1 else ""
        text = f"{row['w2_latent_mean']:.2f}{spread}, {row['accuracy_mean']:.1%}"
        if row["published_w2_latent"] is not None:
            text += f" ({row['published_w2_latent']:.2f}, {row['published_accuracy']:.1%})"
        return text

    lines = [["tau", *(f"{figures.KERNELS[m]}, {figures.COUPLINGS.get(c, c)}" for m, c in columns)]]
    lines.append(["---"] * (1 + len(columns)))
    for tau in sorted({row["tau"] for row in rows}):
        lines.append([f"{tau:g}", *(cell(cells.get((*column, tau))) for column in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def evaluate(settings: Settings, evaluation: Evaluation, generators: Path, out: Path) -> None:
    runs, published, floor = find_runs(generators), read_published(), evaluation.floor()
    measured = {run: evaluation.of(folder) for run, folder in tqdm(runs.items(), desc="measured", ncols=100)}
    lines = [run._asdict() | found for run, found in measured.items()]
    rows = table(lines, published)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "sweep.csv", lines)
    write_csv(out / "table.csv", rows)
    means = {
        f"{row['metric']} {row['coupling']} {row['tau']:g}": {name: row[f"{name}_mean"] for name in MEASURES}
        for row in rows
    }
    write_json(out / "metrics.json", {"floor": floor, "runs": means})
    save_figure(out / "sweep.png", figures.sweep(rows, floor))
    options, first = settings.evaluation, min(run.seed for run in runs)
    shown = {
        run: evaluation.samples(folder, options.picture_columns)
        for run, folder in runs.items()
        if run.seed == first and run.tau in options.picture_temps
    }
    if shown:
        save_figure(out / "samples.png", figures.samples(shown, options.picture_columns))
    print(markdown(rows))
    print("floor:", ", ".join(f"{name} {value:.4g}" for name, value in floor.items()))


def main() -> None:
    parser = script_parser(__doc__, "mnist")
    parser.add_argument("--autoencoder", type=Path, default=Path("artifacts/mnist/networks/autoencoder"))
    parser.add_argument("--classifier", type=Path, default=Path("artifacts/mnist/networks/classifier"))
    parser.add_argument("--generators", type=Path, default=Path("artifacts/mnist/generators"))
    args = parser.parse_args()
    settings = load_section(args.params, Settings)
    check_output(args.out)
    evaluate(settings, Evaluation(settings, args.autoencoder, args.classifier), args.generators, args.out)


if __name__ == "__main__":
    run_stage(main)
