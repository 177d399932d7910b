"""Run a dvc command (pull, push ...) with any rclone remote as its storage.

rclone serves the folder on 127.0.0.1 with a random password for as long as the
command runs. No configuration file changes. .dvc/config names the folder PATH of
the rclone remote NAME without a secret:
  dvc remote add shared remote://drift-remote/NAME/PATH
docs/sharing.md has the first steps with rclone. The exit code is the command's; 2
after "error: ...", 130 after Ctrl-C.

examples:
  drift remote -- dvc push
  drift remote -- dvc pull artifacts/mae
  drift remote -- dvc exp push origin NAME
  drift remote --remote backup:drift -- dvc push -j 2
"""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "drift remote [-h] [--remote NAME:PATH] [--port N] -- dvc ..."
    parser.add_argument("--remote", metavar="NAME:PATH", help="the folder (what .dvc/config refers to)")
    parser.add_argument("--port", type=int, default=0, metavar="N", help="of 127.0.0.1 (a free one)")
    parser.add_argument("command", nargs="*", metavar="dvc ...", help="the command, after --")


def run(args: argparse.Namespace) -> None:
    from drift.runtime.errors import Stopped
    from drift.sharing.remotes import run_dvc

    try:
        sys.exit(run_dvc(args.command, args.remote, args.port))
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.code)
