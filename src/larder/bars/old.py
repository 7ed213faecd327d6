"""Daily bars from CSV and Parquet files: columns by their usual names, in batches, each bar judged."""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from larder.errors import RefusedFileError

SUFFIXES = (".csv", ".csv.gz", ".parquet")
PRICES = ("open", "high", "low", "close", "adjusted_close")
# Spellings without case, blanks and punctuation; where a file has several, the first of the list counts.
SPELLINGS = {
    "date": (
        *("date", "tradedate", "tradingday", "day", "datetime", "timestamp", "eventtimestamp", "time"),
        *("indexlevel0", ""),  # the index of pandas, which often has no name
    ),
    "open": ("open", "o", "openprice"),
    "high": ("high", "h", "highprice"),
    "low": ("low", "l", "lowprice"),
    "close": ("close", "c", "last", "closeprice"),
    "adjusted_close": ("adjclose", "adjustedclose", "closeadj", "closeadjusted", "adjcloseprice"),
    "volume": ("volume", "vol", "v"),
    "symbol": ("symbol", "ticker", "instrument"),
}
OPTIONAL = ("adjusted_close", "symbol")
NUMBER = r"^-?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
BATCH_BYTES = 1 << 20  # pyarrow reads several ahead
BATCH_ROWS = 1 << 16
Dates = npt.NDArray[np.datetime64]
LARGEST_VOLUME = 2.0**53  # up to here a float64 counts every share


@dataclass(frozen=True)
class Batch:
    """Bars of one batch, in the file's order.

    good: symbol, event_timestamp (date32), the prices (float64), volume (int64), seconds (int32, of the day).
    rejected: symbol, event_timestamp (null where unreadable), reason, bar (the bar's own text).
    """

    good: pa.Table
    rejected: pa.Table


def symbol_of(path: Path) -> str:
    """GOOG.US.csv → GOOG.US."""
    name = path.name
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    raise RefusedFileError(f"{path}: the name must end in one of {', '.join(SUFFIXES)}.")


def columns_of(path: Path, header: list[str]) -> dict[str, str]:
    """Which column of the file holds what: {"open": "Open", …}."""
    by_spelling: dict[str, list[str]] = {}
    for name in header:
        by_spelling.setdefault(re.sub(r"[^a-z0-9]", "", name.lower()), []).append(name)
    found = {}
    for field, spellings in SPELLINGS.items():
        names = next((by_spelling[s] for s in spellings if s in by_spelling), [])
        if len(names) > 1:
            raise RefusedFileError(f"{path}: {field} stands in several columns ({', '.join(names)}); one is allowed.")
        if names:
            found[field] = names[0]
        elif field not in OPTIONAL:
            allowed = ", ".join(s for s in spellings if s)
            raise RefusedFileError(
                f"{path}: no column for {field} among {', '.join(header) or 'none at all'}; "
                f"allowed names, in any case, are {allowed}."
            )
    return found


def read(path: Path, today: np.datetime64) -> Iterator[Batch]:
    """The bars of a file, judged; `today` is the last date that a bar can have.

    Raises RefusedFileError, before the first batch or later, where the file as a whole cannot be understood.
    """
    symbol = symbol_of(path)
    broken: list[str] = []
    dates = _Dates(path)
    readable = rows = 0
    try:
        for raw in _parquet(path) if path.name.lower().endswith(".parquet") else _csv(path, broken):
            rows += raw.num_rows
            batch = _judge(raw, symbol, dates, today)
            readable += batch.good.num_rows + batch.rejected.num_rows - batch.rejected["event_timestamp"].null_count
            yield batch
    except (pa.ArrowException, OSError, EOFError, UnicodeError) as error:
        raise RefusedFileError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if rows and not readable:
        raise RefusedFileError(
            f"{path}: no value of its date column is a date; allowed are YYYY-MM-DD, YYYYMMDD, M/D/YYYY, D/M/YYYY "
            "(a time may follow) and Unix time."
        )
    if broken:
        unknown: list[Any] = [None] * len(broken)
        reasons = ["the line has too few or too many columns"] * len(broken)
        yield Batch(_NO_BARS, _rejected(unknown, unknown, reasons, broken))


