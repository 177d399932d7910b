"""From a finished run to the folder that other stages read."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from drift.models.base import PretrainedModel
from drift.models.ema import EMA, ema_variant
from drift.training.log import write_plot
from drift.training.loop import LOG_FILE


def export_run(
    model: PretrainedModel, emas: Sequence[EMA], folder: Path, plots: Mapping[Path, Sequence[str]]
) -> Path:
    """Write `folder/export`: the config, a weights file per EMA, and the log. Returns that folder.

    Columns of the log become `plots`. `model` gets the weights of the first EMA.
    """
    export = folder / "export"
    shutil.rmtree(export, ignore_errors=True)
    export.mkdir()
    decays = [ema.decay for ema in emas]
    for ema in reversed(emas):
        ema.copy_to(model)
        model.save_pretrained(export, variant=ema_variant(decays, ema.decay))
    shutil.copyfile(folder / LOG_FILE, export / LOG_FILE)
    for plot, columns in plots.items():
        write_plot(folder / LOG_FILE, plot, columns)
    return export
