"""The figures of the sweep."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from experiments.mnist.networks import CLASSES
from experiments.mnist.runs import SweepRun

KERNELS = {"l2_sq": "Gaussian", "l2": "Laplacian"}
COUPLINGS = {"partial_two_sided": "two-sided", "sinkhorn": "Sinkhorn"}
TICKS = (4, 5, 6, 8, 10, 20, 40, 80)
_COLOURS = ("tab:orange", "tab:blue", "tab:green", "tab:red")


def sweep(rows: Sequence[Mapping[str, Any]], floor: Mapping[str, float]) -> Figure:
    """W2^2 and accuracy over tau, a column per kernel: mean and spread, published numbers, the floor."""
    metrics = [metric for metric in KERNELS if any(row["metric"] == metric for row in rows)]
    figure = Figure(figsize=(4.6 * len(metrics), 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(metrics), sharex=True, sharey="row", squeeze=False)
    couplings = sorted({row["coupling"] for row in rows})
    for column, metric in enumerate(metrics):
        for top, name in zip(axes[:, column], ("w2_latent", "accuracy"), strict=True):
            for coupling, colour in zip(couplings, _COLOURS, strict=False):
                mine = [row for row in rows if (row["metric"], row["coupling"]) == (metric, coupling)]
                keys = "tau", f"{name}_mean", f"{name}_std"
                tau, mean, std = (np.array([row[key] for row in mine]) for key in keys)
                top.plot(tau, mean, "o-", color=colour, label=COUPLINGS.get(coupling, coupling), markersize=4)
                top.fill_between(tau, mean - std, mean + std, color=colour, alpha=0.25, linewidth=0)
                theirs = [row for row in mine if row[f"published_{name}"] is not None]
                dots = [[row[key] for row in theirs] for key in ("tau", f"published_{name}")]
                top.plot(*dots, "x", color=colour, markersize=9, label=f"{COUPLINGS.get(coupling)}, paper")
            top.axhline(floor[name], color="grey", linestyle=":", label="real training images")
            top.set_xscale("log")
            top.grid(alpha=0.3)
        axes[0, column].set_title(f"{KERNELS[metric]} kernel")
        axes[0, column].set_yscale("log")
        axes[0, column].set_yticks(TICKS, map(str, TICKS))
        axes[0, column].minorticks_off()
        axes[1, column].set_xlabel("temperature tau")
    axes[0, 0].set_ylabel("W2² in the latent space")
    axes[1, 0].set_ylabel("read as asked")
    axes[1, -1].legend(fontsize="small", loc="center right")
    return figure


def samples(shown: Mapping[SweepRun, Tensor], columns: int) -> Figure:
    """A panel of digits per run: a row of panels per coupling, a column per kernel and temperature."""
    couplings = sorted({run.coupling for run in shown})
    across = sorted({(run.metric, run.tau) for run in shown}, key=lambda pair: (-len(pair[0]), pair[1]))
    figure = Figure(figsize=(2.1 * len(across), 2.9 * len(couplings)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(couplings), len(across), squeeze=False)
    for panel in axes.flat:
        panel.set_axis_off()
    for run, images in shown.items():
        grid = images.view(CLASSES, columns, 28, 28).permute(0, 2, 1, 3).reshape(CLASSES * 28, columns * 28)
        panel = axes[couplings.index(run.coupling), across.index((run.metric, run.tau))]
        panel.imshow(1 - grid.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="none")
        panel.set_title(
            f"{KERNELS[run.metric]}, {COUPLINGS.get(run.coupling, run.coupling)}\ntau {run.tau:g}",
            fontsize="small",
        )
    return figure
