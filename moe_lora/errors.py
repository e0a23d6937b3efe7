"""The one error that the command line turns into a single line and an exit code."""


class WanmoeError(Exception):
    """A fault in what the user gave: names the file, the value and the way out, in one line."""

    exit_code = 2
