"""What a user says of files of bars: the options of `larder load` and `inspect`, and /etc/larder/files.yml.

Without pyarrow and pandas, so that preflight can judge an inventory's `pipeline_formats` with it.
"""

import codecs
import difflib
import math
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, available_timezones

import yaml

from larder.bars import catalogue
from larder.bars.model import FIELDS, Options
from larder.errors import ConfigError

PATH = Path("/etc/larder/files.yml")


def show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""


def _one_of(*allowed: str) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if value not in allowed:
            raise ValueError(" or ".join(allowed))
        return value

    return check


def _text(allowed: str, pattern: str) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError(allowed)
        return value

    return check


def _zone(value: Any) -> Any:
    try:
        ZoneInfo(value)
    except (LookupError, ValueError, TypeError, OSError):
        known = available_timezones()
        if known:  # where a machine has no time zones at all, the hosts judge
            meant = hint(value, known) if isinstance(value, str) else ""
            raise ValueError(f"an IANA zone such as America/New_York{meant}") from None
    return value


def _encoding(value: Any) -> Any:
    try:
        "".encode(value)
        codecs.lookup(value)
    except (LookupError, ValueError, TypeError):
        raise ValueError("an encoding that Python knows, such as utf-16 or cp1252") from None
    return value


def _columns(value: Any) -> Any:
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"columns by field, such as close: Price; fields are {', '.join(FIELDS)}")
    for name, column in value.items():
        if name not in FIELDS:
            raise ValueError(f"columns of the fields {', '.join(FIELDS)}; {show(name)} is none")
        if not isinstance(column, str) or not column:
            raise ValueError(f"names of columns; that of {name} is {show(column)}")
    return dict(value)


OPTIONS: Mapping[str, Callable[[Any], Any]] = {
    "format": _text("the name of a format: larder formats lists them", r"\S.*"),
    "columns": _columns,
    "symbol": _text("1 to 64 characters without blanks", r"[^\s\x00-\x1f\x7f]{1,64}"),
    "zone": _zone,
    "day_starts": _text("a time such as 17:00", r"([01]?\d|2[0-3]):[0-5]\d"),
    "decimal": _one_of(".", ","),
    "dates": _one_of("D/M/Y", "M/D/Y", "Y/M/D"),
    "encoding": _encoding,
    "resample": _one_of("1d"),
}


def check(name: str, value: Any) -> Any:
    """The value of an option, or ConfigError: one sentence that says what it holds and what is allowed."""
    try:
        return OPTIONS[name](value)
    except ValueError as error:
        raise ConfigError(f"{name} is {show(value)} and must be {error}.") from None


def columns(text: str) -> dict[str, str]:
    """close=Price,date=Day: a comma ends a column's name only where a field follows it."""
    found = {}
    for part in re.split(rf",(?=\s*(?:{'|'.join(FIELDS)})\s*=)", text):
        name, equals, column = part.partition("=")
        if not equals or name.strip() not in FIELDS:
            raise ConfigError(f"columns is {show(text)} and must be field=column,…; fields are {', '.join(FIELDS)}.")
        found[name.strip()] = column.strip()
    checked: dict[str, str] = check("columns", found)
    return checked


def command(path: Path, options: Options, **more: str) -> str:
    """What to type to load a file: with what was given already, and more."""
    given = {name: getattr(options, name) for name in OPTIONS}
    given["columns"] = ",".join(f"{field}={column}" for field, column in options.columns.items())
    given["resample"] = "1d" * options.resample
    words = [f"--{name.replace('_', '-')} {shlex.quote(value)}" for name, value in (given | more).items() if value]
    return " ".join(["larder load", *sorted(words), shlex.quote(str(path))])


@dataclass(frozen=True)
class Files:
    """What holds of all files, whichever they are."""

    formats: Sequence[Mapping[str, Any]] = ()
    max_rejected: float = 0.05
    first_bar_date: date = date(1900, 1, 1)

    def options(self, given: Mapping[str, Any]) -> Options:
        """With what was given with the command. Raises ConfigError for a format that does not exist."""
        if "format" in given:
            catalogue.load(self.formats).named(given["format"])
        return Options(
            **{**given, "resample": "resample" in given},
            first_day=self.first_bar_date,
            max_rejected=self.max_rejected,
            formats=self.formats,
        )


# In the file as in the inventory's variables.
KEYS = ("formats", "max_rejected", "first_bar_date")


def judge(values: Mapping[str, Any]) -> Files:
    """What files.yml, or an inventory, holds. Raises ConfigError with one sentence for what is wrong first."""
    unknown = sorted(map(str, values.keys() - set(KEYS)))
    if unknown:
        raise ConfigError(f"{show(unknown[0])} is none of {', '.join(KEYS)}.")
    found = Files(**values)
    return Files(_formats(found.formats), _share(found.max_rejected), _day(found.first_bar_date))


def _formats(value: Any) -> Sequence[Mapping[str, Any]]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ConfigError(f"pipeline_formats is {show(value)} and must be a list of formats.")
    try:
        catalogue.load(value)
    except ConfigError as error:
        raise ConfigError(f"pipeline_formats: {error.message}") from None
    return value


def _share(value: Any) -> float:
    try:
        share = float(value)
    except (TypeError, ValueError, OverflowError):
        share = math.nan
    if isinstance(value, bool) or not 0 <= share <= 1:
        raise ConfigError(f"pipeline_max_rejected is {show(value)} and must be a share from 0 to 1, such as 0.05.")
    return share


def _day(value: Any) -> date:
    try:
        day = date.fromisoformat(str(value))
    except ValueError:
        day = date.max
    if day > datetime.now(UTC).date():
        raise ConfigError(
            f"pipeline_first_bar_date is {show(value)} and must be a day of the past, such as 1900-01-01."
        )
    return day


def read(path: Path | None = None) -> Files:
    """files.yml as the role pipeline writes it; without one, the defaults. Another path must be there."""
    try:
        values = yaml.safe_load((path or PATH).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if path is None:
            return Files()
        raise ConfigError(f"{path} does not exist.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path or PATH} cannot be read: {(str(error).splitlines() or [''])[0]}.") from None
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or PATH} is not what larder reads: {', '.join(KEYS)}.")
    try:
        return judge(values)
    except ConfigError as error:
        raise ConfigError(f"{path or PATH}: {error.message}") from None
