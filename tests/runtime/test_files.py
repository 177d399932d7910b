import errno
import gc
import hashlib
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


def test_atomic_write_replaces_only_when_the_block_succeeds(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), files.atomic_write(path) as file:
        file.write(b"half of the ")
        raise RuntimeError
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.bin"]

    with files.atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and names(tmp_path) == ["a.bin"]


def test_atomic_write_by_name_and_over_the_rest_of_a_killed_writer(tmp_path):
    path = tmp_path / "a.bin"
    with files.atomic_write(path) as file:
        leftover = file.name
    Path(leftover).write_bytes(b"x" * 100)
    with files.atomic_write(path) as file:
        Path(file.name).write_bytes(b"whole")
    assert path.read_bytes() == b"whole" and names(tmp_path) == ["a.bin"]


def test_write_json_has_the_same_bytes_for_the_same_content(tmp_path):
    a, b = {"b": [1, 2.5], "a": {"y": None, "x": "ö"}}, {"a": {"x": "ö", "y": None}, "b": [1, 2.5]}
    files.write_json(tmp_path / "a.json", a)
    files.write_json(tmp_path / "b.json", b)
    text = (tmp_path / "a.json").read_bytes()
    assert text == (tmp_path / "b.json").read_bytes()
    assert text.endswith(b"}\n") and json.loads(text) == a
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert (tmp_path / "a.json").read_bytes() == text


@pytest.mark.parametrize("other_filesystem", [False, True])
@pytest.mark.parametrize("present", ["nothing", "folder", "file", "link"])
def test_replace_folder(tmp_path, monkeypatch, present, other_filesystem):
    source, destination = tmp_path / "work" / "new", tmp_path / "artifacts" / "latents"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "a").write_text("new")
    outside = tmp_path / "outside"
    outside.mkdir()
    if present != "nothing":
        destination.parent.mkdir()
    if present == "folder":
        destination.mkdir()
        (destination / "stale").touch()
    elif present == "file":
        destination.touch()
    elif present == "link":
        destination.symlink_to(outside)
    if other_filesystem:
        rename = os.rename

        def refuse(a, b):
            if Path(a).parent != Path(b).parent:
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            rename(a, b)

        monkeypatch.setattr(os, "rename", refuse)

    files.replace_folder(source, destination)
    assert not destination.is_symlink() and names(destination) == ["sub"]
    assert (destination / "sub" / "a").read_text() == "new"
    assert not source.exists() and names(destination.parent) == ["latents"] and outside.exists()


def test_replace_folder_that_fails_keeps_the_old_one(tmp_path):
    destination = tmp_path / "latents"
    destination.mkdir()
    (destination / "old").touch()
    with pytest.raises(FileNotFoundError):
        files.replace_folder(tmp_path / "missing", destination)
    assert names(destination) == ["old"]


def refuse_to_rename(monkeypatch, error, path):
    """As a mount point (EBUSY) or a folder of an overlay's lower layer (EXDEV) do."""
    rename = os.rename

    def rename_others(a, b):
        if Path(a) == path:
            raise OSError(error, os.strerror(error))
        rename(a, b)

    monkeypatch.setattr(os, "rename", rename_others)


def test_a_folder_that_an_overlay_does_not_rename_is_copied_aside(tmp_path, monkeypatch):
    source, destination = tmp_path / "new", tmp_path / "latents"
    for folder in (source, destination):
        folder.mkdir()
        (folder / folder.name).touch()
    refuse_to_rename(monkeypatch, errno.EXDEV, destination)
    files.check_output(destination)
    files.replace_folder(source, destination)
    assert names(destination) == ["new"] and names(tmp_path) == ["latents"]


def test_a_folder_that_cannot_give_way_is_told_before_and_kept(tmp_path, monkeypatch):
    source, destination = tmp_path / "work" / "new", tmp_path / "latents"
    source.mkdir(parents=True)
    destination.mkdir()
    (destination / "old").touch()
    refuse_to_rename(monkeypatch, errno.EBUSY, destination)
    with pytest.raises(UserError, match=r"latents: cannot be replaced \(Device or resource busy\)"):
        files.check_output(destination)
    with pytest.raises(OSError, match="busy"):
        files.replace_folder(source, destination)
    assert names(destination) == ["old"] and source.exists()
    assert names(tmp_path) == ["latents", "work"]