def _csv(path: Path, broken: list[str]) -> Iterator[pa.RecordBatch]:
    with pa.input_stream(path, compression="detect") as stream:
        first = stream.read(BATCH_ROWS).split(b"\n", 1)[0].decode("utf-8-sig").rstrip("\r")
    delimiter = max(",;\t|", key=first.count)
    header = next(csv.reader([first], delimiter=delimiter), [])
    columns = columns_of(path, header)

    def skip(row: Any) -> str:
        broken.append(row.text or "")
        return "skip"

    with pa.input_stream(path, compression="detect") as stream:
        reader = pa.csv.open_csv(
            stream,
            read_options=pa.csv.ReadOptions(block_size=BATCH_BYTES),
            parse_options=pa.csv.ParseOptions(delimiter=delimiter, invalid_row_handler=skip),
            # All as text, so that one bad value costs its own bar and not the file.
            convert_options=pa.csv.ConvertOptions(
                include_columns=list(columns.values()),
                column_types={name: pa.string() for name in columns.values()},
                strings_can_be_null=True,
                null_values=["", "NA", "N/A", "null", "NULL", "None"],
            ),
        )
        for batch in reader:
            yield batch.rename_columns(list(columns))


def _parquet(path: Path) -> Iterator[pa.RecordBatch]:
    with pa.parquet.ParquetFile(path) as file:
        columns = columns_of(path, file.schema_arrow.names)
        for batch in file.iter_batches(BATCH_ROWS, columns=list(columns.values())):
            yield batch.select(list(columns.values())).rename_columns(list(columns))


