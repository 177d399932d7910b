"""`drift adopt`: latents of a folder or an rclone remote become a stage's output, or are refused by name."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
import yaml
from complaints import complaint
from dvc.utils.serialize import modify_yaml
from golden_weights import GOLDEN
from imports import ROOT
from project import draw_images

from drift import cli
from drift.data import latents
from drift.data.latents import LatentStore, file_hashes, latent_files
from drift.evaluation.inspection import SourceImages
from drift.models.mae import LatentMAE
from drift.runtime.torchvision import ensure_torchvision
from drift.settings import load_settings
from drift.settings.autoencoder import AutoencoderSource
from drift.sharing import adopt
from drift.sharing.adopt import adopt_latents, adopt_mae, use_encoder
from drift.training.inputs import check_latents

N = 40
SHAPE = (4, 8, 8)  # of the digits' VAE for images of 32 pixels
CHECKPOINT = GOLDEN / "prior_mae/ckpt_final.pt"


@pytest.fixture
def settings():
    return load_settings(ROOT / "presets/digits.yaml")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty project but for the VAE, and an rclone remote called drive, which is `tmp_path`."""
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.delenv("DRIFT_WORK_DIR", raising=False)
    (tmp_path / "rclone.conf").write_text(f"[drive]\ntype = alias\nremote = {tmp_path}\n")
    monkeypatch.setenv("RCLONE_CONFIG", str(tmp_path / "rclone.conf"))
    os.symlink(ROOT / "pretrained", "pretrained")
    return tmp_path / "project"


