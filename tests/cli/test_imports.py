"""drift import-release and drift import-prior, as one runs them."""

import json

import pytest
import torch
from golden_weights import GOLDEN

from drift import cli
from drift.models.generator import Generator
from drift.models.mae import LatentMAE
from drift.models.sinkhorn_mae import SinkhornMAE

RELEASE = GOLDEN / "release_generator"
CHECKPOINT = GOLDEN / "prior_mae" / "ckpt_final.pt"


def test_import_release_of_a_local_folder(tmp_path, capsys):
    assert cli.main(["import-release", str(RELEASE), str(tmp_path / "ours")]) == 0
    assert f"wrote {tmp_path / 'ours'}" in capsys.readouterr().out
    assert isinstance(Generator.from_pretrained(tmp_path / "ours"), Generator)


def test_import_release_takes_its_names_from_the_hub(tmp_path, monkeypatch, capsys):
    """From a stand-in of the hub's client: the layout of the release, and only the folder that is needed."""
    asked = []

    def snapshot_download(repository, *, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        folder = tmp_path / "hub/models/gen/jax/latent_L_sota"
        folder.mkdir(parents=True)
        for name in ("metadata.json", "ema_params.msgpack"):
            (folder / name).write_bytes((RELEASE / "params_ema" / name).read_bytes())
        return tmp_path / "hub"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    command = ["import-release", "latent_L_sota", str(tmp_path / "ours"), "--revision", "abc"]
    assert cli.main(command) == 0
    assert asked == [("Goodeat/drifting", "abc", ["models/gen/jax/latent_L_sota/*"])]
    assert (tmp_path / "ours/diffusion_pytorch_model.safetensors").exists()


def test_without_a_network_the_way_out_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert cli.main(["import-release", "mae_latent_640", str(tmp_path / "ours")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "mae_latent_640" in error and "models/mae/jax/mae_latent_640/" in error


@pytest.mark.parametrize("name", ["metadata.json", "ema_params.msgpack"])
def test_truncated_files_are_named_and_nothing_is_written(tmp_path, capsys, name):
    for file in (RELEASE / "params_ema").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    assert cli.main(["import-release", str(tmp_path), str(tmp_path / "ours")]) == 2
    assert name in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_import_prior(tmp_path, capsys):
    assert cli.main(["import-prior", str(CHECKPOINT), str(tmp_path / "ours")]) == 0
    out = capsys.readouterr().out
    assert f"wrote {tmp_path / 'ours'}" in out and f"mae.source={tmp_path / 'ours'}" in out
    model = LatentMAE.from_pretrained(tmp_path / "ours")
    assert isinstance(model, SinkhornMAE)
    shadow = torch.load(CHECKPOINT, weights_only=True)["ema"]["shadow"]
    assert torch.equal(model.encoder.stem.conv.weight, shadow["encoder.conv1.weight"])
    assert json.loads((tmp_path / "ours/config.json").read_text())["_class_name"] == "SinkhornMAE"
    assert cli.main(["import-prior", str(tmp_path / "nothing.pt"), str(tmp_path / "x")]) == 2
    assert "nothing.pt" in capsys.readouterr().err
