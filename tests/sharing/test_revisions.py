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


def dvc(*arguments):
    return run(sys.executable, "-m", "dvc", *arguments)


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
        **{f"GIT_{who}_NAME": "drift" for who in ("AUTHOR", "COMMITTER")},
        **{f"GIT_{who}_EMAIL": "drift@example.org" for who in ("AUTHOR", "COMMITTER")},
    }.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "repository").mkdir()
    monkeypatch.chdir(tmp_path / "repository")
    return tmp_path / "repository"


@pytest.mark.slow
@pytest.mark.parametrize("below", ["", "teams/some project"])
def test_a_project_may_be_a_subfolder(outer, monkeypatch, below):
    """Two commits, each with what `dvc repro` made of another input, and a cache that lies elsewhere."""
    run("git", "init", "--quiet")
    folder = outer / below
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(folder)
    (folder / ".dvc").mkdir()  # what dvc init makes
    (folder / ".dvc/.gitignore").write_text("/config.local\n/tmp\n/cache\n")
    (folder / ".dvc/config").touch()
    (folder / "dvc.yaml").write_text(STAGE)
    dvc("config", "--local", "cache.dir", str(outer.parent / "cache"))
    for number in ("one", "two"):
        (folder / "given").write_text(number)
        dvc("repro", "--quiet")
        run("git", "add", "--all")
        run("git", "commit", "--quiet", "--message", number)
        run("git", "tag", number)
    for revision in ("one", "two", "one"):  # at last from the work folder
        assert (fetch_revision("artifacts/generator", revision) / "x").read_text() == revision
    (folder / "given").write_text("three")
    dvc("exp", "run", "--quiet", "--name", "tried")
    assert (fetch_revision(folder / "artifacts/generator", "tried") / "x").read_text() == "three"

    assert complaint(lambda: fetch_revision("artifacts/other", "one")).startswith(
        "artifacts/other as of one: DVC cannot get it (it has no folder artifacts/other); "
    )
    assert "unknown Git revision 'none'" in complaint(lambda: fetch_revision("artifacts", "none"))
    for outside in ("../generator", outer.parent, "."):
        assert f"is not below {folder}" in complaint(lambda: fetch_revision(outside, "one"))  # noqa: B023
    shutil.rmtree(folder / ".work")
    shutil.rmtree(outer.parent / "cache")
    assert "No storage files available" in complaint(lambda: fetch_revision("artifacts/generator", "one"))
    assert not list(folder.rglob(".generator*"))
    shutil.copyfile(ROOT / "Makefile", "Makefile")
    assert run("make", "git").stdout == ""


def test_gits_reason_is_handed_on(outer, monkeypatch):
    shutil.copyfile(ROOT / "Makefile", outer / "Makefile")
    made = run("make", "git", check=False)
    assert made.returncode and "or run: git init && git add -A && git commit" in made.stderr
    assert "is not a git repository" in complaint(lambda: fetch_revision("x", "main"))
    run("git", "init", "--quiet")
    (outer / ".dvc").mkdir()
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # Git's own, as if of another user
    said = run("make", "git", check=False).stderr
    assert "git says: fatal: detected dubious ownership in repository" in said
    assert f"git config --global --add safe.directory {outer}" in said and "git init" not in said


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root gives a folder away")
def test_the_repository_of_another_user_is_refused_with_the_reason(outer):
    run("git", "init", "--quiet")
    (outer / ".dvc").mkdir()
    run("git", "commit", "--quiet", "--allow-empty", "--message", "one")
    run("chown", "-R", "1000", str(outer))
    assert "is not owned by current user" in complaint(lambda: fetch_revision("artifacts", "HEAD"))
