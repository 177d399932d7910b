"""The whole pipeline in the latents of a representation autoencoder, tiny, under DVC."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from project import copy_project, weights
from small_rae import small_rae

from drift.training.log import read_log

LATENT = {
    "features": ["latent"],
    "views": ["center"],
    "encode": {"autoencoder": {"kind": "rae", "source": "rae"}, "posterior": "sample", "mirror": True},
    "mae": {"view": "center"},
}


@pytest.mark.slow
def test_an_rae_and_its_latent_alone_go_through_all_stages(tmp_path):
    """No MAE is trained; the RAE decodes what fid measures, what is drawn and what is exported."""
    project = copy_project(tmp_path)
    small_rae(pixels=16).save_pretrained(tmp_path / "rae")
    project.settings(**LATENT)
    assert project.repro() == ["encode@center", "mae", "drift", "fid"]
    latents = np.load(tmp_path / "artifacts/latents/center/train_latents.npy", mmap_mode="r")
    assert latents.shape == (2 * 1437, 64, 2, 2) and latents.dtype == np.float16
    meta = json.loads((tmp_path / "artifacts/latents/center/train_meta.json").read_text())
    assert (meta["posterior"], meta["vae"], meta["scaling_factor"]) == ("mean", "rae", 1.0)
    assert json.loads((tmp_path / "artifacts/mae/config.json").read_text()) == {"needed": False}
    log = read_log(tmp_path / "artifacts/generator/logs.jsonl")
    assert len(log) == 8 and all(line["feature_sets"].keys() == {"global"} for line in log)
    assert weights(tmp_path / "artifacts/generator")
    assert json.loads((tmp_path / "metrics/fid.json").read_text())["fid"] > 0
    protocol = json.loads((tmp_path / "reports/protocol.json").read_text())["protocol"]
    assert (protocol["vae"], protocol["latent_scale_factor"]) == ("rae", 1.0)
    assert project.repro() == []
    drift = (sys.executable, "-m", "drift.cli")
    project.run(*drift, "export", "out", "--name", "x")
    for source in ("artifacts/generator", "out"):
        project.run(
            *drift, "sample", source, "--classes", "3", "--count", "2", "--files", "--out", f"of/{source}"
        )
    one, other = (
        Image.open(tmp_path / f"of/{source}/3/000001.png") for source in ("artifacts/generator", "out")
    )
    assert one.size == (16, 16) and np.array_equal(np.asarray(one), np.asarray(other))
    inspected = project.run(*drift, "inspect", "latents", "artifacts/latents/center", "--compare-images")
    assert "2874 of 64x2x2" in inspected.stdout
