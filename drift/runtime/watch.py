"""What the stages at work, and those that have been, say in their work folders: `drift watch`.

It only reads, and only the ends of logs, so it may run beside a stage, as often as one likes and on another
machine that sees the folder. It imports no torch, to be there at once.
"""

import json
import math
import os
import shutil
import textwrap
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from drift.runtime.lock import Holder
from drift.runtime.progress import done, read_log
from drift.runtime.work import read_note

STAGES = ("encode", "mae", "drift", "fid")
VALUES = ("loss", "drift_rms", "reconstruction", "held_out")
WINDOW_S = 60.0
"""What a rolling rate looks back on."""
SILENT_S = 300.0
"""A run on another machine that has said nothing for so long is taken for dead."""
_TAIL = 1 << 18  # bytes of a log; its lines have some 10 KB at most


@dataclass(frozen=True)
class Run:
    """A work folder at one moment."""

    stage: str
    folder: Path
    state: str
    """`starting`, `running`, `stopped` or `finished`, and what that rests on where it cannot be seen."""
    alive: bool
    lines: Sequence[Mapping[str, Any]]
    """The last lines of the log."""
    since: float | None
    """When the process that works there has begun, in Unix seconds; None if there is none."""
    checkpoint: int | None
    """Steps of the newest checkpoint."""
    decides: Mapping[str, Any]
    """The settings and inputs of the run."""

    @property
    def current(self) -> Sequence[Mapping[str, Any]]:
        """Those lines that the process at work has written; all, if there is none."""
        return [line for line in self.lines if self.since is None or line["time"] >= self.since]

    @property
    def rate(self) -> float | None:
        """Rolling, per second: over the last minute of the process at work, or its last two lines."""
        lines = self.current
        if self.since is None or len(lines) < 2:
            return None
        last = lines[-1]
        recent = [line for line in lines[:-1] if last["time"] - line["time"] <= WINDOW_S]
        first = recent[0] if recent else lines[-2]
        span = last["time"] - first["time"]
        return (done(last) - done(first)) / span if span > 0 else None

    @property
    def mean_rate(self) -> float | None:
        """Per second, since the first line of the process at work, or of the last one."""
        return self.current[-1].get("steps_per_s") if self.current else None

    @property
    def seconds_left(self) -> float | None:
        """At the rolling rate, from the last line on."""
        if not self.rate:
            return None
        return (self.lines[-1]["steps"] - done(self.lines[-1])) / self.rate


def find_runs(root: Path, stages: Sequence[str], now: float) -> list[Run]:
    """The runs of `stages` in the work folder `root` at `now`, in Unix seconds.

    Those at work come first, in the order of the stages; then the others, the latest first.
    """
    runs = []
    for stage in stages:
        for folder in sorted((root / stage).glob("*/")):
            with suppress(FileNotFoundError):  # cleared away just now
                runs.append(_read(stage, folder, now))
    at_work = [run for run in runs if run.alive]
    others = [run for run in runs if not run.alive]
    return at_work + sorted(others, key=lambda run: run.lines[-1]["time"] if run.lines else 0, reverse=True)


def _read(stage: str, folder: Path, now: float) -> Run:
    # The note last: a run that has ended since is finished and not stopped
    holder = Holder.of(folder)
    at_work = holder.at_work() if holder else False
    # Logs of earlier versions have no times
    lines = [line for line in read_log(folder / "logs.jsonl", last=_TAIL) if "time" in line]
    note = read_note(folder)
    latest = max(holder.since if holder else 0.0, lines[-1]["time"] if lines else 0.0)
    if note is not None and note["finished"]:
        state, alive = "finished", False
    elif at_work is None:
        alive = now - latest < SILENT_S
        state = f"{'running' if alive else 'stopped'} on {holder.host}, by the age of its log"
    elif at_work:
        alive = True
        state = "running" if lines and lines[-1]["time"] >= holder.since else "starting"
    else:
        state, alive = "stopped", False
    return Run(
        stage=stage,
        folder=folder,
        state=state,
        alive=alive,
        lines=lines,
        since=holder.since if alive else None,
        # As drift.training.checkpoint names them
        checkpoint=max((int(path.name[5:]) for path in folder.glob("step-*")), default=None),
        decides=note["decides"] if note else {},
    )


