"""drift remote"""

import argparse
import sys

from drift.cli.command import Run


def add(parser: argparse.ArgumentParser) -> Run:
    """run a dvc command (pull, push ...) with any rclone remote as its storage"""
    parser.usage = "drift remote [-h] [--remote NAME:PATH] [--port N] -- dvc ..."
    parser.description = """\
Run one DVC command whose storage is a folder of an rclone remote: Google Drive,
Dropbox, OneDrive, SFTP, S3 ..., encrypted (crypt) or not. For as long as the
command runs, "rclone serve webdav" serves that folder on 127.0.0.1, with a
random password; it is stopped when the command ends, however it ends.

Nothing is written into .dvc/config or rclone's own configuration, and the
password is on no command line. A folder that is missing on the remote is made,
unless the command only reads. The exit code is that of the command; 2 for what
is told as "error: ..."; 130 after Ctrl-C."""
    parser.epilog = """\
which remote:
  .dvc/config names it without a secret, for everybody who clones the project:
      dvc remote add shared remote://drift-remote/NAME/PATH
  is the folder PATH of the rclone remote NAME (rclone listremotes). Let it not
  be DVC's default remote (-d): dvc exp run looks that up, needed or not, and
  "drift-remote" only exists within drift remote. Where there are several, dvc's
  own -r chooses. --remote NAME:PATH serves any folder of any rclone remote,
  whatever .dvc/config says; folders with #, ? or % in their names only so.

needed, once:
  pip install -c constraints.txt -e '.[share]'   rclone, and WebDAV for DVC
  rclone config                                  see docs/sharing.md

examples:
  drift remote -- dvc push                       all results of the workspace
  drift remote -- dvc pull artifacts/mae         one of them
  drift remote -- dvc status -c                  what differs from the storage
  drift remote -- dvc exp push origin NAME       an experiment, with its results
  drift remote --remote backup:drift -- dvc push -j 2"""
    parser.add_argument("--remote", metavar="NAME:PATH", help="the folder (what .dvc/config refers to)")
    parser.add_argument("--port", type=_port, metavar="N", help="of 127.0.0.1 (a free one)")
    parser.add_argument("command", nargs="*", metavar="dvc ...", help="the command, after --")

    def run(args: argparse.Namespace) -> None:
        from drift.runtime.errors import Stopped
        from drift.sharing.remotes import run_dvc

        try:
            code = run_dvc(args.command, args.remote, args.port)
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            code = stopped.code
        sys.exit(code)

    return run


def _port(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"{text}: a port is a number from 1 to 65535")
    return int(text)
