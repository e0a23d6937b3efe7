"""The one error that the command line turns into a single line and an exit code."""


class WanmoeError(Exception):
    """A fault in what the user gave: names the file, the value and the way out, in one line."""

    exit_code = 2


class CommonError(WanmoeError):
    """A fault that every rank of a job raises in the same words: one of each machine says it."""
