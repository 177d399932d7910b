"""The whole pipeline, tiny: what runs, what does not run again, what goes on after a kill.

The tests share one project and run in the order of this file.
"""

import csv
import json
import os
import shutil
import signal
import sys
import time

import numpy as np
import psutil
import pytest
from imports import ROOT
from PIL import Image
from ruamel.yaml import YAML
from safetensors.numpy import load_file

from drift.training.log import read_log

MAE = (
    "--latents",
    "artifacts/latents/augmented",
    "--plot",
    "other/mae.csv",
    "--held-out-plot",
    "other/held.csv",
)
DRIFT = ("--latents", "artifacts/latents/center", "--mae", "artifacts/mae", "--plot", "other/plot.csv")


def test_one_command_runs_all_stages(finished):
    assert finished.first_run[-3:] == ["mae", "drift", "fid"]
    assert sorted(finished.first_run[:-3]) == ["encode@augmented", "encode@center"]
    latents = np.load(finished.folder / "artifacts/latents/center/train_latents.npy", mmap_mode="r")
    assert latents.shape == (1437, 4, 4, 4) and latents.dtype == np.float16
    for artifact, more in (("mae", set()), ("generator", {"classes.json"})):
        files = {path.name for path in (finished.folder / "artifacts" / artifact).iterdir()}
        assert (
            files
            == {"config.json", "diffusion_pytorch_model.safetensors", "settings.yaml", "logs.jsonl"} | more
        )
    result = json.loads((finished.folder / "metrics/fid.json").read_text())
    assert [entry["omega"] for entry in result["sweep"]] == [1.0, 2.0]
    assert result["best"] in result["sweep"] and result["floor"] > 0
    assert all(0 <= entry["accuracy"] <= 1 for entry in result["sweep"])
    for name in ("samples", "omega"):
        assert Image.open(finished.folder / f"plots/{name}.png").mode == "RGB"
    assert f"{result['best']['fid']:.2f}" in (finished.folder / "reports/index.html").read_text()
    summary = json.loads((finished.folder / "plots/fid_sweep.json").read_text())
    assert [entry["fid"] for entry in summary["results"]] == [entry["fid"] for entry in result["sweep"]]
    log = (finished.folder / "artifacts/mae/logs.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in log]
    assert steps == list(range(6))


def test_plots_and_experiments_can_be_shown(finished):
    finished.run("dvc", "plots", "show", "--out", "shown")
    page = (finished.folder / "shown" / "index.html").read_text()
    for axis in (
        "fid",
        "kid",
        "inception_score",
        "precision, recall",
        "ema_decay",
        "accuracy",
        "drift_rms",
        "neighbours",
        "loss",
        "reconstruction",
    ):
        assert f'"title": "{axis}"' in page
    assert "plots_samples.png" in page


def test_nothing_runs_again(finished):
    assert finished.repro() == []
    (finished.folder / "README.md").write_text("changed")
    assert finished.repro() == []


def test_hardware_reruns_nothing(finished):
    finished.settings(hardware={"sample_batch": 7})
    assert finished.repro() == []


def test_a_setting_of_fid_reruns_fid_alone(finished):
    finished.settings(fid={"omegas": [1.0, 1.5, 2.0]})
    assert finished.repro() == ["fid"]
    finished.commit()


def test_an_experiment_with_another_coupling_reruns_drift_and_fid(finished):
    assert finished.repro("exp", "run", "--name", "with-row", "--set-param", "coupling=row") == [
        "drift",
        "fid",
    ]
    shown = finished.run("dvc", "exp", "show", "--csv").stdout.splitlines()
    rows = {row["Experiment"] or row["rev"]: row for row in csv.DictReader(shown)}
    assert rows["with-row"]["coupling"] == "row"
    assert rows["trunk"]["coupling"] == "partial_two_sided"
    assert float(rows["with-row"]["best.fid"]) > 0
    finished.settings(coupling="partial_two_sided")
    assert finished.repro() == []  # all of it is in the run cache


def test_a_changed_comment_trains_nothing_again(finished):
    with open(finished.folder / "drift/models/mae.py", "a") as file:
        file.write("# changed\n")
    said = finished.run("dvc", "repro").stdout
    assert [f"{stage}: finished already" in said for stage in ("mae", "drift")] == [True, True]
    assert "Running stage 'fid'" not in said  # what it reads has the same bytes


def test_changed_code_of_the_mae_reruns_what_uses_it(finished):
    with open(finished.folder / "drift/models/mae.py", "a") as file:
        file.write("CHANGED = True\n")
    assert finished.repro() == ["mae", "drift", "fid"]


def weights(project, folder):
    return load_file(project.folder / folder / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("stage", ["mae", "drift"])
def test_two_processes_compute_what_one_does(finished, stage):
    """To the bit, in equal parts; `dvc repro` took all at once, which agrees until rounding shows."""
    finished.settings(hardware={"mae_micro_batch": 8, "classes_per_pass": 5})
    arguments = DRIFT if stage == "drift" else MAE
    for processes in ("1", "2"):
        out = f"other/{stage}-{processes}"
        finished.stage(stage, *arguments, "--out", out, "--nproc", processes, "--fresh")
    finished.settings(hardware={"mae_micro_batch": None, "classes_per_pass": None})
    one, two = weights(finished, f"other/{stage}-1"), weights(finished, f"other/{stage}-2")
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)
    whole = finished.folder / "artifacts" / {"mae": "mae", "drift": "generator"}[stage]
    for folder in (finished.folder / f"other/{stage}-1", finished.folder / f"other/{stage}-2"):
        for line, expected in zip(
            read_log(folder / "logs.jsonl")[:2], read_log(whole / "logs.jsonl")[:2], strict=True
        ):
            for name in line.keys() - {"time", "steps_per_s", "feature_sets", "unit"}:
                assert line[name] == pytest.approx(expected[name], rel=1e-5), name


def test_an_imported_encoder_is_the_output_of_mae_and_leaves_dvc_content(finished):
    """And needs no augmented latents, which are the larger part of encode."""
    checkpoint = ROOT / "tests/golden/prior_mae/ckpt_final.pt"
    augmented = finished.folder / "artifacts/latents/augmented"
    augmented.rename(augmented.with_name("elsewhere"))
    done = finished.run(
        sys.executable, "-m", "drift.cli", "adopt", "mae", str(checkpoint), "--to", "other/prior"
    )
    assert "wrote params.yaml: views = ['center']" in done.stdout and "wrote dvc.lock" in done.stdout
    assert finished.repro() == ["drift", "fid"]
    assert "up to date" in finished.run("dvc", "status").stdout
    assert finished.repro() == []
    augmented.with_name("elsewhere").rename(augmented)
    weights_of = {name: weights(finished, name) for name in ("other/prior", "artifacts/mae")}
    for name, tensor in weights_of["other/prior"].items():
        assert np.array_equal(weights_of["artifacts/mae"][name], tensor)
    made_by = YAML(typ="safe", pure=True).load(finished.folder / "artifacts/mae/settings.yaml")
    assert made_by["decides"]["mae"]["source"] == "other/prior"
    [line] = read_log(finished.folder / "artifacts/mae/logs.jsonl")
    assert line["held_out"] > 0
    finished.settings(mae={"source": "artifacts/mae"})
    said = finished.run("dvc", "repro", "--single-item", "mae", check=False).stderr
    assert "error: params.yaml: mae.source = 'artifacts/mae': allowed: outside of artifacts/mae" in said
    finished.run("dvc", "checkout", "artifacts/mae")  # which DVC had emptied before
    assert weights(finished, "artifacts/mae").keys() == weights_of["other/prior"].keys()
    finished.settings(mae={"source": "other/nobody"})
    center = ("mae", "--latents", "artifacts/latents/center", "--out", "other/x")
    refused(finished.stage(*center, check=False), "other/nobody")
    finished.settings(views=["center", "augmented"], mae={"source": None, "view": "augmented"})
    assert finished.repro() == []  # all of it is in the run cache


def test_fid_measures_the_same_images_for_any_processes_and_batches(finished):
    """Reference and samples to the pixel, and the numbers but for the order of sums."""
    finished.settings(fid={"images": 90, "labels": "held_out"})
    results = []
    for processes, batch in ((1, 64), (1, 7), (2, 64), (2, 7)):
        name = f"other/fid-{processes}-{batch}"
        finished.settings(hardware={"sample_batch": batch, "png_folder": f"{name}/png"})
        command = [sys.executable, "-m", "stages.fid", "--generator", "artifacts/generator"]
        command += ["--out", f"{name}/fid.json", "--plots", name, "--report", f"{name}/index.html"]
        finished.run(*command, "--nproc", str(processes), DRIFT_WORK_DIR=f"{name}/work")
        results.append(finished.folder / name)
    for omega in ("1", "2"):
        files = [sorted((folder / f"png/gen_omega_{omega}").glob("*.png")) for folder in results]
        assert [len(listing) for listing in files] == [90] * 4
        for same in zip(*files, strict=True):
            pixels = [np.asarray(Image.open(path)) for path in same]
            assert all(np.array_equal(other, pixels[0]) for other in pixels)
    numbers = [json.loads((folder / "fid.json").read_text()) for folder in results]
    whole, *others = numbers
    assert whole["protocol"]["labels"] == "held_out"
    for other in others:
        for entry, expected in zip(other["sweep"], whole["sweep"], strict=True):
            for key in entry.keys() - {"dir"}:
                assert entry[key] == pytest.approx(expected[key], rel=1e-6), key
        for key in ("floor", "training", "classifier_accuracy_real"):
            assert other[key] == pytest.approx(whole[key], rel=1e-6)
    assert (results[0] / "samples.png").read_bytes() == (results[3] / "samples.png").read_bytes()
    finished.settings(
        fid={"images": 80, "labels": "balanced"}, hardware={"sample_batch": 128, "png_folder": None}
    )


DETERMINISTIC = """
import importlib, sys, drift.runtime.processes
drift.runtime.processes.make_deterministic = lambda: sys.exit("asked for")
importlib.import_module(f"stages.{sys.argv[1]}").main(sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("stage", "arguments"),
    [
        ("encode", ("--view", "center", "--out", "other/latents")),
        ("mae", (*MAE, "--out", "other/mae")),
        ("drift", (*DRIFT, "--out", "other/generator")),
        ("fid", ("--generator", "artifacts/generator", "--out", "other/fid.json", "--plots", "other")),
    ],
)
def test_every_stage_asks_for_deterministic_algorithms_by_setting(finished, stage, arguments):
    finished.settings(hardware={"deterministic": True})
    done = finished.run(sys.executable, "-c", DETERMINISTIC, stage, *arguments, check=False)
    assert done.stderr == "asked for\n"
    finished.settings(hardware={"deterministic": False})


# Not bfloat16 for the MAE: PyTorch's gradients of its convolutions on a CPU are not finite on maps of 1x1
@pytest.mark.parametrize(
    ("stage", "arguments", "half"), [("mae", MAE, "float16"), ("drift", DRIFT, "bfloat16")]
)
def test_training_in_another_precision_is_another_run(finished, stage, arguments, half):
    decides = {}
    for precision in ("float32", half):
        finished.settings(**{stage: {"precision": precision}})
        command = [sys.executable, "-m", f"stages.{stage}", *arguments, "--out", f"other/{precision}"]
        finished.run(*command, DRIFT_WORK_DIR=f"other/{stage}-{precision}")
        (note,) = (finished.folder / f"other/{stage}-{precision}" / stage).glob("*/work.json")
        decides[precision] = json.loads(note.read_text())["decides"]
        changed = finished.run("dvc", "status", stage).stdout
        assert ("params.yaml" in changed) == (precision == half), changed
    exact = decides["float32"]
    assert exact | {stage: exact[stage] | {"precision": half}} == decides[half]
    finished.settings(**{stage: {"precision": "float32"}})


def test_fid_records_the_precision_of_the_vae_and_mixes_none(finished):
    decides = {}
    for precision in ("float32", "bfloat16"):
        name = f"other/vae-{precision}"
        finished.settings(fid={"omegas": [1.0], "metrics": [], "precision": precision})
        command = [sys.executable, "-m", "stages.fid", "--generator", "artifacts/generator"]
        command += ["--out", f"{name}/fid.json", "--plots", name, "--report", f"{name}/index.html"]
        finished.run(*command, DRIFT_WORK_DIR=f"{name}/work")
        result = json.loads((finished.folder / name / "fid.json").read_text())
        assert result["protocol"]["vae_precision"] == precision
        (note,) = (finished.folder / name / "work/fid").glob("*/work.json")
        decides[precision] = json.loads(note.read_text())["decides"]
    exact = decides["float32"]
    assert exact | {"fid": exact["fid"] | {"precision": "bfloat16"}} == decides["bfloat16"]
    metrics = ["kid", "inception_score", "precision_recall"]
    finished.settings(fid={"omegas": [1.0, 2.0], "metrics": metrics, "precision": "float32"})


def test_fid_compares_with_statistics_and_refuses_what_they_cannot_give(finished):
    features = np.random.default_rng(0).standard_normal((200, 64))
    statistics = {"ref_mu": features.mean(0), "ref_sigma": np.cov(features, rowvar=False)}
    np.savez(finished.folder / "other/real.npz", **statistics)
    finished.settings(fid={"reference": "other/real.npz"})
    command = ("fid", "--generator", "artifacts/generator", "--out", "other/npz.json", "--plots", "other/npz")
    refused(finished.stage(*command, "--report", "other/npz.html", check=False), "kid", "other/real.npz")
    finished.settings(fid={"metrics": ["inception_score"]})
    finished.stage(*command, "--report", "other/npz.html")
    result = json.loads((finished.folder / "other/npz.json").read_text())
    assert result["floor"] is None and result["best"]["fid"] > 0
    assert result["best"].keys() == {
        "omega", "ema_decay", "fid", "inception_score", "inception_score_std", "accuracy"
    }  # fmt: skip
    metrics = ["kid", "inception_score", "precision_recall"]
    finished.settings(fid={"reference": "held_out", "metrics": metrics})


def start_and_wait_for_a_checkpoint(project, *command, stage="drift"):
    shutil.rmtree(project.folder / ".work" / stage)
    process = project.start(*command)
    end = time.monotonic() + 60
    while not list(project.folder.glob(f".work/{stage}/*/step-*")):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("stage", ["mae", "drift"])
def test_a_killed_run_goes_on_to_the_same_bits(finished, stage):
    """The files of `encode`: see test_encode_stage.py."""
    arguments = DRIFT if stage == "drift" else MAE
    finished.settings(**{stage: {"steps": 60, "warmup_steps": 2}})
    finished.stage(stage, *arguments, "--out", f"other/{stage}-whole")
    command = (sys.executable, "-m", f"stages.{stage}", *arguments, "--out", f"other/{stage}-resumed")
    process = start_and_wait_for_a_checkpoint(finished, *command, stage=stage)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (finished.folder / f"other/{stage}-resumed").exists()
    said = finished.run(*command).stdout
    assert "going on from step" in said
    for name in ("diffusion_pytorch_model.safetensors", "config.json", "settings.yaml"):
        one, other = (finished.folder / "other" / f"{stage}-{run}" / name for run in ("whole", "resumed"))
        assert one.read_bytes() == other.read_bytes()


def test_two_processes_that_are_told_to_stop_save_the_step(finished):
    command = (sys.executable, "-m", "stages.drift", *DRIFT, "--out", "other/stopped", "--nproc", "2")
    process = start_and_wait_for_a_checkpoint(finished, *command)
    process.terminate()
    assert process.wait() == 143
    assert not (finished.folder / "other/stopped").exists()
    reached = max(int(path.name[5:]) for path in finished.folder.glob(".work/drift/*/step-*"))
    assert f"going on from step {reached} " in finished.run(*command).stdout


def test_ctrl_c_under_dvc_saves_the_step(finished):
    finished.settings(drift={"steps": 200})
    process = start_and_wait_for_a_checkpoint(finished, "dvc", "repro", "drift")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait() != 0
    reached = [int(path.name[5:]) for path in finished.folder.glob(".work/drift/*/step-*")]
    said = finished.run("dvc", "repro", "drift").stdout
    assert f"going on from step {max(reached)} " in said
    assert "wrote artifacts/generator" in said


@pytest.mark.skipif(sys.platform != "linux", reason="there is no prctl")
def test_a_dvc_that_is_killed_takes_its_stage_along_which_saves_the_step(finished):
    finished.settings(drift={"steps": 2000})
    # DVC takes $SHELL; unlike bash, some never replace themselves by the only command they are given
    process = start_and_wait_for_a_checkpoint(finished, "env", "SHELL=/bin/sh", "dvc", "repro", "drift")
    (stage,) = [
        child for child in psutil.Process(process.pid).children() if "stages.drift" in child.cmdline()
    ]
    process.kill()
    psutil.wait_procs([stage], timeout=30)
    assert not stage.is_running()
    log = read_log(next(finished.folder.glob(".work/drift/*/logs.jsonl")))
    reached = [int(path.name[5:]) for path in finished.folder.glob(".work/drift/*/step-*")]
    assert max(reached) == log[-1]["step"] + 1 < 2000  # not the last multiple of checkpoint_every before it


@pytest.mark.parametrize("stage", ["mae", "drift"])
def test_a_latent_file_cut_short_is_refused(finished, stage):
    view = {"mae": "augmented", "drift": "center"}[stage]
    file = finished.folder / f"artifacts/latents/{view}/train_latents.npy"
    whole = file.read_bytes()
    file.unlink()  # it may be a link into DVC's cache
    file.write_bytes(whole[:-100])
    try:
        latents = ("--latents", f"artifacts/latents/{view}", "--out", "other/never")
        arguments = latents if stage == "mae" else (*latents, "--mae", "artifacts/mae")
        refused(finished.stage(stage, *arguments, check=False), "train_latents.npy")
    finally:
        file.write_bytes(whole)
    assert not (finished.folder / "other/never").exists()


def refused(done, *wanted):
    """One line, exit code 2."""
    assert done.returncode == 2, done.stderr
    (line,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert "Traceback" not in done.stderr
    for part in wanted:
        assert part in line


def test_a_checkpoint_of_another_shape_is_refused(finished):
    def newest():
        return max(finished.folder.glob(".work/drift/*/step-00000004"), key=os.path.getmtime)

    finished.settings(drift={"steps": 4, "warmup_steps": 2})
    finished.stage("drift", *DRIFT, "--out", "other/wide")
    wide = shutil.copytree(newest(), finished.folder / "other/wide-checkpoint")
    finished.settings(drift={"hidden": 8})
    finished.stage("drift", *DRIFT, "--out", "other/narrow")
    shutil.copytree(wide, newest(), dirs_exist_ok=True)
    done = finished.stage("drift", *DRIFT, "--out", "other/never", check=False)
    refused(done, "step-00000004", "model.", "--fresh")
    assert not (finished.folder / "other/never").exists()


def test_weights_of_another_shape_are_refused(finished):
    (finished.folder / "other/mixed").mkdir()
    for name, source in (("config.json", "narrow"), ("diffusion_pytorch_model.safetensors", "wide")):
        content = (finished.folder / "other" / source / name).read_bytes()
        (finished.folder / "other/mixed" / name).write_bytes(content)
    done = finished.stage("fid", "--generator", "other/mixed", "--out", "other/fid.json", check=False)
    refused(done, "other/mixed/diffusion_pytorch_model.safetensors", "size mismatch")
    assert not (finished.folder / "other/fid.json").exists()


def test_a_folder_that_cannot_be_written_is_refused(finished):
    (finished.folder / "in-the-way").touch()
    done = finished.stage("drift", *DRIFT, "--out", "in-the-way/generator", check=False)
    refused(done, "in-the-way")


def test_a_missing_image_folder_is_refused(finished):
    finished.settings(data={"dataset": "folder", "root": "no/such/images"})
    done = finished.stage("encode", "--view", "center", "--out", "other/latents", check=False)
    refused(done, "no/such/images")


def test_an_image_that_does_not_decode_is_named(finished):
    images = finished.folder / "images" / "train"
    for label in range(10):
        (images / f"class{label}").mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (20, 24), (25 * label, 40 * number, 0)).save(
                images / f"class{label}" / f"{number}.JPEG"
            )
    (images / "class3" / "1.JPEG").write_bytes(b"\xff\xd8\xff not an image")
    finished.settings(data={"dataset": "folder", "root": "images"})
    encode = ("encode", "--view", "center", "--out", "other/latents")
    refused(finished.stage(*encode, check=False), "class3/1.JPEG")
    assert not (finished.folder / "other/latents").exists()
    (images / "class3" / "1.JPEG").write_bytes((images / "class3" / "0.JPEG").read_bytes())
    finished.stage(*encode)
    assert np.load(finished.folder / "other/latents/train_labels.npy").tolist() == sorted(list(range(10)) * 2)


def test_a_misspelt_key_is_refused_before_anything_is_written(finished):
    finished.settings(drift={"postives": 3})
    done = finished.stage("drift", *DRIFT, "--out", "other/never", check=False)
    refused(done, "drift.postives", "did you mean positives")
    assert not (finished.folder / "other/never").exists()
