import errno
import gc
import json
import mmap
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from imports import ROOT

from drift.runtime import files
from drift.runtime.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def refuse_with(number):
    """Takes the place of a system call that a filesystem lacks, or of one that fails."""

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    return refuse


def test_atomic_write_replaces_only_when_the_block_succeeds(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), files.atomic_write(path) as file:
        file.write(b"half of the ")
        raise RuntimeError
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.bin"]
    Path(file.name).write_bytes(b"x" * 100)  # what a killed writer leaves behind
    with files.atomic_write(path) as file:
        Path(file.name).write_bytes(b"new")  # by a writer that wants a name
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and names(tmp_path) == ["a.bin"]


def test_write_json_has_the_same_bytes_for_the_same_content(tmp_path):
    path, content = tmp_path / "a.json", {"b": [1, 2.5], "a": {"y": None, "x": "ö"}}
    files.write_json(path, content)
    text = path.read_bytes()
    assert text.endswith(b"}\n") and json.loads(text) == content
    files.write_json(path, {"a": {"x": "ö", "y": None}, "b": [1, 2.5]})
    assert path.read_bytes() == text
    with pytest.raises(ValueError):
        files.write_json(path, {"loss": float("nan")})
    assert path.read_bytes() == text


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refuse_with(errno.ENOSPC))
    with pytest.raises(OSError) as caught, files.atomic_write(tmp_path / "a.bin"):
        pass
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a.bin"))
    assert names(tmp_path) == []


def refuse_to_rename(monkeypatch, number, refused):
    """As between filesystems (EXDEV), at a mount point (EBUSY) or in an overlay's lower layer (EXDEV)."""
    rename, refuse = os.rename, refuse_with(number)
    monkeypatch.setattr(os, "rename", lambda a, b: (refuse if refused(Path(a), Path(b)) else rename)(a, b))


def between_filesystems(monkeypatch):
    refuse_to_rename(monkeypatch, errno.EXDEV, lambda a, b: a.parent != b.parent)
    monkeypatch.setattr(os, "link", refuse_with(errno.EXDEV))


@pytest.fixture
def work(tmp_path):
    """A finished folder."""
    (tmp_path / "work/new/sub").mkdir(parents=True)
    (tmp_path / "work/new/sub/a").write_text("new")
    return tmp_path / "work/new"


@pytest.fixture
def output(tmp_path):
    """What an earlier run has made."""
    (tmp_path / "artifacts/latents").mkdir(parents=True)
    (tmp_path / "artifacts/latents/old").touch()
    return tmp_path / "artifacts/latents"


def assert_replaced(work, output):
    assert names(output) == ["sub"] and (output / "sub/a").read_text() == "new"
    assert not work.exists() and names(output.parent) == ["latents"]


@pytest.mark.parametrize("other_filesystem", [False, True])
@pytest.mark.parametrize("present", ["nothing", "folder", "file", "link"])
def test_replace_folder(tmp_path, monkeypatch, work, output, present, other_filesystem):
    outside = tmp_path / "outside"
    outside.mkdir()
    if present != "folder":
        shutil.rmtree(output)
    if present == "file":
        output.touch()
    elif present == "link":
        output.symlink_to(outside)
    if other_filesystem:
        between_filesystems(monkeypatch)
    files.replace_folder(work, output)
    assert not output.is_symlink() and outside.exists()
    assert_replaced(work, output)


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV])
def test_a_folder_that_stays_where_it_is_gets_new_contents(monkeypatch, work, output, number):
    refuse_to_rename(monkeypatch, number, lambda a, b: a == output)
    files.check_output(output)
    files.replace_folder(work, output)
    assert_replaced(work, output)


