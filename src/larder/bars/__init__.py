"""Daily bars from the files that people have: which format a file has, which bars it holds, what is wrong with others.

    for batch in read(path, options): ...     the bars, judged
    print(inspect(path, options))             what a load would do

catalogue and formats.yml: the formats, as data · source: archives and encodings · recognise: which format a sheet has ·
sheets: its rows · dates, numbers: what stands in a cell · survey: what only the whole file tells · judge: bar by bar.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from larder.bars.model import NUMBERS, PRICES, Batch, Inspection, Options, Stored
from larder.bars.source import candidates
from larder.errors import ConfigError, RefusedFileError
from larder.log import printable

__all__ = ["NUMBERS", "PRICES", "Batch", "Inspection", "Options", "Stored", "candidates", "inspect", "read"]


def read(path: Path, options: Options | None = None, told: Inspection | None = None) -> Iterator[Batch]:
    """The bars of a file, judged; `told` is told of the file what an inspection tells.

    Raises RefusedFileError, with the file's name and the reason, where the file as a whole is not to be taken: before
    the first batch, or after the last one. Who stores bars stores nothing of such a file.
    """
    told = told or Inspection(str(path))
    with _refusal(path):
        yield from _judged(path, options or Options(), told)


def inspect(path: Path, options: Options | None = None) -> Inspection:
    """What a load of the file would do. ConfigError for options that cannot be, no error for what the file holds."""
    told = Inspection(str(path))
    try:
        with _refusal(path):
            for _ in _judged(path, options or Options(), told):
                pass
    except RefusedFileError as error:
        told.refusal = error.message
    return told


def _judged(path: Path, options: Options, told: Inspection) -> Iterator[Batch]:
    # Preflight judges formats on a controller, which has no pyarrow.
    from larder.bars.judge import judge
    from larder.bars.survey import survey

    return judge(survey(path, options, told), told)


@contextmanager
def _refusal(path: Path) -> Iterator[None]:
    """Whatever a file makes its readers do, it is refused by its name, with the reason."""
    try:
        yield
    except ConfigError:
        raise
    except RefusedFileError as error:
        raise RefusedFileError(f"{printable(path)}: {error.message}") from error
    except PermissionError:
        raise RefusedFileError(f"{printable(path)}: it may not be read by this user: permission denied.") from None
    except FileNotFoundError:
        raise RefusedFileError(f"{printable(path)}: it does not exist, or its link leads nowhere.") from None
    except MemoryError:
        raise RefusedFileError(f"{printable(path)}: it needs more memory than there is: split it.") from None
    except Exception as error:  # a parser may raise anything at all for what a file holds
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0][:300]
        if isinstance(error, UnicodeError) or "UTF8" in reason:
            raise RefusedFileError(
                f"{printable(path)}: some of its text is of another encoding than its first lines: --encoding, such as "
                "cp1252, says which one."
            ) from error
        raise RefusedFileError(
            f"{printable(path)}: it cannot be read ({type(error).__name__}: {reason}). It may be damaged or cut off: "
            "fetch it again, or write it anew."
        ) from error
