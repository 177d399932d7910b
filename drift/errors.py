"""The one exception for mistakes of the user, as opposed to bugs of ours."""


class UserError(Exception):
    """A wrong setting, a missing or damaged file, a path that cannot be written.

    The message is one line that names the thing, the value and the way out. Entry points print it
    without a traceback and exit with code 2 (see `drift.launch.run`); anything else keeps its traceback.
    """
