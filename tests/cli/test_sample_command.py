"""drift sample: a grid, files, a Git revision, and what it refuses."""

import os
import subprocess
import sys

import numpy as np
import pytest
from imports import ROOT
from PIL import Image
from small_generator import write_generator

from drift import cli
from drift.evaluation.pictures import VISIBLE_SIDE


def test_it_makes_a_grid(generator_folder, pipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "sample",
        str(generator_folder),
        "--classes",
        "cat",
        "0",
        "7",
        "--count",
        "3",
        "--omega",
        "2",
    ]
    assert cli.main([*arguments, "--seed", "5", "--device", "cpu", "--out", "a/grid.png"]) == 0
    out = capsys.readouterr().out
    assert "3 of each: cat (1), tench (0), 7 (2)" in out and "wrote a/grid.png" in out
    grid = np.asarray(Image.open("a/grid.png"))
    side = VISIBLE_SIDE // 16 * 16
    expected = pipe([1] * 3, 2.0, pipe.sample_generators(5, range(3))).images
    right = grid[2 : 2 + side, -(side + 2) : -2]  # the last sample of the first row
    assert np.array_equal(right[::4, ::4], np.asarray(expected[2]))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_class_may_have_a_name_that_the_terminal_cannot_show(tmp_path, encoding):
    """`\\udcff` is how Python reads the byte 0xff in the name of a folder."""
    source = write_generator(tmp_path / "generator", names=["a\udcff", "\u732b", "7"])
    done = subprocess.run(
        [sys.executable, "-m", "drift.cli", "sample", str(source), "--count", "1", "--device", "cpu"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"a\\udcff (0), " in done.stdout and b"wrote outputs/samples.png" in done.stdout
    assert Image.open(tmp_path / "outputs/samples.png").height > 3 * VISIBLE_SIDE - 64


def test_it_writes_files(generator_folder, pipe, tmp_path):
    out = str(tmp_path / "png")
    arguments = ["--classes", "1", "--count", "2", "--files", "--device", "cpu", "--out", out]
    assert cli.main(["sample", str(generator_folder), *arguments]) == 0
    expected = pipe([1] * 2, 1.0, pipe.sample_generators(0, range(2))).images
    files = sorted(file.relative_to(out).as_posix() for file in tmp_path.rglob("*.png"))
    assert files == ["1/000000.png", "1/000001.png"]
    for file, image in zip(files, expected, strict=True):
        assert np.array_equal(np.asarray(Image.open(f"{out}/{file}")), np.asarray(image))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "nowhere"),
        (["--classes", "dog"], "'dog'"),
        (["--classes", "3"], "the classes are 0 to 2"),
        (["--out", "grid.jpg"], "grid.jpg"),
        (["--weights", "ema_0.5"], "ema_05"),
        (["--device", "abacus"], "abacus"),
        (["--vae", "no-vae"], "no-vae"),
    ],
)
def test_it_refuses_in_one_line(refusal, tmp_path, arguments, told):
    assert told in refusal("sample", arguments)
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.slow
def test_samples_of_a_revision(tmp_path, monkeypatch):
    """The generator that was committed, not the one that lies there now."""
    monkeypatch.chdir(tmp_path)
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "drift")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "drift@example.org")

    def run(*command):
        subprocess.run(command, check=True, capture_output=True)

    run("git", "init", "--quiet")
    run(sys.executable, "-m", "dvc", "init", "--quiet")
    write_generator(tmp_path / "artifacts/generator", seed=0)
    run(sys.executable, "-m", "dvc", "add", "--quiet", "artifacts/generator")
    run("git", "add", "--all")
    run("git", "commit", "--quiet", "--message", "one")
    common = ["sample", "--classes", "0", "--count", "2", "--device", "cpu", "--out"]
    assert cli.main([*common, "one.png"]) == 0
    write_generator(tmp_path / "artifacts/generator", seed=1)
    assert cli.main([*common, "now.png"]) == 0
    assert cli.main([*common, "before.png", "--rev", "HEAD"]) == 0
    one, now, before = ((tmp_path / f"{name}.png").read_bytes() for name in ("one", "now", "before"))
    assert one == before != now


@pytest.mark.parametrize("command", [["sample"], ["export", "out", "--no-metrics"]])
def test_the_hub_is_not_asked_for_a_generator_that_is_not_trained_yet(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("drift.interop.pipeline.download", lambda *_, **__: pytest.fail("asked the hub"))
    assert cli.main(command) == 2
    told = "error: artifacts/generator: there is none; dvc repro trains it, dvc pull fetches it"
    assert capsys.readouterr().err.startswith(told)
    assert not list(tmp_path.glob("out*/*"))
