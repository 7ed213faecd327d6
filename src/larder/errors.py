"""What can go wrong, each with the exit code that tells a caller what to do."""

from collections.abc import Mapping

import click


class LarderError(click.ClickException):
    """The work failed (exit code 1): a store cannot be reached, a stage broke."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.hint = ""  # what to type next

    def format_message(self) -> str:
        return f"{self.message} {self.hint}".rstrip()


class ConfigError(LarderError):
    """A credential, option or setting is missing or wrong (exit code 2)."""

    exit_code = 2


class RefusedFileError(LarderError):
    """A file cannot be understood and nothing of it was loaded (exit code 3)."""

    exit_code = 3


class BusyError(LarderError):
    """Another run holds the lock (exit code 4)."""

    exit_code = 4


class SpareError(BusyError):
    """Another host runs the pipeline (exit code 6)."""

    exit_code = 6


class UnhealthyError(LarderError):
    """The stores answer, but not as they should (exit code 5)."""

    exit_code = 5


class SymbolsError(LarderError):
    """Some symbols could not be computed; all else was done (exit code 1)."""

    def __init__(self, failed: Mapping[str, str], rows: int) -> None:
        some = "; ".join(f"{symbol} ({why})" for symbol, why in list(failed.items())[:5])
        super().__init__(
            f"{len(failed)} of the symbols could not be computed: {some}{' …' if len(failed) > 5 else ''}."
        )
        self.rows = rows


def reason(error: BaseException) -> str:
    """What an error says, in one line."""
    what = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return f"{type(error).__name__}: {what}" if what else type(error).__name__
