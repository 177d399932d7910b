"""Samples measured while a generator trains: the numbers of the fid stage, and a kill in the middle."""

import csv
import json
from pathlib import Path

import pytest
from project import compare

from drift.evaluation.sweep import Sweep
from drift.training.drift import GeneratorTraining
from drift.training.log import read_log

DRIFT = ("--latents", "artifacts/latents/center", "--mae", "artifacts/mae")


def test_samples_are_measured_while_it_trains_as_the_fid_stage_measures_them(project, monkeypatch):
    """The last evaluation is that of the weights that the stage hands on; the best ones are a folder."""
    monkeypatch.setenv("DRIFT_WORK_DIR", "elsewhere")  # where it is not finished already
    evaluated = {"evaluate_every": 3, "evaluate_images": 80, "evaluate_omegas": [1.0, 2.0]}
    project.settings(drift=evaluated)
    project.main(
        "drift", *DRIFT, "--out", "other/generator", "--plot", "other/drift.csv", "--fid-plot", "fid.csv"
    )
    measured = [line for line in read_log(Path("other/generator/logs.jsonl")) if "fid" in line]
    assert [line["step"] for line in measured] == [2, 5, 7]
    with Path("plots/fid_sweep.csv").open() as file:
        sweep = {float(row["omega"]): row for row in csv.DictReader(file)}
    for omega in (1.0, 2.0):
        assert measured[-1][f"fid_{omega:g}"] == pytest.approx(float(sweep[omega]["fid"]), rel=1e-9)
    of_best = sweep[measured[-1]["omega"]]
    assert measured[-1]["accuracy"] == float(of_best["accuracy"])
    assert measured[-1]["fid"] == min(measured[-1]["fid_1"], measured[-1]["fid_2"])
    with Path("fid.csv").open() as file:
        assert [float(row["fid"]) for row in csv.DictReader(file)] == pytest.approx(
            [m["fid"] for m in measured], rel=1e-5
        )
    best = min(measured, key=lambda line: line["fid"])
    found = json.loads(Path("other/generator/best/evaluation.json").read_text())
    files = [path for path in Path("other/generator").rglob("*") if path.is_file()]
    assert len({path.stat().st_mode for path in files}) == 1, "of weights, others may read less"
    assert (found["fid"], found["done"]) == (best["fid"], best["step"] + 1)
    pictures = sorted(path.name for path in Path().glob("elsewhere/drift/*/samples/*.png"))
    assert pictures == ["00000003.png", "00000006.png", "00000008.png"]
    # The folder of the best is measured like any generator
    project.settings(fid={"omegas": [best["omega"]]})
    outputs = ("--plots", "best", "--report", "best/page.html")
    project.main("fid", "--generator", "other/generator/best", "--out", "best/fid.json", *outputs)
    assert json.loads(Path("best/fid.json").read_text())["fid"] == pytest.approx(best["fid"], rel=1e-9)


def test_a_run_that_is_killed_while_it_is_measured_goes_on_to_the_same_bits(project, monkeypatch):
    """No step is taken twice: the checkpoint is written before the evaluation."""
    project.settings(drift={"evaluate_every": 3, "evaluate_images": 80}, hardware={"checkpoint_every": 100})
    monkeypatch.setenv("DRIFT_WORK_DIR", "first")
    plots = ("--plot", "other/drift.csv", "--fid-plot", "other/fid.csv")
    project.main("drift", *DRIFT, "--out", "other/whole", *plots)
    monkeypatch.setenv("DRIFT_WORK_DIR", "elsewhere")
    run, measured = Sweep.run, []

    def killed_the_second_time(sweep, work, on_images):
        entries = run(sweep, work, on_images)
        measured.append(entries)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return entries

    monkeypatch.setattr(Sweep, "run", killed_the_second_time)
    with pytest.raises(KeyboardInterrupt):
        project.main("drift", *DRIFT, "--out", "other/killed", *plots)
    steps: list[int] = []
    prepare = GeneratorTraining.prepare
    monkeypatch.setattr(GeneratorTraining, "prepare", lambda t, step: steps.append(step) or prepare(t, step))
    project.main("drift", *DRIFT, "--out", "other/killed", *plots)
    assert steps == [6, 7] and len(measured) == 4
    measured = [line["step"] for line in read_log(Path("other/killed/logs.jsonl")) if "fid" in line]
    assert measured == [2, 5, 7]
    assert not compare(Path("other/whole"), Path("other/killed"), without=("settings.yaml",))
