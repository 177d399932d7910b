"""fid: generator -> images at each omega -> Fréchet distances and other metrics, pictures, a report.

    python -m stages.fid --generator artifacts/generator --out metrics/fid.json

Writes OUT with the numbers and what was measured how (docs/protocol.md explains it), the sweep as CSV for
DVC's plots and as JSON with the prior's fields, two pictures with a row per class, and a page with all of it.
"""

import json
import sys
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

import drift
from drift.autoencoders.kl import VAE
from drift.data.datasets import Dataset, class_difference, open_images
from drift.evaluation.networks import FeatureNetwork, check_feature_network, load_feature_network
from drift.evaluation.outputs import Outputs, Pictures
from drift.evaluation.pictures import class_rows, omega_columns
from drift.evaluation.reference import (
    Peers,
    Reference,
    load_statistics,
    measure_images,
    open_reference,
    require_enough,
    self_test,
)
from drift.evaluation.report import print_report
from drift.evaluation.sample import ImageDecoder, balanced_labels, random_labels, split_labels
from drift.evaluation.sweep import Samples, best_entry, check_metrics, evaluate_sweep, sweep_summary
from drift.models.base import model_files
from drift.models.ema import ema_variant
from drift.models.generator import CLASSES_FILE, Generator, read_class_names
from drift.runtime.errors import UserError
from drift.runtime.files import sha256, write_json
from drift.runtime.processes import join, run_stage, spawn, stage_parser, wanted_processes
from drift.runtime.progress import ProgressLog
from drift.runtime.seeds import numpy_generator
from drift.runtime.work import SETTINGS_FILE, Work, work_root
from drift.settings import Settings, load_settings
from drift.training.compile import Compiled

PACKAGES = ("clean-fid", "diffusers", "numpy", "pillow", "scipy", "torch", "torchvision")


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = stage_parser(__doc__)
    parser.add_argument("--generator", type=Path, required=True, help="folder of the generator")
    parser.add_argument("--out", type=Path, default=Path("metrics/fid.json"))
    parser.add_argument("--plots", type=Path, default=Path("plots"), help="folder of curves and pictures")
    parser.add_argument("--report", type=Path, default=Path("reports/index.html"))
    args = parser.parse_args(argv)

    settings = load_settings(args.params)
    data, fid, hardware = settings.data, settings.fid, settings.hardware
    outputs = Outputs(args.out, args.plots, args.report)
    outputs.check_writable()
    made_by = _read_provenance(args.generator)
    trained = made_by["decides"]["drift"]["ema_decays"] if made_by else None
    decays = fid.ema_decays if trained else (None,)
    weights = {decay: ema_variant(trained, decay) if trained else None for decay in decays}

    @lru_cache(maxsize=1)
    def load(decay: float | None) -> Generator:
        return Generator.from_pretrained(args.generator, variant=weights[decay])

    for decay in reversed(decays):
        load(decay)
    vae = VAE.from_pretrained(settings.encode.vae, settings.encode.vae_revision, precision=fid.precision)
    check_feature_network(fid.features, fid.mode, fid.inception)
    training = open_images(data.dataset, data.root, "train", data.classes)
    _require_classes(args.generator, training)
    reference_images = open_reference(fid.reference, data.dataset, data.root, data.classes)
    if fid.labels == "balanced":
        labels = balanced_labels(fid.images, data.classes)
    elif fid.labels == "random":
        labels = random_labels(fid.images, data.classes, settings.seed)
    else:
        split = open_images(data.dataset, data.root, fid.labels, data.classes)
        labels = split_labels(split.labels, fid.images, settings.seed)
    code = spawn("stages.fid", argv, wanted_processes(args.nproc, hardware.processes))
    if code is not None:
        return code

    with join(hardware.time_limit, deterministic=hardware.deterministic) as ranks:
        network = load_feature_network(
            fid.features, fid.mode, ranks.device, workers=hardware.workers, inception=fid.inception
        )
        require_enough(fid.images, network, "generated images per omega (fid.images)")
        floor_images = min(fid.floor_images, len(training))
        if floor_images:
            require_enough(floor_images, network, "real training images (fid.floor_images; 0 takes none)")
        check_metrics(fid.metrics, network, reference_images is not None)
        if hardware.compile and ranks.device.type == "cuda":
            vae.compile_with(Compiled)
        decode = ImageDecoder(vae.to(ranks.device), hardware.decode_batch, fid.rounding)
        on_device = lru_cache(maxsize=1)(lambda decay: load(decay).to(ranks.device).eval())
        decides = {
            "seed": settings.seed,
            "data": data.model_dump(mode="json"),
            "fid": fid.model_dump(mode="json"),
            "generator": list(
                dict.fromkeys(
                    sha256(path) for decay in decays for path in model_files(args.generator, weights[decay])
                )
            ),
            "vae": vae.digest,
            "features": network.digest,
            "images": training.digest,
            "reference": sha256(fid.reference) if reference_images is None else reference_images.digest,
        }
        peers = Peers(ranks.rank, ranks.world_size, ranks.sum, ranks.device, ranks.barrier)
        real = (0 if reference_images is None else len(reference_images)) + floor_images
        remarks = settings.remarks("fid")
        with Work("fid", decides, fresh=args.fresh, first=ranks.first, remarks=remarks) as work:
            ranks.barrier()
            progress = work.folder / "sweep.json"
            finished = json.loads(progress.read_text()) if progress.exists() else []
            if ranks.first:
                total = real + len(decays) * len(fid.omegas) * fid.images
                log = ProgressLog(work.folder / "logs.jsonl", steps=total, unit="img")

            def reached(images: int, force: bool = False) -> None:
                if ranks.first:
                    log.reached(images, force=force)

            measuring = {
                "image_size": data.image_size,
                "batch_size": hardware.sample_batch,
                "seed": settings.seed,
                "on_bad_image": settings.encode.on_bad_image,
                "workers": hardware.workers,
                "peers": peers,
            }
            cache = work_root() / "reference"
            if reference_images is None:
                reference = load_statistics(fid.reference, network.dimension, network.digest)
            else:
                reference = measure_images(reference_images, network, cache, **measuring, on_images=reached)
            tested = self_test(reference, settings.seed) if ranks.first else {}
            like_generated = None
            if floor_images:
                like_generated = measure_images(
                    training,
                    network,
                    cache,
                    images=fid.floor_images,
                    **measuring,
                    on_images=lambda images: reached(real - floor_images + images),
                )

            def remember(entry):
                finished.append(entry)
                if ranks.first:
                    write_json(progress, finished)
                    reached(real + len(finished) * fid.images, force=True)

            pictures = _draw(on_device(decays[0]), decode, settings, training) if ranks.first else None
            sweep = evaluate_sweep(
                on_device,
                decode,
                network,
                reference,
                Samples(labels, settings.seed, hardware.sample_batch, ranks.device),
                ema_decays=decays,
                omegas=fid.omegas,
                metrics=fid.metrics,
                precision_recall_images=fid.precision_recall_images,
                work=work.folder,
                png=None if hardware.png_folder is None else Path(hardware.png_folder),
                run=work.folder.name,
                writers=hardware.workers,
                peers=peers,
                finished=tuple(finished),
                on_entry=remember,
                on_images=lambda images: reached(real + images),
            )
            vae.tell_recomputed()
            if ranks.first:
                measured = {
                    "best": best_entry(sweep),
                    "sweep": sweep,
                    "floor": tested["halves"],
                    "training": like_generated and like_generated.statistics.distance(reference.statistics),
                    "images": fid.images,
                    "classifier_accuracy_real": reference.statistics.accuracy,
                    "self_test": tested,
                    "protocol": _protocol(settings, network, reference, ranks.device.type)
                    | {
                        "floor_images": like_generated.statistics.count if like_generated else 0,
                        "vae_sha256": vae.digest,
                        "generator": made_by["how"] if made_by else None,
                        "generator_sha256": decides["generator"],
                    },
                }
                summary = sweep_summary(
                    sweep,
                    generator=str(args.generator),
                    images=fid.images,
                    batch_size=hardware.sample_batch,
                    workers=hardware.workers,
                    mode=fid.mode,
                    reference=fid.reference,
                    statistics=fid.reference if reference_images is None else reference.digest,
                    latent_scale_factor=vae.scaling_factor,
                )
                outputs.write(
                    measured,
                    summary,
                    pictures,
                    title=f"{args.generator.name}: {fid.images} images per omega",
                    settings=(made_by["decides"] if made_by else {})
                    | {"fid": decides["fid"], "data": decides["data"]},
                    training_log=args.generator / "logs.jsonl",
                )
                work.finish(outputs.metrics)
                print_report(outputs.metrics, outputs.beside_metrics, hardware.png_folder)
    return 0


