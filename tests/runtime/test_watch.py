"""`drift watch`: states, rates and times left against numbers computed by hand, and what a screen shows."""

import io
import json
import os
import platform
import re
import time

import pytest

from drift.runtime import watch
from drift.runtime.lock import Holder
from drift.runtime.watch import STAGES, differences, find_runs, follow, look, page, show
from drift.runtime.work import Work

NOW = 1_700_000_000.0


def training_line(step, at, steps=100, **values):
    return {"step": step, "steps": steps, "unit": "step", **values, "time": NOW + at}


def leave(root, stage, name, lines=(), *, finished=False, decides=None, since=None, host=None):
    """The work folder of a run; `since` for one whose process is alive, which `alive` makes believe."""
    folder = root / stage / name
    folder.mkdir(parents=True)
    note = {"stage": stage, "decides": decides or {}, "code": [], "finished": finished}
    (folder / "work.json").write_text(json.dumps(note))
    if lines:
        (folder / "logs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if since is not None:
        holder = {"host": host or platform.node(), "pid": os.getpid(), "since": NOW + since}
        folder.with_suffix(".run").write_text(json.dumps(holder))
    return folder


@pytest.fixture
def alive(monkeypatch):
    monkeypatch.setattr(Holder, "at_work", lambda holder, folder: holder.host == platform.node() or None)


def only(root, now=NOW):
    (run,) = find_runs(root, STAGES, now)
    return run


def described(root, now=NOW):
    return "\n".join(page(find_runs(root, STAGES, now), now))


def test_states_of_a_real_run(tmp_path, monkeypatch):
    monkeypatch.setenv("DRIFT_WORK_DIR", str(tmp_path))
    with Work("mae", {"lr": 1}) as work:
        assert only(tmp_path).state == "starting"
        (work.folder / "logs.jsonl").write_text(json.dumps({**training_line(0, 0), "time": time.time()}))
        assert only(tmp_path).state == "running"
        holder = work.folder.with_suffix(".run").read_text()
        with pytest.raises(SystemExit), Work("mae", {"lr": 1}, first=False):
            raise SystemExit  # another process of the run ends first
        assert only(tmp_path).state == "running"
    assert only(tmp_path).state == "stopped"
    work.folder.with_suffix(".run").write_text(holder)  # what a kill leaves behind
    assert only(tmp_path).state == "stopped"
    with Work("mae", {"lr": 1}) as work:
        assert only(tmp_path).state == "starting"  # the line is of the run before
        work.finish(work.folder / "logs.jsonl")
    assert only(tmp_path).state == "finished"


def test_looking_does_not_keep_a_stage_from_starting(tmp_path, monkeypatch):
    monkeypatch.setenv("DRIFT_WORK_DIR", str(tmp_path))
    taken = []
    monkeypatch.setattr("drift.runtime.lock.Lock.acquire", lambda *args, **options: taken.append(args))
    leave(tmp_path, "mae", "a", since=-5)
    only(tmp_path)
    assert not taken
    assert sorted(path.name for path in (tmp_path / "mae").iterdir()) == ["a", "a.run"]


@pytest.mark.parametrize(
    ("silence", "state"),
    [(299, "running on far, by the age of its log"), (301, "stopped on far, by the age of its log")],
)
def test_a_run_on_another_machine_is_judged_by_its_log(tmp_path, alive, silence, state):
    leave(tmp_path, "mae", "a", [training_line(3, 0)], since=-1000, host="far")
    run = only(tmp_path, NOW + silence)
    assert run.state == state
    assert run.alive == state.startswith("running")


def test_a_run_on_another_machine_that_starts_has_time_for_it(tmp_path, alive):
    leave(tmp_path, "mae", "a", since=0, host="far")
    assert only(tmp_path, NOW + 299).alive
    assert not only(tmp_path, NOW + 301).alive


def test_rate_and_time_left(tmp_path, alive):
    # One step a second at first, two a second in the last minute
    lines = [training_line(step, at) for step, at in [(0, 0), (50, 50), (100, 100), (140, 120), (220, 160)]]
    lines = [{**line, "steps": 1000} for line in lines]
    leave(tmp_path, "drift", "a", lines, since=-10)
    run = only(tmp_path)
    assert run.rate == pytest.approx(2.0)  # of the line at 100 and the one at 160
    assert run.seconds_left == pytest.approx((1000 - 221) / 2)
    assert "  221 of 1,000 steps (22.1%)  2 steps/s  ETA 0:06:30\n" in described(tmp_path)


def test_a_gap_before_a_resume_is_not_in_the_rate(tmp_path, alive):
    lines = [training_line(step, at) for step, at in [(0, 0), (10, 10), (20, 20)]]
    lines += [training_line(step, at) for step, at in [(21, 40), (25, 48), (29, 56)]]
    leave(tmp_path, "drift", "a", lines, since=30)
    run = only(tmp_path)
    assert run.rate == pytest.approx(0.5)
    assert run.seconds_left == pytest.approx(70 / 0.5)


def test_a_resumed_run_has_no_rate_before_its_second_line(tmp_path, alive):
    lines = [{**training_line(step, step), "steps_per_s": 1.0} for step in range(20)]
    folder = leave(tmp_path, "drift", "a", lines, since=30)
    assert only(tmp_path).rate is only(tmp_path).mean_rate is only(tmp_path).seconds_left is None
    with (folder / "logs.jsonl").open("a") as file:
        file.write(json.dumps(training_line(20, 40)) + "\n")
    assert only(tmp_path).rate is only(tmp_path).mean_rate is only(tmp_path).seconds_left is None
    assert "  21 of 100 steps (21.0%)\n" in described(tmp_path)


def test_lines_that_are_far_apart_still_give_a_rate(tmp_path, alive):
    leave(
        tmp_path, "drift", "a", [training_line(0, 0), training_line(5, 100), training_line(25, 300)], since=0
    )
    assert only(tmp_path).rate == pytest.approx(0.1)


def test_a_run_that_does_not_work_has_a_mean_and_no_time_left(tmp_path):
    leave(tmp_path, "mae", "a", [training_line(0, 0), {**training_line(4, 2), "steps_per_s": 2.0}])
    assert only(tmp_path).rate is None
    assert "  5 of 100 steps (5.0%)  mean 2 steps/s\n" in described(tmp_path)


def test_values_and_the_newest_checkpoint(tmp_path):
    lines = [
        {**training_line(0, 0), "loss": 1.0, "reconstruction": 0.25, "held_out": 0.3},
        {**training_line(1, 1), "loss": 0.5, "reconstruction": 0.125},
    ]
    folder = leave(tmp_path, "mae", "a", lines)
    for step in (900, 1000, 1200):
        (folder / f"step-{step:08d}").mkdir()
    told = "  loss 0.5  reconstruction 0.125  held_out 0.3  checkpoint 1,200  logged 2 h ago"
    assert told in described(tmp_path, NOW + 2 * 3600)


def test_images_are_counted_in_their_unit(tmp_path, alive):
    lines = [{"step": n, "steps": 10_000, "unit": "img", "time": NOW + n / 500} for n in (0, 2500, 5000)]
    lines[-1]["steps_per_s"] = 499.6
    leave(tmp_path, "encode", "a", lines, since=-1)
    assert "  5,000 of 10,000 img (50.0%)  500 img/s (mean 500)  ETA 0:00:10\n" in described(tmp_path)


@pytest.mark.parametrize(
    ("steps", "left"), [(61, "ETA 0:01:00"), (36_062, "ETA 10:01:01"), (216_001, "ETA 2.5 days")]
)
def test_times_left_in_hours_and_days(tmp_path, alive, steps, left):
    leave(tmp_path, "drift", "a", [training_line(-1, 0, steps), training_line(0, 1, steps)], since=-1)
    assert left in described(tmp_path)


def test_all_but_the_last_step_is_not_all(tmp_path):
    leave(tmp_path, "drift", "a", [training_line(99_998, 0, 100_000)])
    assert "99,999 of 100,000 steps (99.9%)" in described(tmp_path)


def test_a_run_that_has_logged_nothing(tmp_path, alive):
    leave(tmp_path, "fid", "a", since=-1)
    assert page(find_runs(tmp_path, STAGES, NOW), NOW) == ["fid a  starting", "  nothing logged yet"]


def test_a_last_line_that_is_being_written_is_passed_over(tmp_path):
    folder = leave(tmp_path, "drift", "a", [training_line(7, 0)])
    with (folder / "logs.jsonl").open("a") as file:
        file.write('{"step": 8, "steps": 100, "lo')
    assert "8 of 100 steps" in described(tmp_path)


def test_only_the_end_of_a_huge_log_is_read(tmp_path, alive):
    folder = leave(tmp_path, "drift", "a", since=-1)
    with (folder / "logs.jsonl").open("wb") as file:
        file.truncate(1 << 36)
        file.seek(0, 2)
        for step in range(20):
            line = {**training_line(step, 10 * step), "feature_sets": "x" * 10_000}
            file.write(b"\n" + json.dumps(line).encode())
    assert only(tmp_path).rate == pytest.approx(0.1)


def test_runs_of_a_stage_are_told_apart_by_what_differs():
    one = {"coupling": "row", "drift": {"lr": 1e-4, "steps": 10}, "mae": {"model": "0" * 64}}
    other = {"coupling": "sinkhorn", "drift": {"lr": 1e-4, "steps": 20}, "mae": {"model": "1" * 64}}
    assert differences([one, other]) == [
        f"coupling=row  drift.steps=10  mae.model={'0' * 20}",
        f"coupling=sinkhorn  drift.steps=20  mae.model={'1' * 20}",
    ]
    assert differences([one]) == [""]
    assert differences([{"root": "a\u00e9\033"}, {}]) == ["root=a\\u00e9\\u001b", ""]


def test_those_at_work_come_first_and_then_the_latest(tmp_path, alive):
    leave(tmp_path, "encode", "b", [training_line(0, 5)], finished=True)
    leave(tmp_path, "mae", "c", [training_line(0, 9)])
    leave(tmp_path, "drift", "e", [training_line(0, 1)], since=0)
    leave(tmp_path, "drift", "d", [training_line(0, 1)], since=0)
    assert [run.folder.name for run in find_runs(tmp_path, STAGES, NOW)] == ["d", "e", "c", "b"]
    assert [run.folder.name for run in find_runs(tmp_path, ["drift", "mae"], NOW)] == ["d", "e", "c"]


def test_a_page_fits_the_terminal(tmp_path, alive):
    for i in range(8):
        lines = [training_line(n, n, 10**9, loss=1e-9 * n, drift_rms=1e-9) for n in (10**6, 2 * 10**6)]
        decides = dict.fromkeys(("latents", "generator", "mae"), f"{i}" * 64)
        leave(tmp_path, "drift", f"{i:016x}", lines, decides=decides, since=0)
    runs = find_runs(tmp_path, STAGES, NOW + 10**7)
    lines = page(runs, NOW, width=79, height=22)
    assert max(map(len, lines)) == 79
    assert len(lines) == 22
    assert lines[-1] == "and 1 more"
    assert len(page(runs, NOW, width=79, height=24)) == 24
    assert len(page(runs, NOW)) == 24


def test_without_runs_it_says_where_it_has_looked(tmp_path):
    (told,) = look(tmp_path / "none", ["mae", "drift"])
    assert told.startswith(f"no runs of mae, drift in {tmp_path / 'none'}: ")
    assert max(map(len, look(tmp_path, STAGES, width=30))) <= 30


class Screen(io.StringIO):
    """A terminal that knows the two movements of the cursor which `follow` needs."""

    def isatty(self):
        return True

    def shown(self):
        lines, row = [""], 0
        for part in re.split(r"(\n|\033\[\d+A|\033\[J)", self.getvalue()):
            if part == "\n":
                row += 1
                lines += [""] * (row + 1 - len(lines))
            elif part.endswith("A"):
                row -= int(part[2:-1])
            elif part == "\033[J":
                del lines[row + 1 :]
                lines[row] = ""
            else:
                lines[row] += part
        return lines


def follow_for(monkeypatch, times, out, between=lambda: None, **options):
    """`follow` until it has looked so many times; how long it waited after each."""
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == times:
            raise KeyboardInterrupt
        between()

    monkeypatch.setattr(watch.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        follow(*options.pop("where"), out, **options)
    return waits


def test_a_terminal_shows_the_last_page_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LINES", "24")
    screen = Screen()
    waits = follow_for(
        monkeypatch,
        3,
        screen,
        lambda: leave(tmp_path, "mae", f"r{len(list((tmp_path).glob('mae/*')))}", [training_line(7, 0)]),
        where=(tmp_path, STAGES),
    )
    assert waits == [2.0] * 3
    shown = screen.shown()
    assert shown[0].endswith(" (Ctrl-C ends)") or len(shown[0]) == 39
    assert [line.split()[:2] for line in shown[1::3]] == [["mae", "r0"], ["mae", "r1"], []]
    assert len(shown) == 8 and shown[-1] == ""
    assert max(map(len, shown)) <= 39


@pytest.mark.parametrize("term", ["dumb", None])
def test_a_dumb_terminal_gets_one_block_after_the_other(tmp_path, monkeypatch, term):
    monkeypatch.delenv("TERM", raising=False)
    if term:
        monkeypatch.setenv("TERM", term)
    leave(tmp_path, "mae", "a", [training_line(7, 0)])
    screen = Screen()
    assert follow_for(monkeypatch, 3, screen, where=(tmp_path, STAGES)) == [30.0] * 3
    assert screen.getvalue().count("8 of 100 steps") == 3
    assert "\033" not in screen.getvalue()


def test_a_file_gets_whole_lines_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    leave(tmp_path, "mae", "a", [training_line(7, 0, loss=0.5)])
    once, following = io.StringIO(), io.StringIO()
    show(tmp_path, STAGES, once)
    assert follow_for(monkeypatch, 2, following, where=(tmp_path, STAGES), interval=7.0) == [7.0] * 2
    assert re.search("  loss 0.5  logged [0-9]+ d ago\n", once.getvalue())
    assert following.getvalue().count("  loss 0.5  logged") == 2
    assert "\033" not in following.getvalue()
