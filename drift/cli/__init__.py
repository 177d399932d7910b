"""The command `drift`, or `python -m drift.cli`: what one does beside the pipeline.

A command is a module of `drift.cli` named in `COMMANDS`. Its docstring is its help, `add_arguments(parser)`
adds its arguments, and `run(args)` does the work. Only `run` imports what takes time.
"""

import argparse
import importlib
import os
import re
import sys
from collections.abc import Sequence

from drift.runtime.errors import UserError, escape_output

COMMANDS = (
    *("watch", "clean", "study", "fid-selftest", "inspect latents", "inspect mae", "inspect features"),
    *("sample", "demo", "export", "import-release", "import-sinkhorn", "remote"),
    *("adopt latents", "adopt mae"),
)
_GROUPS = {
    "inspect": "Look at what a stage has made: pictures, numbers, warnings",
    "adopt": "Take results that were handed on as plain files for the output of a stage",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code, which is 2 for a mistake of the user and 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="drift",
        description="Commands beside the stages of the pipeline.",
        epilog="drift COMMAND --help tells more. The stages are modules: python -m stages.drift --help.",
    )
    places = {"": parser.add_subparsers(title="commands", metavar="COMMAND", required=True)}
    for name in COMMANDS:
        group, _, word = name.rpartition(" ")
        if group not in places:
            parent = places[""].add_parser(group, help=_GROUPS[group], description=f"{_GROUPS[group]}.")
            places[group] = parent.add_subparsers(title="what", metavar="WHAT", required=True)
        module = importlib.import_module(f"drift.cli.{re.sub('[ -]', '_', name)}")
        about, examples, lines = (module.__doc__ or "").partition("examples:\n")
        command = places[group].add_parser(
            word,
            help=about.partition("\n")[0].rstrip("."),
            description=about.strip(),
            epilog=examples + lines,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
