"""The whole pipeline, tiny, under DVC: what runs, what does not run again, what can be shown."""

import csv
import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from imports import ROOT
from PIL import Image
from project import weights
from safetensors.numpy import load_file, save_file

from drift.models.base import WEIGHTS_FILE
from drift.runtime.torchvision import ensure_torchvision
from drift.training.log import read_log

DRIFT = ("--latents", "artifacts/latents/center", "--mae", "artifacts/mae")
MAE = ("--latents", "artifacts/latents/augmented")


def test_one_command_runs_all_stages(pipeline):
    ran = json.loads((pipeline.folder / "ran.json").read_text())
    assert ran[-2:] == ["drift", "fid"]
    assert sorted(ran[:-2]) == ["encode@augmented", "encode@center", "mae"]
    latents = np.load(pipeline.folder / "artifacts/latents/center/train_latents.npy", mmap_mode="r")
    assert latents.shape == (1437, 4, 4, 4) and latents.dtype == np.float16
    for stage, artifact in (("mae", "mae"), ("drift", "generator")):
        assert weights(pipeline.folder / "artifacts" / artifact)
        made_by = yaml.safe_load((pipeline.folder / "artifacts" / artifact / "settings.yaml").read_text())
        assert made_by["settings"][stage]["weight_decay"] == 0.01  # a default
    log = read_log(pipeline.folder / "artifacts/mae/logs.jsonl")
    assert [line["step"] for line in log if "loss" in line] == list(range(6))
    with (pipeline.folder / "plots/fid_sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["omega"]) for row in rows] == [1.0, 2.0]
    assert all(float(row["fid"]) > 0 and 0 <= float(row["accuracy"]) <= 1 for row in rows)
    for name in ("samples", "omega"):
        assert Image.open(pipeline.folder / f"plots/{name}.png").mode == "RGB"


def test_what_counts_runs_again_and_nothing_else(project):
    (project.folder / "README.md").write_text("changed")
    project.settings(hardware={"sample_batch": 7})
    assert project.repro() == []
    project.settings(coupling="row")
    assert project.repro() == ["drift", "fid"]


def test_drifting_in_the_latent_alone_trains_no_mae(project):
    """The Sinkhorn paper's default; the folder of the MAE then only says so."""
    project.settings(features=["latent"])
    arguments = ("--plot", "other/plot.csv")
    project.main("mae", *MAE, "--out", "other/none", *arguments, "--held-out-plot", "other/held_out.csv")
    assert json.loads((project.folder / "other/none/config.json").read_text()) == {"needed": False}
    assert (project.folder / "other/plot.csv").read_text().startswith("step,")
    latents = ("--latents", "artifacts/latents/center", "--mae", "other/none")
    project.main("drift", *latents, "--out", "other/generator", *arguments)
    log = read_log(project.folder / "other/generator/logs.jsonl")
    assert len(log) == 8 and all(line["feature_sets"].keys() == {"global"} for line in log)


def test_what_a_generator_started_from_is_told_and_makes_another_run(project):
    shutil.copytree("artifacts/generator", "start")
    project.settings(drift={"init_from": "start", "steps": 1, "warmup_steps": 0})
    weights_file = Path("start", WEIGHTS_FILE)
    said = []
    for _ in range(2):
        project.main("drift", *DRIFT, "--out", "more", "--plot", "other/plot.csv")
        said.append(yaml.safe_load(Path("more/settings.yaml").read_text())["decides"])
        assert said[-1]["init_from"][WEIGHTS_FILE] == hashlib.sha256(weights_file.read_bytes()).hexdigest()
        save_file({name: 2 * array for name, array in load_file(weights_file).items()}, weights_file)
    assert said[0]["drift"]["init_from"] == "start" and said[0] != said[1]
    assert len(list(Path(".work/drift").glob("*/work.json"))) == 3


@pytest.mark.slow
def test_drifting_in_features_of_latents_and_of_decoded_images(project, capsys):
    """Other weights in the same folder make another run."""
    ensure_torchvision()
    from transformers import ConvNextV2Config, ConvNextV2Model

    def train(out: str, seed: int) -> list[dict]:
        torch.manual_seed(seed)
        ConvNextV2Model(ConvNextV2Config(depths=[1] * 4, hidden_sizes=[4] * 4)).save_pretrained("convnext")
        project.main("drift", *DRIFT, "--out", out, "--plot", f"{out}.csv")
        return read_log(project.folder / out / "logs.jsonl")

    project.settings(
        features=["mae", {"encoder": "convnext", "source": "convnext"}],
        drift={"steps": 2, "warmup_steps": 0},
        hardware={"feature_batch": 16},
    )
    log = train("one", seed=0)
    made_by = yaml.safe_load(Path("one/settings.yaml").read_text())["settings"]
    assert made_by["features"][1] == {"encoder": "convnext", "source": "convnext", "revision": None}
    for line in log:
        sets = line["feature_sets"]
        assert {"global", "layer1", "convnext_stage_1", "convnext_global_std"} <= sets.keys()
        assert all(one["scale"] > 0 for one in sets.values())
    capsys.readouterr()
    assert train("two", seed=0) == log and "finished already" in capsys.readouterr().out
    assert train("three", seed=1)[0]["loss"] != log[0]["loss"]


@pytest.mark.slow
def test_a_changed_comment_trains_nothing_again(project):
    with open(project.folder / "drift/models/mae.py", "a") as file:
        file.write("# changed\n")
    said = project.run("dvc", "repro").stdout
    assert [f"{stage}: finished already" in said for stage in ("mae", "drift")] == [True, True]
    assert "Running stage 'fid'" not in said  # what it reads has the same bytes


@pytest.mark.slow
def test_changed_code_of_the_mae_reruns_what_uses_it(project):
    with open(project.folder / "drift/models/mae.py", "a") as file:
        file.write("CHANGED = True\n")
    assert project.repro() == ["mae", "drift", "fid"]


@pytest.mark.slow
def test_experiments_and_plots_can_be_shown(project):
    assert project.repro("exp", "run", "--name", "omegas", "--set-param", "fid.omegas=[1.0,1.5]") == ["fid"]
    project.repro("exp", "run", "--name", "with-row", "--set-param", "coupling=row")
    shown = project.run("dvc", "exp", "show", "--csv").stdout.splitlines()
    rows = {row["Experiment"] or row["rev"]: row for row in csv.DictReader(shown)}
    assert (rows["with-row"]["coupling"], rows["trunk"]["coupling"]) == ("row", "partial_two_sided")
    (fid,) = (float(value) for key, value in rows["with-row"].items() if key in ("fid", "best.fid"))
    assert fid > 0
    project.run("dvc", "plots", "show", "--out", "shown")
    page = (project.folder / "shown" / "index.html").read_text()
    of_field = ("drift_rms", "neighbours", "row_entropy", "unused_positives", "loss")
    for axis in ("fid", "kid", "inception_score", "precision, recall", *of_field):
        assert f'"title": "{axis}"' in page
    assert "plots_samples.png" in page


@pytest.mark.slow
def test_an_imported_encoder_is_the_output_of_mae_and_leaves_dvc_content(project):
    """And needs no augmented latents, which are the larger part of encode."""
    checkpoint = ROOT / "tests/golden/prior_mae/ckpt_final.pt"
    (project.folder / "artifacts/latents/augmented").rename(project.folder / "elsewhere")
    adopt = (sys.executable, "-m", "drift.cli", "adopt", "mae", str(checkpoint), "--to", "imported")
    said = project.run(*adopt).stdout
    assert "wrote params.yaml: views = ['center']" in said and "wrote dvc.lock" in said
    assert project.repro() == ["drift", "fid"]
    assert "up to date" in project.run("dvc", "status").stdout
    assert project.repro() == []
    imported = weights(project.folder / "imported")
    for name, tensor in weights(project.folder / "artifacts/mae").items():
        assert np.array_equal(tensor, imported[name])
    made_by = yaml.safe_load((project.folder / "artifacts/mae/settings.yaml").read_text())
    assert made_by["decides"]["mae"]["source"] == "imported"
    [line] = read_log(project.folder / "artifacts/mae/logs.jsonl")
    assert line["held_out"] > 0
    project.settings(mae={"source": "artifacts/mae"})
    done = project.run("dvc", "repro", "--single-item", "mae", check=False)
    assert "error: params.yaml: mae.source = 'artifacts/mae'" in done.stderr
    project.run("dvc", "checkout", "artifacts/mae")  # which DVC had emptied before
    assert weights(project.folder / "artifacts/mae").keys() == imported.keys()


def fid(project, out: str, *arguments: str, **environment: str) -> dict:
    """What the stage measures; everything that it writes lies in the folder `out`."""
    project.stage(
        "fid", "--generator", "artifacts/generator", "--out", f"{out}/fid.json", "--plots", out,
        "--report", f"{out}/index.html", *arguments, **environment,
    )  # fmt: skip
    flat = json.loads((project.folder / out / "fid.json").read_text())
    assert {"fid", "omega"} <= flat.keys() and len(flat) <= 10
    return json.loads((project.folder / out / "protocol.json").read_text())


@pytest.mark.slow
def test_fid_measures_the_same_images_for_any_processes_and_batches(project):
    """The samples to the pixel, and the numbers but for the order of sums."""
    project.settings(fid={"images": 90, "labels": "held_out", "omegas": [1.0]})
    numbers, pictures = [], []
    for processes, batch in ((1, 64), (2, 7)):
        out = f"fid-{processes}-{batch}"
        project.settings(hardware={"sample_batch": batch, "png_folder": f"{out}/png"})
        numbers.append(fid(project, out, "--nproc", str(processes), DRIFT_WORK_DIR=f"{out}/work"))
        listing = sorted((project.folder / out / "png").rglob("*.png"))
        pictures.append([np.asarray(Image.open(path)) for path in listing])
    assert len(pictures[0]) == 90
    assert all(np.array_equal(one, other) for one, other in zip(*pictures, strict=True))
    for entry, expected in zip(numbers[1]["sweep"], numbers[0]["sweep"], strict=True):
        for key in entry.keys() - {"dir"}:
            assert entry[key] == pytest.approx(expected[key], rel=1e-6), key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "arguments", "half"), [("mae", MAE, "float16"), ("drift", DRIFT, "bfloat16")]
)
def test_training_in_another_precision_is_another_run(project, stage, arguments, half):
    """Not bfloat16 for the MAE, whose gradients PyTorch's CPU convolutions make infinite on 1x1 maps."""
    assert "params.yaml" not in project.run("dvc", "status", stage).stdout
    project.settings(**{stage: {"precision": half}})
    assert "params.yaml" in project.run("dvc", "status", stage).stdout
    project.main(stage, *arguments, "--out", "half")
    assert len(list((project.folder / ".work" / stage).glob("*/work.json"))) == 2
