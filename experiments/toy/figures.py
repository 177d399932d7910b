"""figures: the curves and samples of all trainings -> tables and figures.

    python -m experiments.toy.figures --runs artifacts/toy --out experiments/toy/results

Writes OUT/curves.csv (every measurement), OUT/table.csv (mean and standard deviation over the seeds after the
last step; for `real`, the floor, over all measurements), and for each metric OUT/w2_<metric>.png and
OUT/samples_<metric>.png.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from drift.field.couplings import COUPLINGS
from drift.runtime.errors import UserError
from drift.runtime.files import check_output
from drift.runtime.processes import run_stage
from experiments.common import load_section, mean_and_std, read_csv, save_figure, script_parser, write_csv
from experiments.toy.settings import Toy

REAL = "real"
_OF_THE_PAPER = {"row": "one-sided", "partial_two_sided": "two-sided", "sinkhorn": "Sinkhorn"}
NAMES = {name: name for name in COUPLINGS} | _OF_THE_PAPER | {REAL: "real points"}
COLOURS = {name: f"C{number}" for number, name in enumerate(COUPLINGS)} | {REAL: "0.35"}
MEASURED = ("w2", "near_modes", "modes")
SETTING = ("dist_metric", "target", "coupling", "eps")


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__, "toy")
    parser.add_argument("--runs", type=Path, required=True, help="folder of all outputs of train")
    args = parser.parse_args(argv)
    settings = load_section(args.params, Toy)
    check_output(args.out / "table.csv")
    folders = {
        (metric, target): args.runs / f"{target}-{metric}"
        for metric in settings.dist_metrics
        for target in settings.targets
    }
    for folder in folders.values():
        if not (folder / "curves.csv").exists():
            raise UserError(f"{folder}: no results of experiments.toy.train; dvc repro makes them")
    rows = [row for folder in folders.values() for row in read_csv(folder / "curves.csv")]
    write_csv(args.out / "curves.csv", rows)
    last = max(row["step"] for row in rows)
    final = [row for row in rows if row["step"] == last or row["coupling"] == REAL]
    write_csv(args.out / "table.csv", mean_and_std(final, SETTING, MEASURED))
    curves = mean_and_std(rows, (*SETTING, "step"), MEASURED)
    for metric in settings.dist_metrics:
        of_metric = [row for row in curves if row["dist_metric"] == metric]
        save_figure(args.out / f"w2_{metric}.png", draw_curves(of_metric, settings))
        samples = {
            target: dict(np.load(folders[metric, target] / "samples.npz")) for target in settings.targets
        }
        save_figure(args.out / f"samples_{metric}.png", draw_samples(samples, settings))
    return 0


def draw_curves(curves: Sequence[Mapping[str, Any]], settings: Toy) -> Figure:
    """W2^2 over steps, a row for each target and a column for each temperature; mean and spread."""
    targets, temps = settings.targets, sorted(settings.temps)
    figure, axes = panels(len(targets), len(temps), (3.2, 2.1), sharex=True, sharey="row")
    for i, target in enumerate(targets):
        for j, eps in enumerate(temps):
            ax: Axes = axes[i, j]
            for coupling in (REAL, *settings.couplings):
                chosen = [
                    row
                    for row in curves
                    if row["target"] == target and row["coupling"] == coupling and row["eps"] in (None, eps)
                ]
                draw_curve(ax, chosen, coupling)
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_locator(NullLocator())
            ax.grid(alpha=0.25, linewidth=0.5)
            if i == 0:
                ax.set_title(f"$\\varepsilon$ = {eps:g}")
            if j == 0:
                ax.set_ylabel(f"{target}\n$W_2^2$")
            if i == len(targets) - 1:
                ax.set_xlabel("step")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    return figure


def draw_curve(ax: Axes, rows: Sequence[Mapping[str, Any]], coupling: str) -> None:
    steps = [row["step"] for row in rows]
    mean, std = (np.array([row[f"w2_{of}"] for row in rows]) for of in ("mean", "std"))
    style = "--" if coupling == REAL else "-"
    ax.plot(steps, mean, style, color=COLOURS[coupling], label=NAMES[coupling], linewidth=1.4)
    if coupling != REAL:  # on a logarithmic axis, a band that reaches 0 would fill the panel
        ax.fill_between(
            steps,
            np.maximum(mean - std, mean / 3),
            mean + std,
            color=COLOURS[coupling],
            alpha=0.2,
            linewidth=0,
        )


def draw_samples(samples: Mapping[str, Mapping[str, np.ndarray]], settings: Toy) -> Figure:
    """Points of the first seed: a row for each target; real points, then temperatures and couplings."""
    runs = [(eps, coupling) for eps in sorted(settings.temps) for coupling in settings.couplings]
    figure, axes = panels(len(settings.targets), 1 + len(runs), (1.35, 1.4))
    for i, target in enumerate(settings.targets):
        real = samples[target][REAL]
        middle = (real.max(axis=0) + real.min(axis=0)) / 2
        half = 0.6 * (real.max(axis=0) - real.min(axis=0)).max()
        for j, (eps, coupling) in enumerate([(None, REAL), *runs]):
            ax: Axes = axes[i, j]
            points = real if coupling == REAL else samples[target][f"{coupling}-{eps:g}"]
            ax.scatter(*points.T, s=1.2, color=COLOURS[coupling], linewidths=0)
            (x, y) = middle
            ax.set(xlim=(x - half, x + half), ylim=(y - half, y + half), xticks=[], yticks=[], aspect="equal")
            if i == 0:
                ax.set_title(
                    NAMES[coupling] + ("" if eps is None else f"\n$\\varepsilon$ = {eps:g}"), fontsize=9
                )
            if j == 0:
                ax.set_ylabel(target, fontsize=9)
    return figure


def panels(rows: int, columns: int, size: tuple[float, float], **shared) -> tuple[Figure, np.ndarray]:
    """A figure of so many panels of a size in inches."""
    figure = Figure(figsize=(columns * size[0], rows * size[1] + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


if __name__ == "__main__":
    run_stage(main)
