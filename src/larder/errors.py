"""What can go wrong, each with the exit code that tells a caller what to do."""

import click


class LarderError(click.ClickException):
    """The work failed (exit code 1): a store cannot be reached, a stage broke."""

    exit_code = 1


class ConfigError(LarderError):
    """A credential, option or setting is missing or wrong (exit code 2)."""

    exit_code = 2


class RefusedFileError(LarderError):
    """A file cannot be understood and nothing of it was loaded (exit code 3)."""

    exit_code = 3


class BusyError(LarderError):
    """Another run holds the lock (exit code 4)."""

    exit_code = 4


class UnhealthyError(LarderError):
    """The stores answer, but not as they should (exit code 5)."""

    exit_code = 5
