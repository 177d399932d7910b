"""Images that do not decode, or have other classes: one policy in all stages, and told before the work."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from project import Project, copy_project

from drift.models.generator import Generator

CLASSES = ("ant", "bee", "cat")
PER_CLASS = 30


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    """Images as files, two of `val` damaged, and a generator that has learned nothing."""
    project = copy_project(tmp_path_factory.mktemp("project"))
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in CLASSES:
            folder = project.folder / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(PER_CLASS):
                Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(folder / f"{number:02}.png")
    val = project.folder / "images" / "val"
    (val / "ant/03.png").write_bytes(b"")
    (val / "bee/07.png").write_bytes((val / "bee/07.png").read_bytes()[:600])
    generator = Generator(
        input_size=4, num_classes=3, hidden_size=16, depth=1, num_heads=2, context_tokens=1,
        style_codebooks=1, style_entries=2,
    )  # fmt: skip
    generator.save_pretrained(project.folder / "generator")
    project.settings(
        data={"dataset": "folder", "root": "images", "classes": 3, "image_size": 16},
        drift={"classes_per_step": 3},
        fid={"reference": "val", "omegas": [1.0], "picture_classes": 3, "floor_images": 80},
    )
    return project


def fid(project, check=True):
    return project.stage("fid", "--generator", "generator", "--out", "metrics/out.json", check=check)


def test_fid_names_them_before_it_samples(project):
    done = fid(project, check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: 2 of 90 images do not decode: images/val/ant/03.png (an empty file), ")
    assert "images/val/bee/07.png (" in line and "encode.on_bad_image: skip" in line
    assert "omega 1" not in done.stderr and "Traceback" not in done.stderr


def test_the_self_test_names_them(project):
    done = project.run("python", "-m", "drift.cli", "fid-selftest", check=False)
    assert done.returncode == 2 and "images/val/ant/03.png (an empty file)" in done.stderr


def test_fid_leaves_out_what_encode_leaves_out(project):
    train = project.folder / "images/train/cat/00.png"
    whole = train.read_bytes()
    train.write_bytes(b"no image")
    project.settings(encode={"on_bad_image": "skip"}, fid={"floor_images": 90})
    try:
        done = fid(project)
    finally:
        train.write_bytes(whole)
        project.settings(encode={"on_bad_image": "error"}, fid={"floor_images": 80})
    assert "val: left out 2 of 90 images" in done.stdout and "train: left out 1 of 90 images" in done.stdout
    protocol = json.loads((project.folder / "metrics/out.json").read_text())["protocol"]
    assert (protocol["reference_images"], protocol["floor_images"]) == (88, 89)


def test_a_generator_of_other_classes_is_refused(project):
    classes = project.folder / "generator/classes.json"
    classes.write_text(json.dumps(["ant", "cat", "bee"]))
    done = fid(project, check=False)
    classes.unlink()
    assert done.returncode == 2
    assert "label 1 is 'cat' in generator/classes.json (3 classes), but 'bee' in the data" in done.stderr


def test_a_split_of_other_classes_is_refused(project):
    val = project.folder / "images/val"
    shutil.move(val / "bee", val / "wasp")
    done = fid(project, check=False)
    tested = project.run("python", "-m", "drift.cli", "fid-selftest", check=False)
    shutil.move(val / "wasp", val / "bee")
    for said in (done, tested):
        assert said.returncode == 2
        assert "images: label 1 is 'cat' in val (3 classes), but 'bee' in train" in said.stderr