def _require_classes(generator: Path, training: Dataset) -> None:
    """Refuse a generator whose labels mean other classes than those of the data, as far as it tells."""
    names = read_class_names(generator)
    if names is None or names == [str(label) for label in range(len(names))]:  # of latents without names
        return
    if difference := class_difference(str(generator / CLASSES_FILE), names, "the data", training.class_names):
        raise UserError(
            f"{difference}; take the data that it was trained on, or remove {CLASSES_FILE} if its labels are "
            "those of the data all the same"
        )


def _draw(generator: Generator, decode: ImageDecoder, settings: Settings, training: Dataset) -> Pictures:
    fid = settings.fid
    drawn = numpy_generator(settings.seed, "fid/pictures").permutation(settings.data.classes)
    classes = sorted(drawn[: fid.picture_classes].tolist())
    how = {
        "batch_size": settings.hardware.sample_batch,
        "device": generator.device,
        "names": [training.class_names[label] for label in classes],
    }
    return Pictures(
        samples=class_rows(
            generator, decode, classes, fid.picture_columns, fid.picture_omega, settings.seed, **how
        ),
        omega=omega_columns(generator, decode, classes, fid.omegas, settings.seed, **how),
        samples_omega=fid.picture_omega,
    )


def _protocol(
    settings: Settings, network: FeatureNetwork, reference: Reference, device: str
) -> dict[str, Any]:
    """How the numbers were made, as far as the settings and the reference decide it."""
    fid = settings.fid
    return {
        "image_size": settings.data.image_size,
        "labels": fid.labels,
        "rounding": fid.rounding,
        "features": fid.features,
        "features_sha256": network.digest,
        "published_weights": network.published,
        "mode": fid.mode,
        "reference": fid.reference,
        "reference_digest": reference.digest,
        "reference_images": reference.statistics.count,
        "precision_recall_images": fid.precision_recall_images,
        "seed": settings.seed,
        "device": device,
        "vae": settings.encode.vae,
        "vae_precision": fid.precision,
        "versions": {"drift": drift.__version__} | {name: version(name) for name in PACKAGES},
    }


def _read_provenance(folder: Path) -> dict | None:
    """What the settings file of a generator says; None for one that no stage of ours has made."""
    path = folder / SETTINGS_FILE
    return YAML(typ="safe", pure=True).load(path) if path.is_file() else None


if __name__ == "__main__":
    run_stage(main, memory="hardware.sample_batch or hardware.decode_batch")