@pytest.mark.parametrize("failure", ["copy", "swap"])
def test_a_copy_between_filesystems_that_fails_leaves_nothing(tmp_path, monkeypatch, failure):
    source, destination = tmp_path / "work" / "new", tmp_path / "artifacts" / "generator"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "a").touch()
    destination.mkdir(parents=True)
    (destination / "old").touch()
    refuse_to_rename(monkeypatch, errno.EXDEV, source)
    if failure == "swap":
        refuse_to_rename(monkeypatch, errno.EBUSY, destination.with_name(".generator.new"))
    else:

        def refuse(*_, **__):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(shutil, "copyfile", refuse)
    with pytest.raises(OSError) as caught:
        files.replace_folder(source, destination)
    assert caught.value.errno == {"copy": errno.ENOSPC, "swap": errno.EBUSY}[failure]
    assert names(destination.parent) == ["generator"] and names(destination) == ["old"]
    assert names(source / "sub") == ["a"]


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="only root may mount")
def test_a_mounted_volume_is_told_before(tmp_path):
    for name in ("volume", "artifacts/generator"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "metrics.json").touch()
    program = """
from pathlib import Path
from drift.runtime.errors import UserError
from drift.runtime.files import check_output, write_json
check_output("artifacts/generator/inside")
write_json("metrics.json", 42)  # mounted as well
try:
    check_output("artifacts/generator")
except UserError as error:
    print(error)
"""
    mounts = "mount --bind volume artifacts/generator && touch other && mount --bind other metrics.json"
    command = f'{mounts} && {sys.executable} -c "$PROGRAM" && cat metrics.json'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", command],
        cwd=tmp_path,
        env={**os.environ, "PROGRAM": program, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(done.stderr)
    assert "artifacts/generator: cannot be replaced (Device or resource busy)" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "42"
    assert names(tmp_path / "artifacts") == ["generator"]


def test_a_link_out_of_the_repository_is_told_under_dvc_alone(tmp_path, monkeypatch):
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
    def refuse(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
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

        def refuse(*_, **__):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", refuse)
    assert (tmp_path / "b/file").samefile(tmp_path / "a/file")
    shutil.rmtree(tmp_path / "a")
    assert (tmp_path / "b/file").read_text() == "42"


def test_check_writable_makes_the_folder_and_leaves_nothing_in_it(tmp_path):
    files.check_writable(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == []


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError) as caught, files.atomic_write(tmp_path / "a.bin"):
        pass
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a.bin"))
    assert names(tmp_path) == []


def test_check_writable_names_the_folder_and_the_reason(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/sub: cannot be written \(Not a directory\)"):
        files.check_writable(tmp_path / "file" / "sub")
    with pytest.raises(UserError, match=r"file: cannot be written \(File exists\)"):
        files.check_writable(tmp_path / "file")
    with pytest.raises(UserError, match="/proc/drift: cannot be written"):
        files.check_writable("/proc/drift")  # refused to root as well

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(files.tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(UserError, match=r"\(Read-only file system\)") as error:
        files.check_writable(tmp_path)
    assert "\n" not in str(error.value)


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(b"abc" * 100_000).hexdigest()


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


def test_rows_need_no_compiler_once_they_are_open(tmp_path, monkeypatch):
    """Python 3.11's fails at times in two threads, and NumPy parses headers with it."""
    np.save(tmp_path / "a.npy", np.zeros((4, 2)))
    rows = files.RowFile(tmp_path / "a.npy")
    monkeypatch.setattr("ast.parse", lambda *_, **__: pytest.fail("a header is parsed"))
    rows.write(1, np.ones((2, 2)))
    assert rows.read().sum() == 4


def test_two_threads_may_open_rows_at_once(tmp_path):
    """Collections that give way to other threads make that fail within a second on Python 3.11.7."""
    np.save(tmp_path / "a.npy", np.zeros((4, 2)))

    def give_way(*_):
        time.sleep(0)

    def open_often(_):
        return [files.RowFile(tmp_path / "a.npy").shape for _ in range(100)]

    before = gc.get_threshold()
    gc.callbacks.append(give_way)
    gc.set_threshold(10)
    try:
        with ThreadPoolExecutor(16) as pool:
            shapes = {shape for found in pool.map(open_often, range(16)) for shape in found}
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(give_way)
    assert shapes == {(4, 2)}
