"""The command `drift`: its exit codes, its help, and that watching starts without what is heavy."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_weights import GOLDEN
from imports import ROOT

from drift import cli
from drift.models import LatentMAE
from drift.runtime.errors import UserError

LINE = {"step": 4, "steps": 10, "unit": "step", "loss": 0.5, "time": 1_700_000_000.0}


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "mae/0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "logs.jsonl").write_text(json.dumps(LINE) + "\n")
    return tmp_path


def start(*arguments, **options):
    command = [sys.executable, "-m", "drift.cli", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_watch_once_as_one_runs_it(work):
    process = start("watch", "--once", env={**os.environ, "DRIFT_WORK_DIR": str(work)})
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.startswith("mae 01234567  stopped\n  5 of 10 steps (50.0%)\n  loss 0.5  logged ")


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
    out = subprocess.check_output([sys.executable, "-c", program, work], text=True)
    assert out.splitlines()[-1] == "[]"


def test_stages_can_be_chosen(work, capsys):
    assert cli.main(["watch", "--work", str(work), "drift", "fid"]) == 0
    assert capsys.readouterr().out.startswith("no runs of drift, fid in ")
    assert cli.main(["watch", "mea"]) == 2
    assert "mea: the stages are encode, mae, drift, fid" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["watch", "--interval", "0"], "0: a number above 0 is needed"),
        (["watch", "--interval", "soon"], "soon: a number above 0 is needed"),
        (["sample", "--count", "0"], "0: a whole number above 0 is needed"),
        (["sample", "--omega", "nan"], "nan: a number above 0 is needed"),
        (["adopt", "latents", "x"], "--view"),
        (["adopt", "latents", "x", "--view", "y"], "invalid choice: 'y'"),
        (["inspect"], "WHAT"),
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
        def run(args):
            raise error

        monkeypatch.setattr("drift.cli.clean.run", run)
        return cli.main(["clean"])

    assert fail(UserError("the thing: value; way out")) == 2
    assert capsys.readouterr().err == "error: the thing: value; way out\n"
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError())


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_help_has_an_example_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.split(), "--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    if command:
        assert f"\nexamples:\n  drift {command}" in said
    else:
        assert all(name.split()[0] in said for name in cli.COMMANDS)


def test_fid_selftest_tells_what_it_found_and_refuses_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DRIFT_WORK_DIR", str(tmp_path / "work"))
    assert cli.main(["fid-selftest", "--params", "presets/digits.yaml"]) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert "360 images" in lines["reference"]
    assert abs(float(lines["itself"].split(",")[0])) < 1e-6
    for name in ("moved", "scaled"):
        measured, expected = lines[name].split(", expected ")
        assert float(measured) == pytest.approx(float(expected), rel=1e-6)
    assert float(lines["floor"]) > 0

    def with_reference(reference):
        text = Path("presets/digits.yaml").read_text().replace("held_out\n", f"{reference}\n  metrics: []\n")
        text = text.replace("  metrics: [kid, inception_score, precision_recall]\n", "")
        (tmp_path / "params.yaml").write_text(text)
        return cli.main(["fid-selftest", "--params", str(tmp_path / "params.yaml")])

    # What it has measured, on a machine that has the file alone
    copy = shutil.copy(lines["statistics"].split(" (")[0].strip(), tmp_path / "digits.npz")
    assert with_reference(copy) == 0
    elsewhere = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert "360 images" in elsewhere["reference"] and elsewhere["moved"] == lines["moved"]
    broken = np.eye(64)
    broken[0, 1] = broken[1, 0] = 3
    np.savez(tmp_path / "broken.npz", mu=np.zeros(64), sigma=broken)
    assert with_reference(tmp_path / "broken.npz") == 2
    assert "broken.npz: 'same' gives" in capsys.readouterr().err


RELEASE, CHECKPOINT = GOLDEN / "release_generator", GOLDEN / "prior_mae/ckpt_final.pt"


def test_import_release_takes_its_names_from_the_hub(tmp_path, monkeypatch, capsys):
    """From a stand-in of the hub's client: the layout of the release, and only the folder that is needed."""
    asked = []

    def snapshot_download(repository, *, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        folder = tmp_path / "hub/models/gen/jax/latent_L_sota"
        shutil.copytree(RELEASE / "params_ema", folder)
        return tmp_path / "hub"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    ours = tmp_path / "ours"
    assert cli.main(["import-release", "latent_L_sota", str(ours), "--revision", "abc"]) == 0
    assert asked == [("Goodeat/drifting", "abc", ["models/gen/jax/latent_L_sota/*"])]
    assert f"wrote {ours}" in capsys.readouterr().out and (ours / "config.json").exists()


def test_without_a_network_the_way_out_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert cli.main(["import-release", "mae_latent_640", str(tmp_path / "ours")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "mae_latent_640" in error and "models/mae/jax/mae_latent_640/" in error


def test_a_truncated_file_is_named_and_nothing_is_written(tmp_path, capsys):
    name = "metadata.json"
    source = shutil.copytree(RELEASE / "params_ema", tmp_path / "source")
    os.truncate(source / name, (source / name).stat().st_size // 2)
    assert cli.main(["import-release", str(source), str(tmp_path / "ours")]) == 2
    assert name in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_import_sinkhorn(tmp_path, capsys):
    assert cli.main(["import-sinkhorn", str(CHECKPOINT), str(tmp_path / "ours")]) == 0
    out = capsys.readouterr().out
    assert f"wrote {tmp_path / 'ours'}" in out and f"mae.source={tmp_path / 'ours'}" in out
    shadow = torch.load(CHECKPOINT, weights_only=True)["ema"]["shadow"]
    weights = LatentMAE.from_pretrained(tmp_path / "ours").encoder.stem.conv.weight
    assert torch.equal(weights, shadow["encoder.conv1.weight"])
    assert cli.main(["import-sinkhorn", str(tmp_path / "nothing.pt"), str(tmp_path / "x")]) == 2
    assert "nothing.pt" in capsys.readouterr().err
