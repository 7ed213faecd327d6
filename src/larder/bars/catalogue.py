"""The catalogue of formats: formats.yml, and a user's own entries before it."""

import codecs
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any
from zoneinfo import ZoneInfo

import yaml

from larder.bars.model import CURRENCIES, FIELDS
from larder.errors import ConfigError

SYMBOL = "{symbol}"
# Behind a column's name. Other words there, such as (adj) and (000s), make another column of it.
UNIT = re.compile(rf"\s*[(\[](?:shares|{CURRENCIES}|[$€£¥₹元円])[)\]]$")
ORDERS = ("D/M/Y", "M/D/Y", "Y/M/D")


@dataclass(frozen=True)
class Format:
    """How a vendor's export is recognised and read. An entry of formats.yml, or of `pipeline_formats`.

    name, title: for people; `--format` takes the name.
    header: columns that a header line has to name. fields: for files without one, the field of each column, `_` for
        none; `first` is what the first cell looks like. wide: two header lines, of fields and of symbols. An entry that
        has none of the three says more of files that another entry recognises.
    files: globs of the file names (or ends of paths) that the entry is for.
    columns: field to column; of several the first that is there, for the volume the first that is not 0 throughout.
    symbol: a regular expression for the file's name without its ending, with groups `symbol` and `timeframe`.
    only: column to values; other rows are left out. period: the column that names the timeframe, and what is daily.
    encoding, delimiter, decimal (. or ,), dates (D/M/Y, M/D/Y, Y/M/D): where the file itself does not tell.
    stamps: the zone of times that name none. zone: the market's, where instants become days. day_starts: as Options.
    volume_factor: what the volume is multiplied with. volume_unit: what it counts, for people.
    resample: intraday bars become daily ones.
    """

    name: str
    title: str = ""
    header: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    first: str | None = None
    wide: bool = False
    files: tuple[str, ...] = ()
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    symbol: str | None = None
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    period: Mapping[str, Any] = field(default_factory=dict)
    encoding: str | None = None
    delimiter: str | None = None
    decimal: str | None = None
    dates: str | None = None
    stamps: str | None = None
    zone: str | None = None
    day_starts: str | None = None
    volume_factor: float = 1.0
    volume_unit: str | None = None
    resample: bool = False
    own: bool = False  # a user's, not the catalogue's

    @property
    def recognises(self) -> bool:
        """Whether the entry recognises files, and does not only say more of what another one recognises."""
        return bool(self.header or self.fields or self.wide or self.columns or self.name == "generic")

    def over(self, other: "Format") -> "Format":
        """The other entry with what this one says."""
        default = Format("")
        said = {
            f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != getattr(default, f.name)
        }
        for key in ("files", "own", "title"):
            said.pop(key, None)
        return replace(other, **said | {"name": f"{other.name}, {self.name}"})


@dataclass(frozen=True)
class Catalogue:
    """Entries in the order in which they are tried, and the usual names of columns and months."""

    formats: tuple[Format, ...]
    names: Mapping[str, tuple[str, ...]]
    months: Mapping[str, int]

    def named(self, name: str) -> Format:
        for entry in self.formats:
            if entry.name == name:
                return entry
        raise ConfigError(f"--format is {name!r}; it may be {', '.join(entry.name for entry in self.formats)}.")


@lru_cache(maxsize=1 << 14)
def plain(text: str) -> str:
    """A column's name without case, accents, blanks, punctuation, its currency: "Adj Close (USD)" → adjclose."""
    text = UNIT.sub("", text)
    folded = unicodedata.normalize("NFKD", text.replace("ł", "l").replace("Ł", "l").casefold())
    return "".join(c for c in folded if c.isalnum())


def load(own: Iterable[Mapping[str, Any]] = ()) -> Catalogue:
    """The built-in catalogue after a user's own entries. Raises ConfigError for an entry that cannot be used."""
    builtin, names, months = _builtin()
    entries = [replace(entry(value, n), own=True) for n, value in enumerate(own, 1)]
    twice = {e.name for e in entries} & {e.name for e in builtin} | {
        e.name for e in entries if sum(other.name == e.name for other in entries) > 1
    }
    if twice:
        raise ConfigError(f"The name of the format {min(twice)!r} is taken; each entry needs one of its own.")
    return Catalogue((*entries, *builtin), names, months)


@cache
def _builtin() -> tuple[tuple[Format, ...], Mapping[str, tuple[str, ...]], Mapping[str, int]]:
    text = yaml.safe_load(files("larder.bars").joinpath("formats.yml").read_text(encoding="utf-8"))
    return (
        tuple(entry(value, n) for n, value in enumerate(text["formats"], 1)),
        {name: tuple(plain(each) for each in spellings) for name, spellings in text["names"].items()},
        {word: number for number, words in text["months"].items() for word in words},
    )


