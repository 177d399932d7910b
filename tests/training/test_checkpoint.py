"""Checkpoints: whole or absent, the newest good one is used, and a model of another shape is refused."""

import errno
import os

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

import drift.training.checkpoint
from drift.runtime.errors import UserError
from drift.training.checkpoint import load_checkpoint, load_optimizer, optimizer_tensors, save_checkpoint


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"model.weight": torch.full((2, 3), value), "queue.rows": torch.arange(4)}


def test_the_newest_is_loaded_and_two_are_kept(tmp_path):
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, tensors(step), {"note": f"after {step}"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000020", "step-00000030"]
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.step == 30 and checkpoint.state["note"] == "after 30"
    assert torch.equal(checkpoint.part("model")["weight"], torch.full((2, 3), 30.0))
    assert checkpoint.part("queue")["rows"].dtype == torch.int64


def test_every_so_many_steps_one_is_kept(tmp_path):
    for step in range(10, 90, 10):
        save_checkpoint(tmp_path, step, tensors(step), keep_every=30)
    assert sorted(int(p.name[5:]) for p in tmp_path.iterdir()) == [30, 60, 70, 80]
    assert load_checkpoint(tmp_path).step == 80


def test_no_checkpoint(tmp_path):
    assert load_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path / "absent") is None


@pytest.mark.parametrize("damage", ["truncate", "empty", "missing", "state", "bit"])
def test_a_damaged_one_is_reported_and_passed_over(tmp_path, capsys, damage):
    save_checkpoint(tmp_path, 10, tensors(10), {})
    newest = save_checkpoint(tmp_path, 20, tensors(20), {})
    file = newest / "tensors.safetensors"
    if damage == "truncate":
        os.truncate(file, file.stat().st_size - 5)
    elif damage == "empty":
        os.truncate(file, 0)
    elif damage == "missing":
        file.unlink()
    elif damage == "bit":  # of a weight: the file is as long and its header as before
        content = bytearray(file.read_bytes())
        content[-50] ^= 1
        file.write_bytes(content)
    else:
        (newest / "state.json").write_text('{"step"')
    assert load_checkpoint(tmp_path).step == 10
    assert f"{newest}: damaged (" in capsys.readouterr().out


def test_damaged_ones_are_not_kept_in_the_place_of_whole_ones(tmp_path, capsys):
    for step in (10, 20, 30, 40):
        save_checkpoint(tmp_path, step, tensors(step), keep_every=10)
    for step in (30, 40):
        os.truncate(tmp_path / f"step-{step:08d}" / "tensors.safetensors", 100)
    assert load_checkpoint(tmp_path).step == 20
    save_checkpoint(tmp_path, 25, tensors(25))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000020", "step-00000025"]
    for path in tmp_path.iterdir():
        (path / "state.json").unlink()
    assert load_checkpoint(tmp_path) is None
    assert "no checkpoint there is whole; starting from step 0" in capsys.readouterr().out


def test_a_write_that_was_cut_off_is_not_a_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 10, tensors(10), {})
    draft = tmp_path / "tmp-00000020"
    draft.mkdir()
    (draft / "tensors.safetensors").write_bytes(b"half")
    assert load_checkpoint(tmp_path).step == 10
    save_checkpoint(tmp_path, 20, tensors(20), {})
    assert load_checkpoint(tmp_path).step == 20 and not draft.exists()


@pytest.mark.parametrize(
    "expected",
    [
        {"weight": torch.zeros(3, 2)},
        {"weight": torch.zeros(2, 3), "bias": torch.zeros(3)},
        {},
    ],
)
def test_another_shape_is_refused_with_file_name_and_way_out(tmp_path, expected):
    save_checkpoint(tmp_path, 10, tensors(10), {})
    with pytest.raises(UserError) as caught:
        load_checkpoint(tmp_path).require("model", expected)
    message = str(caught.value)
    assert "step-00000010" in message and "model." in message and "--fresh" in message
    assert "\n" not in message


def test_optimizer_goes_on_with_the_same_bits(tmp_path):
    def run(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            model(torch.full((4, 3), float(step))).square().sum().backward()
            optimizer.step()

    def fresh():
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    whole, optimizer = fresh()
    run(whole, optimizer, range(6))
    half, optimizer = fresh()
    run(half, optimizer, range(3))
    saved = {f"optimizer.{k}": v for k, v in optimizer_tensors(optimizer).items()}
    saved |= {f"model.{k}": v for k, v in half.state_dict().items()}
    save_checkpoint(tmp_path, 3, saved, {})

    resumed, optimizer = fresh()
    checkpoint = load_checkpoint(tmp_path)
    resumed.load_state_dict(checkpoint.part("model"))
    load_optimizer(optimizer, checkpoint.part("optimizer"))
    run(resumed, optimizer, range(3, 6))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
    ids=["safetensors", "system"],
)
def test_a_full_disk_leaves_the_last_checkpoint_and_no_half_one(tmp_path, monkeypatch, error):
    save_checkpoint(tmp_path, 1, {"a": torch.ones(2)})

    def fail(tensors, path):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(drift.training.checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="No space left") as caught:
        save_checkpoint(tmp_path, 2, {"a": torch.zeros(2)})
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(tmp_path / "tmp-00000002")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert load_checkpoint(tmp_path).step == 1


def test_other_errors_of_safetensors_stay_what_they_are(tmp_path, monkeypatch):
    def fail(tensors, path):
        raise SafetensorError("something else")

    monkeypatch.setattr(drift.training.checkpoint, "save_file", fail)
    with pytest.raises(SafetensorError, match="something else"):
        save_checkpoint(tmp_path, 2, {"a": torch.zeros(2)})