@pytest.mark.parametrize("failure", ["copy", "swap"])
def test_replacing_that_fails_keeps_both_and_leaves_nothing(monkeypatch, work, output, failure):
    between_filesystems(monkeypatch)
    if failure == "swap":
        refuse_to_rename(monkeypatch, errno.EPERM, lambda a, b: a.name == ".latents.replacing")
    else:
        monkeypatch.setattr(shutil, "copyfile", refuse_with(errno.ENOSPC))
    with pytest.raises(OSError) as caught:
        files.replace_folder(work, output)
    assert caught.value.errno == {"copy": errno.ENOSPC, "swap": errno.EPERM}[failure]
    assert names(output.parent) == ["latents"] and names(output) == ["old"]
    assert names(work / "sub") == ["a"]


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="only root may mount")
def test_a_mounted_volume_and_a_mounted_file_take_results(tmp_path, work, output):
    (tmp_path / "volume").mkdir()
    (tmp_path / "volume/stale").touch()
    (tmp_path / "metrics.json").touch()
    program = """
from drift.runtime.files import check_output, replace_folder, write_json
check_output("artifacts/latents")
replace_folder("work/new", "artifacts/latents")
write_json("metrics.json", 42)
"""
    mounts = "mount --bind volume artifacts/latents && touch other && mount --bind other metrics.json"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f'{mounts} && {sys.executable} -c "$PROGRAM" && cat metrics.json'],
        cwd=tmp_path,
        env={**os.environ, "PROGRAM": program, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(done.stderr)
    assert done.stdout == "42\n", done.stderr
    assert names(tmp_path / "volume") == ["sub"] and names(output.parent) == ["latents"]


def test_a_link_out_of_the_repository_is_refused_under_dvc_alone(tmp_path, monkeypatch):
    project, outside = tmp_path / "project", tmp_path / "outside"
    for folder in (project / ".git", project / "sub", project / "inside", outside):
        folder.mkdir(parents=True)
    (project / "sub/artifacts").symlink_to(outside)
    (project / "sub/linked").symlink_to(project / "inside")
    monkeypatch.chdir(project / "sub")
    monkeypatch.delenv("DVC_STAGE", raising=False)
    files.check_output("artifacts/mae")
    monkeypatch.setenv("DVC_STAGE", "mae")
    files.check_output("linked/mae")
    with pytest.raises(UserError, match=rf"artifacts/mae: a link leads to {outside}, out of the Git"):
        files.check_output("artifacts/mae")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_filesystem_without_fsync_will_do(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", refuse_with(number))
    files.write_json(tmp_path / "a.json", 1)
    files.sync(tmp_path)
    (tmp_path / "work").mkdir()
    files.replace_folder(tmp_path / "work", tmp_path / "out")
    np.save(tmp_path / "a.npy", np.zeros((4, 2)))
    files.RowFile(tmp_path / "a.npy").write(1, np.ones((2, 2)))
    assert names(tmp_path) == ["a.json", "a.npy", "out"]


def test_a_linked_folder_is_another_folder_with_the_same_files(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("42")
    for other in ("b", "c"):
        files.link_folder(tmp_path / "a", tmp_path / other)
        assert (tmp_path / other / "file").read_text() == "42"
        monkeypatch.setattr(os, "link", refuse_with(errno.EPERM))
    assert (tmp_path / "b/file").samefile(tmp_path / "a/file")
    shutil.rmtree(tmp_path / "a")
    assert (tmp_path / "b/file").read_text() == "42"


def test_check_writable_makes_the_folder_or_gives_the_reason(tmp_path, monkeypatch):
    files.check_writable(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/sub: cannot be written \(Not a directory\)"):
        files.check_writable(tmp_path / "file" / "sub")
    with pytest.raises(UserError, match="/proc/drift: cannot be written"):
        files.check_writable("/proc/drift")  # refused to root as well
    monkeypatch.setattr(files.tempfile, "NamedTemporaryFile", refuse_with(errno.EROFS))
    with pytest.raises(UserError, match=r"\(Read-only file system\)"):
        files.check_writable(tmp_path)


def test_rows_are_read_and_written_in_place(tmp_path):
    rng = np.random.default_rng(0)
    expected = rng.standard_normal((20, 3, 2)).astype(np.float32)
    np.save(tmp_path / "a.npy", expected)
    rows = files.RowFile(tmp_path / "a.npy")
    assert (len(rows), rows.shape, rows.dtype) == (20, (20, 3, 2), np.float32)
    for start, count in ((0, 1), (5, 4), (19, 1), (7, 0)):
        expected[start : start + count] = part = rng.standard_normal((count, 3, 2)).astype(np.float32)
        rows.write(start, part, flush=start == 5)
    for chosen in (slice(None), slice(3, 9), slice(20, 30), rng.permutation(20)[:11], np.array([], int)):
        assert np.array_equal(rows.read(chosen), expected[chosen])
    assert np.array_equal(np.load(tmp_path / "a.npy"), expected)
    for start, wrong in ((20, expected[:1]), (0, expected[:1, :2]), (0, expected[:1].astype(np.float64))):
        with pytest.raises(AssertionError):
            rows.write(start, wrong)
    os.truncate(tmp_path / "a.npy", 300)
    with pytest.raises(AssertionError, match="cut short"):
        rows.read()


@pytest.mark.parametrize("shape", [(3, 4, 2), (7,)])
def test_new_rows_are_zeros_and_need_no_writable_map(tmp_path, monkeypatch, shape):
    np.save(tmp_path / "expected.npy", np.zeros(shape, np.float16))
    memmap = mmap.mmap

    def refuse(*arguments, access, **options):
        if access == mmap.ACCESS_WRITE:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return memmap(*arguments, access=access, **options)

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert files.RowFile.create(tmp_path / "a.npy", np.float16, shape).shape == shape
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()


def test_two_threads_may_open_rows_at_once(tmp_path):
    """Collections that give way to other threads make that fail within a second on Python 3.11.7."""
    np.save(tmp_path / "a.npy", np.zeros((4, 2)))
    before, give_way = gc.get_threshold(), lambda *_: time.sleep(0)
    gc.callbacks.append(give_way)
    gc.set_threshold(10)
    try:
        with ThreadPoolExecutor(16) as pool:
            shapes = set(pool.map(lambda _: files.RowFile(tmp_path / "a.npy").shape, range(1600)))
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(give_way)
    assert shapes == {(4, 2)}
