"""`drift watch`: states, rates and times left against numbers computed by hand, and what a screen shows."""

import io
import json
import os
import platform
import time

import pytest

from drift.runtime import watch
from drift.runtime.lock import Holder
from drift.runtime.watch import STAGES, follow, page
from drift.runtime.work import Work

NOW = 1_700_000_000.0


def line(step, at, steps=100, **values):
    return {"step": step, "steps": steps, "unit": "step", "time": NOW + at, **values}


def leave(root, stage, name, lines=(), *, finished=False, inputs=None, since=None, host=None):
    """The work folder of a run; `since` for one whose process is alive, which `alive` makes believe."""
    folder = root / stage / name
    folder.mkdir(parents=True)
    note = {"stage": stage, "decides": inputs or {}, "code": [], "finished": finished}
    (folder / "work.json").write_text(json.dumps(note))
    if lines:
        (folder / "logs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if since is not None:
        holder = {"host": host or platform.node(), "pid": 42, "since": NOW + since}
        folder.with_suffix(".run").write_text(json.dumps(holder))
    return folder


@pytest.fixture
def clock(monkeypatch):
    """Sets the time, in seconds after `NOW`; processes of this machine are alive."""
    monkeypatch.setattr(Holder, "at_work", lambda holder: holder.host == platform.node() or None)
    seconds = [0]
    monkeypatch.setattr(watch.time, "time", lambda: NOW + seconds[-1])
    return seconds.append


def heads(root, stages=STAGES):
    return [text for text in page(root, stages) if not text.startswith("  ")]


def test_states_of_a_real_run(tmp_path, monkeypatch):
    monkeypatch.setenv("DRIFT_WORK_DIR", str(tmp_path))

    def state():
        (head,) = heads(tmp_path)
        return head.split("  ")[1]

    with Work("mae", {"lr": 1}) as work:
        assert state() == "starting"
        (work.folder / "logs.jsonl").write_text(json.dumps(line(0, 0, time=time.time())))
        assert state() == "running"
        assert f"(process {os.getpid()} on {platform.node()})" in heads(tmp_path)[0]
        with pytest.raises(SystemExit), Work("mae", {"lr": 1}, first=False):
            raise SystemExit  # another process of the run ends first
        assert state() == "running"
    assert state() == "stopped"
    killed = {"host": platform.node(), "pid": os.getpid(), "since": 1.0}
    work.folder.with_suffix(".run").write_text(json.dumps(killed))
    assert state() == "stopped"
    with Work("mae", {"lr": 1}) as work:
        assert state() == "starting"  # the line is of the run before
        work.finish(work.folder / "logs.jsonl")
    assert state() == "finished"


def test_looking_does_not_keep_a_stage_from_starting(tmp_path):
    leave(tmp_path, "mae", "a", since=-5)
    page(tmp_path, STAGES)
    assert sorted(path.name for path in (tmp_path / "mae").iterdir()) == ["a", "a.run"]  # and no a.lock


@pytest.mark.parametrize(("lines", "word"), [([line(3, 0)], "running"), ([], "starting")])
def test_a_run_on_another_machine_is_judged_by_its_log(tmp_path, clock, lines, word):
    leave(tmp_path, "mae", "a", lines, since=0, host="far")
    clock(299)
    assert heads(tmp_path) == [f"mae a  {word}  (process 42 on far)"]
    clock(301)
    assert heads(tmp_path) == ["mae a  stopped"]


@pytest.mark.parametrize(
    ("positions", "since", "text"),
    [
        # One step a second at first, two a second in the last minute
        ([(0, 0), (50, 50), (100, 100), (140, 120), (220, 160)], -10, "  2.00 steps/s  ETA 06:29"),
        # A gap before the resume is not in the rate
        ([(0, 0), (20, 20), (21, 40), (25, 48), (29, 56)], 30, "  0.50 steps/s  ETA 32:20"),
        # Lines far apart
        ([(0, 0), (5, 100), (25, 300)], 0, "  0.10 steps/s  ETA 2:42:20"),
        # No second line since the resume
        ([(0, 0), (20, 20), (21, 40)], 30, "  22 of 1,000 steps (2.2%)"),
        ([(0, 0), (998, 20)], None, "  999 of 1,000 steps (99.9%)"),
    ],
)
def test_rate_and_time_left(tmp_path, clock, positions, since, text):
    leave(tmp_path, "drift", "a", [line(step, at, 1000) for step, at in positions], since=since)
    images = [line(n, n / 500, 10_000, unit="img") for n in (0, 2500, 5000)]
    leave(tmp_path, "encode", "a", images, since=-1)
    assert page(tmp_path, ["drift"])[1].endswith(text)
    assert page(tmp_path, ["encode"])[1] == "  5,000 of 10,000 img (50.0%)  500.00 img/s  ETA 00:10"


def test_values_and_the_newest_checkpoint(tmp_path, clock):
    first = line(0, 0, loss=1.0, reconstruction=0.25, held_out=0.3)
    folder = leave(tmp_path, "mae", "a", [first, line(1, 1, loss=0.5, reconstruction=0.125)])
    for step in (900, 1000, 1200):
        (folder / f"step-{step}").mkdir()
    with (folder / "logs.jsonl").open("a") as file:
        file.write('{"step": 8, "steps": 100, "lo')  # being written
    clock(2 * 3600)
    values = "  loss 0.5  reconstruction 0.125  held_out 0.3  checkpoint 1,200  logged 1:59:59 ago"
    assert page(tmp_path, STAGES)[2] == values


def test_runs_of_a_stage_are_shown_with_what_differs(tmp_path, clock):
    for name, coupling, root in (("a", "row", "a\u00e9\033"), ("b", "sinkhorn", "1" * 64)):
        leave(tmp_path, "drift", name, inputs={"seed": 0, "coupling": coupling, "data": {"root": root}})
    leave(tmp_path, "mae", "c", inputs={"seed": 1})
    assert heads(tmp_path, ["drift", "mae"]) == [
        "drift a  stopped  coupling=row  data.root=a\\u00e9\\u001b",
        f"drift b  stopped  coupling=sinkhorn  data.root={'1' * 20}",
        "mae c  stopped",
    ]


def test_those_at_work_come_first_and_then_the_latest(tmp_path, clock):
    leave(tmp_path, "encode", "b", [line(0, 5)], finished=True)
    leave(tmp_path, "mae", "c", [line(0, 9)])
    leave(tmp_path, "mae", "f")
    leave(tmp_path, "drift", "e", [line(0, 1)], since=0)
    leave(tmp_path, "drift", "d", [line(0, 1)], since=0)
    assert [head.split()[1] for head in heads(tmp_path)] == ["d", "e", "c", "b", "f"]
    assert [head.split()[1] for head in heads(tmp_path, ["drift", "mae"])] == ["d", "e", "c", "f"]


class Screen(io.StringIO):
    def isatty(self):
        return True


def follow_for(monkeypatch, times, root, out, interval=None):
    """`follow` until it has looked so many times; how long it waited after each."""
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == times:
            raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        follow(root, STAGES, out, interval)
    return waits


def test_a_terminal_shows_a_page_that_fits_it_again_and_again(tmp_path, monkeypatch):
    for name, value in {"TERM": "xterm", "COLUMNS": "40", "LINES": "8"}.items():
        monkeypatch.setenv(name, value)
    for name in ("a", "b", "c"):
        leave(tmp_path, "mae", name, [line(7, 0)], inputs={"latents": name * 64})
    screen = Screen()
    assert follow_for(monkeypatch, 2, tmp_path, screen) == [2.0, 2.0]
    _, first, second = screen.getvalue().split("\033[H\033[2J")
    assert len(first.splitlines()) == 7 and first.splitlines()[-1] == "..."
    assert max(map(len, second.splitlines())) == 39


@pytest.mark.parametrize(
    ("out", "term", "interval"), [(Screen, "dumb", None), (Screen, None, None), (io.StringIO, "xterm", 7.0)]
)
def test_what_cannot_be_cleared_gets_one_block_of_whole_lines_after_the_other(
    tmp_path, monkeypatch, out, term, interval
):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("TERM", term) if term else monkeypatch.delenv("TERM", raising=False)
    leave(tmp_path, "mae", "a", [line(7, 0, loss=0.5)])
    screen = out()
    assert follow_for(monkeypatch, 3, tmp_path, screen, interval) == [interval or 30.0] * 3
    assert screen.getvalue().count("  8 of 100 steps (8.0%)\n  loss 0.5  logged") == 3
    assert "\033" not in screen.getvalue()


def test_without_runs_it_says_where_it_has_looked(tmp_path):
    assert page(tmp_path / "none", ["mae", "drift"])[0] == f"no runs of mae, drift in {tmp_path / 'none'}"
