"""A generator as a folder to hand on: `DriftPipeline` with a model card."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

import drift
from drift.evaluation.report import format_report
from drift.interop.measured import in_words, metric_arguments, shown
from drift.interop.onnx import DECODER_FILE, GENERATOR_FILE, check_onnx, export_onnx
from drift.interop.pipeline import INDEX_FILE, DriftPipeline, autoencoder_kind, made_from
from drift.models.base import model_files
from drift.runtime.errors import UserError
from drift.runtime.files import check_output, replace_folder, sha256
from drift.runtime.work import SETTINGS_FILE

PICTURE_FILE = "samples.png"
_TASK = "unconditional-image-generation"


@dataclass(frozen=True)
class Card:
    """What the model card says besides what the generator's folder holds."""

    name: str
    license: str = "other"
    """As the Hugging Face hub names it."""
    dataset: str | None = None
    """The hub's id of what it was trained on."""
    metrics: Path | None = None
    """The `reports/protocol.json` of this generator."""
    picture: Path | None = None
    """A PNG; left out if there is none."""
    hub_id: str | None = None
    """Where it will be on the hub, for the program in the card; without one, that loads a folder `name`."""


def export_pipeline(
    source: str | Path,
    destination: str | Path,
    card: Card,
    *,
    weights: str = "model",
    vae: str | None = None,
    include_vae: bool = True,
    onnx: bool = False,
    force: bool = False,
) -> list[tuple[str, int]]:
    """Write the generator in `source` as a folder for `DriftPipeline.from_pretrained`, with a model card.

    `source` is a folder of the drift stage or of a pipeline, `weights` names a copy of its weights, and `vae`
    is the folder or hub id of another VAE than it names. Without `include_vae` the VAE is only named, by its
    hub id. `onnx` adds both networks in ONNX. `destination` appears whole or not at all; `force` replaces
    what is there.

    Returns the files and their sizes in bytes. Raises `UserError` if something is missing or damaged, if the
    metrics belong to another generator, or if `destination` exists.
    """
    source, destination = Path(source), Path(destination)
    if destination.exists() and not force:
        raise UserError(f"{destination}: exists already; name another folder, or add --force")
    check_output(destination)
    if onnx:
        check_onnx()
    measured = None if card.metrics is None else _read_metrics(card.metrics, source, weights)
    pipeline = DriftPipeline.from_pretrained(source, vae=vae, variant=weights)
    vae_id = (pipeline.vae_reference or {}).get("id")
    if not include_vae and not pipeline.makes_pixels and vae_id and Path(vae_id).is_dir():
        raise UserError(
            f"the VAE {vae_id} is a local folder, which others do not have; export it too (without "
            "--vae-by-reference), or name a hub id (--vae)"
        )
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as folder:
        fresh = Path(folder, "draft")
        pipeline.save_pretrained(fresh, include_vae=include_vae)
        for file, name in ((card.picture, PICTURE_FILE), (source / SETTINGS_FILE, SETTINGS_FILE)):
            if file is not None and file.is_file():
                shutil.copyfile(file, fresh / name)
        if onnx:
            export_onnx(pipeline, fresh, include_decoder=include_vae)
        _write_card(fresh, card, pipeline, measured, weights)
        replace_folder(fresh, destination)
    paths = sorted(path for path in destination.rglob("*") if path.is_file())
    return [(path.relative_to(destination).as_posix(), path.stat().st_size) for path in paths]


def _write_card(
    folder: Path, card: Card, pipeline: DriftPipeline, measured: dict[str, Any] | None, weights: str
) -> None:
    best = measured["best"] if measured else {}
    data = card.dataset or "other"
    results = [
        EvalResult(
            _TASK,
            dataset_type=data,
            dataset_name=data,
            metric_type=key,
            metric_name=name,
            metric_value=round(best[key], 4),
            metric_args=metric_arguments(measured),
        )
        for key, name in (("fid", "FID"), ("inception_score", "Inception Score"))
        if measured and key in best
    ]
    head = ModelCardData(
        license=card.license,
        library_name="drift",
        pipeline_tag=_TASK,
        tags=["drifting-model", "one-step", "class-conditional", "image-generation"],
        datasets=[card.dataset] if card.dataset else None,
        eval_results=results or None,
        model_name=card.name,
    )
    vae = (pipeline.vae_reference or {}).get("id", "not named")
    if pipeline.makes_pixels:
        vae = "none: the generator makes pixels"
    kind = "VAE" if pipeline.vae is None else autoencoder_kind(pipeline.vae).called
    million = sum(parameter.numel() for parameter in pipeline.generator.parameters()) / 1e6
    config = {key: value for key, value in pipeline.generator.config.items() if not key.startswith("_")}
    settings = _flat(made_from(folder))
    ModelCard.from_template(
        head,
        template_path=str(Path(__file__).with_name("card.md.j2")),
        name=card.name,
        source=card.hub_id or card.name,
        version=drift.__version__,
        picture=PICTURE_FILE if (folder / PICTURE_FILE).exists() else None,
        omega=f"{best.get('omega', 1):g}",
        model=_table({"parameters": f"{million:.1f} million", "weights": weights, kind: vae, **config}),
        report=format_report(measured) if measured else "None are given.",
        words=in_words(measured) if measured else "",
        protocol=_table({**measured["protocol"], "generator_folder": None}) if measured else "",
        onnx=(folder / GENERATOR_FILE).exists(),
        decoder=(folder / DECODER_FILE).exists(),
        config=config,
        settings=_table(settings) if settings else "Not recorded.",
    ).save(folder / "README.md")


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {key} | {shown(value)} |" for key, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines])


def _flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return flat


def _read_metrics(path: Path, source: Path, weights: str) -> dict[str, Any]:
    """The numbers of the stage fid, which must be of the generator in `source`."""
    if not source.is_dir():
        raise UserError(f"{source}: no local folder, so {path} may be of another; add --no-metrics")
    try:
        measured = json.loads(path.read_text(encoding="utf-8"))
        digests = set(measured["protocol"]["generator_sha256"])
        float(measured["best"]["fid"])
        in_words(measured)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path}: missing, damaged, or no protocol.json of the stage fid; run fid, or add --no-metrics"
        ) from None
    folder = source / "generator" if (source / INDEX_FILE).is_file() else source
    if not set(map(sha256, model_files(folder, weights))) <= digests:
        raise UserError(
            f"{path}: belongs to another generator than {weights} in {folder}; run fid, or add --no-metrics"
        )
    return measured
