"""mae: latents -> the frozen feature encoder of the drifting loss, trained or taken from `mae.source`.

    python -m stages.mae --latents artifacts/latents/augmented --out artifacts/mae

Writes OUT/config.json, diffusion_pytorch_model.safetensors (EMA weights), settings.yaml and logs.jsonl; and
for DVC's plots, the training curve and the error on held-out images. A run that was killed goes on from its
last checkpoint. With `mae.source`, nothing is trained: that encoder becomes OUT, and its error on the latents
is measured. If no encoder of `features` is the MAE, OUT only says so.
"""

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from drift.data.latents import LatentStore
from drift.models.base import model_files, uninitialized
from drift.models.mae import LatentMAE
from drift.runtime.files import check_output, sha256, write_json
from drift.runtime.processes import join, run_stage, spawn, stage_parser
from drift.runtime.work import SETTINGS_FILE, Work
from drift.settings import load_settings
from drift.training.export import export_run
from drift.training.inputs import check_latents
from drift.training.log import write_plot
from drift.training.loop import LOG_FILE, Run
from drift.training.mae import (
    HELD_OUT_COLUMNS,
    PLOT_COLUMNS,
    adopt_encoder,
    mae_config,
    open_encoder,
    train_mae,
)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = stage_parser(__doc__)
    parser.add_argument("--latents", type=Path, required=True, help="folder of the latents")
    parser.add_argument("--out", type=Path, required=True, help="folder of the MAE")
    parser.add_argument("--plot", type=Path, default=Path("plots/mae_training.csv"))
    parser.add_argument("--held-out-plot", type=Path, default=Path("plots/mae_held_out.csv"))
    args = parser.parse_args(argv)

    settings = load_settings(args.params)
    hardware = settings.hardware
    plots = {args.plot: PLOT_COLUMNS, args.held_out_plot: HELD_OUT_COLUMNS}
    for path in (args.out, *plots):
        check_output(path)
    store = LatentStore.open(args.latents)
    check_latents(store, settings, settings.mae.view)
    if not settings.needs_mae:
        publish_none(args.out, plots)
        return 0
    decides = {"seed": settings.seed, "latents": store.digest}
    source = settings.mae.source
    if source is None:
        uninitialized(lambda: LatentMAE(**mae_config(settings.mae, store)))  # refuses sizes that do not fit
        decides |= settings.deciding("mae")
    else:
        encoder = open_encoder(source, store)
        files = {path.name: sha256(path) for path in model_files(Path(source))}
        decides["mae"] = {"source": source, **files}
    if (code := spawn("stages.mae", argv, args.nproc or hardware.processes)) is not None:
        return code

    remarks = settings.remarks("mae")
    with (
        join(hardware.time_limit, deterministic=hardware.deterministic) as ranks,
        Work("mae", decides, fresh=args.fresh, first=ranks.first, remarks=remarks) as work,
    ):
        ranks.barrier()
        run = Run(settings.seed, hardware, ranks, work.folder)
        if source is None:
            model, emas = train_mae(store, settings.mae, run)
        else:
            model, emas = adopt_encoder(encoder, Path(source), store, settings.mae, run)
        if ranks.first:
            export = export_run(model, emas, work.folder, plots)
            if source is not None and (made_by := Path(source, SETTINGS_FILE)).exists():
                shutil.copyfile(made_by, export / "source.yaml")
            work.publish(export, args.out, settings.in_force("mae") if source is None else None)
    return 0


def publish_none(out: Path, plots: Mapping[Path, Sequence[str]]) -> None:
    """Write what stands in for an MAE that no encoder of `features` needs: a note, and empty curves."""
    remarks = ["no encoder of features is the MAE: nothing to train"]
    with Work("mae", {"needed": False}, remarks=remarks) as work:
        export = work.folder / "export"
        export.mkdir(exist_ok=True)
        write_json(export / "config.json", {"needed": False})
        (export / LOG_FILE).write_text("")
        for plot, columns in plots.items():
            write_plot(export / LOG_FILE, plot, columns)
        work.publish(export, out)


if __name__ == "__main__":
    run_stage(main, memory="hardware.mae_micro_batch")
