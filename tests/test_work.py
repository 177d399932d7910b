"""Work folders: what is gone on with, what is started over, and what is written beside an artifact."""

import os
import platform
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from ruamel.yaml import YAML

from drift import work as work_module
from drift.errors import UserError
from drift.work import Holder, Work, fingerprint


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DRIFT_WORK_DIR", raising=False)
    monkeypatch.setattr(work_module, "code_digest", lambda: "code-1")


def leave(decides, name="progress", **options):
    """A run that leaves a file behind and is cut off."""
    with Work("stage", decides, **options) as work:
        (work.folder / name).touch()
    return work.folder


def finish(decides, destination, **options):
    with Work("stage", decides, **options) as work:
        (work.folder / "export").mkdir()
        (work.folder / "export" / "result").write_text("42")
        (work.folder / "progress").touch()
        work.publish(work.folder / "export", destination)
    return work


def test_fingerprint_depends_on_content_not_on_order():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_an_unfinished_run_goes_on_and_another_starts_afresh():
    folder = leave({"lr": 1})
    with Work("stage", {"lr": 1}) as same, Work("stage", {"lr": 2}) as other:
        assert (same.folder / "progress").exists()
        assert same.folder == folder
        assert not (other.folder / "progress").exists()


def test_fresh_throws_away():
    leave({"lr": 1})
    with Work("stage", {"lr": 1}, fresh=True) as work:
        assert not (work.folder / "progress").exists()


def test_changed_code_is_reported_and_recorded_but_goes_on(monkeypatch, capsys, tmp_path):
    leave({"lr": 1})
    monkeypatch.setattr(work_module, "code_digest", lambda: "code-2")
    work = finish({"lr": 1}, tmp_path / "out")
    assert work.code == ["code-1", "code-2"]
    assert "the code has changed" in capsys.readouterr().out
    settings = YAML(typ="safe", pure=True).load(tmp_path / "out" / "settings.yaml")
    assert settings["how"]["code"] == ["code-1", "code-2"]
    assert settings["decides"] == {"lr": 1}


def test_remarks_go_to_the_screen_and_into_the_settings_file(capsys, tmp_path):
    work = finish({"lr": 1}, tmp_path / "out", remarks=["without effect here: a (b is c)"])
    assert capsys.readouterr().out.count("stage: without effect here: a (b is c)\n") == 1
    settings = YAML(typ="safe", pure=True).load(tmp_path / "out" / "settings.yaml")
    assert settings["how"]["remarks"] == ["without effect here: a (b is c)"]
    finish({"lr": 2}, tmp_path / "plain")
    assert "remarks" not in (tmp_path / "plain" / "settings.yaml").read_text()
    assert work.folder == Work("stage", {"lr": 1}).folder  # they decide nothing


def test_a_finished_run_is_exported_again_until_dvc_has_it(tmp_path):
    finish({"lr": 1}, tmp_path / "out")
    with Work("stage", {"lr": 1}) as work:
        assert (work.folder / "progress").exists()
    finish({"lr": 1}, tmp_path / "out")
    lock = tmp_path / "dvc.lock"
    lock.touch()
    os.utime(lock, (time.time() + 5, time.time() + 5))
    with Work("stage", {"lr": 1}) as work:
        assert not (work.folder / "progress").exists()


def test_a_finished_run_of_other_code_starts_over(monkeypatch, tmp_path):
    finish({"lr": 1}, tmp_path / "out")
    monkeypatch.setattr(work_module, "code_digest", lambda: "code-2")
    with Work("stage", {"lr": 1}) as work:
        assert not (work.folder / "progress").exists()
        assert work.code == ["code-2"]


def test_finished_work_of_other_settings_is_cleared_and_unfinished_kept(tmp_path):
    done = finish({"lr": 1}, tmp_path / "out").folder
    kept = leave({"lr": 2})
    with Work("stage", {"lr": 3}):
        assert not done.exists()
        assert (kept / "progress").exists()


def test_settings_beside_the_artifact_have_the_same_bytes_each_time(tmp_path):
    finish({"lr": 1, "layers": [1, 2]}, tmp_path / "a")
    leave({"lr": 1, "layers": [1, 2]}, fresh=True)
    finish({"lr": 1, "layers": [1, 2]}, tmp_path / "b")
    assert (tmp_path / "a" / "settings.yaml").read_bytes() == (tmp_path / "b" / "settings.yaml").read_bytes()


def test_a_second_run_at_the_same_place_is_refused():
    with (
        Work("stage", {"lr": 1}),
        pytest.raises(UserError, match="another run of stage"),
        Work("stage", {"lr": 1}),
    ):
        pass


def test_drift_work_dir_moves_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DRIFT_WORK_DIR", str(tmp_path / "elsewhere"))
    assert leave({"lr": 1}).is_relative_to(tmp_path / "elsewhere" / "stage")


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DRIFT_WORK_DIR", str(tmp_path / "file" / "work"))
    with pytest.raises(UserError, match="file/work"):
        leave({"lr": 1})


def test_who_works_in_a_folder_can_be_seen_without_the_lock():
    began = time.time()
    with Work("stage", {"lr": 1}) as work:
        holder = Holder.of(work.folder)
        assert (holder.host, holder.pid) == (platform.node(), os.getpid())
        assert began <= holder.since <= time.time()
        assert holder.at_work(work.folder) is True
        assert replace(holder, host="another").at_work(work.folder) is None
    assert Holder.of(work.folder) is None
    assert holder.at_work(work.folder) is False  # as a killed run leaves it, whose number another has


def test_a_process_that_is_gone_is_not_at_work():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with Work("stage", {"lr": 1}) as work:
        assert Holder(platform.node(), gone.pid, 0.0).at_work(work.folder) is False


def test_only_the_first_process_says_that_it_works():
    with Work("stage", {"lr": 1}, first=False) as work:
        assert Holder.of(work.folder) is None
