"""The command `drift`: its exit codes, and that watching starts without what is heavy."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from imports import ROOT

from drift import cli
from drift.runtime.errors import UserError

LINE = {"step": 4, "steps": 10, "unit": "step", "loss": 0.5, "time": 1_700_000_000.0}


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "mae" / "0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "logs.jsonl").write_text(json.dumps(LINE) + "\n")
    return tmp_path


def start(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "drift.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_watch_once_as_one_runs_it(work):
    process = start("watch", "--once", env={**os.environ, "DRIFT_WORK_DIR": str(work)})
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    lines = out.splitlines()
    assert lines[:2] == ["mae 01234567  stopped", "  5 of 10 steps (50.0%)"]
    assert lines[2].startswith("  loss 0.5  logged ")


def test_ctrl_c_ends_following_quietly(work):
    process = start("watch", "--follow", "--work", str(work))
    assert "(Ctrl-C ends)" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")


@pytest.mark.parametrize("how", [["--once"], ["--follow", "--interval", "0.01"]])
def test_a_reader_that_goes_away_is_no_error(work, how):
    process = start("watch", *how, "--work", str(work))
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


def test_watch_does_not_wait_for_torch(work):
    program = (
        "import sys; from drift.cli import main; main(['watch', '--work', sys.argv[1]]); "
        "print(sorted({'torch', 'numpy', 'diffusers'} & sys.modules.keys()))"
    )
    out = subprocess.run(
        [sys.executable, "-c", program, work], capture_output=True, text=True, check=True
    ).stdout
    assert out.splitlines()[-1] == "[]"


def test_no_runs_are_no_error(tmp_path, capsys):
    assert cli.main(["watch", "--work", str(tmp_path)]) == 0
    assert str(tmp_path) in capsys.readouterr().out


def test_stages_can_be_chosen(work, capsys):
    assert cli.main(["watch", "--work", str(work), "drift", "fid"]) == 0
    assert capsys.readouterr().out.startswith("no runs of drift, fid in ")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["watch", "mea"], "mea: the stages are encode, mae, drift, fid"),
        (["watch", "--interval", "0"], "0: a number of seconds above 0"),
        (["watch", "--interval", "soon"], "soon: a number of seconds above 0"),
        (["watch", "--once", "--follow"], "not allowed with"),
        (["wacht"], "wacht"),
        ([], "COMMAND"),
    ],
)
def test_a_wrong_argument_is_code_2(arguments, told, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


def test_a_mistake_of_the_user_is_one_line_and_a_bug_keeps_its_traceback(monkeypatch, capsys):
    def fail(error):
        def command(parser):
            """fails"""

            def run(args):
                raise error

            return run

        monkeypatch.setitem(cli._COMMANDS, "fail", command)
        return cli.main(["fail"])

    assert fail(UserError("the thing: value; way out")) == 2
    assert capsys.readouterr().err == "error: the thing: value; way out\n"
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError())


def test_fid_selftest_tells_what_it_found_and_refuses_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DRIFT_WORK_DIR", str(tmp_path / "work"))
    arguments = ["fid-selftest", "--params", "presets/digits.yaml"]
    assert cli.main(arguments) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert "360 images" in lines["reference"]
    assert abs(float(lines["itself"].split(",")[0])) < 1e-6
    for name in ("moved", "scaled"):
        measured, expected = lines[name].split(", expected ")
        assert float(measured) == pytest.approx(float(expected), rel=1e-6)
    assert float(lines["floor"]) > 0

    # What it has measured, on a machine that has the file alone
    copy = shutil.copy(lines["statistics"].split(" (")[0].strip(), tmp_path / "digits.npz")
    settings = Path("presets/digits.yaml").read_text()
    settings = settings.replace("[kid, inception_score, precision_recall]", "[]")
    (tmp_path / "params.yaml").write_text(settings.replace("reference: held_out", f"reference: {copy}"))
    assert cli.main(["fid-selftest", "--params", str(tmp_path / "params.yaml")]) == 0
    elsewhere = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert "360 images" in elsewhere["reference"] and elsewhere["moved"] == lines["moved"]

    broken = np.eye(64)
    broken[0, 1] = broken[1, 0] = 3
    np.savez(tmp_path / "broken.npz", mu=np.zeros(64), sigma=broken)
    settings = settings.replace("reference: held_out", f"reference: {tmp_path}/broken.npz")
    (tmp_path / "params.yaml").write_text(settings)
    assert cli.main(["fid-selftest", "--params", str(tmp_path / "params.yaml")]) == 2
    assert "broken.npz: 'same' gives" in capsys.readouterr().err


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said for name in cli._COMMANDS)
