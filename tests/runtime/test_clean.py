"""`drift clean` in a real DVC project: what is stored goes, and nothing else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from imports import ROOT

from drift import cli
from drift.runtime import work as work_module
from drift.runtime.clean import find_work, remove_work
from drift.runtime.work import Work, dvc_hash, read_note, work_root

DVC_YAML = """
stages:
  mae:
    cmd: "true"
    outs: [artifacts/mae]
  fid:
    cmd: "true"
    metrics:
      - fid.json: {cache: false}
"""


def run(*command: str) -> None:
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env=environment, capture_output=True)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Two finished runs, of which DVC has the results; an unfinished one, and one that DVC does not know."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder := tmp_path_factory.mktemp("template"))
        patch.delenv("DRIFT_WORK_DIR", raising=False)
        patch.setattr(work_module, "code_digest", lambda: "code")  # not of what other tests import
        run("git", "init", "--quiet")
        run(sys.executable, "-m", "dvc", "init", "--quiet")
        Path("dvc.yaml").write_text(DVC_YAML)
        for inputs in ({"lr": 2}, {"lr": 1}):
            with Work("mae", inputs) as work:
                export = work.folder / "export"
                (export / "sub").mkdir(parents=True)
                for name in ("b", "a", "sub/Z", "ö"):
                    (export / name).write_text(f"{name} of {inputs}")
                work.publish(export, Path("artifacts/mae"))
        with Work("fid", {}) as work:
            Path("fid.json").write_text("{}")
            work.finish(Path("fid.json"))
        with Work("mae", {"lr": 3}) as work:
            (work.folder / "progress").write_bytes(bytes(100))
        run(sys.executable, "-m", "dvc", "commit", "--force", "--quiet")
    return folder


@pytest.fixture
def project(template, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(template, tmp_path / "project"))
    monkeypatch.delenv("DRIFT_WORK_DIR", raising=False)
    monkeypatch.setattr(work_module, "code_digest", lambda: "code")


def stored() -> dict[str, bool]:
    """By stage and settings of a work folder."""
    return {
        f"{work.folder.parent.name} {read_note(work.folder)['decides']}": work.stored
        for work in find_work(work_root())
    }


def test_what_dvc_lock_proves_to_be_stored_goes(project, capsys):
    assert stored() == {"fid {}": True, "mae {'lr': 1}": True, "mae {'lr': 2}": False, "mae {'lr': 3}": False}
    assert cli.main(["clean"]) == 0
    assert "2 of 4 folders" in capsys.readouterr().out and len(stored()) == 4
    assert cli.main(["clean", "--yes"]) == 0
    assert stored() == {"mae {'lr': 2}": False, "mae {'lr': 3}": False}
    output = capsys.readouterr().out
    assert output.count("removed ") == 3
    assert "(not finished)" in output and "(dvc.lock has no such result)" in output
    assert Path("artifacts/mae/a").read_text() == "a of {'lr': 1}"


def test_what_has_gone_from_the_cache_or_changed_in_git_is_no_proof(project):
    cached = dvc_hash(Path("artifacts/mae/a"))
    Path(".dvc/cache/files/md5", cached[:2], cached[2:]).unlink()
    Path("fid.json").write_text("{ }")
    assert not any(stored().values())


def test_a_run_at_work_is_left_alone(project):
    found = find_work(work_root())
    with Work("mae", {"lr": 1}) as work:
        assert not stored()["mae {'lr': 1}"]
        (stale,) = [other for other in found if other.folder == work.folder]
        assert stale.stored and not remove_work(stale)  # it has begun since DVC was asked
        assert work.folder.exists()


def test_without_dvc_lock_or_without_dvc_nothing_goes(project, capsys):
    Path("dvc.lock").unlink()
    assert not any(stored().values())
    shutil.rmtree(".dvc")
    assert cli.main(["clean", "--yes"]) == 2
    assert capsys.readouterr().err.startswith("error: DVC does not say")
    assert len(list(work_root().glob("*/*/work.json"))) == 4
