"""`drift adopt`: latents of a folder or an rclone remote become a stage's output, or are refused by name."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from complaints import complaint
from golden_weights import GOLDEN
from imports import ROOT
from ruamel.yaml import YAML

from drift import cli
from drift.data.latents import LatentStore, file_hashes
from drift.models.mae import LatentMAE
from drift.runtime.errors import UserError
from drift.settings import load_settings
from drift.sharing import adopt
from drift.sharing.adopt import adopt_latents, adopt_mae, fetch_source, use_encoder
from drift.sharing.remotes import find_rclone
from drift.training.inputs import check_latents

N = 40
SHAPE = (4, 8, 8)  # of the digits' VAE for images of 32 pixels


@pytest.fixture
def settings():
    return load_settings(ROOT / "presets" / "digits.yaml")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty project but for the VAE."""
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.delenv("DRIFT_WORK_DIR", raising=False)
    os.symlink(ROOT / "pretrained", "pretrained")
    return tmp_path / "project"


def write(folder, split="train", meta=None, shape=SHAPE, n=N):
    """Files as they are exchanged, with a meta file that states little."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    np.save(folder / f"{split}_latents.npy", rng.normal(size=(n, *shape)).astype(np.float16))
    np.save(folder / f"{split}_labels.npy", np.arange(n, dtype=np.int64) % 10)
    (folder / f"{split}_meta.json").write_text(json.dumps(meta or {}))
    return folder


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "source")


def test_what_is_adopted_passes_for_what_the_settings_ask_for(here, source, settings):
    write(source, "val", {"num_classes": 10, "note": "kept"})
    (source / "unrelated.bin").write_bytes(b"x" * 100)
    told = adopt_latents(str(source), "center", settings, "artifacts/latents/center")
    assert [line.split(":")[0] for line in told] == ["train", "val"]
    std = np.load(source / "train_latents.npy").astype(np.float64).std()
    assert f"40 latents [4, 8, 8], standard deviation {std:.3f}" in told[0]
    out = here / "artifacts" / "latents" / "center"
    assert {path.name for path in out.iterdir()} == {
        "settings.yaml",
        *(
            f"{split}_{what}"
            for split in ("train", "val")
            for what in ("latents.npy", "labels.npy", "meta.json")
        ),
    }
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
    said = YAML(typ="safe").load(out / "settings.yaml")
    assert said["adopted"]["source"] == str(source)
    assert said["adopted"]["splits"]["val"]["stated"] == ["note", "num_classes"]
    assert "vae" in said["adopted"]["splits"]["train"]["from_settings"]
    assert not list((here / ".work" / "adopt").iterdir())


def test_what_is_there_is_replaced_only_if_asked_for(here, source, settings):
    out = here / "artifacts" / "latents" / "center"
    out.mkdir(parents=True)
    (out / "old").touch()
    again = lambda **how: adopt_latents(str(source), "center", settings, out, **how)  # noqa: E731
    assert complaint(again) == f"{out}: exists already; --force replaces it"
    (source / "train_labels.npy").write_bytes(b"damaged")
    with pytest.raises(UserError):
        again(force=True)
    assert [path.name for path in out.iterdir()] == ["old"]
    write(source)
    again(force=True)
    assert not (out / "old").exists() and len(LatentStore.open(out)) == N


def cut(path):
    os.truncate(path, path.stat().st_size - 7)


def edit(path, change):
    array = np.load(path)
    np.save(path, change(array))


def with_value(value):
    def change(array):
        array[7, 1, 2, 3] = value
        return array

    return change


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        ("train_latents.npy", cut, "is cut short"),
        ("train_labels.npy", cut, "is cut short"),
        ("train_latents.npy", lambda p: p.write_bytes(b""), "is cut short or no .npy file"),
        ("train_labels.npy", lambda p: p.unlink(), "is missing"),
        ("train_meta.json", lambda p: p.unlink(), "is missing"),
        ("train_meta.json", lambda p: p.write_text('{"view": '), "is not JSON"),
        ("train_meta.json", lambda p: p.write_text("[]"), "holds list, not an object"),
        ("train_latents.npy", lambda p: edit(p, np.float32), "holds float32 in 4 dimensions, not float16"),
        ("train_labels.npy", lambda p: edit(p, np.int32), "holds int32 in 1 dimensions, not int64"),
        ("train_labels.npy", lambda p: edit(p, lambda a: a[:-1]), "39 labels for the 40 latents"),
        ("train_labels.npy", lambda p: edit(p, lambda a: a + 1), "labels 1 to 10 are not all in 0 to 9"),
        ("train_labels.npy", lambda p: edit(p, lambda a: a - 1), "labels -1 to 8 are not all in"),
        ("train_latents.npy", lambda p: edit(p, with_value(np.nan)), "row 7 holds a value that is not"),
        ("train_latents.npy", lambda p: edit(p, with_value(-np.inf)), "row 7 holds a value that is not"),
        ("train_latents.npy", lambda p: edit(p, lambda a: a[:, :, :4]), "but encode.vae makes [4, 8, 8] of"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_refused_by_name(here, source, settings, monkeypatch, name, damage, told):
    monkeypatch.setattr(adopt, "_BLOCK", 5 * 2 * 4 * 8 * 8)  # five rows
    damage(source / name)
    out = here / "artifacts" / "latents" / "center"
    message = complaint(lambda: adopt_latents(str(source), "center", settings, out))
    assert message.startswith(f"{source}/{name}: ") and told in message
    assert "dvc repro" not in message and "; " in message
    assert not out.exists()


@pytest.mark.parametrize(
    ("view", "stated", "told"),
    [
        ("center", {"view": "augmented"}, 'view is "augmented"'),
        ("center", {"image_size": 256}, "image_size is 256"),
        ("center", {"vae": "stabilityai/sd-vae-ft-mse"}, 'vae is "stabilityai/sd-vae-ft-mse"'),
        ("center", {"scaling_factor": 0.5}, "scaling_factor is 0.5"),
        (
            "center",
            {"vae_precision": "bfloat16"},
            'vae_precision is "bfloat16", but encode.precision is "float32"',
        ),
        ("center", {"num_classes": 1000}, "num_classes is 1000"),
        ("center", {"posterior": "sample"}, 'posterior is "sample"'),
        ("center", {"mirror": True}, "mirror is true"),
        ("augmented", {"crops": 2}, "crops is 2"),
        ("augmented", {"crop_scale": [0.2, 1.0]}, "crop_scale is [0.2, 1.0]"),
        (
            "augmented",
            {"images": N, "crops": 4, "view": "augmented"},
            "40 images of 4 rows each are not the 40",
        ),
        ("center", {"sha256": {"latents": "00", "labels": "00"}}, "sha256 is"),
        ("center", {"shape": [41, *SHAPE]}, "shape is [41"),
    ],
)
def test_what_contradicts_the_settings_is_refused(here, source, settings, view, stated, told):
    write(source, meta=stated)
    message = complaint(lambda: adopt_latents(str(source), view, settings, here / "out"))
    assert message.startswith(f"{source}/train_meta.json: ") and told in message
    assert not (here / "out").exists()


def test_what_is_only_odd_is_told(here, source, settings):
    write(source, meta={"crop_scale": [0.6000000001, 1], "crop_ratio": [0.8, 1.25]})
    edit(source / "train_labels.npy", lambda labels: labels % 9)
    edit(source / "train_latents.npy", lambda latents: latents * np.float16(5))
    told = "\n".join(adopt_latents(str(source), "augmented", settings, here / "out"))
    assert "warning: the standard deviation should be near 1" in told
    assert "warning: no latents of 1 classes, such as 9" in told
    assert "warning: train_meta.json does not state crops (encode.crops is 4)" in told


def test_a_source_that_is_none_is_refused(here, tmp_path, settings):
    adopt_it = lambda source: complaint(lambda: adopt_latents(source, "center", settings, here / "out"))  # noqa: E731
    assert "/none: there is no such folder; give one, or NAME:PATH" in adopt_it(f"{tmp_path}/none")
    (tmp_path / "empty").mkdir()
    assert "/empty: holds nothing of *_latents.npy" in adopt_it(f"{tmp_path}/empty")
    write(tmp_path / "val_only", "val")
    assert "val_only: holds no train_latents.npy" in adopt_it(f"{tmp_path}/val_only")


def test_a_fetch_goes_on_where_it_was_cut_off(tmp_path, source, capsys):
    (source / "inner").mkdir()
    (source / "inner" / "file").write_text("content")
    into = fetch_source(str(source), tmp_path / "into")
    assert (into / "inner" / "file").read_text() == "content"
    (into / "train_latents.npy").unlink()
    (into / ".train_latents.npy.part").write_bytes(b"half")
    capsys.readouterr()
    fetch_source(str(source), into)
    assert capsys.readouterr().out.splitlines() == [f"copying {source}/train_latents.npy (0.0 MiB)"]
    assert (into / "train_latents.npy").read_bytes() == (source / "train_latents.npy").read_bytes()
    fetch_source(str(source / "inner" / "file"), tmp_path / "one")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["file"]


def test_latents_come_from_an_rclone_remote(here, source, settings, tmp_path, monkeypatch):
    password = subprocess.run(
        [find_rclone(), "obscure", "x"], capture_output=True, text=True, check=True
    ).stdout
    (tmp_path / "rclone.conf").write_text(
        f"[secret]\ntype = crypt\nremote = {tmp_path}/cloud\npassword = {password}\n"
    )
    monkeypatch.setenv("RCLONE_CONFIG", str(tmp_path / "rclone.conf"))
    subprocess.run([find_rclone(), "copy", str(source), "secret:a/latents"], check=True)
    adopt_latents("secret:a/latents", "center", settings, here / "out")
    assert LatentStore.open(here / "out").meta["sha256"] == file_hashes(source)
    wrong = lambda place: complaint(lambda: adopt_latents(place, "center", settings, here / "new"))  # noqa: E731
    assert "sekret: rclone knows no remote of that name (it knows secret);" in wrong("sekret:a")
    assert "secret:b: rclone copy ended with code 3" in wrong("secret:b")
    subprocess.run([find_rclone(), "delete", "secret:a/latents", "--include", "*_labels.npy"], check=True)
    assert wrong("secret:a/latents").startswith("secret:a/latents/train_labels.npy: is missing; ")


def test_dvc_takes_it_for_the_result_of_the_stage(tmp_path, source, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "stages")
    from project import copy_project

    (tmp_path / "project").mkdir()
    project = copy_project(tmp_path / "project")
    shutil.rmtree(source)
    write(source, shape=(4, 4, 4))  # of images of 16 pixels
    drift = (sys.executable, "-m", "drift.cli", "adopt", "latents", str(source), "--view")
    not_yet = project.run(*drift, "augmented", "--no-commit").stdout
    assert "not told to DVC yet: dvc commit -f encode@augmented" in not_yet
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
    assert "no such folder" in capsys.readouterr().err  # of the source, which is looked for then


def test_a_commit_that_fails_is_told(here, capfd):
    message = complaint(lambda: adopt.commit("encode@center"))
    assert message.endswith("see to its complaint above, then: dvc commit -f encode@center")


@pytest.mark.parametrize(
    "arguments", [["adopt"], ["adopt", "latents", "x"], ["adopt", "latents", "x", "--view", "y"]]
)
def test_a_wrong_word_is_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2


CHECKPOINT = GOLDEN / "prior_mae" / "ckpt_final.pt"


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "runs/imagenet_mae/w4"
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copyfile(CHECKPOINT, folder / "checkpoints/ckpt_final.pt")
    return folder


@pytest.mark.parametrize("how", ["file", "run", "rclone"])
def test_an_mae_of_the_prior_becomes_an_encoder(here, run_folder, tmp_path, monkeypatch, how):
    source = {
        "file": str(run_folder / "checkpoints/ckpt_final.pt"),
        "run": f"{run_folder}/",
        "rclone": "drive:imagenet_mae/w4",
    }[how]
    (tmp_path / "rclone.conf").write_text(f"[drive]\ntype = alias\nremote = {tmp_path}/runs\n")
    monkeypatch.setenv("RCLONE_CONFIG", str(tmp_path / "rclone.conf"))
    adopt_mae(source, "imported/w4")
    shadow = torch.load(CHECKPOINT, weights_only=True)["ema"]["shadow"]
    weights = LatentMAE.from_pretrained("imported/w4").encoder.stem.conv.weight
    assert torch.equal(weights, shadow["encoder.conv1.weight"])
    assert "--force" in complaint(lambda: adopt_mae(source, "imported/w4"))
    adopt_mae(source, "imported/w4", force=True)


def test_a_damaged_mae_is_refused_by_its_own_name_and_replaces_nothing(here, run_folder):
    adopt_mae(str(run_folder), "imported/w4")
    before = file_bytes(here / "imported/w4")
    path = run_folder / "checkpoints/ckpt_final.pt"
    cut(path)
    assert str(path) in complaint(lambda: adopt_mae(str(run_folder), "imported/w4", force=True))
    assert file_bytes(here / "imported/w4") == before
    assert "nowhere" in complaint(lambda: adopt_mae("nowhere", "imported/x"))
    assert "in artifacts/mae, which a stage writes" in complaint(lambda: adopt_mae(source, "artifacts/mae"))


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
    changed = [new for old, new in zip(before, after, strict=True) if old.split() != new.split()]
    assert len(changed) == (1 if encoded else 3)
    settings = load_settings("params.yaml")
    assert settings.mae.source == str(here / "imported")
    assert settings.mae.view == ("augmented" if encoded else "center")
    assert settings.views == (("center", "augmented") if encoded else ("center",))
