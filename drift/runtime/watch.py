"""`drift watch`: what the work folders say of the runs at work, and of those before.

It only reads, and only the ends of logs, so it may run beside a stage, and on another machine that sees the
folder. It imports no torch, to start at once.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from drift.runtime.lock import Holder
from drift.runtime.progress import done, read_log
from drift.runtime.work import read_note

STAGES = ("encode", "mae", "drift", "fid")
VALUES = ("loss", "drift_rms", "reconstruction", "held_out")
WINDOW_S = 60.0  # what the speed looks back on
SILENT_S = 300.0  # a run on another machine that has logged nothing for so long counts as stopped
_TAIL = 1 << 18  # bytes of a log; its lines have some 10 KB at most


@dataclass(frozen=True)
class Run:
    """A work folder at one moment."""

    stage: str
    folder: Path
    state: str
    """`starting`, `running`, `stopped` or `finished`."""
    holder: Holder | None
    """The process at work, if there is one."""
    lines: Sequence[Mapping[str, Any]]
    """The last lines of the log."""
    checkpoint: int | None
    """Steps of the newest checkpoint."""
    inputs: Mapping[str, str]
    """The settings and inputs of the run, by dotted key."""

    @property
    def rate(self) -> float | None:
        """Per second, over the last minute of the process at work, or between its last two lines."""
        lines = [line for line in self.lines if self.holder and line["time"] >= self.holder.since]
        if len(lines) < 2:
            return None
        last = lines[-1]
        first = next(n for n in lines if last["time"] - n["time"] <= WINDOW_S or n is lines[-2])
        span = last["time"] - first["time"]
        return (done(last) - done(first)) / span if span > 0 else None


def find_runs(root: Path, stages: Sequence[str], now: float) -> list[Run]:
    """The runs of `stages` in the work folder `root` at `now`, in Unix seconds.

    Those at work come first, in the order of the stages; then the others, the latest first.
    """
    runs = []
    for stage in stages:
        for folder in sorted((root / stage).glob("*/")):
            with suppress(FileNotFoundError):  # removed just now
                runs.append(_read(stage, folder, now))

    def latest(run: Run) -> float:
        return math.inf if run.holder else run.lines[-1]["time"] if run.lines else 0.0

    return sorted(runs, key=latest, reverse=True)


def _read(stage: str, folder: Path, now: float) -> Run:
    # The note last: a run that has ended since then is finished, not stopped
    holder = Holder.of(folder)
    at_work = holder.at_work() if holder else False
    lines = [line for line in read_log(folder / "logs.jsonl", last=_TAIL) if "time" in line]
    if at_work is None:
        at_work = now - max(holder.since, lines[-1]["time"] if lines else 0.0) < SILENT_S
    note = read_note(folder)
    if note is not None and note["finished"]:
        state, at_work = "finished", False
    elif at_work:
        state = "running" if lines and lines[-1]["time"] >= holder.since else "starting"
    else:
        state = "stopped"
    return Run(
        stage=stage,
        folder=folder,
        state=state,
        holder=holder if at_work else None,
        lines=lines,
        # As drift.training.checkpoint names them
        checkpoint=max((int(path.name[5:]) for path in folder.glob("step-*")), default=None),
        inputs=_flat(note["decides"]) if note else {},
    )


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as one level of dotted keys, and values as ASCII."""
    flat = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.dumps(value).strip('"')
    return flat


def difference(inputs: Mapping[str, str], others: Sequence[Mapping[str, str]]) -> str:
    """The settings among `inputs` in which not all of `others` are alike: `key=value ...`."""
    return "  ".join(
        f"{key}={value[:20]}" for key, value in inputs.items() if any(o.get(key) != value for o in others)
    )


def describe(run: Run, now: float, difference: str = "") -> list[str]:
    """A run in three lines, or two where nothing has been logged."""
    who = run.holder and f"(process {run.holder.pid} on {run.holder.host})"
    head = "  ".join(filter(None, [f"{run.stage} {run.folder.name[:8]}", run.state, who, difference]))
    saved = [] if run.checkpoint is None else [f"checkpoint {run.checkpoint:,}"]
    if not run.lines:
        return [head, "  " + "  ".join(["nothing logged", *saved])]
    last, rate = run.lines[-1], run.rate
    unit = "steps" if last["unit"] == "step" else last["unit"]
    share = math.floor(1000 * done(last) / last["steps"]) / 10
    progress = [f"{done(last):,} of {last['steps']:,} {unit} ({share:.1f}%)"]
    if rate is not None:
        progress.append(f"{rate:,.0f} {unit}/s" if rate >= 100 else f"{rate:.3g} {unit}/s")
    if rate:
        progress.append(f"ETA {_duration((last['steps'] - done(last)) / rate)}")
    # Not every line has what is measured only now and then
    latest = {name: value for line in run.lines for name, value in line.items() if name in VALUES}
    values = [f"{name} {latest[name]:.4g}" for name in VALUES if name in latest]
    age = f"logged {_duration(max(0, now - last['time']))} ago"  # another machine's clock may be ahead
    return [head, "  " + "  ".join(progress), "  " + "  ".join([*values, *saved, age])]


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def page(root: Path, stages: Sequence[str]) -> list[str]:
    """The runs in `root` as they are now, or where none were found."""
    now = time.time()
    runs = find_runs(root, stages, now)
    if not runs:
        return [
            f"no runs of {', '.join(stages)} in {root.absolute()}",
            "(dvc repro starts one; --work or DRIFT_WORK_DIR name another folder)",
        ]
    alike = {stage: [run.inputs for run in runs if run.stage == stage] for stage in stages}
    return [line for run in runs for line in describe(run, now, difference(run.inputs, alike[run.stage]))]


def show(root: Path, stages: Sequence[str], out: TextIO) -> None:
    """Write the runs of `stages` in `root` once."""
    print(*page(root, stages), sep="\n", file=out)


def follow(root: Path, stages: Sequence[str], out: TextIO, interval: float | None = None) -> None:
    """Write the runs of `stages` in `root` again and again, until Ctrl-C.

    A terminal shows them in place, every 2 seconds unless there is an `interval`; what cannot clear its
    screen gets a new block each time, every 30 seconds.
    """
    in_place = out.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    while True:
        lines = [f"{time.strftime('%H:%M:%S')}  {root}  (Ctrl-C ends)", *page(root, stages)]
        if in_place:
            columns, rows = shutil.get_terminal_size()
            if len(lines) >= rows:
                lines[rows - 2 :] = ["..."]
            # Some terminals wrap after the last column
            lines = ["\033[H\033[2J" + lines[0][: columns - 1], *(line[: columns - 1] for line in lines[1:])]
        out.write("".join(line + "\n" for line in lines))
        out.flush()
        time.sleep(interval or (2.0 if in_place else 30.0))