class _Dates:
    """Reads a file's dates. Whether 3/4/2025 is March or April is decided once per file, from a day above 12."""

    CLOCK = r"(?:[ T](?P<hour>\d{1,2}):(?P<minute>\d{2})(?::(?P<second>\d{2}))?.*)?$"
    YEAR_FIRST = r"^\s*(?P<year>\d{4})[-/.](?P<month>\d{1,2})[-/.](?P<day>\d{1,2})" + CLOCK
    COMPACT = r"^\s*(?P<year>[12]\d{3})(?P<month>\d{2})(?P<day>\d{2})(?:\.0)?" + CLOCK
    YEAR_LAST = r"^\s*(?P<first>\d{1,2})[-/.](?P<second_>\d{1,2})[-/.](?P<year>\d{4})" + CLOCK
    UNIX = r"^\s*(?P<unix>\d{9,19})(?:\.0*)?$"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.day_first: bool | None = None

    def read(self, column: pa.Array) -> tuple[Dates, npt.NDArray[np.int32]]:
        """Dates (datetime64[D], NaT where unreadable) and the seconds of the day. A zone's own local date counts."""
        if pa.types.is_date(column.type):
            column = column.cast(pa.timestamp("s"))
        if pa.types.is_timestamp(column.type):
            if column.type.tz is not None:
                column = pc.local_timestamp(column)
            stamps = column.cast(pa.timestamp("s"), safe=False).to_numpy(zero_copy_only=False)
            return self._split(stamps)
        text = column.cast(pa.string())
        stamps = np.full(len(text), np.datetime64("NaT", "s"))
        for pattern in (self.YEAR_FIRST, self.COMPACT, self.YEAR_LAST, self.UNIX):
            missing = np.isnat(stamps)
            if not missing.any():
                break
            parts = pc.extract_regex(text, pattern)
            matched = pc.is_valid(parts).to_numpy(zero_copy_only=False) & missing
            if matched.any():
                stamps[matched] = self._stamps(parts.filter(pa.array(matched)))
        return self._split(stamps)

    def _stamps(self, parts: pa.StructArray) -> Dates:
        def number(name: str) -> npt.NDArray[np.int64]:
            texts = parts.field(name)
            return np.asarray(pc.if_else(pc.equal(texts, ""), "0", texts).cast(pa.int64()), dtype=np.int64)

        names = [field.name for field in parts.type]
        if "unix" in names:
            unix: npt.NDArray[np.int64] = number("unix")
            for limit, divisor in ((10**17, 10**9), (10**14, 10**6), (10**11, 10**3)):  # nano-, micro-, milliseconds
                unix = np.where(unix >= limit, unix // divisor, unix)
            return np.array(unix, dtype="datetime64[s]")
        if "first" in names:
            first, second = number("first"), number("second_")
            if self.day_first is None:
                if (first > 12).any() == (second > 12).any():
                    raise RefusedFileError(
                        f"{self.path}: its dates ({first[0]}/{second[0]}/…) can be read as month/day and as day/month; "
                        "YYYY-MM-DD is allowed."
                    )
                self.day_first = bool((first > 12).any())
            month, day = (second, first) if self.day_first else (first, second)
        else:
            month, day = number("month"), number("day")
        months = ((number("year") - 1970) * 12 + month - 1).astype("datetime64[M]")
        dates = months.astype("datetime64[D]") + (day - 1).astype("timedelta64[D]")
        dates[(month < 1) | (month > 12) | (day < 1) | (dates.astype("datetime64[M]") != months)] = np.datetime64(
            "NaT", "D"
        )
        clock = number("hour") * 3600 + number("minute") * 60 + number("second")
        return np.array(dates.astype("datetime64[s]") + clock.astype("timedelta64[s]"), dtype="datetime64[s]")

    @staticmethod
    def _split(stamps: Dates) -> tuple[Dates, npt.NDArray[np.int32]]:
        dates = stamps.astype("datetime64[D]")
        seconds = np.where(np.isnat(stamps), 0, (stamps - dates).astype("int64"))
        return dates, seconds.astype(np.int32)


def _numbers(column: pa.Array) -> npt.NDArray[np.float64]:
    """float64, NaN for whatever is not a number."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = pc.utf8_trim_whitespace(column)
        try:
            column = column.cast(pa.float64())
        except pa.ArrowInvalid:
            column = pc.if_else(pc.match_substring_regex(column, NUMBER), column, None).cast(pa.float64())
    return np.asarray(column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False), dtype=np.float64)


def _mask(column: pa.Array) -> npt.NDArray[np.bool_]:
    return np.asarray(pc.fill_null(column, False).to_numpy(zero_copy_only=False), dtype=np.bool_)


def _judge(raw: pa.RecordBatch, symbol: str, dates: _Dates, today: np.datetime64) -> Batch:
    rows = raw.num_rows
    values = {name: _numbers(raw[name]) for name in (*PRICES, "volume") if name in raw.schema.names}
    if "adjusted_close" in values:
        values["adjusted_close"] = np.where(raw["adjusted_close"].is_null(), values["close"], values["adjusted_close"])
    else:
        values["adjusted_close"] = values["close"]
    values["volume"] = np.rint(values["volume"])
    if "symbol" in raw.schema.names:
        symbols = pc.utf8_trim_whitespace(raw["symbol"].cast(pa.string()))
    else:
        symbols = pa.array([symbol] * rows, pa.string())
    named = _mask(pc.match_substring_regex(symbols, r"^[^\s[:cntrl:]]{1,64}$"))
    day, seconds = dates.read(raw["date"])

    with np.errstate(invalid="ignore"):
        faults = [
            ("the symbol is not a name", ~named),
            ("the date cannot be read", np.isnat(day)),
            ("the date is in the future", day > today),
            *((f"{name} is not a number", ~np.isfinite(column)) for name, column in values.items()),
            *((f"{name} is negative", column < 0) for name, column in values.items()),
            ("high is below low", values["high"] < values["low"]),
            ("volume is too large", values["volume"] > LARGEST_VOLUME),
        ]
    bad = np.any([mask for _, mask in faults], axis=0)

    good = pa.table(
        {
            "symbol": symbols,
            "event_timestamp": pa.array(day, pa.date32()),
            **{name: pa.array(values[name]) for name in PRICES},
            "volume": pa.array(np.where(bad, 0, values["volume"]).astype(np.int64)),
            "seconds": pa.array(seconds),
        }
    ).filter(pa.array(~bad))
    where = np.flatnonzero(bad)
    texts = raw.take(pa.array(where)).to_pylist()
    return Batch(
        good,
        _rejected(
            [symbols[int(i)].as_py() for i in where],
            [None if np.isnat(day[i]) else day[i].item() for i in where],
            ["; ".join(reason for reason, mask in faults if mask[i]) for i in where],
            [" ".join(f"{name}={'' if value is None else value}" for name, value in row.items()) for row in texts],
        ),
    )


def _rejected(symbols: list[str | None], days: list[date | None], reasons: list[str], bars: list[str]) -> pa.Table:
    def clean(texts: list[Any]) -> pa.Array:  # PostgreSQL's text holds no NUL
        return pa.array([None if t is None else t.replace("\0", "")[:1000] for t in texts], pa.string())

    return pa.table(
        {
            "symbol": clean(symbols),
            "event_timestamp": pa.array(days, pa.date32()),
            "reason": clean(reasons),
            "bar": clean(bars),
        }
    )


_NO_BARS = pa.table(
    {
        "symbol": pa.array([], pa.string()),
        "event_timestamp": pa.array([], pa.date32()),
        **{name: pa.array([], pa.float64()) for name in PRICES},
        "volume": pa.array([], pa.int64()),
        "seconds": pa.array([], pa.int32()),
    }
)
