"""Which format a sheet has: the first entry of the catalogue that fits its header, or its first line."""

import ast
import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import PurePosixPath
from urllib.parse import unquote

from larder.bars.catalogue import SYMBOL, Catalogue, Format, plain
from larder.bars.model import FIELDS, Options
from larder.bars.source import NoTableError, Sheet, decode, encodings, stem
from larder.errors import RefusedFileError

LINES_BEFORE = 25  # titles and remarks before a header
DELIMITERS = ",;\t|"
REQUIRED = ("date", "open", "high", "low", "close")
# A column "time" beside one of these is the time of the day.
DAYS = ("date", "day", "tradedate", "tradingday", "dtyyyymmdd", "datum", "data", "fecha", "日付", "日期")
IS_NUMBER = re.compile(r"[+-]?[\d.,' ]*\d[\d.,' ]*(?:[eE][+-]?\d+)?")
DAILY = frozenset({"daily", "d1", "1d", "1_d", "d", "1440", "1day", "86400"})
# Names that a program or a person gives to any file: no symbols.
NO_SYMBOLS = frozenset(
    {
        *(
            "",
            "data",
            "daten",
            "download",
            "downloads",
            "export",
            "exports",
            "history",
            "historicaldata",
            "historicalquotes",
        ),
        *(
            "prices",
            "quotes",
            "bars",
            "ohlc",
            "ohlcv",
            "table",
            "tabelle",
            "sheet",
            "sheet1",
            "book1",
            "mappe1",
            "untitled",
        ),
        *("unnamed", "new", "test", "output", "file", "csv", "stocks", "stockdata", "stock", "daily", "chart", "part0"),
    }
)
# What programs and people add to a symbol: a timeframe, of which the bars themselves say more, and first and last day.
_DAY = r"(?:19|20)\d\d[-.]?[01]\d[-.]?[0-3]\d"
NAMED = (
    r"(?P<symbol>.+?)"
    r"(?:[-_ ](?:(?i:daily|eod|1d|d1|1day|hourly|intraday|weekly|monthly|1w|w1|mn1|h[14]|m1|m5|m15|m30)"
    r"|[1-4][hH]|(?:1|5|15|30|60)(?:m|min)))?"
    rf"(?:[-_ ]{_DAY}(?:[-_ ]+(?:to[-_ ]+)?{_DAY})?)?"
)
IS_DATE = re.compile(r"(?:19|20)\d{2}([-_.]?)\d{2}(?:\1\d{2})?|part-\d+.*")


@dataclass(frozen=True)
class Layout:
    """Where in a sheet what stands.

    skip: lines before the first bar. columns: field to the number of its column; for the volume several, the first that
    is not 0 throughout counts. width: how many columns a line has. wide: of each symbol, its columns.
    """

    format: Format
    why: str
    encoding: str | None = None
    delimiter: str | None = None
    skip: int = 0
    width: int = 0
    header: tuple[str, ...] = ()
    columns: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    wide: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    symbol: str | None = None
    timeframe: str | None = None


def recognise(sheet: Sheet, header: Sequence[str] | None, catalogue: Catalogue, options: Options) -> Layout:
    """The layout of a sheet; `header` are the columns of Parquet. Raises RefusedFileError that says what is missing."""
    formats = _formats(catalogue, options)
    fitting = [f for f in formats if not f.files or _named(sheet, f)]
    over = [f for f in fitting if not f.recognises]
    fitting = [f for f in fitting if f.recognises]
    if header is not None:
        layout = _of_header(header, fitting, catalogue, options)
        if layout is None:
            raise _no_columns([list(header)], catalogue, options)
    else:
        layout = _of_text(sheet, fitting, catalogue, options)
    for entry in reversed(over):
        layout = replace(layout, format=entry.over(layout.format), why=f"{layout.why}; {entry.name} fits its name")
    return _with_symbol(layout, sheet)


