"""Show how far the stages at work have come, and how fast.

Runs at work stand first. The speed is that of the last minute. The loss of the stage
drift stays nearly constant by construction; drift_rms is what falls. It only reads, on
any machine that sees the work folders; a run elsewhere counts as at work while its log
is younger than 5 min.

examples:
  drift watch                               on a terminal, until Ctrl-C
  drift watch --once drift                  the runs of one stage, once
  ssh -t HOST 'cd PROJECT; .venv/bin/drift watch'
"""

import argparse
import sys
from pathlib import Path

from drift.cli.options import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "stage", nargs="*", metavar="STAGE", help="encode, mae, drift or fid; all without any"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--once", action="store_true", help="show them once; the default if not on a terminal")
    how.add_argument("--follow", action="store_true", help="until Ctrl-C; the default on a terminal")
    parser.add_argument("--interval", type=positive, metavar="S", help="seconds between two looks (2 or 30)")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="($DRIFT_WORK_DIR, or else .work)")


def run(args: argparse.Namespace) -> None:
    from drift.runtime.errors import UserError
    from drift.runtime.watch import STAGES, follow, page
    from drift.runtime.work import work_root

    if unknown := [stage for stage in args.stage if stage not in STAGES]:
        raise UserError(f"{unknown[0]}: the stages are {', '.join(STAGES)}")
    root, stages = args.work or work_root(), args.stage or STAGES
    if args.follow or (sys.stdout.isatty() and not args.once):
        follow(root, stages, sys.stdout, args.interval)
    else:
        print(*page(root, stages), sep="\n")
