"""Each benchmark runs, at a size that says nothing of speed."""

import json
from pathlib import Path

import pytest

import benchmarks.encode
import benchmarks.fid
import benchmarks.field
import benchmarks.step
from drift.models.generator import Generator

pytestmark = pytest.mark.slow


def figures(main, folder: Path, *arguments: str) -> dict:
    main([*arguments, "--json", str(folder / "figures.json")])
    return json.loads((folder / "figures.json").read_text())


def test_field(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks.field, "SHAPES", ((4, 16),))
    found = figures(benchmarks.field.main, tmp_path, "--device", "cpu", "--classes", "2", "--repeats", "1")
    assert found["times_of_ours"].keys() == {"vectorised", "wflow_vectorised"}


@pytest.mark.parametrize(
    ("stage", "network", "parts", "changes"),
    [
        ("drift", "generator", {"field", "encoder, backward", "optimizer, EMA"}, ()),
        ("mae", "MAE", {"optimizer, EMA"}, ()),
        ("mae", "MAE", {"optimizer, EMA"}, ("encode.autoencoder=pixels", "mae.input_patch_size=4")),
    ],
)
def test_step(tmp_path, stage, network, parts, changes):
    """The parts of a step add up to it, and a backward pass has twice the FLOPs of the forward pass."""
    how = ("--device", "cpu", "--preset", "presets/digits.yaml")
    how += ("--set", "mae.batch_size=8", "drift.classes_per_step=2", *changes)
    found = figures(benchmarks.step.main, tmp_path, *how, "--stage", stage, "--steps", "3")
    forward, backward = f"{network}, forward", f"{network}, backward"
    assert parts | {forward, backward} <= found["parts"].keys()
    assert sum(found["parts"].values()) == pytest.approx(found["seconds"], rel=0.05)
    assert found["flops"][backward] == pytest.approx(2 * found["flops"][forward], rel=0.1)


def test_encode(tmp_path):
    how = ("--count", "4", "--workers", "0", "1", "--set", "encode.autoencoder=pretrained/digits_vae")
    found = figures(benchmarks.encode.main, tmp_path, *how, "data.image_size=32", "hardware.encode_batch=2")
    assert [row["workers"] for row in found["rows"]] == [0, 1]


def test_fid(tmp_path):
    sizes = {"input_size": 8, "num_classes": 10, "hidden_size": 16, "depth": 1, "num_heads": 2}
    Generator(**sizes).save_pretrained(tmp_path / "generator")
    found = figures(
        benchmarks.fid.main,
        tmp_path,
        "--images",
        "80",
        "--generator",
        f"{tmp_path}/generator",
        "--set",
        "fid.omegas=[1]",
    )
    assert found["rows"][0]["images"] == 80
