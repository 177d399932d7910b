"""What the modules of this package have in common."""

import argparse
from collections.abc import Callable
from pathlib import Path

from drift.runtime.errors import UserError

Run = Callable[[argparse.Namespace], None]
"""Runs a command with its arguments; raises `UserError` for a mistake of the user."""
Add = Callable[[argparse.ArgumentParser], Run]
"""Adds a command's arguments to its parser; the first line of its docstring is the command's line of help."""

GENERATOR = "artifacts/generator"
"""Where the stage drift writes, which the commands take without a word."""


def generator_source(source: str, revision: str | None) -> str | Path:
    """What `DriftPipeline.from_pretrained` is to load: `source`, or its folder as of a Git `revision`.

    Raises `UserError` if the revision does not have it, or if the stage drift has made no generator yet: the
    hub is not asked for that.
    """
    if revision is not None:
        from drift.sharing.revisions import fetch_revision

        return fetch_revision(source, revision)
    if source == GENERATOR and not Path(source).is_dir():
        raise UserError(f"{source}: there is none; dvc repro trains it, dvc pull fetches it, or name another")
    return source
