"""The command `drift`, or `python -m drift.cli`: what one does beside the pipeline.

A command is a function that adds its arguments to a parser and returns what is to run with them, and an
entry in `_COMMANDS`. What it needs is imported when it runs, so that none waits for the imports of others.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from drift.errors import UserError

Run = Callable[[argparse.Namespace], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code, which is 2 for a mistake of the user and 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="drift",
        description="Commands beside the stages of the pipeline.",
        epilog="drift COMMAND --help tells more. The stages are modules: python -m stages.drift --help.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, add in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=add.__doc__.partition("\n")[0],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=add(command))
    args = parser.parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # drift ... | head; what is left must not be flushed into it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _watch(parser: argparse.ArgumentParser) -> Run:
    """how far the stages at work have come, and how fast"""
    parser.description = """\
Show the runs of the stages: those at work first, then those that were stopped
or have finished, the latest first. For each: how much of it is done; steps per
second over the last minute, and in parentheses the mean since it was started
the last time; the time that is left; the last values of its log and how old
they are; and the newest checkpoint. What stands beside a run's name are the
settings in which it differs from other runs of its stage.

It only reads the folders that the stages work in, so it disturbs nothing and
may run on any machine that sees them. A run on another machine counts as
running while its log is not older than five minutes."""
    parser.epilog = """\
values:
  loss            stays nearly constant in the stage drift, by construction
  drift_rms       RMS of the raw drift, which falls while the generator learns
  reconstruction  squared error of the MAE at masked places, in training
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
        help="seconds from one look to the next (2; 30 where the terminal cannot write in place)",
    )
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="the work folder ($DRIFT_WORK_DIR, or else .work)"
    )

    def run(args: argparse.Namespace) -> None:
        from drift.watch import STAGES, follow, show
        from drift.work import work_root

        root, stages = args.work or work_root(), args.stage or STAGES
        if args.follow or (sys.stdout.isatty() and not args.once):
            follow(root, stages, sys.stdout, args.interval)
        else:
            show(root, stages, sys.stdout)

    return run


def _stage(text: str) -> str:
    from drift.watch import STAGES

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


_COMMANDS: dict[str, Callable[[argparse.ArgumentParser], Run]] = {"watch": _watch}


if __name__ == "__main__":
    sys.exit(main())
