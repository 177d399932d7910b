"""A generator as a folder to hand on: `DriftPipeline` with a model card."""

import json
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

import drift
from drift.evaluation.report import format_report
from drift.interop.pipeline import INDEX_FILE, DriftPipeline
from drift.models.base import model_files
from drift.runtime.errors import UserError
from drift.runtime.files import check_output, replace_folder, sha256
from drift.runtime.work import SETTINGS_FILE, settings_in_force
from drift.runtime.yaml_files import read_yaml

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


def export_pipeline(
    source: str | Path,
    destination: str | Path,
    card: Card,
    *,
    weights: str = "model",
    vae: str | None = None,
    include_vae: bool = True,
    force: bool = False,
) -> list[tuple[str, int]]:
    """Write the generator in `source` as a folder for `DriftPipeline.from_pretrained`, with a model card.

    `source` is a folder of the drift stage or of a pipeline, `weights` a copy of its weights, and `vae` the
    folder or hub id of another VAE than it names. Without `include_vae` the VAE is only named, by its hub id.
    `destination` is made whole or not at all; with `force` it replaces what is there.

    Returns the files and their sizes in bytes. Raises `UserError` if something is missing or damaged, if the
    metrics are those of another generator, or if `destination` exists.
    """
    source, destination = Path(source), Path(destination)
    if destination.exists() and not force:
        raise UserError(f"{destination}: is there already; name another folder, or add --force")
    check_output(destination)
    measured = None if card.metrics is None else _read_metrics(card.metrics, source, weights)
    pipeline = DriftPipeline.from_pretrained(source, vae=vae, variant=weights)
    if not include_vae and Path(pipeline.vae_reference["id"]).is_dir():
        raise UserError(
            f"the VAE {pipeline.vae_reference['id']} is a local folder, which others do not have; export it "
            "too (without --vae-by-reference), or name a hub id (--vae)"
        )
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as folder:
        fresh = Path(folder, "draft")
        pipeline.save_pretrained(fresh, include_vae=include_vae)
        for file, name in ((card.picture, PICTURE_FILE), (source / SETTINGS_FILE, SETTINGS_FILE)):
            if file is not None and file.is_file():
                shutil.copyfile(file, fresh / name)
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
        EvalResult(_TASK, data, data, metric_type=key, metric_name=name, metric_value=round(best[key], 4))
        for key, name in (("fid", "FID"), ("inception_score", "Inception Score"))
        if key in best
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
    million = sum(parameter.numel() for parameter in pipeline.generator.parameters()) / 1e6
    config = {key: value for key, value in pipeline.generator.config.items() if not key.startswith("_")}
    made_by = folder / SETTINGS_FILE
    settings = settings_in_force(read_yaml(made_by, "get it again (dvc pull)")) if made_by.exists() else {}
    ModelCard.from_template(
        head,
        template_path=str(Path(__file__).with_name("card.md.j2")),
        name=card.name,
        version=drift.__version__,
        picture=PICTURE_FILE if (folder / PICTURE_FILE).exists() else None,
        omega=f"{best.get('omega', 1):g}",
        model=_table(
            {"parameters": f"{million:.1f} million", "weights": weights, "VAE": vae, **config}.items()
        ),
        report=format_report(measured) if measured else "None are given.",
        protocol=_table(measured["protocol"].items()) if measured else "",
        settings=_table(_flat(settings)) if settings else "Not recorded.",
    ).save(folder / "README.md")


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    rows = (f"| {key} | {value} |" for key, value in rows if value is not None)
    return "\n".join(["| | |", "|---|---|", *rows])


def _flat(values: dict[str, Any], path: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        yield from _flat(value, f"{path}{key}.") if isinstance(value, dict) else [(path + key, value)]


def _read_metrics(path: Path, source: Path, weights: str) -> dict[str, Any]:
    """The numbers of the stage fid, which must be of the generator in `source`."""
    if not source.is_dir():
        raise UserError(f"{source}: no local folder, so {path} may be of another; add --no-metrics")
    try:
        measured = json.loads(path.read_text(encoding="utf-8"))
        digests = set(measured["protocol"]["generator_sha256"])
        measured["best"]["fid"] + 0  # a number
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path}: missing, damaged, or no protocol.json of the stage fid; run fid, or add --no-metrics"
        ) from None
    folder = source / "generator" if (source / INDEX_FILE).is_file() else source
    if not set(map(sha256, model_files(folder, weights))) <= digests:
        raise UserError(
            f"{path}: these are the metrics of another generator than {weights} in {folder}; run fid on this "
            "one, or add --no-metrics"
        )
    return measured
