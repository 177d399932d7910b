"""The log: one line a step, whole lines only, and columns of it as CSV."""

import json

import torch

from drift.runtime.progress import read_log
from drift.training.log import RunLog, flattened, rebuilt, to_numbers, write_plot


def test_a_resumed_log_has_each_step_once_and_other_processes_write_nothing(tmp_path):
    path = tmp_path / "logs.jsonl"
    what = {"what": "x", "steps": 6}
    first = RunLog(path, **what, start=0, active=True)
    for step in range(5):
        first.write(step, {"loss": float(step)})
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # the process was killed here
    second, other = (RunLog(path, **what, start=3, active=active) for active in (True, False))
    for step in range(3, 6):
        other.write(step, {"loss": -1.0})
        second.write(step, {"loss": 10.0 * step})
    expected = [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]
    assert [(line["step"], line["loss"]) for line in read_log(path)] == expected
    assert {(line["steps"], line["unit"]) for line in read_log(path)} == {(6, "step")}


def test_plot_has_the_columns_of_lines_that_have_them_all(tmp_path):
    lines = [{"step": 0, "loss": 1.25, "lr": 0.001, "time": 3.0}, {"step": 5, "lr": 1.0},
             {"step": 10, "loss": 0.5, "lr": 1e-06}]  # fmt: skip
    (tmp_path / "logs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_plot(tmp_path / "logs.jsonl", tmp_path / "plot.csv", ("loss", "lr"))
    assert (tmp_path / "plot.csv").read_text() == "step,loss,lr\n0,1.25,0.001\n10,0.5,1e-06\n"


def test_trees_become_numbers_and_back():
    third = torch.tensor(1 / 3, requires_grad=True)
    sets = {"a": {"rms": third * torch.ones(2)}, "b": third}
    values = {"loss": third, "rms": torch.arange(2.0), "sets": sets}
    assert to_numbers({**values, "lr": 1 / 7}) == {
        "loss": third.item(),
        "rms": [0.0, 1.0],
        "sets": {"a": {"rms": [0.3333, 0.3333]}, "b": 0.3333},
        "lr": 1 / 7,
    }
    torch.testing.assert_close(rebuilt(values, flattened(values)), values)
