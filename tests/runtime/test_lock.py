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


no_flock = pytest.mark.parametrize("there", [errno.EOPNOTSUPP], indirect=True)


def test_one_at_a_time_and_everyone_can_see_who(there):
    first, second, began = Lock(there), Lock(there), time.time()
    assert first.acquire() and not second.acquire()
    assert f"process {os.getpid()} on {platform.node()}" in second.holder()
    holder = Holder.of(there)
    assert (holder.host, holder.pid) == (platform.node(), os.getpid())
    assert began <= holder.since <= time.time()
    assert holder.at_work() is True
    assert replace(holder, host="another").at_work() is None
    first.release()
    assert Holder.of(there) is None
    assert second.acquire()
    second.release()


def gone() -> Holder:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return Holder(platform.node(), process.pid, time.time())


@pytest.mark.parametrize("number", ["free", "of a process that began later"])
def test_what_a_killed_process_has_left_is_no_lock(there, number):
    holder = gone() if number == "free" else Holder(platform.node(), os.getpid(), 1.0)
    there.with_suffix(".run").write_text(json.dumps(asdict(holder)))
    assert holder.at_work() is False
    lock = Lock(there)
    assert lock.acquire() and Holder.of(there).since > holder.since
    lock.release()


@no_flock
def test_the_lock_of_another_machine_stays_and_names_the_way_out(there):
    run = there.with_suffix(".run")
    run.write_text(json.dumps(asdict(Holder("far", 4711, 1_700_000_000.0))))
    lock = Lock(there)
    assert not lock.acquire()
    assert "process 4711 on far" in lock.holder() and f"delete {run}" in lock.holder()
    run.unlink()
    assert lock.acquire()
    lock.release()


@no_flock
def test_a_lock_that_is_just_being_written_is_one(there):
    there.with_suffix(".run").touch()
    assert not Lock(there).acquire()


def test_other_errors_of_flock_are_raised(tmp_path, monkeypatch):
    def refuse(file, what):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="Input/output"):
        Lock(tmp_path / "run").acquire()
