"""drift: latents of the view `drift.view` and the feature encoders -> the one-step generator.

    python -m stages.drift --latents artifacts/latents/center --mae artifacts/mae --out artifacts/generator

Writes OUT/config.json, diffusion_pytorch_model.safetensors (the first EMA; others are variants such as
diffusion_pytorch_model.ema_0999.safetensors), classes.json (names of the classes), settings.yaml and
logs.jsonl; and for DVC's plots, the training curve. With `drift.evaluate_every`, samples are measured in the
course of the training: OUT/best is then the generator with the smallest Fréchet distance. A run that was
killed goes on from its last checkpoint.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from drift.data.latents import LatentStore
from drift.evaluation.while_training import BEST, FID_COLUMNS, TrainingEvaluation
from drift.features import Encoder, load_encoders
from drift.models.base import model_files
from drift.models.generator import CLASSES_FILE
from drift.runtime.files import check_output, sha256, write_json
from drift.runtime.processes import join, run_stage, spawn, stage_parser
from drift.runtime.work import Work
from drift.settings import Settings, load_settings
from drift.training.drift import generator_config, open_generator, plot_columns, train_generator
from drift.training.export import export_run
from drift.training.inputs import check_latents, load_autoencoder
from drift.training.loop import Run


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = stage_parser(__doc__)
    parser.add_argument("--latents", type=Path, required=True, help="folder of the latents")
    parser.add_argument("--mae", type=Path, required=True, help="folder of the MAE")
    parser.add_argument("--out", type=Path, required=True, help="folder of the generator")
    parser.add_argument("--plot", type=Path, default=Path("plots/drift_training.csv"))
    parser.add_argument("--fid-plot", type=Path, default=Path("plots/drift_fid.csv"))
    args = parser.parse_args(argv)

    settings = load_settings(args.params)
    hardware = settings.hardware
    for path in (args.out, args.plot, args.fid_plot):
        check_output(path)
    store = LatentStore.open(args.latents)
    check_latents(store, settings, settings.drift.view)
    evaluation = TrainingEvaluation(settings, store) if settings.drift.evaluate_every else None
    if (source := settings.drift.init_from) is not None:
        open_generator(source, generator_config(settings.drift, store))  # refuses what does not fit
    encoder = load_features(settings, store, args.mae)
    if (code := spawn("stages.drift", argv, args.nproc or hardware.processes)) is not None:
        return code

    autoencoder = settings.encode.autoencoder
    decides = {
        "seed": settings.seed,
        **settings.deciding("drift"),
        "latents": store.digest,
        # That of the latents, which decodes what the generator makes
        "vae": autoencoder.id,
        "vae_revision": autoencoder.revision,
    }
    if settings.needs_mae:
        decides["mae"] = {path.name: sha256(path) for path in model_files(args.mae)}
    if source is not None:
        decides["init_from"] = {path.name: sha256(path) for path in model_files(Path(source))}
    if settings.needs_decoder:
        decides["encoder"] = encoder.digest
    remarks = settings.remarks("drift")
    with (
        join(hardware.time_limit, deterministic=hardware.deterministic) as ranks,
        Work("drift", decides, fresh=args.fresh, first=ranks.first, remarks=remarks) as work,
    ):
        ranks.barrier()
        run = Run(settings.seed, hardware, ranks, work.folder)
        field = settings.field_settings()
        if evaluation is not None:
            evaluation.start(ranks, work.folder)
        model, emas = train_generator(store, encoder, settings.drift, field, run, evaluation)
        if ranks.first:
            curves = {args.plot: plot_columns(field), args.fid_plot: FID_COLUMNS}
            export = export_run(model, emas, work.folder, curves)
            write_json(export / CLASSES_FILE, store.class_names)
            if (best := work.folder / BEST).exists():
                shutil.copytree(best, export / BEST)
                write_json(export / BEST / CLASSES_FILE, store.class_names)
            work.publish(export, args.out, settings.in_force("drift"))
    return 0


def load_features(settings: Settings, store: LatentStore, mae: Path) -> Encoder:
    """The encoders of the settings; for those of images, on the autoencoder of the latents."""
    autoencoder = None
    if settings.needs_decoder:
        autoencoder = load_autoencoder(store, settings, settings.decoder_precision)
    return load_encoders(settings.features, mae=mae, autoencoder=autoencoder)


if __name__ == "__main__":
    run_stage(main, memory="hardware.classes_per_pass or hardware.feature_batch")
