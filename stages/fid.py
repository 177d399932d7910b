"""fid: generator -> images at each omega -> Fréchet distances, a picture.

    python -m stages.fid --generator artifacts/generator --out metrics/fid.json

Writes OUT with the numbers and what was measured how, the sweep as CSV for DVC's plots, and a picture with
one row per class.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ruamel.yaml import YAML

from drift.data.images import open_images
from drift.errors import UserError
from drift.evaluation.features import check_feature_network, load_feature_network
from drift.evaluation.fid import (
    evaluate_sweep,
    load_statistics,
    real_statistics,
    require_enough,
    write_sweep_csv,
)
from drift.evaluation.pictures import class_rows, save_png
from drift.evaluation.report import print_report
from drift.files import check_writable, sha256, write_json
from drift.launch import join, run_stage, spawn, stage_parser, wanted_processes
from drift.models.ema import ema_file
from drift.models.generator import Generator
from drift.models.vae import VAE
from drift.params import load_settings
from drift.progress import ProgressLog
from drift.work import SETTINGS_FILE, Work


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = stage_parser(__doc__)
    parser.add_argument("--generator", type=Path, required=True, help="folder of the generator")
    parser.add_argument("--out", type=Path, default=Path("metrics/fid.json"))
    parser.add_argument("--sweep", type=Path, default=Path("plots/fid_sweep.csv"))
    parser.add_argument("--picture", type=Path, default=Path("plots/samples.png"))
    args = parser.parse_args(argv)

    settings = load_settings(args.params)
    data, fid, hardware = settings.data, settings.fid, settings.hardware
    for path in (args.out, args.sweep, args.picture):
        check_writable(path.parent)
    made_by = read_provenance(args.generator)
    weights = ema_file(made_by["decides"]["drift"]["ema_decays"], fid.ema_decay) if made_by else "model"
    generator = Generator.from_pretrained(args.generator, weights=weights)
    vae = VAE.from_pretrained(settings.encode.vae, settings.encode.vae_revision)
    check_feature_network(fid.features, fid.mode)
    training = open_images(data.dataset, data.root, "train", data.classes)
    by_file = fid.reference.endswith(".npz")
    held_out = None if by_file else open_images(data.dataset, data.root, fid.reference, data.classes)
    if by_file and not Path(fid.reference).is_file():
        raise UserError(f"fid.reference = {fid.reference}: there is no such file; correct the path")
    code = spawn("stages.fid", argv, wanted_processes(args.nproc, hardware.processes))
    if code is not None:
        return code

    with join(hardware.time_limit) as ranks:
        network = load_feature_network(fid.features, fid.mode, ranks.device, workers=hardware.workers)
        require_enough(fid.images, network, "generated images per omega (fid.images)")
        generator = generator.to(ranks.device).eval()
        vae = vae.to(ranks.device)
        decides = {
            "seed": settings.seed,
            "data": data.model_dump(mode="json"),
            "fid": fid.model_dump(mode="json"),
            "generator": [
                sha256(args.generator / name) for name in ("config.json", f"{weights}.safetensors")
            ],
            "vae": vae.digest,
            "features": network.digest,
            "images": training.digest,
            "reference": sha256(fid.reference) if by_file else held_out.digest,
        }
        peers = {"rank": ranks.rank, "world_size": ranks.world_size, "all_reduce_sum": ranks.sum}

        def measure(source, images=None):
            return real_statistics(
                source,
                network,
                image_size=data.image_size,
                batch_size=hardware.sample_batch,
                images=images,
                seed=settings.seed,
                workers=hardware.workers,
                **peers,
            )

        if by_file:
            reference = load_statistics(fid.reference, network.dimension)
        else:
            reference = measure(held_out)
        with Work("fid", decides, fresh=args.fresh, first=ranks.first) as work:
            ranks.barrier()
            progress = work.folder / "sweep.json"
            finished = json.loads(progress.read_text()) if progress.exists() else []
            if ranks.first:
                log = ProgressLog(work.folder / "logs.jsonl", steps=len(fid.omegas) * fid.images, unit="img")

            def remember(entry):
                finished.append(entry)
                if ranks.first:
                    write_json(progress, finished)
                    log.reached(len(finished) * fid.images, force=True)

            result = evaluate_sweep(
                generator,
                vae,
                network,
                reference,
                measure(training, fid.floor_images) if fid.floor_images else None,
                omegas=fid.omegas,
                images=fid.images,
                classes=data.classes,
                seed=settings.seed,
                batch_size=hardware.sample_batch,
                device=ranks.device,
                finished=tuple(finished),
                on_entry=remember,
                on_images=log.reached if ranks.first else lambda images: None,
                **peers,
            )
            if ranks.first:
                result["protocol"] = {
                    "features": fid.features,
                    "features_sha256": network.digest,
                    "mode": fid.mode,
                    "reference": fid.reference,
                    "reference_images": None if by_file else len(held_out),
                    "floor_images": min(fid.floor_images, len(training)),
                    "ema_decay": fid.ema_decay,
                    "seed": settings.seed,
                    "vae": settings.encode.vae,
                    "generator": made_by["how"] if made_by else None,
                }
                picture = class_rows(
                    generator,
                    vae,
                    range(fid.picture_classes),
                    fid.picture_columns,
                    fid.picture_omega,
                    settings.seed,
                    batch_size=hardware.sample_batch,
                    device=ranks.device,
                    row_labels=training.class_names[: fid.picture_classes],
                )
                save_png(args.picture, picture)
                write_sweep_csv(args.sweep, result["sweep"])
                write_json(args.out, result)
                work.finish()
                print_report(args.out, (args.sweep, args.picture))
    return 0


def read_provenance(folder: Path) -> dict | None:
    """What the settings file of a generator says; None for one that no stage of ours has made."""
    path = folder / SETTINGS_FILE
    return YAML(typ="safe", pure=True).load(path) if path.is_file() else None


if __name__ == "__main__":
    run_stage(main, memory="hardware.sample_batch")
