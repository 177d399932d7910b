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

    def refuse(file, what):
        raise OSError(request.param, os.strerror(request.param))

    if request.param != "flock":
        monkeypatch.setattr(fcntl, "flock", refuse)
    return tmp_path / "run"


def without_flock(number):
    return pytest.mark.parametrize("there", [number], indirect=True)


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


@pytest.mark.parametrize("number", ["free", "of a process that began later"])
def test_what_a_killed_process_has_left_is_no_lock(there, number):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    pid, since = (killed.pid, time.time()) if number == "free" else (os.getpid(), 1.0)
    holder = Holder(platform.node(), pid, since)
    there.with_suffix(".run").write_text(json.dumps(asdict(holder)))
    assert holder.at_work() is False
    lock = Lock(there)
    assert lock.acquire() and Holder.of(there).since > holder.since
    lock.release()


@without_flock(errno.EOPNOTSUPP)
def test_the_lock_of_another_machine_stays_and_names_the_way_out(there):
    run, lock = there.with_suffix(".run"), Lock(there)
    run.touch()  # the name is just being written
    assert not lock.acquire()
    run.write_text(json.dumps(asdict(Holder("far", 4711, 1_700_000_000.0))))
    assert not lock.acquire()
    assert "process 4711 on far" in lock.holder() and f"delete {run}" in lock.holder()
    run.unlink()
    assert lock.acquire()
    lock.release()


@without_flock(errno.EIO)
def test_other_errors_of_flock_are_raised(there):
    with pytest.raises(OSError, match="Input/output"):
        Lock(there).acquire()
