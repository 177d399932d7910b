"""mae: latents of the augmented view -> the frozen feature encoder of the drifting loss.

    python -m stages.mae --latents artifacts/latents/augmented --out artifacts/mae

Writes OUT/config.json, model.safetensors (EMA weights), settings.yaml and logs.jsonl, and the training
curve for DVC's plots. A run that was killed goes on from its last checkpoint.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from drift.data.latents import LatentStore, check_meta
from drift.files import check_writable
from drift.launch import join, run_stage, spawn, stage_parser, wanted_processes
from drift.params import load_settings
from drift.training.export import export_run
from drift.training.mae import PLOT_COLUMNS, mae_config, train_mae
from drift.work import Work


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = stage_parser(__doc__)
    parser.add_argument("--latents", type=Path, required=True, help="folder of the augmented latents")
    parser.add_argument("--out", type=Path, required=True, help="folder of the MAE")
    parser.add_argument("--plot", type=Path, default=Path("plots/mae_training.csv"))
    args = parser.parse_args(argv)

    settings = load_settings(args.params)
    check_writable(args.out.parent)
    check_writable(args.plot.parent)
    store = LatentStore.open(args.latents)
    check_meta(store, vae=settings.encode.vae, view="augmented", image_size=settings.data.image_size)
    mae_config(settings.mae, store)
    code = spawn("stages.mae", argv, wanted_processes(args.nproc, settings.hardware.processes))
    if code is not None:
        return code

    decides = {
        "seed": settings.seed,
        "mae": settings.mae.model_dump(mode="json"),
        "latents": store.digest,
    }
    with join() as ranks, Work("mae", decides, fresh=args.fresh, first=ranks.first) as work:
        ranks.barrier()
        model, emas = train_mae(
            store,
            settings.mae,
            seed=settings.seed,
            hardware=settings.hardware,
            ranks=ranks,
            folder=work.folder,
        )
        if ranks.first:
            export = export_run(model, emas, work.folder, plot=args.plot, columns=PLOT_COLUMNS)
            work.publish(export, args.out, precision=settings.hardware.precision)
    return 0


if __name__ == "__main__":
    run_stage(main)
