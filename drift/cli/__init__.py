"""The command `drift`, or `python -m drift.cli`: what one does beside the pipeline.

A command is a module of `drift.cli`, whose `add` adds its arguments to a parser and returns what is to
run with them, and an entry in `_COMMANDS`. What it needs is imported when it runs, so that none waits for the
imports of others.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from drift.cli import (
    adopt,
    clean,
    export,
    fid_selftest,
    import_prior,
    import_release,
    inspect,
    remote,
    sample,
    watch,
)
from drift.cli.command import Add
from drift.runtime.errors import UserError, escape_output


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
    escape_output()
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


_COMMANDS: dict[str, Add] = {
    "watch": watch.add,
    "clean": clean.add,
    "fid-selftest": fid_selftest.add,
    "inspect": inspect.add,
    "sample": sample.add,
    "export": export.add,
    "import-release": import_release.add,
    "import-prior": import_prior.add,
    "remote": remote.add,
    "adopt": adopt.add,
}
