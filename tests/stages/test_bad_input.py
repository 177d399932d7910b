"""What a user gets wrong is one line, before the work and without a file written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from complaints import complaint
from project import Project, draw_images

from drift.models.base import WEIGHTS_FILE

DRIFT = ("drift", "--latents", "artifacts/latents/center", "--mae", "artifacts/mae", "--out", "never")
MAE = ("mae", "--latents", "artifacts/latents/augmented", "--out", "never")
ENCODE = ("encode", "--view", "center", "--out", "never")
FID = ("fid", "--generator", "artifacts/generator", "--out", "never/fid.json", "--plots", "plots-of-it",
       "--report", "never/index.html")  # fmt: skip
GENERATOR = Path("artifacts/generator")


def cut(view: str):
    def change(project: Project) -> None:
        file = project.folder / f"artifacts/latents/{view}/train_latents.npy"
        content = file.read_bytes()
        file.unlink()  # it may be a link into DVC's cache
        file.write_bytes(content[:-100])

    return change


def other_weights(project: Project) -> None:
    project.settings(drift={"hidden": 8, "steps": 1, "warmup_steps": 0})
    project.main(*DRIFT[:-1], "narrow")
    shutil.copyfile("narrow/config.json", GENERATOR / "config.json")


def other_checkpoint(project: Project) -> None:
    """That of a wider generator where one of a narrower is expected."""
    (wide,) = Path(".work/drift").glob("*/step-00000008")
    project.settings(drift={"hidden": 8})
    project.main(*DRIFT[:-1], "narrow")
    (narrow,) = set(Path(".work/drift").glob("*/step-00000008")) - {wide}
    shutil.copytree(wide, narrow, dirs_exist_ok=True)


def statistics_alone(project: Project) -> None:
    features = np.random.default_rng(0).standard_normal((200, 64))
    np.savez("real.npz", ref_mu=features.mean(0), ref_sigma=np.cov(features, rowvar=False))
    project.settings(fid={"reference": "real.npz"})


def in_the_way(project: Project) -> None:
    (project.folder / "never").touch()


def setting(**sections):
    return lambda project: project.settings(**sections)


def started(change: Callable[[Path], object], **drift):
    """From a copy of the generator, with `change` made to it."""

    def make(project: Project) -> None:
        shutil.copytree(GENERATOR, "start")
        change(Path("start"))
        project.settings(drift={"init_from": "start", **drift})

    return make


CASES = {
    "misspelt key": (setting(drift={"postives": 3}), DRIFT, ["drift.postives"]),
    "latents cut short, mae": (cut("augmented"), MAE, ["train_latents.npy"]),
    "latents cut short, drift": (cut("center"), DRIFT, ["train_latents.npy"]),
    "folder in the way": (in_the_way, (*DRIFT[:-1], "never/generator"), ["never"]),
    "no such images": (setting(data={"dataset": "folder", "root": "no/images"}), ENCODE, ["no/images"]),
    "MAE of its own output": (setting(mae={"source": "artifacts/mae"}), MAE, ["mae.source", "artifacts/mae"]),
    "no such MAE": (setting(mae={"source": "nobody"}), MAE, ["nobody"]),
    "generator of its own output": (
        setting(drift={"init_from": str(GENERATOR)}),
        DRIFT,
        ["drift.init_from", "outside of artifacts/gen"],
    ),
    "no such generator": (setting(drift={"init_from": "nobody"}), DRIFT, ["drift.init_from = nobody"]),
    "generator of other sizes": (
        started(lambda folder: None, hidden=8),
        DRIFT,
        ["its hidden_size is 16", "of this run is 8"],
    ),
    "damaged generator": (
        started(lambda folder: (folder / WEIGHTS_FILE).write_bytes(b"")),
        DRIFT,
        [f"start/{WEIGHTS_FILE}"],
    ),
    "no such encoder": (
        setting(features=[{"encoder": "moco", "source": "no.pth"}]),
        DRIFT,
        ["no.pth", "checkpoint of MoCo"],
    ),
    "encoder in an output": (
        setting(features=[{"encoder": "dinov2", "source": "artifacts/mae"}]),
        DRIFT,
        ["dinov2.source"],
    ),
    "weights of another shape": (other_weights, FID, ["artifacts/generator"]),
    "checkpoint of another shape": (other_checkpoint, DRIFT, ["--fresh"]),
    "metrics that need images": (statistics_alone, FID, ["kid", "real.npz"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_line_and_nothing_is_written(project, case):
    change, command, words = CASES[case]
    change(project)
    message = complaint(lambda: project.main(*command))
    assert all(word in message for word in words), message
    assert not any(path.is_file() for path in Path("never").rglob("*"))


@pytest.mark.slow
def test_it_is_code_2_and_no_traceback(project):
    project.settings(drift={"postives": 3})
    done = project.stage(*DRIFT, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: params.yaml: ") and done.stderr.count("\n") == 1


CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def images(project, monkeypatch) -> Project:
    """Images as files, and a generator of their classes that has learned nothing."""
    for split in ("train", "val"):
        draw_images(project.folder / "images" / split, CLASSES, 30)
    project.settings(
        data={"dataset": "folder", "root": "images", "classes": 3},
        drift={"classes_per_step": 3, "steps": 1, "warmup_steps": 0},
        mae={"steps": 1, "warmup_steps": 0, "finetune_steps": 0, "view": "center"},
        fid={"reference": "val", "omegas": [1.0], "metrics": [], "picture_classes": 3, "floor_images": 80},
    )
    for stage, *arguments in (ENCODE[:-1], (*MAE[:2], "artifacts/latents/center", "--out"), DRIFT[:-1]):
        out = {"encode": "artifacts/latents/center", "mae": "artifacts/mae", "drift": str(GENERATOR)}[stage]
        shutil.rmtree(out)
        project.main(stage, *arguments, out)
    return project


def test_images_that_do_not_decode_are_named_or_left_out(images, capsys):
    """By one policy in all stages, before anything is sampled."""
    val = images.folder / "images/val"
    (val / "ant/03.png").write_bytes(b"")
    (val / "bee/07.png").write_bytes((val / "bee/07.png").read_bytes()[:600])
    message = complaint(lambda: images.main(*FID))
    assert message.startswith("2 of 90 images do not decode: images/val/ant/03.png (an empty file), ")
    assert "images/val/bee/07.png (" in message and "encode.on_bad_image: skip" in message
    assert "omega 1" not in capsys.readouterr().err
    (images.folder / "images/train/cat/00.png").write_bytes(b"no image")
    assert "images/train/cat/00.png" in complaint(lambda: images.main(*ENCODE))
    images.settings(encode={"on_bad_image": "skip"}, fid={"floor_images": 90})
    images.main(*ENCODE)
    assert np.bincount(np.load("never/train_labels.npy")).tolist() == [30, 30, 29]
    images.main(*FID)
    said = capsys.readouterr().out
    assert "val: left out 2 of 90 images" in said and "train: left out 1 of 90 images" in said


def test_other_classes_are_refused(images):
    names = GENERATOR / "classes.json"
    whole = names.read_text()
    names.write_text(json.dumps(["ant", "cat", "bee"]))
    message = complaint(lambda: images.main(*FID))
    assert (
        "label 1 is 'cat' in artifacts/generator/classes.json" in message and "'bee' in the data" in message
    )
    names.write_text(whole)
    val = images.folder / "images/val"
    (val / "bee").rename(val / "wasp")
    assert "label 1 is 'cat' in val (3 classes), but 'bee' in train" in complaint(lambda: images.main(*FID))


@pytest.mark.parametrize("command", [ENCODE, MAE, DRIFT, FID], ids=lambda command: command[0])
def test_every_stage_asks_for_deterministic_algorithms_by_setting(project, command, monkeypatch):
    class Asked(Exception):
        pass

    def make_deterministic():
        raise Asked

    monkeypatch.setattr("drift.runtime.processes.make_deterministic", make_deterministic)
    project.settings(hardware={"deterministic": True})
    with pytest.raises(Asked):
        project.main(*command)
