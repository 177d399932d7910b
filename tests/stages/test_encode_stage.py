"""The real encode stage with a real autoencoder: processes, kills and signals change no byte of its files."""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from project import Project, copy_project

CLASSES, PER_CLASS = 4, 60
COMMAND = (sys.executable, "-m", "stages.encode", "--view", "center", "--out")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    """Settings and images with which the stage takes a second, one of them damaged."""
    project = copy_project(tmp_path_factory.mktemp("project"))
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        folder = project.folder / "images" / "train" / f"class{label}"
        folder.mkdir(parents=True)
        for number in range(PER_CLASS):
            pixels = rng.integers(0, 256, (*rng.integers(20, 40, 2), 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:02}.png")
    (project.folder / "images/train/class1/07.png").write_bytes(b"no image")
    project.settings(
        data={"dataset": "folder", "root": "images", "classes": CLASSES, "image_size": 32},
        encode={"on_bad_image": "skip", "posterior": "sample"},
        drift={"classes_per_step": CLASSES},
        fid={"picture_classes": CLASSES},
        hardware={"encode_batch": 3},
    )
    return project


@pytest.fixture(scope="module")
def expected(project) -> dict[str, bytes]:
    """What one process with two threads writes in one go."""
    project.run(*COMMAND, "whole", OMP_NUM_THREADS="2")
    return contents(project, "whole")


def contents(project: Project, out: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (project.folder / out).iterdir()}


def start(project: Project, out: str) -> subprocess.Popen:
    """Start the stage afresh and wait until it is at work."""
    shutil.rmtree(project.folder / ".work", ignore_errors=True)
    process = subprocess.Popen(
        (*COMMAND, out),
        cwd=project.folder,
        env=project.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 60
    while done(project) < 20:
        assert time.monotonic() < end and process.poll() is None, "waited in vain"
        time.sleep(0.002)
    return process


def done(project: Project) -> int:
    """Images that are marked as done."""
    return sum(np.count_nonzero(np.load(m)) for m in project.folder.glob(".work/*/*/images_done.npy"))


def test_it_encodes_and_skips(project, expected):
    labels = np.load(project.folder / "whole/train_labels.npy")
    assert np.bincount(labels).tolist() == [PER_CLASS, PER_CLASS - 1, PER_CLASS, PER_CLASS]
    assert sorted(expected) == ["settings.yaml", "train_labels.npy", "train_latents.npy", "train_meta.json"]
    assert b'"class1/07.png"' in expected["train_meta.json"]


def test_a_finished_run_gives_its_latents_again(project, expected):
    """DVC has removed them before it starts the stage, and has something newer in its lock file."""
    shutil.rmtree(project.folder / "whole")
    lock = project.folder / "dvc.lock"
    lock.touch()
    os.utime(lock, (time.time() + 60, time.time() + 60))
    said = project.run(*COMMAND, "whole")
    assert "finished already" in said.stdout and "encode center" not in said.stderr
    assert contents(project, "whole") == expected


def test_a_killed_run_goes_on_with_two_processes_to_the_same_bytes(project, expected):
    process = start(project, "killed")
    process.kill()
    process.communicate()
    assert 0 < done(project) < CLASSES * PER_CLASS
    assert "going on" in project.run(*COMMAND, "killed", "--nproc", "2").stdout
    assert contents(project, "killed") == expected


def test_another_precision_of_the_vae_does_not_go_on_with_these_rows(project, expected):
    process = start(project, "rough")
    process.kill()
    process.communicate()
    project.settings(encode={"precision": "bfloat16"})
    assert "going on" not in project.run(*COMMAND, "rough").stdout
    project.settings(encode={"precision": "float32"})
    rough = contents(project, "rough")
    assert b'"vae_precision": "bfloat16"' in rough["train_meta.json"]
    assert b'"vae_precision": "float32"' in expected["train_meta.json"]
    exact, found = (np.load(project.folder / out / "train_latents.npy") for out in ("whole", "rough"))
    assert 0 < np.abs(exact.astype(float) - found).mean() < 0.02  # latents have a spread of 1
    assert "going on" in project.run(*COMMAND, "exact").stdout  # the rows in float32 are still there
    assert contents(project, "exact") == expected


def test_ctrl_c_ends_it_quietly_with_all_blocks_marked(project):
    project.settings(hardware={"workers": 1})
    process = start(project, "stopped")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the helper that decodes gets it too
    said = process.communicate()[1]
    assert process.returncode == 130 and "Traceback" not in said, said
    assert f"SIGINT after {done(project)} of {CLASSES * PER_CLASS} images; run it again" in said
    assert done(project) < CLASSES * PER_CLASS
    assert not (project.folder / "stopped").exists()
