"""The pipeline in pixels, tiny: random crops for MAE and generator, and no autoencoder anywhere."""

import json

import numpy as np
import pytest
import yaml
from imports import ROOT
from PIL import Image
from project import TINY, Project, copy_project

from drift.data.latents import LatentStore
from drift.interop import DriftPipeline
from drift.models import Generator, LatentMAE
from drift.training.log import read_log

PIXELS = {
    "views": ["augmented"],
    "encode": {"autoencoder": "pixels", "crops": 2, "posterior": "mean"},
    "mae": {**TINY["mae"], "input_patch_size": 2},
    "drift": {
        **TINY["drift"], "view": "augmented", "patch": 4,
        "evaluate_every": 8, "evaluate_images": 70, "evaluate_omegas": [1.0],
    },
    "fid": {**TINY["fid"], "images": 70, "floor_images": 70, "omegas": [1.0]},
}  # fmt: skip


def check(folder, monkeypatch) -> None:
    """What the stages have left behind in `folder`, from which everything goes on without an autoencoder."""
    monkeypatch.chdir(folder)
    store = LatentStore("artifacts/latents/augmented")
    assert store.dtype == np.uint8 and store.shape == (2 * 1437, 3, 16, 16) and store.per_image == 2
    assert (store.meta["vae"], store.meta["view"]) == ("pixels", "augmented")
    mae, generator = (
        LatentMAE.from_pretrained("artifacts/mae"),
        Generator.from_pretrained("artifacts/generator"),
    )
    assert (mae.config["in_channels"], mae.config["input_patch_size"]) == (3, 2)
    assert (generator.config["in_channels"], generator.config["input_size"]) == (3, 16)
    decides = yaml.safe_load((folder / "artifacts/generator/settings.yaml").read_text())["decides"]
    assert (decides["vae"], decides["drift"]["view"]) == ("pixels", "augmented")
    assert json.loads((folder / "reports/protocol.json").read_text())["protocol"]["vae"] == "pixels"
    measured = [line["fid"] for line in read_log(folder / "artifacts/generator/logs.jsonl") if "fid" in line]
    at_the_end = json.loads((folder / "metrics/fid.json").read_text())["fid"]
    assert measured == [pytest.approx(at_the_end, rel=1e-9)]
    pipe = DriftPipeline.from_pretrained("artifacts/generator")
    made = pipe([3], omega=1.0, generator=pipe.sample_generators(0, [3]), rounding="nearest").images[0]
    stored = np.asarray(Image.open("png/gen_omega_1/000003.png"))  # of class 3, as classes take turns
    assert np.array_equal(np.asarray(made), stored)


def test_all_stages_run_in_pixels(tmp_path, monkeypatch):
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    monkeypatch.chdir(tmp_path)
    project = Project(tmp_path)
    (tmp_path / "params.yaml").write_bytes((ROOT / "presets/digits.yaml").read_bytes())
    project.settings(**{**TINY, **PIXELS, "hardware": {**TINY["hardware"], "png_folder": "png"}})
    latents = ("--latents", "artifacts/latents/augmented")
    project.main("encode", "--view", "augmented", "--out", latents[1])
    project.main("mae", *latents, "--out", "artifacts/mae")
    project.main("drift", *latents, "--mae", "artifacts/mae", "--out", "artifacts/generator")
    project.main("fid", "--generator", "artifacts/generator")
    check(tmp_path, monkeypatch)


@pytest.mark.slow
def test_dvc_runs_them_and_takes_the_view_from_the_settings(tmp_path, monkeypatch):
    project = copy_project(tmp_path / "project")
    project.settings(**PIXELS, hardware={"png_folder": "png"})
    assert project.repro() == ["encode@augmented", "mae", "drift", "fid"]
    check(project.folder, monkeypatch)
    project.settings(encode={"posterior": "sample", "precision": "bfloat16"})  # without effect
    said = project.run("dvc", "repro", "encode@augmented").stdout
    assert "encode: finished already" in said
    project.run(*("drift export ../out --license mit").replace("drift", "python -m drift.cli", 1).split())
    assert not (tmp_path / "out/vae").exists() and (tmp_path / "out/README.md").exists()
