"""`drift study`: its answers and complaints, and a sweep with real DVC."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from imports import ROOT

from drift import cli

RECORDED = ROOT / "tests/evaluation/experiments.json"
TRAIN = """
import json, random, yaml
p = yaml.safe_load(open("params.yaml"))
noise = random.Random(p["seed"]).uniform(0, 0.02)
json.dump({"row": 1.0, "sinkhorn": 0.5}[p["coupling"]] + noise, open("model.json", "w"))
"""
MEASURE = """
import json, pathlib
pathlib.Path("metrics").mkdir(exist_ok=True)
json.dump({"fid": json.load(open("model.json")), "omega": 1.0}, open("metrics/fid.json", "w"))
"""
STAGES = {
    "train": {
        "cmd": "python train.py",
        "deps": ["train.py"],
        "params": ["seed", "coupling"],
        "outs": ["model.json"],
    },
    "measure": {
        "cmd": "python measure.py",
        "deps": ["measure.py", "model.json"],
        "metrics": [{"metrics/fid.json": {"cache": False}}],
    },
}


@pytest.fixture
def dvc(monkeypatch):
    """What DVC answers."""
    answer = SimpleNamespace(returncode=0, stdout=RECORDED.read_text(), stderr="")
    asked = []
    monkeypatch.setattr("subprocess.run", lambda command, **how: asked.append(command) or answer)
    answer.asked = asked
    return answer


def test_a_study(dvc, capsys):
    assert cli.main(["study"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split("|")[1:4:2] == [" settings                   ", " fid                          "]
    assert said[2].startswith("| coupling=partial_two_sided | 3     | 0.5465 ± 0.033 ")
    assert said[-2:] == [
        "11 experiments; left out: 2 failed, 1 queued",
        "warning: they differ in code or data as well: measure.py",
    ]
    assert dvc.asked == [[sys.executable, "-m", "dvc", "exp", "show", "--json"]]
    assert cli.main(["study", "--rev", "HEAD~1", "--against", "coupling=row", "--metrics", "fid"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["|", "settings", "|", "seeds", "|", "fid", "|"]
    assert "coupling=row " in said[2] and "better" in said[3]
    assert dvc.asked[1][-2:] == ["--rev", "HEAD~1"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--metrics", "fid", "fidd"], "--metrics fidd: no experiment has it; there are accuracy, fid"),
        (["--against", "coupling"], "--against coupling: no experiment has these settings; KEY=VALUE is"),
        (
            ["--against", "drift.steps=10", "coupling=rwo"],
            "no experiment has these settings; there are coupling=partial_two_sided, coupling=row, ",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments, told, dvc, capsys):
    assert cli.main(["study", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_without_experiments_the_way_out_is_told(dvc, capsys):
    shown = json.loads(dvc.stdout)
    waiting = [one for one in shown[1]["experiments"] if (one["executor"] or {}).get("state") == "failed"]
    for left, told in ((waiting, "(2 failed)"), (None, "(there are none)")):
        shown[1]["experiments"] = left
        dvc.stdout = json.dumps(shown)
        assert cli.main(["study"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: HEAD: no experiment of it has been measured {told}; make study")
    dvc.returncode, dvc.stderr = 253, "WARNING: x\nERROR: you are not inside of a DVC repository\n"
    assert cli.main(["study"]) == 2
    said = (
        "error: DVC shows no experiments: you are not inside of a DVC repository; run this in the project's"
    )
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.slow
def test_a_sweep_with_real_dvc(tmp_path, monkeypatch, capsys):
    """`make study` on two stages; the workspace stays as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "drift")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "drift@example.org")

    def run(*command):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    assert cli.main(["study"]) == 2
    assert "not inside of a DVC repository" in capsys.readouterr().err
    run("git", "init", "--quiet")
    run("dvc", "init", "--quiet")
    Path("train.py").write_text(TRAIN)
    Path("measure.py").write_text(MEASURE)
    Path("params.yaml").write_text(yaml.safe_dump({"seed": 0, "coupling": "row"}))
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}))
    run("dvc", "repro")
    run("git", "add", "--all")
    run("git", "commit", "--quiet", "--message", "state")
    assert cli.main(["study"]) == 2
    assert "(there are none)" in capsys.readouterr().err

    makefile = (ROOT / "Makefile").read_text().replace("study: git setup", "study:")
    Path(tmp_path, ".git/Makefile").write_text(makefile)
    said = run("make", "-f", ".git/Makefile", "study", "SWEEP=seed=0,1 coupling=row,sinkhorn")
    *_, head, _, row, sinkhorn, _, counted = said.splitlines()
    assert head.split() == ["|", "settings", "|", "seeds", "|", "fid", "|"]
    assert row.startswith("| coupling=row      | 2     | 1.0")
    assert sinkhorn.startswith("| coupling=sinkhorn | 2     | 0.5") and "better" in sinkhorn
    assert counted == "4 experiments"
    assert run("git", "status", "--short") == ""
