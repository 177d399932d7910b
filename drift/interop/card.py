"""A generator as a folder to hand on: `DriftPipeline` with a model card."""

import io
import json
import shutil
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from ruamel.yaml import YAML

import drift
from drift.evaluation.report import format_report
from drift.interop.pipeline import INDEX_FILE, DriftPipeline
from drift.models.base import model_files
from drift.runtime.errors import UserError
from drift.runtime.files import check_output, replace_folder, sha256
from drift.runtime.work import SETTINGS_FILE

CARD_FILE = "README.md"
PICTURE_FILE = "samples.png"
_HUB_METRICS = (("fid", "FID"), ("inception_score", "Inception Score"))


def export_pipeline(
    source: str | Path,
    destination: str | Path,
    *,
    weights: str = "model",
    vae: str | None = None,
    include_vae: bool = True,
    metrics: Path | None = None,
    picture: Path | None = None,
    name: str,
    license: str = "other",
    dataset: str | None = None,
    force: bool = False,
) -> list[tuple[str, int]]:
    """Write the generator in `source` as a folder for `DriftPipeline.from_pretrained`, with a model card.

    Args:
        source: folder of the drift stage (or of a pipeline).
        destination: made whole or not at all; with `force` it replaces what is there.
        weights: which copy of the generator's weights.
        vae: folder or hub id of the VAE, if not the one that the source names.
        include_vae: write the VAE too, or only name it, which needs a hub id.
        metrics: the `reports/protocol.json` of this generator; None leaves the numbers out.
        picture: a PNG for the card; left out if there is none.
        name, license, dataset: for the card; the last two as the Hugging Face hub names them.

    Returns the files and their sizes in bytes. Raises `UserError` if something is missing or damaged, if the
    metrics are those of another generator, or if `destination` exists.
    """
    source, destination = Path(source), Path(destination)
    if destination.exists() and not force:
        raise UserError(f"{destination}: is there already; name another folder, or add --force")
    check_output(destination)
    measured = None if metrics is None else _read_metrics(metrics, source, weights)
    pipeline = DriftPipeline.from_pretrained(source, vae=vae, variant=weights)
    reference = pipeline.vae_reference
    if not include_vae and Path(reference["id"]).is_dir():
        raise UserError(
            f"the VAE {reference['id']} is a local folder, which others do not have; export it too (without "
            "--vae-by-reference), or name a hub id (--vae)"
        )
    fresh = destination.with_name(f".{destination.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        pipeline.save_pretrained(fresh, include_vae=include_vae)
        has_picture = picture is not None and picture.is_file()
        if has_picture:
            shutil.copyfile(picture, fresh / PICTURE_FILE)
        if (source / SETTINGS_FILE).exists():
            shutil.copyfile(source / SETTINGS_FILE, fresh / SETTINGS_FILE)
        card = model_card(
            pipeline,
            measured,
            name=name,
            weights=weights,
            settings=_read_settings(source / SETTINGS_FILE),
            license=license,
            dataset=dataset,
            picture=PICTURE_FILE if has_picture else None,
            vae=reference and reference["id"],
            vae_included=include_vae,
        )
        (fresh / CARD_FILE).write_text(card, encoding="utf-8")
        replace_folder(fresh, destination)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    paths = sorted(path for path in destination.rglob("*") if path.is_file())
    return [(path.relative_to(destination).as_posix(), path.stat().st_size) for path in paths]


def model_card(
    pipeline: DriftPipeline,
    measured: dict[str, Any] | None,
    *,
    name: str,
    weights: str,
    settings: dict[str, Any],
    license: str,
    dataset: str | None,
    picture: str | None,
    vae: str | None,
    vae_included: bool,
) -> str:
    """The card as Markdown with the fields that the Hugging Face hub reads at its head."""
    head: dict[str, Any] = {
        "license": license,
        "library_name": "drift",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["drifting-model", "one-step", "class-conditional", "image-generation"],
    }
    if dataset:
        head["datasets"] = [dataset]
    best = measured and measured["best"]
    if best:
        head["model-index"] = [
            {
                "name": name,
                "results": [
                    {
                        "task": {"type": "unconditional-image-generation"},
                        "dataset": {"name": dataset or "see below", "type": dataset or "other"},
                        "metrics": [
                            {"type": key, "name": title, "value": round(best[key], 4)}
                            for key, title in _HUB_METRICS
                            if key in best
                        ],
                    }
                ],
            }
        ]
    yaml = YAML()
    yaml.default_flow_style = False
    front = io.StringIO()
    yaml.dump(head, front)
    template = resources(drift).joinpath("model_card.md.j2").read_text(encoding="utf-8")
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(template).render(
        front=front.getvalue(),
        name=name,
        config=pipeline.generator.config,
        parameters=sum(parameter.numel() for parameter in pipeline.generator.parameters()),
        classes=len(pipeline.id2label),
        example=next(iter(pipeline.id2label), 0),
        weights=weights,
        measured=measured,
        omega=best["omega"] if best else 1.0,
        report=measured and format_report(measured),
        settings=dict(_flat(settings)),
        picture=picture,
        vae=vae,
        included=vae_included,
        version=drift.__version__,
    )


def _flat(values: dict[str, Any], path: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += _flat(value, f"{path}{key}.")
        else:
            found.append((path + key, value))
    return found


def _read_settings(path: Path) -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(path)["decides"] if path.exists() else {}


def _read_metrics(path: Path, source: Path, weights: str) -> dict[str, Any]:
    try:
        measured = json.loads(path.read_text(encoding="utf-8"))
        of = measured["protocol"]["generator_sha256"]
        assert measured["best"]["fid"] is not None
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; run fid, or add --no-metrics") from None
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise UserError(
            f"{path}: damaged, or no protocol.json of the stage fid; run fid again, or add --no-metrics"
        ) from None
    folder = source / "generator" if (source / INDEX_FILE).is_file() else source
    if not source.is_dir():
        raise UserError(f"{source}: no local folder, so {path} cannot be told to be of it; add --no-metrics")
    if not set(map(sha256, model_files(folder, weights))) <= set(of):
        raise UserError(
            f"{path}: these are the metrics of another generator than {weights} in {folder}; run fid on this "
            "one, or add --no-metrics"
        )
    return measured
