"""`drift watch`: what the work folders say of the runs at work and of earlier ones.

It only reads, and only the ends of logs, so it may run beside a stage, or on another machine that sees the
folder. It starts at once, as it does not import torch.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from drift.runtime.lock import Holder
from drift.runtime.progress import read_log
from drift.runtime.work import read_note

STAGES = ("encode", "mae", "drift", "fid")
VALUES = ("loss", "drift_rms", "reconstruction", "held_out", "fid")
WINDOW_S = 60.0  # what the speed looks back on
SILENT_S = 300.0  # a run on another machine that has logged nothing for so long counts as stopped
_TAIL = 1 << 18  # bytes of a log; its lines have some 10 KB at most


def page(root: Path, stages: Sequence[str]) -> list[str]:
    """The runs of `stages` in the work folder `root`, two or three lines each.

    Those at work come first, in the order of the stages; then the others, the latest first. Beside a run
    stand the settings and inputs in which it differs from other runs of its stage.
    """
    now, runs = time.time(), []
    for stage in stages:
        folders = sorted((root / stage).glob("*/"))
        inputs = {folder: dotted((read_note(folder) or {"decides": {}})["decides"]) for folder in folders}
        for folder in folders:
            different = [
                f"{key}={value[:20]}"
                for key, value in inputs[folder].items()
                if any(others.get(key) != value for others in inputs.values())
            ]
            with suppress(FileNotFoundError):  # removed just now
                runs.append(_describe(stage, folder, different, now))
    runs.sort(key=lambda run: run[0], reverse=True)
    return [line for _, lines in runs for line in lines] or [
        f"no runs of {', '.join(stages)} in {root.absolute()}",
        "(dvc repro starts one; --work or DRIFT_WORK_DIR name another folder)",
    ]


def dotted(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as one level of dotted keys, and values as ASCII."""
    flat = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.dumps(value).strip('"')
    return flat


def _describe(stage: str, folder: Path, different: Sequence[str], now: float) -> tuple[float, list[str]]:
    """When a run was last at work, in Unix seconds (infinite: it still is), and its lines."""
    holder = Holder.of(folder)
    log = [line for line in read_log(folder / "logs.jsonl", last=_TAIL) if "time" in line]
    latest = log[-1]["time"] if log else 0.0
    if holder:
        at_work = holder.at_work()
        if at_work is None:
            at_work = now - max(holder.since, latest) < SILENT_S
        holder = holder if at_work else None
    state = "stopped"
    if (read_note(folder) or {}).get("finished"):  # looked at last, as a run may end meanwhile
        state, holder = "finished", None
    elif holder:
        state = "running" if latest >= holder.since else "starting"
        state += f"  (process {holder.pid} on {holder.host})"
    lines = ["  ".join([f"{stage} {folder.name[:8]}", state, *different])]
    # Not every line has what is measured only now and then
    values = {name: value for line in log for name, value in line.items() if name in VALUES}
    facts = [f"{name} {values[name]:.4g}" for name in VALUES if name in values]
    # As drift.training.checkpoint names them
    if checkpoints := [int(path.name[5:]) for path in folder.glob("step-*")]:
        facts.append(f"checkpoint {max(checkpoints):,}")
    if log:
        of_holder = [line for line in log if holder and line["time"] >= holder.since]
        lines.append("  " + _progress(of_holder, log[-1]))
        facts.append(f"logged {tqdm.format_interval(max(0, now - latest))} ago")
    lines.append("  " + ("  ".join(facts) or "nothing logged yet"))
    return math.inf if holder else latest, lines


def _done(line: Mapping[str, Any]) -> int:
    """How many of the `steps` of a line are done."""
    return line["step"] + 1 if line["unit"] == "step" else line["step"]


def _progress(log: Sequence[Mapping[str, Any]], last: Mapping[str, Any]) -> str:
    """Position, speed and time left from the `last` line and those of the process at work."""
    rate = None
    if len(log) > 1:
        first = next(line for line in log if last["time"] - line["time"] <= WINDOW_S or line is log[-2])
        rate = (_done(last) - _done(first)) / max(1e-3, last["time"] - first["time"])
    return tqdm.format_meter(
        _done(last),
        last["steps"],
        elapsed=0,
        unit=" steps" if last["unit"] == "step" else f" {last['unit']}",
        rate=rate,
        bar_format="{n:,} of {total:,}{unit} ({percentage:.1f}%)"
        + ("  {rate_noinv_fmt}  ETA {remaining}" if rate else ""),
    )


def follow(root: Path, stages: Sequence[str], out: TextIO, interval: float | None = None) -> None:
    """Write the page again and again until Ctrl-C, every `interval` seconds.

    A terminal shows it in place, every 2 seconds by default. What cannot clear its screen gets a new block
    each time, every 30 seconds.
    """
    in_place = out.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    while True:
        lines = [f"{time.strftime('%H:%M:%S')}  {root}  (Ctrl-C ends)", *page(root, stages)]
        if in_place:
            columns, rows = shutil.get_terminal_size()
            if len(lines) >= rows:
                lines[rows - 2 :] = ["..."]
            lines = [line[: columns - 1] for line in lines]  # some terminals wrap after the last column
            out.write("\033[H\033[2J")
        out.write("".join(line + "\n" for line in lines))
        out.flush()
        time.sleep(interval or (2.0 if in_place else 30.0))
