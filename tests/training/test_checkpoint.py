"""Checkpoints: whole or absent, the newest whole one is used, and a model of another shape is refused."""

import errno
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from drift.runtime.errors import UserError
from drift.training.checkpoint import Checkpoints, load


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"model.weight": torch.full((40, 30), value), "model.steps": torch.arange(4)}


def save(folder: Path, *steps: int, keep_every: int = 0) -> None:
    with Checkpoints(folder, keep_every=keep_every) as checkpoints:
        for step in steps:
            checkpoints.save(step, tensors(step), {"note": f"after {step}"})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_is_loaded_and_two_are_kept(tmp_path):
    assert Checkpoints(tmp_path / "absent").newest() is None
    save(tmp_path, 10, 20, 30)
    assert names(tmp_path) == ["step-00000020", "step-00000030"]
    saved, found = Checkpoints(tmp_path).newest(), tensors(0)
    assert saved.step == 30 and saved.state == {"note": "after 30"}
    before = found["model.weight"].data_ptr()
    load(saved, found)
    assert (found["model.weight"] == 30).all() and found["model.weight"].data_ptr() == before
    assert found["model.steps"].dtype == torch.int64 and found["model.steps"].tolist() == [0, 1, 2, 3]


def test_every_so_many_steps_one_is_kept(tmp_path):
    save(tmp_path, *range(10, 90, 10), keep_every=30)
    assert [int(name[5:]) for name in names(tmp_path)] == [30, 60, 70, 80]


def test_what_changes_after_the_call_is_not_in_it(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        state = tensors(1)
        checkpoints.save(1, state, {})
        state["model.weight"].fill_(2)
    found = tensors(0)
    load(Checkpoints(tmp_path).newest(), found)
    assert (found["model.weight"] == 1).all()


def damage_bit(path: Path) -> None:
    """Of a weight: the file is as long as before."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 5),
    "empty": lambda path: os.truncate(path, 0),
    "missing": lambda path: path.unlink(),
    "bit": damage_bit,
    "files": lambda path: (path.parent / "files.json").write_text('{"files"'),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_one_is_reported_and_the_one_before_is_used(tmp_path, capsys, damage):
    save(tmp_path, 10, 20, 30, 40, keep_every=10)
    for step in (30, 40):
        damage(max((tmp_path / f"step-{step:08d}").glob("*.distcp"), key=lambda path: path.stat().st_size))
    assert Checkpoints(tmp_path).newest().step == 20
    assert f"{tmp_path / 'step-00000040'}: damaged (" in capsys.readouterr().out
    save(tmp_path, 25)  # damaged ones are not kept in the place of whole ones
    assert names(tmp_path) == ["step-00000020", "step-00000025"]
    for path in tmp_path.iterdir():
        (path / "files.json").unlink()
    assert Checkpoints(tmp_path).newest() is None
    assert "no checkpoint there is whole; starting from step 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [{"model.weight": torch.zeros(30, 40)}, {"model.bias": torch.zeros(3)}, {"model.weight": None}],
    ids=["shape", "more", "fewer"],
)
def test_another_model_is_refused_with_file_name_and_way_out(tmp_path, change):
    save(tmp_path, 10)
    expected = {name: tensor for name, tensor in {**tensors(0), **change}.items() if tensor is not None}
    with pytest.raises(UserError, match=r"step-00000010: model\.\w+ is .* --fresh$"):
        load(Checkpoints(tmp_path).newest(), expected)


def test_a_full_disk_leaves_the_last_checkpoint_and_no_half_one(tmp_path):
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = Checkpoints(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # as a full disk, but for the number
    try:
        checkpoints.save(2, tensors(2), {})
        with pytest.raises(OSError) as caught:
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(tmp_path / "tmp-00000002")
    assert names(tmp_path) == ["step-00000001"]
    assert checkpoints.newest().step == 1


KILLED = """
import sys, torch
from pathlib import Path
from drift.training.checkpoint import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]))
state = {str(i): torch.zeros(300_000) for i in range(20)}
for step in range(1, 10_000):
    for tensor in state.values():
        tensor.fill_(step)
    checkpoints.save(step, state, {})
"""


@pytest.mark.slow
def test_kills_leave_a_whole_checkpoint_of_one_step(tmp_path):
    reached = 0
    for kill in range(6):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
        while not list(tmp_path.glob("step-*")) or (kill == 0 and len(list(tmp_path.glob("step-*"))) < 2):
            time.sleep(0.05)
        time.sleep(0.3 + 0.07 * kill)
        process.kill()
        process.wait()
        saved = Checkpoints(tmp_path).newest()
        found = {str(i): torch.zeros(300_000) for i in range(20)}
        load(saved, found)
        assert all((tensor == saved.step).all() for tensor in found.values())
        reached = max(reached, saved.step)
    assert reached > 1