def write(folder, split="train", meta=None, shape=SHAPE):
    """Files as they are exchanged, with a meta file that states little."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    np.save(folder / f"{split}_latents.npy", rng.normal(size=(N, *shape)).astype(np.float16))
    np.save(folder / f"{split}_labels.npy", np.arange(N, dtype=np.int64) % 10)
    (folder / f"{split}_meta.json").write_text(json.dumps(meta or {}))
    return folder


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "source")


def test_what_is_adopted_passes_for_what_the_settings_ask_for(here, source, settings):
    write(source, "val", {"num_classes": 10, "note": "kept"})
    (source / "unrelated.bin").write_bytes(b"x" * 100)
    before = file_bytes(source)
    told = adopt_latents(str(source), "center", settings, "artifacts/latents/center")
    std = np.load(source / "train_latents.npy").astype(np.float64).std()
    assert told[0] == f"train: 40 latents [4, 8, 8], standard deviation {std:.3f}"
    out = here / "artifacts/latents/center"
    files = {path.name for split in ("train", "val") for path in latent_files(out, split)}
    assert {path.name for path in out.iterdir()} == {"settings.yaml", *files}
    store = LatentStore.open(out)
    check_latents(store, settings, "center")
    assert store.meta == {
        "view": "center",
        "image_size": 32,
        "num_classes": 10,
        "vae": "pretrained/digits_vae",
        "scaling_factor": store.meta["scaling_factor"],
        "shape": [N, *SHAPE],
        "dtype": "float16",
        "sha256": file_hashes(source),
    }
    assert LatentStore.open(out, "val").meta["note"] == "kept"
    adopted = yaml.safe_load((out / "settings.yaml").read_text())["adopted"]
    assert adopted["source"] == str(source)
    assert adopted["splits"]["val"]["stated"] == ["note", "num_classes"]
    assert "vae" in adopted["splits"]["train"]["from_settings"]
    assert file_bytes(source) == before and [path.name for path in out.parent.iterdir()] == ["center"]


def test_what_is_there_is_replaced_only_if_asked_for(here, source, settings):
    out = here / "artifacts/latents/center"
    out.mkdir(parents=True)
    (out / "old").touch()
    again = lambda **how: adopt_latents(str(source), "center", settings, out, **how)  # noqa: E731
    assert complaint(again) == f"{out}: exists already; --force replaces it"
    (source / "train_labels.npy").write_bytes(b"damaged")
    complaint(lambda: again(force=True))
    assert [path.name for path in out.iterdir()] == ["old"]
    write(source)
    again(force=True)
    assert not (out / "old").exists() and len(LatentStore.open(out)) == N


def cut(path):
    os.truncate(path, path.stat().st_size - 7)


def edit(path, change):
    np.save(path, change(np.load(path)))


def with_value(value):
    def change(array):
        array[7, 1, 2, 3] = value
        return array

    return change


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        ("train_latents.npy", cut, "is cut short"),
        ("train_labels.npy", lambda p: p.unlink(), "is missing"),
        ("train_meta.json", lambda p: p.write_text('{"view": '), "is not JSON"),
        ("train_latents.npy", lambda p: edit(p, np.float32), "holds float32 in 4 dimensions, not float16"),
        ("train_labels.npy", lambda p: edit(p, lambda a: a[:-1]), "39 labels for the 40 latents"),
        ("train_labels.npy", lambda p: edit(p, lambda a: a + 1), "label 10 is not below data.classes = 10"),
        ("train_labels.npy", lambda p: edit(p, lambda a: a - 1), "labels -1 to 8 are not all in"),
        ("train_latents.npy", lambda p: edit(p, with_value(np.nan)), "row 7 holds a value that is not"),
        ("train_latents.npy", lambda p: edit(p, lambda a: a[:, :, :4]), "the autoencoder makes (4, 8, 8)"),
    ],
)
def test_what_is_damaged_is_refused_by_name(here, source, settings, monkeypatch, name, damage, told):
    monkeypatch.setattr(latents, "_BLOCK", 5 * 256)
    damage(source / name)
    message = complaint(lambda: adopt_latents(str(source), "center", settings, here / "a/out"))
    assert message.startswith(f"{source}/{name}: ") and told in message
    assert message.endswith("; copy the files again, or correct params.yaml")
    assert not list((here / "a").iterdir())


@pytest.mark.parametrize(
    ("view", "stated", "told"),
    [
        ("center", {"view": "augmented"}, 'view is "augmented"'),
        ("center", {"scaling_factor": 0.5}, "scaling_factor is 0.5"),
        ("center", {"posterior": "sample"}, 'posterior is "sample"'),
        ("center", {"mirror": True}, "mirror is true"),
        ("augmented", {"crop_scale": [0.2, 1.0]}, "crop_scale is [0.2, 1.0]"),
        ("augmented", {"images": N, "crops": 4, "view": "augmented"}, "40 images of 4 rows each are not the"),
        ("center", {"sha256": {"latents": "00", "labels": "00"}}, "sha256 is"),
        ("center", {"shape": [41, *SHAPE]}, "shape is [41"),
    ],
)
def test_what_contradicts_the_settings_is_refused(here, source, settings, view, stated, told):
    write(source, meta=stated)
    message = complaint(lambda: adopt_latents(str(source), view, settings, here / "out"))
    assert message.startswith(f"{source}/train_meta.json: ") and told in message


def test_what_is_only_odd_is_told(here, source, settings):
    edit(source / "train_latents.npy", lambda latents: latents * np.float16(5))
    told = "\n".join(adopt_latents(str(source), "augmented", settings, here / "out"))
    assert "warning: it should be near 1" in told
    assert "warning: the meta file does not state crops: every row counts" in told


def test_pixels_are_adopted_as_8_bits_and_not_as_latents(here, source, settings):
    autoencoder = AutoencoderSource(kind="pixels")
    settings = settings.model_copy(
        update={"encode": settings.encode.model_copy(update={"autoencoder": autoencoder})}
    )
    adopt_it = lambda: adopt_latents(str(source), "center", settings, here / "out")  # noqa: E731
    told = complaint(adopt_it)
    assert (
        "train_latents.npy: holds float16, but latents of kind pixels (encode.autoencoder) are stored" in told
    )
    levels = np.random.default_rng(0).integers(100, 120, (N, 3, 32, 32), np.uint8)
    np.save(source / "train_latents.npy", levels)
    std = (levels.astype(np.float64) / 127.5 - 1).std()
    assert adopt_it() == [f"train: 40 latents [3, 32, 32], standard deviation {std:.3f}"]
    store = LatentStore.open(here / "out")
    assert np.array_equal(store.latents, levels) and store.meta["vae"] == "pixels"
    np.save(source / "train_latents.npy", levels[:, :, :16])
    assert "the autoencoder makes (3, 32, 32)" in complaint(
        lambda: adopt_latents(str(source), "center", settings, here / "other")
    )


# A file per sample


@pytest.fixture
def samples(here, tmp_path):
    """An image and a latent for each of 24 training images, and the settings."""
    draw_images(tmp_path / "images/train", ("ant", "bee", "cat"), 8)
    (here / "params.yaml").write_text((ROOT / "presets/digits.yaml").read_text())
    with modify_yaml(here / "params.yaml") as content:
        content["data"] |= {"dataset": "folder", "root": str(tmp_path / "images"), "classes": 3}
        content["drift"]["classes_per_step"] = content["fid"]["picture_classes"] = 3
    (tmp_path / "samples").mkdir()
    stored = np.random.default_rng(0).normal(size=(24, *SHAPE)).astype(np.float32)
    for index, latent in enumerate(stored):
        np.save(tmp_path / f"samples/{index:06d}.npy", latent)
    return tmp_path / "samples", stored.astype(np.float16), load_settings("params.yaml")


@pytest.mark.parametrize("shards", [None, 10])
def test_a_file_per_sample_is_adopted_with_the_labels_of_the_images(samples, shards):
    """In the order of torchvision's ImageFolder."""
    source, stored, settings = samples
    for index in range(24 if shards else 0):
        shard = source / f"{index // shards:05d}"
        shard.mkdir(exist_ok=True)
        (source / f"{index:06d}.npy").rename(shard / f"{index:06d}.npy")
    told = adopt_latents(str(source), "center", settings, "out")
    ensure_torchvision()
    from torchvision.datasets import ImageFolder

    assert told[0] == f"train: 24 latents [4, 8, 8], standard deviation {stored.astype(float).std():.3f}"
    store, order = LatentStore.open("out"), ImageFolder(settings.data.root + "/train")
    assert np.array_equal(store.latents, stored) and store.labels.tolist() == order.targets
    assert store.class_names == order.classes and store.meta["images"] == 24
    assert sorted(path.name for path in store.folder.iterdir()) == [
        "settings.yaml",
        *sorted(p.name for p in latent_files("out")),
    ]
    check_latents(store, settings, "center")
    assert SourceImages(store, settings).name(9) == "bee/01.png"