def differences(decides: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each of some runs of a stage, the settings in which they are not all alike: `key=value ...`."""
    flat = [_flat(one) for one in decides]
    keys = dict.fromkeys(key for one in flat for key in one)
    telling = [key for key in keys if len({one.get(key) for one in flat}) > 1]
    return ["  ".join(f"{key}={one[key][:20]}" for key in telling if key in one) for one in flat]


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as one level of dotted keys, and values as ASCII."""
    flat = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.dumps(value).strip('"')
    return flat


def describe(run: Run, now: float, difference: str = "") -> list[str]:
    """A run in three lines, or two where nothing has been logged."""
    head = f"{run.stage} {run.folder.name[:8]}  {run.state}"
    if difference:
        head += f"  {difference}"
    saved = [] if run.checkpoint is None else [f"checkpoint {run.checkpoint:,}"]
    if not run.lines:
        return [head, "  " + "  ".join(["nothing logged yet" if run.alive else "nothing logged", *saved])]
    last = run.lines[-1]
    unit = "steps" if last["unit"] == "step" else last["unit"]
    share = math.floor(1000 * done(last) / last["steps"]) / 10
    progress = [f"{done(last):,} of {last['steps']:,} {unit} ({share:.1f}%)"]
    mean = None if run.mean_rate is None else f"mean {_rate(run.mean_rate)}"
    if run.rate is not None:
        progress.append(f"{_rate(run.rate)} {unit}/s" + (f" ({mean})" if mean else ""))
    elif mean:
        progress.append(f"{mean} {unit}/s")
    if run.seconds_left is not None:
        progress.append(f"ETA {_duration(run.seconds_left)}")
    values = []
    for name in VALUES:
        # Not every line has what is measured only now and then
        latest = next((line[name] for line in reversed(run.lines) if name in line), None)
        if latest is not None:
            values.append(f"{name} {latest:.4g}")
    age = f"logged {_age(now - last['time'])} ago"
    return [head, "  " + "  ".join(progress), "  " + "  ".join([*values, *saved, age])]


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _duration(seconds: float) -> str:
    if seconds >= 86400:
        return f"{seconds / 86400:.1f} days"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"  # the clock of another machine may be ahead


def page(runs: Sequence[Run], now: float, width: int | None = None, height: int | None = None) -> list[str]:
    """All runs, cut to `width` columns and, by leaving out the last ones, to `height` lines."""
    told_apart: dict[Path, str] = {}
    for stage in STAGES:
        alike = [run for run in runs if run.stage == stage]
        texts = differences([run.decides for run in alike])
        told_apart |= {run.folder: text for run, text in zip(alike, texts, strict=True)}
    blocks = [describe(run, now, told_apart[run.folder]) for run in runs]
    shown = len(blocks)
    if height is not None and sum(map(len, blocks)) > height:
        while shown and sum(map(len, blocks[:shown])) > height - 1:
            shown -= 1
    lines = [line for block in blocks[:shown] for line in block]
    if shown < len(blocks):
        lines.append(f"and {len(blocks) - shown} more")
    return [line[:width] for line in lines]


def look(root: Path, stages: Sequence[str], width: int | None = None, height: int | None = None) -> list[str]:
    """The page of the runs in `root` as they are now, or a line that says where there are none."""
    now = time.time()
    runs = find_runs(root, stages, now)
    if runs:
        return page(runs, now, width, height)
    told = (
        f"no runs of {', '.join(stages)} in {root.absolute()}: a stage makes one when it starts (dvc repro); "
        "--work or DRIFT_WORK_DIR name another folder"
    )
    return [told] if width is None else textwrap.wrap(told, width)


def show(root: Path, stages: Sequence[str], out: TextIO) -> None:
    """Write the runs of `stages` in `root` once."""
    width = shutil.get_terminal_size().columns if out.isatty() else None
    print(*look(root, stages, width), sep="\n", file=out)


def follow(root: Path, stages: Sequence[str], out: TextIO, interval: float | None = None) -> None:
    """Write the runs of `stages` in `root` again and again, until Ctrl-C.

    A terminal shows them in place, every 2 seconds unless there is an `interval`; what cannot move its
    cursor gets a new block each time, every 30 seconds.
    """
    terminal = out.isatty()
    in_place = terminal and os.environ.get("TERM", "dumb") != "dumb"
    width = height = None
    written = 0
    while True:
        if terminal:
            columns, rows = shutil.get_terminal_size()
            width = columns - 1  # after the last column some terminals go to the next line
            height = rows - 2 if in_place else None  # and one line each for the head and the cursor
        head = f"{time.strftime('%H:%M:%S')}  {root}  (Ctrl-C ends)"
        lines = [head[:width], *look(root, stages, width, height)]
        if in_place and written:
            out.write(f"\033[{written}A\033[J")  # up, and clear from there to the end of the screen
        out.write("".join(line + "\n" for line in lines))
        out.flush()
        written = len(lines)
        time.sleep(interval or (2.0 if in_place else 30.0))
