"""Progress lines: how often, and what a kill does to them."""

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from drift.runtime import progress
from drift.runtime.progress import ProgressLog, read_log


def test_lines_are_five_seconds_apart_unless_forced(tmp_path, monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: now, time=lambda: 1_700_000_000.0 + now)
    monkeypatch.setattr(progress, "time", clock)
    log, now = ProgressLog(tmp_path / "logs.jsonl", steps=1000, unit="img"), 100.0
    log.reached(300, {"omega": 1})
    expected = {"step": 300, "steps": 1000, "unit": "img", "omega": 1, "time": 1_700_000_100.0}
    assert read_log(tmp_path / "logs.jsonl") == [expected]
    for step in range(301, 313):
        now += 1
        log.reached(step)
    log.reached(399, force=True)
    log.reached(400, force=True)
    assert [line["step"] for line in read_log(tmp_path / "logs.jsonl")] == [300, 305, 310, 399, 400]


@pytest.mark.parametrize("cut", range(1, 23))
def test_a_line_that_was_cut_anywhere_does_not_spoil_the_next(tmp_path, cut):
    path = tmp_path / "logs.jsonl"
    ProgressLog(path, steps=9, unit="img").reached(1)
    with path.open("a") as file:
        file.write('{"step": 2, "steps": 9}'[:cut])
    for step in (3, 4):
        ProgressLog(path, steps=9, unit="img").reached(step)
    assert [line["step"] for line in read_log(path)] == [1, 3, 4]


def test_the_end_of_a_log_has_its_whole_lines(tmp_path):
    path = tmp_path / "logs.jsonl"
    assert read_log(path) == read_log(path, last=10) == []
    texts = [json.dumps({"step": step}) + "\n" for step in (0, 5, 10, 100, 1000)]
    path.write_text("".join(texts))
    for last in range(path.stat().st_size + 10):
        expected = [json.loads(text) for i, text in enumerate(texts) if len("".join(texts[i:])) <= last]
        assert read_log(path, last=last) == expected


def test_of_a_huge_log_only_the_end_is_read(tmp_path):
    path = tmp_path / "logs.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 36)  # a hole: it takes no room, but nobody could read it all
        file.seek(0, 2)
        file.write(b'\n{"step": 7}\n{"step": 8}\n{"ste')
    assert read_log(path, last=1 << 16) == [{"step": 7}, {"step": 8}]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
def test_a_full_disk_names_the_log(tmp_path):
    (tmp_path / "logs.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError) as caught:
        ProgressLog(tmp_path / "logs.jsonl", steps=2, unit="step").reached(0)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "logs.jsonl"))
