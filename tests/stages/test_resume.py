"""Kills, signals and numbers of processes: a stage that is started again ends in the same result.

`tests/torture.py` does the same at random moments, as often as one likes.
"""

import os
import shutil
import signal
import sys

import numpy as np
import psutil
import pytest
from project import Project, compare, copy_project, draw_images, relative_difference, weights

from drift.training.log import read_log

ARGUMENTS = {
    "mae": ("--latents", "artifacts/latents/augmented", "--plot", "mae.csv", "--held-out-plot", "held.csv"),
    "drift": ("--latents", "artifacts/latents/center", "--mae", "artifacts/mae", "--plot", "drift.csv"),
    "encode": ("--view", "center"),
}


def command(stage: str, out: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"stages.{stage}", *ARGUMENTS[stage], "--out", out, *arguments)


def checkpoints(project: Project, stage: str) -> list[int]:
    """The steps of those that are there."""
    return sorted(int(path.name[5:]) for path in project.folder.glob(f".work/{stage}/*/step-*"))


@pytest.mark.parametrize("stage", [pytest.param("mae", marks=pytest.mark.slow), "drift"])
def test_a_killed_run_goes_on_to_the_same_bits(project, stage, monkeypatch, capsys):
    project.settings(**{stage: {"steps": 60, "warmup_steps": 2}})
    shutil.rmtree(".work")
    process = project.start(*command(stage, "resumed"))
    project.wait_for(f".work/{stage}/*/step-*", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (project.folder / "resumed").exists()
    project.main(stage, *ARGUMENTS[stage], "--out", "resumed")
    assert "going on from step" in capsys.readouterr().out
    monkeypatch.setenv("DRIFT_WORK_DIR", "elsewhere")
    project.main(stage, *ARGUMENTS[stage], "--out", "whole")
    # The settings file names the code, of which this process has imported more
    assert not compare(project.folder / "whole", project.folder / "resumed", without=("settings.yaml",))


ONE_STEP = {
    "mae": {"steps": 1, "warmup_steps": 0, "finetune_steps": 0},
    "drift": {"steps": 1, "warmup_steps": 0},
}


@pytest.mark.parametrize("stage", [pytest.param("mae", marks=pytest.mark.slow), "drift"])
def test_two_processes_take_the_step_that_one_takes(project, stage, monkeypatch):
    project.settings(**{stage: ONE_STEP[stage]})
    project.stage(stage, *ARGUMENTS[stage], "--out", "two", "--nproc", "2")
    monkeypatch.setenv("DRIFT_WORK_DIR", "elsewhere")
    project.main(stage, *ARGUMENTS[stage], "--out", "one")
    assert relative_difference(weights(project.folder / "one"), weights(project.folder / "two")) < 1e-5
    (one,), (two,) = (read_log(project.folder / out / "logs.jsonl") for out in ("one", "two"))
    for name in one.keys() - {"time", "steps_per_s", "feature_sets", "unit"}:
        assert two[name] == pytest.approx(one[name], rel=1e-5), name


@pytest.mark.slow
def test_two_processes_that_get_sigterm_save_the_step(project):
    project.settings(drift={"steps": 2000})
    shutil.rmtree(".work")
    process = project.start(*command("drift", "stopped", "--nproc", "2"))
    project.wait_for(".work/drift/*/step-*", process)
    process.terminate()
    assert process.wait() == 143
    assert not (project.folder / "stopped").exists()
    (log,) = project.folder.glob(".work/drift/*/logs.jsonl")
    assert checkpoints(project, "drift")[-1] == read_log(log)[-1]["step"] + 1 < 2000


@pytest.mark.slow
def test_ctrl_c_under_dvc_saves_the_step(project):
    project.settings(drift={"steps": 300})
    shutil.rmtree(".work")
    process = project.start("dvc", "repro", "drift")
    project.wait_for(".work/drift/*/step-*", process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.wait() != 0
    reached = checkpoints(project, "drift")[-1]
    said = project.run("dvc", "repro", "drift").stdout
    assert f"going on from step {reached} " in said
    assert "wrote artifacts/generator" in said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="there is no prctl")
def test_a_dvc_that_is_killed_takes_its_stage_along_which_saves_the_step(project):
    project.settings(drift={"steps": 2000})
    shutil.rmtree(".work")
    # DVC takes $SHELL; unlike bash, some never replace themselves by the only command they are given
    process = project.start("env", "SHELL=/bin/sh", "dvc", "repro", "drift")
    project.wait_for(".work/drift/*/step-*", process)
    children = psutil.Process(process.pid).children()
    (stage,) = [child for child in children if "stages.drift" in child.cmdline()]
    process.kill()
    process.wait()
    psutil.wait_procs([stage], timeout=30)
    assert not stage.is_running()
    (log,) = project.folder.glob(".work/drift/*/logs.jsonl")
    # Not the last multiple of checkpoint_every before it
    assert checkpoints(project, "drift")[-1] == read_log(log)[-1]["step"] + 1 < 2000


CLASSES, PER_CLASS = ("a", "b", "c", "d"), 60


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> tuple[Project, dict[str, bytes]]:
    """Images that `encode` takes a second for, one of them damaged, and the latents of a whole run."""
    project = copy_project(tmp_path_factory.mktemp("project"))
    draw_images(project.folder / "images/train", CLASSES, PER_CLASS)
    (project.folder / "images/train/b/07.png").write_bytes(b"no image")
    project.settings(
        data={"dataset": "folder", "root": "images", "classes": len(CLASSES), "image_size": 32},
        encode={"on_bad_image": "skip", "posterior": "sample"},
        drift={"classes_per_step": len(CLASSES)},
        fid={"picture_classes": len(CLASSES)},
        hardware={"encode_batch": 3},
    )
    project.run(*command("encode", "whole"), OMP_NUM_THREADS="2")
    return project, contents(project, "whole")


def contents(project: Project, out: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (project.folder / out).iterdir()}


def start_encode(project: Project, out: str):
    """Start the stage afresh and wait until it is at work."""
    shutil.rmtree(project.folder / ".work", ignore_errors=True)
    process = project.start(*command("encode", out))
    project.wait_for(".work/*/*/images_done.npy", process)
    while encoded(project) < 20 and process.poll() is None:
        pass
    return process


def encoded(project: Project) -> int:
    """Images that are marked as done."""
    return sum(np.count_nonzero(np.load(m)) for m in project.folder.glob(".work/*/*/images_done.npy"))


@pytest.mark.slow
def test_encode_goes_on_after_a_kill_with_two_processes_to_the_same_bytes(images):
    project, expected = images
    labels = np.load(project.folder / "whole/train_labels.npy")
    assert np.bincount(labels).tolist() == [PER_CLASS, PER_CLASS - 1, PER_CLASS, PER_CLASS]
    assert b'"b/07.png"' in expected["train_meta.json"]
    process = start_encode(project, "killed")
    process.kill()
    process.wait()
    assert 0 < encoded(project) < len(CLASSES) * PER_CLASS
    assert "going on" in project.run(*command("encode", "killed", "--nproc", "2")).stdout
    assert contents(project, "killed") == expected
    # DVC has removed them before it starts the stage
    shutil.rmtree(project.folder / "killed")
    assert "finished already" in project.run(*command("encode", "killed")).stdout
    assert contents(project, "killed") == expected


@pytest.mark.slow
def test_another_precision_of_the_vae_does_not_go_on_with_these_rows(images):
    project, expected = images
    process = start_encode(project, "rough")
    process.kill()
    process.wait()
    project.settings(encode={"precision": "bfloat16"})
    assert "going on" not in project.run(*command("encode", "rough")).stdout
    project.settings(encode={"precision": "float32"})
    exact, rough = (np.load(project.folder / out / "train_latents.npy") for out in ("whole", "rough"))
    assert 0 < np.abs(exact.astype(float) - rough).mean() < 0.02  # latents have a spread of 1
    assert (
        "going on" in project.run(*command("encode", "exact")).stdout
    )  # the rows in float32 are still there
    assert contents(project, "exact") == expected


@pytest.mark.slow
def test_ctrl_c_ends_encode_with_all_blocks_marked(images):
    project, _ = images
    project.settings(hardware={"workers": 1})
    process = start_encode(project, "stopped")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the helper that decodes gets it too
    assert process.wait() == 130
    done = encoded(project)
    assert 0 < done < len(CLASSES) * PER_CLASS
    assert not (project.folder / "stopped").exists()
    project.settings(hardware={"workers": 0})
    assert "going on" in project.run(*command("encode", "stopped")).stdout
