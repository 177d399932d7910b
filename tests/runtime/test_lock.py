"""Locks, with and without `flock`, and who is said to hold them."""

import errno
import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest

from drift.runtime.lock import Holder, Lock


@pytest.fixture(params=["flock", errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK], ids=str)
def there(request, tmp_path, monkeypatch):
    """A folder on a filesystem with `flock`, or with an error in its place."""
    if request.param != "flock":

        def refuse(file, what):
            raise OSError(request.param, os.strerror(request.param))

        monkeypatch.setattr(fcntl, "flock", refuse)
    return tmp_path / "run"


def test_one_at_a_time(there):
    first, second = Lock(there), Lock(there)
    assert first.acquire() and not second.acquire()
    assert f"process {os.getpid()} on {platform.node()}" in second.holder()
    first.release()
    assert Holder.of(there) is None
    assert second.acquire()
    second.release()


def test_who_has_it_can_be_seen_without_the_lock(there):
    lock, began = Lock(there), time.time()
    lock.acquire()
    holder = Holder.of(there)
    assert (holder.host, holder.pid) == (platform.node(), os.getpid())
    assert began <= holder.since <= time.time()
    assert holder.at_work(there) is True
    assert replace(holder, host="another").at_work(there) is None
    assert replace(holder, since=0.0).at_work(there) is False  # of a process that had the number before
    lock.release()
    assert holder.at_work(there) is False  # as a killed run leaves it, whose number another has


def gone() -> Holder:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return Holder(platform.node(), process.pid, time.time())


def leave(folder, holder):
    folder.with_suffix(".run").write_text(json.dumps(asdict(holder)))


def test_what_a_killed_process_has_left_is_no_lock(there):
    leave(there, gone())
    assert Holder.of(there).at_work(there) is False
    lock = Lock(there)
    assert lock.acquire() and Holder.of(there).pid == os.getpid()
    lock.release()


def test_a_killed_process_that_had_our_number_has_left_no_lock(there):
    leave(there, Holder(platform.node(), os.getpid(), 1.0))  # in a container that was started again
    lock = Lock(there)
    assert lock.acquire()
    lock.release()


@pytest.mark.parametrize("there", [errno.EOPNOTSUPP], indirect=True)
def test_the_lock_of_another_machine_stays_and_names_the_way_out(there):
    leave(there, Holder("far", 4711, 1_700_000_000.0))
    lock = Lock(there)
    assert not lock.acquire()
    said = lock.holder()
    assert "process 4711 on far" in said and f"delete {there.with_suffix('.run')}" in said
    there.with_suffix(".run").unlink()
    assert lock.acquire()
    lock.release()


@pytest.mark.parametrize("there", [errno.EOPNOTSUPP], indirect=True)
def test_a_lock_that_is_just_being_written_is_one(there):
    there.with_suffix(".run").touch()
    lock = Lock(there)
    assert not lock.acquire()
    assert "a process without a name" in lock.holder()


def test_other_errors_of_flock_are_raised(tmp_path, monkeypatch):
    def refuse(file, what):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="Input/output"):
        Lock(tmp_path / "run").acquire()
