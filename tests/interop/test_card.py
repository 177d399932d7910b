"""A generator exported with a model card."""

import json
import os
import subprocess
import sys

from complaints import complaint
from huggingface_hub import ModelCard
from imports import ROOT
from PIL import Image
from small_generator import write_generator

from drift.interop.card import Card, export_pipeline
from drift.runtime.files import sha256


def metrics_of(folder, file):
    entry = {"omega": 2.0, "ema_decay": None, "fid": 3.14159, "inception_score": 9.5}
    protocol = {"features": "inception", "reference": "train", "reference_images": 50, "floor_images": 9}
    protocol |= {"mode": "clean", "labels": "balanced", "rounding": "down", "seed": 4}
    protocol["generator_folder"] = "/home/somebody/generator"
    digests = [sha256(folder / name) for name in ("config.json", "diffusion_pytorch_model.safetensors")]
    result = {
        "best": entry, "sweep": [entry], "floor": 1.0, "training": None, "images": 100,
        "classifier_accuracy_real": None, "protocol": protocol | {"generator_sha256": digests},
    }  # fmt: skip
    file.write_text(json.dumps(result))
    return file


def test_the_card_has_what_was_measured_and_its_program_runs(generator_folder, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    metrics = metrics_of(generator_folder, tmp_path / "fid.json")
    card = Card("fish", license="mit", dataset="a/b", metrics=metrics, picture=tmp_path / "picture.png")
    files = dict(export_pipeline(generator_folder, tmp_path / "out", card))
    assert files.keys() >= {"README.md", "samples.png", "model_index.json", "settings.yaml"}
    read = ModelCard.load(tmp_path / "out/README.md")
    assert (read.data.license, read.data.datasets, read.data.library_name) == ("mit", ["a/b"], "drift")
    assert {(each.metric_type, each.metric_value) for each in read.data.eval_results} == {
        ("fid", 3.1416),
        ("inception_score", 9.5),
    }
    measured_by = {"omega": 2.0, "images": 100, "features": "inception", "mode": "clean", "seed": 4}
    measured_by |= {"reference": "train", "reference_images": 50, "labels": "balanced", "rounding": "down"}
    assert all(each.metric_args == measured_by for each in read.data.eval_results)
    assert (
        "FID 3.14 is the Fréchet distance between 100 samples, at omega 2, and 50 images of `train`, in "
        "features of Inception-v3 (clean-fid, mode clean). Labels of the samples are balanced, their seed is "
        "4, and pixels are cut off to 8 bits.\n"
    ) in read.text
    assert "/home/somebody" not in read.text
    shown = ["# fish", "| 2 (best) | 3.14 | 9.50 |", "| drift.steps | 3 |", "| mode | clean |", "omega=2,"]
    assert all(line in read.text for line in shown) and "](samples.png)" in read.text
    program = read.text.split("```python\n")[1].split("```")[0]
    program = program.replace('"cuda"', '"cpu"').replace('"fish"', '"out"')
    subprocess.run(
        [sys.executable, "-c", program + "assert image.size == (16, 16)"],
        cwd=tmp_path,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_metrics_of_another_generator_do_not_get_into_a_card(generator_folder, tmp_path):
    def refused(source, metrics):
        card = Card("x", metrics=metrics)
        told = complaint(lambda: export_pipeline(source, tmp_path / "out", card))
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
        return told

    other = metrics_of(write_generator(tmp_path / "other", seed=1), tmp_path / "other.json")
    own = metrics_of(generator_folder, tmp_path / "own.json")
    assert f"{other}: belongs to another generator than model in" in refused(generator_folder, other)
    export_pipeline(generator_folder, tmp_path / "pipeline", Card("x"))
    assert "another generator" in refused(tmp_path / "pipeline", other)
    assert "no local folder" in refused("someone/generator", own)
    export_pipeline(tmp_path / "pipeline", tmp_path / "again", Card("x", metrics=own))
    assert "3.14" in (tmp_path / "again/README.md").read_text()
    other.write_text("{}")
    assert f"{other}: missing, damaged" in refused(generator_folder, other)


def test_export_replaces_nothing_unasked_and_names_no_private_vae(generator_folder, tmp_path):
    (tmp_path / "out").mkdir()
    assert "--force" in complaint(lambda: export_pipeline(generator_folder, tmp_path / "out", Card("x")))
    told = complaint(
        lambda: export_pipeline(generator_folder, tmp_path / "new", Card("x"), include_vae=False)
    )
    assert "local folder" in told
    export_pipeline(generator_folder, tmp_path / "out", Card("x"), force=True)
    assert "None are given" in (tmp_path / "out/README.md").read_text()
    index = json.loads((tmp_path / "out/model_index.json").read_text()) | {"vae_reference": None}
    (tmp_path / "out/model_index.json").write_text(json.dumps(index))  # as the first version wrote it
    told = complaint(
        lambda: export_pipeline(tmp_path / "out", tmp_path / "new", Card("x"), include_vae=False)
    )
    assert "is not known" in told
