"""TensorBoard's own reader against `logs.jsonl`, a kill included; and runs without the package."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import (
    EventAccumulator as PluginEventAccumulator,
)
from test_loop import Cut, at, cut, run

from drift.runtime.files import write_json
from drift.training.log import RunLog, read_log

WHAT = {"what": "x", "steps": 6}
MANY = {str(number): 1.0 for number in range(49)}


def events(folder):
    return EventAccumulator(str(folder / "tensorboard")).Reload()


def scalars(found, tag):
    return [(event.step, pytest.approx(event.value, rel=1e-6)) for event in found.Scalars(tag)]


def test_events_are_what_the_log_says_after_a_kill(tmp_path):
    """The first writer is not closed, as if killed; the second begins where the checkpoint was."""
    path, settings = tmp_path / "logs.jsonl", {"drift": {"lr": 1e-4}, "temps": [0.02, 0.05]}
    write_json(tmp_path / "work.json", {"decides": settings})
    first, picture = RunLog(path, **WHAT, start=0, active=True), np.zeros((4, 6, 3), np.uint8)
    for step in range(5):
        first.write(step, {"loss": step / 3, "of": {"mean": [float(step), -1.0]}, "sets": MANY})
        if step in (2, 4):
            first.evaluation(step, {"fid": 9.0 - step}, Image.fromarray(picture + np.uint8(step)))
    assert len(events(tmp_path).Scalars("loss")) == 5
    second, other = (RunLog(path, **WHAT, start=3, active=active) for active in (True, False))
    for step in range(3, 6):
        other.write(step, {"loss": -1.0})
        other.evaluation(step, {"fid": -1.0}, Image.fromarray(picture))
        second.write(step, {"loss": 10.0 * step, "of": {"mean": [0.5, float(step)]}})
    second.evaluation(5, {"fid": 3.0}, Image.fromarray(picture + np.uint8(7)))
    found, log = events(tmp_path), [line for line in read_log(path) if "loss" in line]
    assert set(found.Tags()["scalars"]) == {"loss", "of/mean/0", "of/mean/1", "fid"}  # `sets` has too many
    assert scalars(found, "fid") == [(2, 7.0), (5, 3.0)]
    assert scalars(found, "loss") == [(line["step"], line["loss"]) for line in log]
    for i in range(2):
        assert scalars(found, f"of/mean/{i}") == [(line["step"], line["of"]["mean"][i]) for line in log]
    pictures = {
        event.step: Image.open(io.BytesIO(event.encoded_image_string)) for event in found.Images("samples")
    }
    assert {step: np.unique(image).tolist() for step, image in pictures.items()} == {2: [2], 5: [7]}
    assert pictures[5].size == (6, 4)
    (text,) = found.Tensors("settings/text_summary")
    assert text.tensor_proto.string_val[0].decode().splitlines() == [
        "    drift:", "      lr: 0.0001", "    temps:", "    - 0.02", "    - 0.05",
    ]  # fmt: skip


def test_a_training_that_was_cut_has_each_step_once(tmp_path):
    with pytest.raises(Cut):
        run(tmp_path, look=at(5, cut))
    run(tmp_path)  # from step 3
    run(tmp_path)  # finished: nothing to do
    found, log = events(tmp_path), read_log(tmp_path / "logs.jsonl")
    assert [line["step"] for line in log] == list(range(8))
    assert set(found.Tags()["scalars"]) == {"loss", "grad_norm", "lr", *(f"of/mean/{i}" for i in range(3))}
    for tag in ("loss", "grad_norm", "lr"):
        assert scalars(found, tag) == [(line["step"], line[tag]) for line in log]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_a_run_that_begins_anew_drops_what_was_there(tmp_path):
    """As TensorBoard itself reads: it drops texts too."""
    write_json(tmp_path / "work.json", {"decides": {"seed": 0}})
    for value in (1.0, 2.0):  # killed before the first checkpoint
        RunLog(tmp_path / "logs.jsonl", **WHAT, start=0, active=True).write(0, {"loss": value})
    found = PluginEventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.tensor_proto.float_val[0] for event in found.Tensors("loss")] == [2.0]
    assert len(found.Tensors("settings/text_summary")) == 1


def test_without_the_package_nothing_is_written_and_nothing_breaks(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it raises ImportError
    run(tmp_path / "without")
    assert not (tmp_path / "without/tensorboard").exists()
    log = RunLog(tmp_path / "logs.jsonl", **WHAT, start=0, active=True)
    log.evaluation(0, {"fid": 1.0}, Image.fromarray(np.zeros((4, 6, 3), np.uint8)))
    log.close()


def test_it_is_imported_when_it_is_used_and_without_tensorflow(tmp_path):
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('TensorFlow was imported')")
    program = (
        "import sys; from pathlib import Path; from drift.training.log import RunLog\n"
        "log = RunLog(Path(sys.argv[1], 'logs.jsonl'), what='x', steps=1, start=0, active=True)\n"
        "print('tensorboard' in sys.modules)\n"
        "log.write(0, {'loss': 1.0}); print('tensorboard' in sys.modules)"
    )
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(tmp_path)])
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "False\nTrue\n"), done.stderr
    assert len(events(tmp_path).Scalars("loss")) == 1