def _formats(catalogue: Catalogue, options: Options) -> list[Format]:
    if options.format is None:
        return list(catalogue.formats)
    wanted = catalogue.named(options.format)
    return [replace(wanted, files=()), *(f for f in catalogue.formats if not f.recognises)]


def _named(sheet: Sheet, entry: Format) -> bool:
    path = PurePosixPath(sheet.member or sheet.path.as_posix())
    return any(path.match(glob) or fnmatchcase(path.name, glob) for glob in entry.files)


def _of_text(sheet: Sheet, formats: Sequence[Format], catalogue: Catalogue, options: Options) -> Layout:
    names = [options.encoding] if options.encoding else encodings(sheet.sample)
    if not names:
        raise NoTableError("it is no text: it holds bytes that no encoding has, or NUL. Write it as CSV or Parquet.")
    best: list[list[str]] = []
    for encoding in names:
        text = decode(sheet.sample, encoding)
        if text is None:
            raise RefusedFileError(f"it is not {encoding}; --encoding names another one.")
        if re.match(r"\s*(?:<!doctype|<html|<\?xml|<table)", text, re.IGNORECASE):
            raise NoTableError(
                "it is a page (HTML or XML), perhaps a login or an error page of its source: download it again as CSV."
            )
        if re.match(r"\s*[{\[]\s*[\"{\[\]}]", text):
            raise NoTableError("it is JSON: write it as CSV or Parquet.")
        lines = re.split(r"\r\n|\n|\r", text)
        if len(sheet.sample) >= 1 << 18:
            lines.pop()
        rows = [(n, line) for n, line in enumerate(lines) if line.strip()][:LINES_BEFORE]
        for found in (
            _positions(rows, formats, options),
            _wide(rows, formats),
            _header(lines, rows, formats, catalogue, options),
            _headerless(rows, formats),
        ):
            if found:
                return replace(found, encoding=encoding)
        best = best or [_split(line, _likely(line)) for _, line in rows]
    first = best[0]
    numbers = sum(bool(IS_NUMBER.fullmatch(cell.strip())) for cell in first)
    if len(first) > 3 and numbers >= max(3, len(first) - 2):
        raise RefusedFileError(
            f"it has no header line and no known layout (its first line has {len(first)} columns, "
            f"{' | '.join(first)[:100]}); --columns date=1,open=2,high=3,low=4,close=5,volume=6 says which is which."
        )
    raise _no_columns(best, catalogue, options)