def save_as(change):
    return lambda path: np.save(path, change(np.load(path)))


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        ("000007.npy", lambda path: path.unlink(), ": 000007.npy is missing (1 of 24 are)"),
        (
            "000024.npy",
            lambda path: np.save(path, np.zeros(SHAPE)),
            ": has 000024.npy, but there are 24 images",
        ),
        ("000007.npy", cut, "/000007.npy: is cut short or no .npy file"),
        ("000007.npy", save_as(lambda x: x[:, 1:]), "/000007.npy: holds float32 (4, 7, 8), not floating"),
        ("000000.npy", save_as(lambda x: x[:2]), "/000000.npy: holds float32 (2, 8, 8), not floating"),
        ("000007.npy", save_as(lambda x: x.astype(int)), "/000007.npy: holds int64 (4, 8, 8), not floating"),
        (
            "000007.npy",
            save_as(lambda x: x * 1e6),
            "/000007.npy: holds a value that is not finite in float16",
        ),
        ("00000/000007.npy", lambda path: (path.parent.mkdir(), path.touch()), "/000007.npy: is there twice"),
    ],
)
def test_samples_that_cannot_be_adopted_are_named(here, samples, name, damage, told):
    source, _, settings = samples
    damage(source / name)
    message = complaint(lambda: adopt_latents(str(source), "center", settings, here / "a/out"))
    assert message.startswith(str(source)) and told in message
    assert not list((here / "a").iterdir())


def test_images_of_samples_can_be_elsewhere_and_must_have_the_classes(here, samples, capsys):
    source, _, settings = samples
    shutil.move(settings.data.root, here / "moved")
    arguments = ["adopt", "latents", str(source), "--view", "center", "--no-commit"]
    assert cli.main(arguments) == 2
    assert cli.main([*arguments, "--images", "moved"]) == 0
    assert len(LatentStore.open("artifacts/latents/center")) == 24


def test_a_source_that_is_none_is_refused(here, tmp_path, settings):
    adopt_it = lambda source: complaint(lambda: adopt_latents(source, "center", settings, here / "out"))  # noqa: E731
    assert "/none: is not there; name a folder, or NAME:PATH" in adopt_it(f"{tmp_path}/none")
    assert "val_only: holds no train_latents.npy" in adopt_it(str(write(tmp_path / "val_only", "val")))
    assert "drive:none: rclone copy ended with code 3" in adopt_it("drive:none")
    assert "drive:val_only: holds no train_latents.npy" in adopt_it("drive:val_only")


def test_latents_come_from_an_rclone_remote(here, source, settings):
    (source / "unrelated.bin").write_bytes(b"x" * 100)
    adopt_latents("drive:source", "center", settings, here / "out")
    assert LatentStore.open(here / "out").meta["sha256"] == file_hashes(source)
    (source / "train_labels.npy").unlink()
    message = complaint(lambda: adopt_latents("drive:source", "center", settings, here / "new"))
    assert message.startswith("drive:source/train_labels.npy: is missing; ")
    assert not list((here / ".work/adopt").iterdir())


