"""What the modules of this package have in common."""

import argparse
from collections.abc import Callable

Run = Callable[[argparse.Namespace], None]
"""Runs a command with its arguments; raises `UserError` for a mistake of the user."""
Add = Callable[[argparse.ArgumentParser], Run]
"""Adds a command's arguments to its parser; the first line of its docstring is the command's line of help."""