def entry(value: Any, number: int) -> Format:
    """An entry as a Format; ConfigError says which key holds what, and what it may hold."""
    known = {f.name for f in fields(Format)} - {"own"}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or not value["name"].strip():
        raise ConfigError(f"Entry {number} of the formats is {value!r}; it has to be a mapping with a name.")
    label = f"The format {value['name']!r}"

    def wrong(key: str, allowed: str) -> ConfigError:
        return ConfigError(f"{label}: {key} is {value[key]!r}; it may be {allowed}.")

    if unknown := sorted(set(map(str, value)) - known):
        raise ConfigError(f"{label} has the unknown key {unknown[0]!r}; there are {', '.join(sorted(known))}.")
    made: dict[str, Any] = dict(value)
    for key in value:
        if key in ("header", "fields", "files"):
            made[key] = _texts(value[key]) or _raise(wrong(key, "a list of texts"))
        elif key in ("columns", "only"):
            if not isinstance(value[key], Mapping):
                raise wrong(key, "a mapping to a text or a list of texts")
            made[key] = {
                str(k): _texts(v, empty=True) or _raise(wrong(key, "a mapping to a text or a list of texts"))
                for k, v in value[key].items()
            }
        elif key in ("wide", "resample"):
            if not isinstance(value[key], bool):
                raise wrong(key, "true or false")
        elif key == "volume_factor":
            if isinstance(value[key], bool) or not isinstance(value[key], int | float) or not 0 < value[key] < 1e12:
                raise wrong(key, "a number above 0")
            made[key] = float(value[key])
        elif key == "period":
            period = value[key]
            if not isinstance(period, Mapping) or set(period) != {"column", "daily"}:
                raise wrong(key, "a mapping of column and daily")
            made[key] = {"column": str(period["column"]), "daily": _texts(period["daily"])}
        elif not isinstance(value[key], str):
            raise wrong(key, "a text")
    if bad := sorted(set(made.get("columns", ())) - set(FIELDS)):
        raise ConfigError(f"{label}: columns names {bad[0]!r}; the fields are {', '.join(FIELDS)}.")
    if bad := sorted(set(made.get("fields", ())) - {*FIELDS, "_"}):
        raise ConfigError(f"{label}: fields names {bad[0]!r}; it may hold {', '.join(FIELDS)} and _.")
    checks: dict[str, tuple[Callable[[str], bool], str]] = {
        "symbol": (lambda v: "symbol" in re.compile(v).groupindex, "a regular expression with a group (?P<symbol>…)"),
        "first": (lambda v: bool(re.compile(v)), "a regular expression"),
        "decimal": (lambda v: v in (".", ","), "a point or a comma"),
        "delimiter": (lambda v: len(v) == 1 and v not in '"\r\n', "one character"),
        "dates": (lambda v: v in ORDERS, ", ".join(ORDERS)),
        "stamps": (lambda v: bool(ZoneInfo(v)), "an IANA zone, such as Europe/Berlin"),
        "zone": (lambda v: bool(ZoneInfo(v)), "an IANA zone, such as America/New_York"),
        "day_starts": (lambda v: seconds_of(v) >= 0, "a time of day, such as 17:00"),
        "encoding": (lambda v: bool(codecs.lookup(v)), "an encoding, such as utf-8 or cp1252"),
    }
    for key, (check, allowed) in checks.items():
        if made.get(key) is not None:
            try:
                fits = check(made[key])
            except (re.error, LookupError, ValueError, OSError):
                fits = False
            if not fits:
                raise wrong(key, allowed)
    return Format(**made)


def seconds_of(clock: str) -> int:
    """ "17:00" as seconds of the day; ValueError where it is none."""
    found = re.fullmatch(r"(\d{1,2}):(\d{2})", clock)
    if not found or int(found[1]) > 23 or int(found[2]) > 59:
        raise ValueError(clock)
    return int(found[1]) * 3600 + int(found[2]) * 60


def _texts(value: Any, *, empty: bool = False) -> tuple[str, ...]:
    """A text or a list of texts as a tuple; () where it is neither."""
    values = [value] if isinstance(value, str | int) and not isinstance(value, bool) else value
    if not isinstance(values, Sequence) or not all(isinstance(v, str | int) for v in values):
        return ()
    texts = tuple(str(v) for v in values)
    return texts if empty or all(texts) else ()


def _raise(error: Exception) -> Any:
    raise error


def table() -> str:
    """The docs' table of formats, in Markdown."""
    lines = ["| name | of | recognised by | symbol | days | volume |", "|---|---|---|---|---|---|"]
    for one in _builtin()[0]:
        if one.header:
            by = "columns " + ", ".join(f"`{name}`" for name in one.header)
        elif one.fields:
            by = f"no header, {len(one.fields)} columns, the first like `{one.first}`".replace("|", "\\|")
        elif one.wide:
            by = "two header lines, of fields and of tickers"
        else:
            by = "usual names of columns"
        by += "".join(f", file `{glob}`" for glob in one.files)
        if "symbol" in one.columns or any(SYMBOL in c for cs in one.columns.values() for c in cs):
            symbol = "in a column" if "symbol" in one.columns else "in the columns' names"
        elif one.wide or "SYMBOL" in map(str.upper, one.header):
            symbol = "in a column" if not one.wide else "in the second header line"
        else:
            symbol = "the file's name" if one.name != "generic" else "in a column, else the file's name"
        days = " ".join(
            filter(None, [one.dates, one.zone and f"in {one.zone}", one.day_starts and f"from {one.day_starts}"])
        )
        lines.append(f"| `{one.name}` | {one.title} | {by} | {symbol} | {days} | {one.volume_unit or ''} |")
    return "\n".join(lines)