@pytest.mark.slow
def test_dvc_takes_it_for_the_result_of_the_stage(tmp_path, source, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests/stages")
    from project import copy_project

    (tmp_path / "project").mkdir()
    project = copy_project(tmp_path / "project")
    write(source, shape=(4, 4, 4))  # of images of 16 pixels
    drift = (sys.executable, "-m", "drift.cli", "adopt", "latents", str(source), "--view")
    assert "dvc commit -f encode@augmented" in project.run(*drift, "augmented", "--no-commit").stdout
    done = project.run(*drift, "center").stdout
    assert "wrote artifacts/latents/center" in done and "wrote dvc.lock: encode@center counts as run" in done
    assert "encode@augmented" in project.run("dvc", "status", "encode@augmented", check=False).stdout
    assert "up to date" in project.run("dvc", "status", "encode@center").stdout
    assert project.repro("repro", "encode@center") == []
    refused = project.run(*drift, "center", check=False)
    assert refused.returncode == 2
    assert refused.stderr == "error: artifacts/latents/center: exists already; --force replaces it\n"


@pytest.mark.parametrize("what", [["latents", "x", "--view", "center"], ["mae", "x", "--to", "y"]])
def test_other_settings_than_those_of_dvc_are_not_committed(here, capsys, what):
    shutil.copyfile(ROOT / "presets/digits.yaml", "other.yaml")
    assert cli.main(["adopt", *what, "--params", "other.yaml"]) == 2
    assert "error: --params other.yaml: DVC goes by params.yaml; copy it" in capsys.readouterr().err
    assert cli.main(["adopt", *what, "--params", "other.yaml", "--no-commit"]) == 2
    assert "is not there" in capsys.readouterr().err  # the source, which is looked for then


def test_a_commit_that_fails_is_told(here, capfd):
    message = complaint(lambda: adopt.run_dvc("commit", "-f", "encode@center"))
    assert message.endswith("mend that, then dvc commit -f encode@center")


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "runs/imagenet_mae/w4"
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copyfile(CHECKPOINT, folder / "checkpoints/ckpt_final.pt")
    return folder


@pytest.mark.parametrize(
    "source", ["{0}/checkpoints/ckpt_final.pt", "{0}/", "drive:runs/imagenet_mae/w4"], ids=str
)
def test_an_mae_of_the_sinkhorn_paper_becomes_an_encoder(here, run_folder, source):
    source = source.format(run_folder)
    adopt_mae(source, "imported/w4")
    shadow = torch.load(CHECKPOINT, weights_only=True)["ema"]["shadow"]
    weights = LatentMAE.from_pretrained("imported/w4").encoder.stem.conv.weight
    assert torch.equal(weights, shadow["encoder.conv1.weight"])
    assert "--force" in complaint(lambda: adopt_mae(source, "imported/w4"))
    adopt_mae(source, "imported/w4", force=True)
    assert [path.name for path in (here / "imported").iterdir()] == ["w4"]


def test_a_damaged_mae_is_refused_by_its_own_name_and_replaces_nothing(here, run_folder):
    adopt_mae(str(run_folder), "imported/w4")
    before = file_bytes(here / "imported/w4")
    cut(run_folder / "checkpoints/ckpt_final.pt")
    for source in (str(run_folder), "drive:runs/imagenet_mae/w4"):
        told = complaint(lambda: adopt_mae(source, "imported/w4", force=True))  # noqa: B023
        assert f"{source}/checkpoints/ckpt_final.pt: " in told
    assert file_bytes(here / "imported/w4") == before
    assert "nowhere" in complaint(lambda: adopt_mae("nowhere", "imported/x"))
    told = complaint(lambda: adopt_mae(str(run_folder), "artifacts/mae"))
    assert "in artifacts/mae, which a stage writes" in told


def file_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("encoded", [True, False])
def test_the_settings_get_the_encoder_and_keep_the_rest(here, encoded):
    """With augmented latents, which are there, and without, which are then not asked for."""
    if encoded:
        (here / "artifacts/latents/augmented").mkdir(parents=True)
    shutil.copyfile(ROOT / "presets/digits.yaml", "params.yaml")
    before = here.joinpath("params.yaml").read_text().splitlines()
    use_encoder(here / "imported", here / "params.yaml", here / "artifacts/latents")
    after = here.joinpath("params.yaml").read_text().splitlines()
    comments = [[line for line in lines if line.startswith("#")] for lines in (before, after)]
    assert comments[0] == comments[1] and len(after) - len(before) in range(1, 5)
    settings = load_settings("params.yaml")
    assert settings.mae.source == str(here / "imported")
    assert settings.mae.view == ("augmented" if encoded else "center")
    assert settings.views == (("center", "augmented") if encoded else ("center",))


def test_the_encoder_gets_the_view_of_the_generator(here):
    text = (ROOT / "presets/digits.yaml").read_text()
    swapped = text.replace("  view: center ", "  view: x ").replace("  view: augmented ", "  view: center ")
    (here / "params.yaml").write_text(swapped.replace("  view: x ", "  view: augmented "))
    use_encoder(here / "imported", here / "params.yaml", here / "artifacts/latents")
    settings = load_settings("params.yaml")
    assert settings.mae.view == settings.drift.view == "augmented" and settings.views == ("augmented",)
