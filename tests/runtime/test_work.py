"""Work folders: what is resumed, what starts over, and what is written beside an artifact."""

import os
import shutil
import subprocess
import sys

import pytest
from imports import ROOT

from drift.runtime import work as work_module
from drift.runtime.errors import UserError
from drift.runtime.work import Work, fingerprint, read_note, settings_in_force, without_words
from drift.runtime.yaml_files import read_yaml


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DRIFT_WORK_DIR", raising=False)
    use_code(monkeypatch, "code-1")


def use_code(monkeypatch, digest):
    monkeypatch.setattr(work_module, "code_digest", lambda: digest)


def leave(inputs, name="progress", **options):
    """A run that leaves a file behind and is cut off."""
    with Work("stage", inputs, **options) as work:
        (work.folder / name).touch()
    return work.folder


def finish(inputs, destination, **options):
    with Work("stage", inputs, **options) as work:
        (work.folder / "export").mkdir()
        (work.folder / "progress").touch()
        work.publish(work.folder / "export", destination)
    return work


def settings_of(folder):
    """As DVC reads YAML."""
    return read_yaml(folder / "settings.yaml", "")


def test_fingerprint_depends_on_content_not_on_order():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_an_unfinished_run_goes_on_and_another_starts_afresh():
    folder = leave({"lr": 1})
    with Work("stage", {"lr": 1}) as same, Work("stage", {"lr": 2}) as other:
        assert same.folder == folder and (same.folder / "progress").exists()
        assert not (other.folder / "progress").exists()


def test_fresh_starts_over_and_keeps_what_was_there(capsys):
    leave({"lr": 1})
    leave({"lr": 1}, name="second", fresh=True)
    with Work("stage", {"lr": 1}, fresh=True) as work:
        assert {path.name for path in work.folder.iterdir()} == {"work.json"}
    first, second = (work.folder.with_name(f"{work.folder.name}-{number}") for number in (1, 2))
    assert (first / "progress").exists() and (second / "second").exists()
    assert str(second) in capsys.readouterr().out


def test_changed_code_and_remarks_are_shown_and_recorded(monkeypatch, capsys, tmp_path):
    leave({"lr": 1})
    use_code(monkeypatch, "code-2")
    work = finish({"lr": 1}, tmp_path / "out", remarks=["without effect here: a (b is c)"])
    assert work.code == ["code-1", "code-2"]
    output = capsys.readouterr().out
    assert "the code has changed" in output
    assert output.count("stage: without effect here: a (b is c)\n") == 1
    settings = settings_of(tmp_path / "out")
    assert settings["how"]["code"] == ["code-1", "code-2"]
    assert settings["how"]["remarks"] == ["without effect here: a (b is c)"]
    assert settings["decides"] == {"lr": 1}
    assert work.folder == Work("stage", {"lr": 1}).folder  # neither is part of the fingerprint


def test_a_finished_run_gives_its_result_again(tmp_path, capsys):
    finish({"lr": 1}, tmp_path / "out")
    (tmp_path / "dvc.lock").touch()  # newer, by another stage or git pull: no sign that DVC has the result
    with Work("stage", {"lr": 1}) as work:
        assert (work.folder / "progress").exists()
    assert "finished already" in capsys.readouterr().out
    assert read_note(work.folder)["finished"]


def test_a_finished_run_of_other_code_starts_over_and_is_kept(monkeypatch, tmp_path):
    finish({"lr": 1}, tmp_path / "out")
    use_code(monkeypatch, "code-2")
    with Work("stage", {"lr": 1}) as work:
        assert not (work.folder / "progress").exists()
        assert work.code == ["code-2"]
    assert (work.folder.with_name(f"{work.folder.name}-1") / "progress").exists()


def test_finished_work_of_other_settings_is_kept_and_counted(tmp_path, capsys):
    done = finish({"lr": 1}, tmp_path / "out").folder
    (done / "weights").write_bytes(bytes(10**8))
    kept = leave({"lr": 2})
    with Work("stage", {"lr": 3}):
        assert (done / "progress").exists() and (kept / "progress").exists()
    assert "1 more in .work/stage, 0.1 GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ("# a comment\ndef scale(x, by=2.0):  # another\n    return x * by\n", True),
        ('"""A module."""\n\n\ndef scale(x, by=2.0):\n    """Larger."""\n    return (x * by)\n', True),
        ("def scale(x, by=2.5):\n    return x * by\n", False),
        ("def scale(x, by=2.0):\n    return x * by\nBY = 1\n", False),
    ],
)
def test_the_code_is_its_statements_and_not_its_words(other, same):
    code = "def scale(x, by=2.0):\n    return x * by\n"
    assert (without_words(code) == without_words(other)) is same


def test_a_changed_comment_in_an_imported_module_changes_no_digest(tmp_path):
    copy = shutil.copytree(ROOT / "drift", tmp_path / "drift", ignore=shutil.ignore_patterns("__pycache__"))

    def digest_after(name, line):
        with (copy / name).open("a") as file:
            file.write(line)
        program = "import drift.data.images, drift.runtime.work as w; print(w.code_digest())"
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.check_output([sys.executable, "-c", program], cwd=tmp_path, env=environment)

    before = digest_after("data/images.py", "# a comment\n")
    assert digest_after("runtime/files.py", "PLUMBING = True\n") == before
    assert digest_after("data/images.py", "ANOTHER = True\n") != before


def test_settings_beside_the_artifact_have_the_same_bytes_each_time(tmp_path):
    inputs = {"lr": 1e-5, "layers": [1, 2], "digest": "1234567890123e45", "name": "ö", "x": None, "no": "no"}
    finish(inputs, tmp_path / "a")
    leave(inputs, fresh=True)
    finish(inputs, tmp_path / "b")
    assert (tmp_path / "a" / "settings.yaml").read_bytes() == (tmp_path / "b" / "settings.yaml").read_bytes()
    assert settings_of(tmp_path / "a")["decides"] == inputs


def test_a_settings_file_keeps_the_defaults_of_its_time_where_older_ones_have_none(tmp_path):
    with Work("stage", {"seed": 1, "mae": {"lr": 1}}) as work:
        (work.folder / "export").mkdir()
        work.publish(work.folder / "export", tmp_path / "a", {"mae": {"lr": 1, "width": 8}})
    assert settings_in_force(settings_of(tmp_path / "a")) == {"seed": 1, "mae": {"lr": 1, "width": 8}}
    assert settings_in_force({"decides": {"mae": {"lr": 1}}}) == {"mae": {"lr": 1}}


def test_a_second_run_at_the_same_place_is_refused():
    told = rf"another run of stage .*process {os.getpid()} on "
    with Work("stage", {"lr": 1}), pytest.raises(UserError, match=told):
        leave({"lr": 1})


def test_drift_work_dir_moves_the_folder_and_must_be_writable(tmp_path, monkeypatch):
    monkeypatch.setenv("DRIFT_WORK_DIR", str(tmp_path / "elsewhere"))
    assert leave({"lr": 1}).is_relative_to(tmp_path / "elsewhere" / "stage")
    (tmp_path / "file").touch()
    monkeypatch.setenv("DRIFT_WORK_DIR", str(tmp_path / "file" / "work"))
    with pytest.raises(UserError, match="file/work"):
        leave({"lr": 1})
