"""The files of one evaluation, written together once all is measured: numbers, curves, pictures, a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from drift.evaluation.page import training_curves, write_page
from drift.evaluation.pictures import save_png
from drift.evaluation.sweep import write_sweep_csv
from drift.runtime.files import check_output, write_json


@dataclass(frozen=True)
class Pictures:
    """What to look at, and how it is to be read."""

    samples: Image.Image
    """A row per class, the same noise in every row of a column."""
    omega: Image.Image
    """A row per class, a column per CFG strength, the same noise in all."""
    samples_omega: float
    """CFG strength of `samples`."""


@dataclass(frozen=True)
class Outputs:
    """Where the files go."""

    metrics: Path
    plots: Path
    """Folder of curves and pictures."""
    report: Path

    @property
    def sweep_csv(self) -> Path:
        return self.plots / "fid_sweep.csv"

    @property
    def sweep_json(self) -> Path:
        return self.plots / "fid_sweep.json"

    @property
    def samples(self) -> Path:
        return self.plots / "samples.png"

    @property
    def omega(self) -> Path:
        return self.plots / "omega.png"

    @property
    def beside_metrics(self) -> Sequence[Path]:
        """All but `metrics`."""
        return self.sweep_csv, self.sweep_json, self.samples, self.omega, self.report

    def check_writable(self) -> None:
        """Raise `UserError` if one of the files cannot be written; makes their folders."""
        for path in (self.metrics, *self.beside_metrics):
            check_output(path)

    def write(
        self,
        result: Mapping[str, Any],
        summary: Mapping[str, Any],
        pictures: Pictures,
        *,
        title: str,
        settings: Mapping[str, Any],
        training_log: Path,
    ) -> None:
        """Write all files, each of them atomically, the metrics last.

        `result` is what `metrics` is to hold, `summary` what `sweep_json` is; `title`, `settings` and the
        log of the generator's training are for the page.
        """
        save_png(self.samples, pictures.samples)
        save_png(self.omega, pictures.omega)
        write_sweep_csv(self.sweep_csv, result["sweep"])
        write_json(self.sweep_json, summary)
        write_page(
            self.report,
            result,
            title=title,
            settings=settings,
            pictures=[
                (
                    "Samples",
                    f"A row per class at omega {pictures.samples_omega:g}; a column shares its noise.",
                    self.samples.read_bytes(),
                ),
                (
                    "The same noise at every omega",
                    "A row per class, a column per omega.",
                    self.omega.read_bytes(),
                ),
            ],
            training=training_curves(training_log),
        )
        write_json(self.metrics, result)