def _split(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:  # a field of more than 128 kB, or a NUL
        return [line[:100]]


def _likely(line: str) -> str:
    return max(DELIMITERS, key=line.count)


def _header(
    lines: Sequence[str],
    rows: Sequence[tuple[int, str]],
    formats: Sequence[Format],
    catalogue: Catalogue,
    options: Options,
) -> Layout | None:
    for number, line in rows:
        for delimiter in sorted(DELIMITERS, key=line.count, reverse=True):
            if delimiter not in line:
                continue
            cells = _split(line, delimiter)
            below = [_split(other, delimiter) for other in lines[number + 1 : number + 50] if other.strip()]
            if below and all(len(row) == len(cells) + 1 for row in below):
                # Each line ends in a delimiter; or R wrote the names of rows, without a name for their column.
                cells = [*cells, ""] if not any(row[-1].strip() for row in below) else ["", *cells]
            layout = _of_header(cells, formats, catalogue, options)
            if layout and layout.format.delimiter in (None, delimiter):
                return replace(layout, delimiter=delimiter, skip=number + 1)
    return None


def _of_header(
    cells: Sequence[str], formats: Sequence[Format], catalogue: Catalogue, options: Options
) -> Layout | None:
    names = [plain(cell) for cell in cells]
    if len(set(filter(None, names))) < min(4, 2 + len(options.columns)):
        return None
    wide = _wide_names(cells, formats)
    if wide:
        return wide
    best: Layout | None = None
    for entry in formats:
        # Of the entries that fit, the one that names most columns counts; a user's own goes before the catalogue's.
        if entry.fields or entry.wide:
            continue
        if best and (best.format.own > entry.own or len(best.format.header) >= len(entry.header)):
            continue
        symbol = _matches(entry.header, cells, names)
        columns = None if symbol is None else _columns(entry, cells, names, symbol, catalogue, options)
        if columns is None:
            continue
        why = (
            f"its columns are those of {entry.title or entry.name}" if entry.header else "its columns have usual names"
        )
        best = Layout(entry, why, width=len(cells), header=tuple(cells), columns=columns, symbol=symbol or None)
    return best


def _matches(header: Sequence[str], cells: Sequence[str], names: Sequence[str]) -> str | None:
    """The symbol that stands in the columns' names, "" where none does; None where a column is missing."""
    symbol = ""
    for want in header:
        if SYMBOL in want:
            found = [m[1] for m in (re.fullmatch(_regex(want), cell.strip(), re.IGNORECASE) for cell in cells) if m]
            if not found or (symbol and symbol not in found):
                return None
            symbol = symbol or found[0]
        elif not _places(want, cells, names, ""):
            return None
    return symbol


def _regex(want: str) -> str:
    return re.escape(want).replace(re.escape(SYMBOL), r"(\S{1,64}?)").replace(r"\*", ".*")


def _places(want: str, cells: Sequence[str], names: Sequence[str], symbol: str) -> list[int]:
    want = want.replace(SYMBOL, symbol)
    if "*" in want:
        return [n for n, cell in enumerate(cells) if re.fullmatch(_regex(want), cell.strip(), re.IGNORECASE)]
    if want.startswith("<"):  # <VOL> of MetaTrader is not vol of others
        return [n for n, cell in enumerate(cells) if cell.strip().casefold() == want.casefold()]
    return [n for n, name in enumerate(names) if name == plain(want)]


def _columns(
    entry: Format,
    cells: Sequence[str],
    names: Sequence[str],
    symbol: str,
    catalogue: Catalogue,
    options: Options,
) -> dict[str, tuple[int, ...]] | None:
    """Field to columns; None where one is missing. RefusedFileError where the user names one that is not there."""
    columns: dict[str, tuple[int, ...]] = {}
    for name in FIELDS:
        if name in options.columns:
            wanted = options.columns[name]
            places = [n for n, cell in enumerate(cells) if cell.strip() == wanted] or _places(wanted, cells, names, "")
            if not places:
                return None
            columns[name] = (places[0],)
            continue
        if name == "time" and name not in entry.columns:
            continue
        if name in entry.columns:
            places = [n for want in entry.columns[name] for n in _places(want, cells, names, symbol)]
        else:
            spelled = [[n for n, each in enumerate(names) if each == s] for s in catalogue.names[name]]
            places = next((p for p in spelled if p), [])
            if len(places) > 1 and names[places[0]]:
                raise RefusedFileError(
                    f"{name} stands in several columns ({', '.join(cells[n] for n in places)}); "
                    f"--columns {name}=… says which one counts."
                )
            places = places[:1]
        if places:
            columns[name] = tuple(dict.fromkeys(places)) if name == "volume" else (places[0],)
        elif name in REQUIRED:
            return None
    if "time" not in columns and names[columns["date"][0]] in DAYS and "time" not in options.columns:
        times = [n for n, each in enumerate(names) if each in catalogue.names["time"] and n not in columns["date"]]
        if times:
            columns["time"] = (times[0],)
    if len({n for places in columns.values() for n in places}) < sum(len(p) for p in columns.values()):
        return None
    return columns


def _positions(rows: Sequence[tuple[int, str]], formats: Sequence[Format], options: Options) -> Layout | None:
    """Columns that the user named by their numbers."""
    if not options.columns or not all(value.isdigit() for value in options.columns.values()):
        return None
    delimiter = max(DELIMITERS, key=lambda d: sum(line.count(d) for _, line in rows))
    number, line = rows[0]
    cells = _split(line, delimiter)
    columns = {name: (int(value) - 1,) for name, value in options.columns.items()}
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        raise RefusedFileError(f"--columns names no column for {missing[0]}.")
    if (far := max(n for (n,) in columns.values())) >= len(cells) or min(n for (n,) in columns.values()) < 0:
        raise RefusedFileError(f"--columns names the column {far + 1}; it has {len(cells)} (1 is the first).")
    # A header line, whose names are not those that the user gave, is no bar.
    is_header = not any(any(c.isdigit() for c in cells[n]) for (n,) in columns.values())
    generic = next((f for f in formats if f.name == "generic"), Format("columns"))
    entry = formats[0] if options.format else generic
    return Layout(
        entry,
        "its columns are named by --columns",
        delimiter=delimiter,
        skip=number + is_header,
        width=len(cells),
        columns=columns,
    )


def _headerless(rows: Sequence[tuple[int, str]], formats: Sequence[Format]) -> Layout | None:
    number, line = rows[0]
    for delimiter in DELIMITERS:
        cells = [cell.strip() for cell in _split(line, delimiter)]
        for entry in formats:
            if not entry.fields or len(cells) != len(entry.fields) or entry.delimiter not in (None, delimiter):
                continue
            if entry.first and not re.fullmatch(entry.first, cells[0]):
                continue
            numeric = [cells[n] for n, name in enumerate(entry.fields) if name in (*REQUIRED[1:], "volume")]
            if not all(IS_NUMBER.fullmatch(cell) for cell in numeric):
                continue
            columns: dict[str, tuple[int, ...]] = {name: (n,) for n, name in enumerate(entry.fields) if name != "_"}
            return Layout(
                entry,
                f"it has no header line, and {len(cells)} columns like those of {entry.title or entry.name}",
                delimiter=delimiter,
                skip=number,
                width=len(cells),
                columns=columns,
            )
    return None


def _levels(top: Sequence[str], below: Sequence[str]) -> Iterator[tuple[Sequence[str], Sequence[str]]]:
    yield top, below
    yield below, top


KNOWN = {
    "open": "open",
    "high": "high",
    "low": "low",
    "close": "close",
    "adjclose": "adjusted_close",
    "volume": "volume",
}


def _symbols(fields: Sequence[str], symbols: Sequence[str]) -> dict[str, dict[str, tuple[int, ...]]] | None:
    """Of each symbol its columns, where one line names fields and another one symbols."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for n, (name, symbol) in enumerate(zip(fields, symbols, strict=True)):
        known = KNOWN.get(plain(name))
        if known and symbol.strip():
            if known in found.setdefault(symbol.strip(), {}):
                return None
            found[symbol.strip()][known] = (n,)
    complete = {s: c for s, c in found.items() if {"open", "high", "low", "close"} <= c.keys()}
    return complete if complete and len(complete) == len(found) else None


def _wide(rows: Sequence[tuple[int, str]], formats: Sequence[Format]) -> Layout | None:
    """Two header lines, of fields and of symbols, perhaps a third with the name of the index."""
    entry = next((f for f in formats if f.wide), None)
    if not entry or len(rows) < 3:
        return None
    for (_, first), (second_number, second) in pairwise(rows[:4]):
        delimiter = _likely(first)
        top, below = _split(first, delimiter), _split(second, delimiter)
        # A line that begins with a date is a bar, whose prices are all the same.
        if len(top) != len(below) or len(top) < 5 or below[0].strip()[:1].isdigit():
            continue
        for names, symbols in _levels(top, below):
            wide = _symbols(names[1:], symbols[1:])
            if not wide:
                continue
            third = next((_split(line, delimiter) for n, line in rows if n > second_number), [])
            named = bool(third) and not any(cell.strip() for cell in third[1:])
            return Layout(
                entry,
                "two header lines name fields and symbols",
                delimiter=delimiter,
                skip=second_number + 1 + named,
                width=len(top),
                columns={"date": (0,)},
                wide={s: {f: (n + 1,) for f, (n,) in c.items()} for s, c in wide.items()},
            )
    return None


def _wide_names(cells: Sequence[str], formats: Sequence[Format]) -> Layout | None:
    """Columns named by pairs, as pandas writes them into Parquet: ('Open', 'AAPL')."""
    entry = next((f for f in formats if f.wide), None)
    if not entry or sum(cell.startswith("('") for cell in cells) < 4:
        return None
    pairs: list[tuple[str, str]] = []
    for cell in cells:
        try:
            pair = ast.literal_eval(cell) if cell.startswith("(") else ("", "")
        except (ValueError, SyntaxError):
            pair = ("", "")
        pairs.append((str(pair[0]), str(pair[1])) if isinstance(pair, tuple) and len(pair) == 2 else ("", ""))
    for names, symbols in _levels([a for a, _ in pairs], [b for _, b in pairs]):
        wide = _symbols(names, symbols)
        dates = [
            n
            for n, (cell, pair) in enumerate(zip(cells, pairs, strict=True))
            if plain(cell) in ("date", "datetime", "indexlevel0", "datepart")
            or plain(pair[0] + pair[1]) in ("date", "datetime")
        ]
        if wide and dates:
            return Layout(
                entry,
                "its columns are named by field and symbol",
                width=len(cells),
                header=tuple(cells),
                columns={"date": (dates[0],)},
                wide=wide,
            )
    return None


def _no_columns(rows: Sequence[Sequence[str]], catalogue: Catalogue, options: Options) -> RefusedFileError:
    """The sentence for the line that looks most like a header."""

    def found(cells: Sequence[str]) -> set[str]:
        names = {plain(cell) for cell in cells}
        return {name for name in REQUIRED if names & set(catalogue.names[name])}

    header = max(rows, key=lambda cells: len(found(cells)), default=[])
    listed = ", ".join(cell.strip() or "(no name)" for cell in header)[:300]
    for name, wanted in options.columns.items():
        if not any(cell.strip() == wanted or plain(cell) == plain(wanted) for cell in header):
            return RefusedFileError(
                f"it has no column {wanted!r}, which --columns names for {name}; there are {listed}."
            )
    if len(header) == 1 and len(found(re.split(r"[\s,;]+", header[0]))) > 2:
        return RefusedFileError(
            f"its columns stand apart by blanks alone, or its lines are quoted as a whole ({listed[:100]}): write it "
            "with commas, semicolons or tabs, and without quotes around a line."
        )
    if not found(header) and not options.columns:
        return NoTableError(
            f"it does not look like bars: none of its first lines names columns such as {', '.join(REQUIRED)} (one is: "
            f"{listed[:120]}). If it holds bars, --columns date=…,open=… names its columns; else take it away."
        )
    missing = next((name for name in REQUIRED if name not in found(header) and name not in options.columns), "date")
    usual = [name for name in dict.fromkeys(catalogue.names[missing]) if name.isascii() and name]
    allowed = ", ".join(usual[:6]) + (" and others" if len(usual) > 6 else "")
    return RefusedFileError(
        f"no column for {missing} among {listed or 'none at all'}; usual names are {allowed}, "
        f"and --columns {missing}=… names another one."
    )


def _with_symbol(layout: Layout, sheet: Sheet) -> Layout:
    """What the file's name says: the symbol, unless a column has it or the name is none, and perhaps the timeframe."""
    name = stem(sheet.name)
    found = re.fullmatch(layout.format.symbol or NAMED, name, re.DOTALL)
    groups = found.groupdict() if found else {}
    timeframe = (groups.get("timeframe") or "").strip("_").split("_20")[0] or None
    symbol = groups.get("symbol") or ""
    if plain(symbol) in NO_SYMBOLS or IS_DATE.fullmatch(symbol):
        symbol = ""
    return replace(layout, symbol=layout.symbol or unquote(symbol) or None, timeframe=timeframe)
