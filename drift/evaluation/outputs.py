"""The files of one evaluation, written together once all is measured: numbers, curves, pictures, a page."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drift.evaluation.evaluate import Copies, Evaluated
from drift.evaluation.page import render_page
from drift.evaluation.pictures import save_png
from drift.evaluation.sweep import COLUMNS, Entry
from drift.runtime.files import atomic_write, check_output, write_json
from drift.settings import Settings

_OF_BEST = ("fid", "omega", "ema_decay", "kid", "inception_score", "precision", "recall", "accuracy")


@dataclass(frozen=True)
class Outputs:
    """Where the files go."""

    metrics: Path
    """The best point's numbers, for `dvc exp show`."""
    plots: Path
    """Folder of curves and pictures."""
    report: Path
    """The page; `protocol.json` stands beside it."""

    @property
    def protocol(self) -> Path:
        """All numbers, and how they were measured."""
        return self.report.with_name("protocol.json")

    @property
    def files(self) -> Sequence[Path]:
        names = ("fid_sweep.csv", "fid_sweep.json", "samples.png", "omega.png")
        return self.metrics, *(self.plots / name for name in names), self.report, self.protocol

    def check_writable(self) -> None:
        """Raise `UserError` if one of the files cannot be written; makes their folders."""
        for path in self.files:
            check_output(path)

    def write(self, evaluated: Evaluated, settings: Settings, copies: Copies) -> None:
        """Write all files, each of them atomically, the metrics last."""
        measured = evaluated.measured
        pictures = {"samples": evaluated.samples, "omega": evaluated.omegas}
        for name, picture in pictures.items():
            save_png(self.plots / f"{name}.png", picture)
        write_sweep_csv(self.plots / "fid_sweep.csv", measured["sweep"])
        write_json(self.plots / "fid_sweep.json", sweep_summary(measured, settings))
        shown = dict(copies.made_by["decides"]) if copies.made_by else {}
        shown |= {"fid": settings.fid.model_dump(mode="json"), "data": settings.data.model_dump(mode="json")}
        captions = {
            "samples": f"Samples at omega {settings.fid.picture_omega:g}: a column shares its noise",
            "omega": "The same noise at every omega",
        }
        page = render_page(
            measured,
            settings=shown,
            pictures={text: (self.plots / f"{name}.png").read_bytes() for name, text in captions.items()},
            training_log=copies.folder / "logs.jsonl",
        )
        with atomic_write(self.report) as file:
            file.write(page.encode(errors="backslashreplace"))
        write_json(self.protocol, measured)
        write_json(self.metrics, flat_metrics(measured))


def flat_metrics(measured: Mapping[str, Any]) -> dict[str, float]:
    """At most ten numbers: those of the best point that were measured, and what to compare its FID with."""
    numbers = {name: measured["best"].get(name) for name in _OF_BEST}
    numbers["fid_of_training_images"] = measured["training"]
    return {name: number for name, number in numbers.items() if number is not None}


def write_sweep_csv(path: str | Path, sweep: Sequence[Entry]) -> None:
    """Write the entries as CSV: `COLUMNS`, of which the Sinkhorn paper's code has omega, fid and dir.

    What was not measured is empty.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(sweep)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def sweep_summary(measured: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """What `fid_sweep.json` holds: the fields of the Sinkhorn paper's code, with ours in each entry."""
    protocol, batch_size = measured["protocol"], settings.hardware.sample_batch
    reference, sweep = protocol["reference"], measured["sweep"]
    return {
        "ckpt": protocol["generator_folder"],
        "use_ema": True,
        "num_gen": measured["images"],
        "batch_size": batch_size,
        "fid": {"mode": protocol["mode"], "batch_size": batch_size, "workers": settings.hardware.workers},
        "real_dir": reference,
        "real_stats": reference if reference.endswith(".npz") else protocol["reference_digest"],
        "latent_scale_factor": protocol["latent_scale_factor"],
        "omegas": list(dict.fromkeys(entry["omega"] for entry in sweep)),
        "results": [{"dir": None, **entry} for entry in sweep],
        "best": {"dir": None, **measured["best"]},
    }
