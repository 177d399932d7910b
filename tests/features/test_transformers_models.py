"""Models of transformers from folders and from the hub, and what is refused."""

import shutil
import sys

import huggingface_hub
import pytest
import torch
from complaints import complaint
from safetensors.torch import load_file, save_file
from transformers import ConvNextV2Config, ConvNextV2ForImageClassification, ConvNextV2Model

from drift.features.pretrained import transformers_model

WEIGHTS = "model.safetensors"
KINDS = {"convnextv2": "ConvNextV2Model"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    config = ConvNextV2Config(depths=[1, 1, 1, 1], hidden_sizes=[4, 4, 4, 4])
    folder = tmp_path_factory.mktemp("saved")
    ConvNextV2ForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def test_weights_are_those_of_the_file_in_float32_and_without_the_head(folder, tmp_path):
    model = transformers_model(folder, None, KINDS)
    expected = load_file(folder / WEIGHTS)
    assert type(model) is ConvNextV2Model and not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[f"convnextv2.{name}"])
    model.half().save_pretrained(tmp_path / "half")
    assert {p.dtype for p in transformers_model(tmp_path / "half", None, KINDS).parameters()} == {
        torch.float32
    }


def test_ids_go_through_the_hub_with_their_revision(folder, monkeypatch):
    def snapshot_download(repository, *, revision, allow_patterns):
        assert (repository, revision) == ("somebody/convnext", "main")
        assert all(any(path.match(pattern) for pattern in allow_patterns) for path in folder.iterdir())
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert type(transformers_model("somebody/convnext", "main", KINDS)) is ConvNextV2Model


def change_weights(folder, **changes):
    weights = {name: t for name, t in load_file(folder / WEIGHTS).items() if name not in changes}
    weights |= {name: tensor for name, tensor in changes.items() if tensor is not None}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def only_a_pickle(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


NORM = "convnextv2.layernorm.weight"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda folder: change_weights(folder, **{NORM: None}),
            "layernorm.weight is missing or of another shape, and 0 more",
        ),
        (
            lambda folder: change_weights(folder, **{NORM: torch.ones(3)}),
            "layernorm.weight is missing or of another shape, and 0 more",
        ),
        (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]), "metadata"),
        (only_a_pickle, WEIGHTS),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "line 1"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "type bert"),
    ],
)
def test_what_is_damaged_is_one_line_with_the_folder(folder, damage, said):
    damage(folder)
    message = complaint(lambda: transformers_model(folder, None, KINDS))
    assert said in message and str(folder) in message


def test_without_transformers_or_the_hub_one_line_says_the_way_out(folder, monkeypatch):
    def snapshot_download(*_, **__):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    message = complaint(lambda: transformers_model("somebody/convnext", "v2", KINDS))
    assert "somebody/convnext" in message and "revision v2 (no network)" in message
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = complaint(lambda: transformers_model(folder, None, KINDS))
    assert "pip install -c constraints.txt -e '.[features]'" in message and str(folder) in message
