"""Artifacts of other revisions, and `make repro`, in repositories of several shapes; real Git and DVC."""

import os
import shutil
import subprocess
import sys

import pytest
from complaints import complaint
from imports import ROOT

from drift.sharing.revisions import fetch_revision

STAGE = """\
stages:
  make:
    cmd: mkdir -p artifacts/generator && cp given artifacts/generator/x
    deps: [given]
    outs: [artifacts/generator]
"""


def run(*command, check=True):
    done = subprocess.run(command, capture_output=True, text=True)
    assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture
def outer(tmp_path, monkeypatch):
    """A folder that is no Git repository yet, and Git without settings of this machine."""
    for name, value in {
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CEILING_DIRECTORIES": str(tmp_path),
        "DVC_NO_ANALYTICS": "1",
        "DVC_GLOBAL_CONFIG_DIR": str(tmp_path / "global"),
        "DVC_SITE_CACHE_DIR": str(tmp_path / "site"),
    }.items():
        monkeypatch.setenv(name, value)
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "drift")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "drift@example.org")
    (tmp_path / "repository").mkdir()
    monkeypatch.chdir(tmp_path / "repository")
    return tmp_path / "repository"


def start_project(folder, monkeypatch):
    """Two commits, tagged one and two, each with what `dvc repro` has made of another input."""
    run("git", "init", "--quiet")
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(folder)
    (folder / ".dvc").mkdir()  # what dvc init makes
    (folder / ".dvc/.gitignore").write_text("/config.local\n/tmp\n/cache\n")
    (folder / ".dvc/config").touch()
    (folder / "dvc.yaml").write_text(STAGE)
    for number in ("one", "two"):
        (folder / "given").write_text(number)
        run(sys.executable, "-m", "dvc", "repro", "--quiet")
        run("git", "add", "--all")
        run("git", "commit", "--quiet", "--message", number)
        run("git", "tag", number)


@pytest.mark.parametrize("below", ["", "teams/some project"])
@pytest.mark.parametrize("cache", ["own", "elsewhere"])
def test_a_project_may_be_a_subfolder(outer, monkeypatch, below, cache):
    start_project(outer / below, monkeypatch)
    if cache == "elsewhere":
        shutil.move(".dvc/cache", outer.parent / "cache")
        run(sys.executable, "-m", "dvc", "config", "--local", "cache.dir", str(outer.parent / "cache"))
    for number in ("one", "two"):
        assert (fetch_revision("artifacts/generator", number) / "x").read_text() == number
    told = complaint(lambda: fetch_revision("artifacts/other", "one"))
    assert (
        told.startswith("artifacts/other as of one: DVC cannot get it (") and "artifacts/other" in told[40:]
    )
    assert "troubles" not in told
    assert "three: no revision or experiment" in complaint(lambda: fetch_revision("artifacts", "three"))
    shutil.copyfile(ROOT / "Makefile", "Makefile")
    assert run("make", "git").stdout == ""


def test_gits_reason_is_handed_on(outer, monkeypatch):
    shutil.copyfile(ROOT / "Makefile", outer / "Makefile")
    made = run("make", "git", check=False)
    assert made.returncode and "or run: git init && git add -A && git commit" in made.stderr
    assert "--rev main: git says: fatal: not a git repository" in complaint(
        lambda: fetch_revision("x", "main")
    )
    start_project(outer, monkeypatch)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # Git's own, as if of another user
    for said in (
        complaint(lambda: fetch_revision("artifacts", "one")),
        run("make", "git", check=False).stderr,
    ):
        assert "git says: fatal: detected dubious ownership in repository" in said
        assert f"git config --global --add safe.directory {outer}" in said
        assert "git init" not in said
    monkeypatch.setenv("PATH", str(outer))
    assert "needs git, which is not installed" in complaint(lambda: fetch_revision("artifacts", "one"))
