"""Draw docs/curves.png: what the logs of some training runs say over the steps.

    python docs/curves.py default=artifacts/generator/logs.jsonl collapses=FOLDER/logs.jsonl docs/curves.png

Both runs have `drift.evaluate_every`. The second, of half the steps, is that of

    dvc exp run -S conventions=sinkhorn -S coupling=sinkhorn -S drift_form=split -S drift.steps=1000
"""

import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from drift.runtime.progress import read_log

PANELS = {
    "fid": "fid: Fréchet distance of samples",
    "drift_rms": "drift_rms: raw drift, in units of S",
    "row_entropy": "row_entropy, in nats",
    "loss": "loss, divided by its first value",
}


def main(runs: list[str], out: str) -> None:
    figure = Figure(figsize=(11, 2.7), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for number, (column, title) in enumerate(PANELS.items(), start=1):
        axes = figure.add_subplot(1, len(PANELS), number)
        for run in runs:
            name, log = run.split("=", 1)
            points = [(line["step"], line[column]) for line in read_log(Path(log)) if column in line]
            steps, values = zip(*points, strict=True)
            if column == "loss":
                values = [value / values[0] for value in values]
            axes.plot(steps, values, marker="o" if len(steps) < 20 else "", markersize=3, label=name)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        if column == "fid":
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if number == 1:
            axes.legend(fontsize=8, frameon=False)
    figure.savefig(out, metadata={"Software": None})


if __name__ == "__main__":
    main(sys.argv[1:-1], sys.argv[-1])
