"""drift watch"""

import argparse
import math
import sys
from pathlib import Path

from drift.cli.command import Run


def add(parser: argparse.ArgumentParser) -> Run:
    """how far the stages at work have come, and how fast"""
    parser.description = """\
Show the runs of the stages: those at work first, then those that were stopped
or have finished, the latest first. For each: the process at work; how much of it
is done; steps per second over the last minute; the time that is left; the last
values of its log and how old they are; and the newest checkpoint. Beside a run
stand the settings in which it differs from other runs of its stage.

It only reads the folders that the stages work in, so it disturbs nothing and
may run on any machine that sees them. A run on another machine counts as
running while its log is not older than five minutes."""
    parser.epilog = """\
values:
  loss            stays nearly constant in the stage drift, by construction
  drift_rms       RMS of the raw drift, which falls while the generator learns
  reconstruction  squared error of the MAE per masked place, over all channels
  held_out        the same on images that it never trains on

examples:
  drift watch                               on a terminal, until Ctrl-C
  drift watch --once drift                  the runs of one stage, once
  ssh -t HOST 'cd PROJECT; .venv/bin/drift watch'"""
    parser.add_argument(
        "stage", nargs="*", metavar="STAGE", type=_stage, help="encode, mae, drift or fid; all without any"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--once", action="store_true", help="show them once; the default if not on a terminal")
    how.add_argument("--follow", action="store_true", help="until Ctrl-C; the default on a terminal")
    parser.add_argument(
        "--interval",
        type=_seconds,
        metavar="S",
        help="seconds from one look to the next (2; 30 where there is no screen to clear)",
    )
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="the work folder ($DRIFT_WORK_DIR, or else .work)"
    )

    def run(args: argparse.Namespace) -> None:
        from drift.runtime.watch import STAGES, follow, show
        from drift.runtime.work import work_root

        root, stages = args.work or work_root(), args.stage or STAGES
        if args.follow or (sys.stdout.isatty() and not args.once):
            follow(root, stages, sys.stdout, args.interval)
        else:
            show(root, stages, sys.stdout)

    return run


def _stage(text: str) -> str:
    from drift.runtime.watch import STAGES

    if text not in STAGES:
        raise argparse.ArgumentTypeError(f"{text}: the stages are {', '.join(STAGES)}")
    return text


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: a number of seconds above 0 is needed")
    return seconds
