"""Dates and times of a column, as they are written in files: which day, which second, which offset from UTC."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from larder.bars.catalogue import plain

Times = npt.NDArray[np.datetime64]
Ints = npt.NDArray[np.int64]
NAIVE = np.iinfo(np.int64).min  # the offset of a time that names none
NAT = np.datetime64("NaT", "s")
LONGEST = 64  # what is longer is no date; it also bounds what a regular expression looks at

CLOCK = (
    r"(?:[ T,;]+(?P<hour>\d{1,2}):?(?P<minute>\d{2})(?::?(?P<second>\d{2}))?(?:[.,]\d+)?\s*(?P<half>[AaPp]\.?[Mm]\.?)?"
    r"\s*(?P<zone>[Zz]|(?:UTC|GMT)?\s*[+-]\d{1,2}:?\d{2}|(?:UTC|GMT)?[+-]\d{1,2}|[A-Z]{2,5})?)?"
    r"(?:\s*\([\p{L} ]+\))?\s*$"  # as JavaScript writes: GMT-0400 (Eastern Daylight Time)
)
WEEKDAY = r"^\s*(?:\p{L}{2,10}\.?,?\s+)?"
PATTERNS = {
    "YYYY-MM-DD": r"^\s*(?P<year>\d{4})[-/.年년]\s?(?P<month>\d{1,2})[-/.月월]\s?(?P<day>\d{1,2})[.日일]?" + CLOCK,
    "YYYYMMDD": r"^\s*(?P<year>[12]\d{3})(?P<month>\d{2})(?P<day>\d{2})(?:\.0+)?" + CLOCK,
    "YYYYMMDDhhmmss": r"^\s*(?P<year>[12]\d{3})(?P<month>[01]\d)(?P<day>[0-3]\d)"
    r"(?P<hour>[0-2]\d)(?P<minute>[0-5]\d)(?P<second>[0-5]\d)\s*$",
    "three numbers": r"^\s*(?P<a>\d{1,2})[-/.](?P<b>\d{1,2})[-/.](?P<c>\d{4}|\d{2})" + CLOCK,
    "D-month-Y": WEEKDAY + r"(?P<day>\d{1,2})\.?[-/ .]+(?P<name>\p{L}{3,10})\.?,?[-/ .]+(?P<year>\d{4}|\d{2})" + CLOCK,
    "month D, Y": WEEKDAY + r"(?P<name>\p{L}{3,10})\.?[-/ .]+(?P<day>\d{1,2}),?[-/ ]+(?P<year>\d{4}|\d{2})" + CLOCK,
    "Unix time": r"^\s*(?P<unix>\d{9,19})(?:\.\d*)?\s*$",
    "Excel's number": r"^\s*(?P<serial>[2-7]\d{4})(?P<fraction>\.\d{1,12})?\s*$",
}
# Three numbers with a year of four digits, and of two.
LONG, SHORT = ("D/M/Y", "M/D/Y"), ("D/M/Y", "M/D/Y", "Y/M/D")
ALLOWED = (
    "YYYY-MM-DD, YYYYMMDD, D/M/YYYY or M/D/YYYY, 30-Sep-2026, Sep 30, 2026 (a time may follow), Unix time, "
    "Excel's day numbers"
)
EXCEL = np.datetime64("1899-12-30", "s")


@dataclass
class Stamps:
    """Of each value: the time as it is written (NaT where it cannot be read), its offset in seconds, or NAIVE."""

    local: Times
    offset: Ints

    @property
    def utc(self) -> Times:
        times: Times = self.local - np.where(self.offset == NAIVE, 0, self.offset).astype("timedelta64[s]")
        return times


def parse(column: pa.Array, months: Mapping[str, int], orders: Sequence[str]) -> tuple[dict[str, Stamps], set[str]]:
    """Read a column once for each order of day, month and year; the same stamps for all where the order is no matter.

    Returns the stamps by order, and the patterns that were met.
    """
    if (typed := _typed(column)) is not None:
        return dict.fromkeys(orders, typed), {"a column of times"}
    text = _text(column)
    if (iso := _iso(text)) is not None:
        return dict.fromkeys(orders, iso), {"YYYY-MM-DD"}
    # A day is written once in its own way, however many symbols have a bar of it.
    words = text.dictionary_encode()
    stamps, met = _parse(words.dictionary, months, orders)
    missing = pc.is_null(words.indices).to_numpy(zero_copy_only=False)
    at = (
        words.indices.fill_null(len(words.dictionary)).to_numpy(zero_copy_only=False)
        if missing.any()
        else words.indices.to_numpy()
    )
    taken: dict[int, Stamps] = {}
    for one in stamps.values():
        if id(one) not in taken:
            taken[id(one)] = Stamps(np.append(one.local, NAT)[at], np.append(one.offset, NAIVE)[at])
    return {order: taken[id(one)] for order, one in stamps.items()}, met


def _iso(text: pa.Array) -> Stamps | None:
    """Days as YYYY-MM-DD throughout, in a tenth of the time that the patterns take."""
    try:
        days = text.cast(pa.date32())
    except pa.ArrowInvalid:
        return None
    local = days.cast(pa.timestamp("s")).to_numpy(zero_copy_only=False)
    return Stamps(local, np.full(len(text), NAIVE))


def _parse(text: pa.Array, months: Mapping[str, int], orders: Sequence[str]) -> tuple[dict[str, Stamps], set[str]]:
    local = np.full(len(text), NAT)
    offset = np.full(len(text), NAIVE)
    met: set[str] = set()
    several: dict[str, Stamps] = {}
    for name, pattern in PATTERNS.items():
        missing = np.isnat(local)
        if not missing.any():
            break
        parts = pc.extract_regex(text, pattern)
        matched = pc.is_valid(parts).to_numpy(zero_copy_only=False) & missing
        if not matched.any():
            continue
        met.add(name)
        parts = parts.filter(pa.array(matched))
        if name == "three numbers":
            short = _count(pc.equal(pc.utf8_length(parts.field("c")), 2)) > 0
            met.add("a year of two digits" if short else "a year of four digits")
            several = {order: _placed(local, offset, matched, *_read(parts, months, order)) for order in orders}
            # Of any order, so that the patterns after it leave these rows alone; they are put in at the end.
            local[matched] = EXCEL
        else:
            local[matched], offset[matched] = _read(parts, months, None)
    plain_stamps = Stamps(local, offset)
    if not several:
        return dict.fromkeys(orders, plain_stamps), met
    result = {}
    for order, stamps in several.items():
        mine = stamps.offset != _UNSET
        result[order] = Stamps(np.where(mine, stamps.local, local), np.where(mine, stamps.offset, offset))
    return result, met


_UNSET = NAIVE + 1


def _placed(local: Times, offset: Ints, matched: npt.NDArray[np.bool_], times: Times, offsets: Ints) -> Stamps:
    stamps = Stamps(local.copy(), np.full_like(offset, _UNSET))
    stamps.local[matched], stamps.offset[matched] = times, offsets
    return stamps


def _typed(column: pa.Array) -> Stamps | None:
    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("s"))
    if not pa.types.is_timestamp(column.type):
        return None
    zone = column.type.tz
    utc = column.cast(pa.timestamp("s", zone), safe=False).cast(pa.int64()).to_numpy(zero_copy_only=False)
    utc = np.where(column.is_null().to_numpy(zero_copy_only=False), np.iinfo(np.int64).min, utc).astype(np.int64)
    instants = utc.view("datetime64[s]")
    if zone is None:
        return Stamps(instants, np.full(len(instants), NAIVE))
    local = to_zone(instants, zone)
    seconds = np.where(np.isnat(local), 0, (local - instants).astype(np.int64))
    return Stamps(local, np.where(np.isnat(local), NAIVE, seconds))


def _text(column: pa.Array) -> pa.Array:
    if pa.types.is_floating(column.type):
        whole = pc.and_(pc.is_finite(column), pc.less(pc.abs(column), 9e18))
        column = pc.if_else(whole, column, None)
        days = pc.less(pc.abs(column), 1e6)  # Excel's days may have a fraction
        return pc.if_else(
            days, column.cast(pa.string()), pc.round(column).cast(pa.int64(), safe=False).cast(pa.string())
        )
    text = column.cast(pa.string())
    return pc.if_else(pc.greater(pc.utf8_length(text), LONGEST), None, text)


def _count(mask: pa.Array) -> int:
    return int(pc.sum(mask).as_py() or 0)


def _read(parts: pa.StructArray, months: Mapping[str, int], order: str | None) -> tuple[Times, Ints]:
    names = [field.name for field in parts.type]

    def number(name: str) -> Ints:
        if name not in names:
            return np.zeros(len(parts), np.int64)
        texts = parts.field(name)
        empty = pc.or_kleene(pc.is_null(texts), pc.equal(texts, ""))
        return np.asarray(pc.if_else(empty, "0", texts).cast(pa.int64()), dtype=np.int64)

    if "unix" in names:
        texts = parts.field("unix")
        # Nineteen nines are beyond int64, and so is what no calendar holds.
        unix = np.asarray(
            pc.if_else(pc.less(texts, "9200000000000000000"), texts, "0").cast(pa.int64())
            if _count(pc.equal(pc.utf8_length(texts), 19))
            else texts.cast(pa.int64()),
            dtype=np.int64,
        )
        lost = np.asarray(pc.and_(pc.equal(pc.utf8_length(texts), 19), pc.greater_equal(texts, "9200000000000000000")))
        for limit, divisor in ((10**17, 10**9), (10**14, 10**6), (10**11, 10**3)):  # nano-, micro-, milliseconds
            unix = np.where(unix >= limit, unix // divisor, unix)
        times = unix.astype("datetime64[s]")
        times[lost.astype(bool)] = NAT
        return times, np.zeros(len(times), np.int64)
    if "serial" in names:
        texts = parts.field("fraction")
        empty = pc.or_kleene(pc.is_null(texts), pc.equal(texts, ""))
        fraction = np.asarray(pc.if_else(empty, "0", texts).cast(pa.float64()))
        seconds = number("serial") * 86400 + np.rint(fraction * 86400).astype(np.int64)
        return EXCEL + seconds.astype("timedelta64[s]"), np.full(len(parts), NAIVE)
    if "name" in names:
        month, day, year = _month(parts.field("name"), months), number("day"), number("year")
    elif order:
        three = dict(zip(order.split("/"), ("a", "b", "c"), strict=True))
        day, month, year = number(three["D"]), number(three["M"]), number(three["Y"])
    else:
        year, month, day = number("year"), number("month"), number("day")
    if order or "name" in names:
        texts = parts.field("year" if "name" in names else dict(zip((order or "").split("/"), "abc", strict=True))["Y"])
        short = np.asarray(pc.less_equal(pc.utf8_length(texts), 2)).astype(np.bool_)
        # As POSIX has it: 69 to 99 are of the last century.
        year = np.where(short, year + np.where(year < 69, 2000, 1900), year)
    if order == "Y/M/D":  # the last of the three numbers is the day, of one or two digits
        day = np.where(np.asarray(pc.greater(pc.utf8_length(parts.field("c")), 2)).astype(np.bool_), 0, day)
    valid = (month >= 1) & (month <= 12) & (day >= 1) & (day <= 31) & (year >= 1) & (year <= 9999)
    base = ((np.where(valid, year, 1970) - 1970) * 12 + np.where(valid, month, 1) - 1).astype("datetime64[M]")
    dates = base.astype("datetime64[D]") + np.where(valid, day - 1, 0).astype("timedelta64[D]")
    valid &= dates.astype("datetime64[M]") == base
    hour, minute, second = number("hour"), number("minute"), number("second")
    if "half" in names:
        half = pc.utf8_lower(pc.fill_null(parts.field("half"), ""))
        morning = np.asarray(pc.starts_with(half, "a")).astype(bool)
        evening = np.asarray(pc.starts_with(half, "p")).astype(bool)
        valid &= ~((morning | evening) & ((hour < 1) | (hour > 12)))
        hour = np.where(morning & (hour == 12), 0, np.where(evening & (hour < 12), hour + 12, hour))
    valid &= (hour < 24) & (minute < 60) & (second < 61)
    times = dates.astype("datetime64[s]") + (hour * 3600 + minute * 60 + second).astype("timedelta64[s]")
    times[~valid] = NAT
    return times, _offset(parts.field("zone")) if "zone" in names else np.full(len(parts), NAIVE)


def _month(names: pa.Array, months: Mapping[str, int]) -> Ints:
    words = names.dictionary_encode()
    numbers = []
    for word in words.dictionary.to_pylist():
        folded = plain(word)
        full = (months.get(folded[:length]) for length in (5, 4, 3))
        numbers.append(next((number for number in full if number), 0))
    found: Ints = np.asarray(numbers, dtype=np.int64)[words.indices.to_numpy()]
    return found


def _offset(zones: pa.Array) -> Ints:
    words = pc.fill_null(zones, "").dictionary_encode()
    seconds = [_seconds(word) for word in words.dictionary.to_pylist()]
    found: Ints = np.asarray(seconds, dtype=np.int64)[words.indices.to_numpy()]
    return found


def _seconds(zone: str) -> int:
    """Of an offset; NAIVE for none, and for an abbreviation such as EST, whose time counts as it is written."""
    word = zone.upper().replace(" ", "").removeprefix("UTC").removeprefix("GMT").replace(":", "")
    if zone and word in ("", "Z"):
        return 0
    if not word or word[0] not in "+-":
        return NAIVE
    digits = word[1:]
    hours, minutes = (int(digits[:-2]), int(digits[-2:])) if len(digits) > 2 else (int(digits), 0)
    return (-1 if word[0] == "-" else 1) * (hours * 3600 + minutes * 60)


def clock(column: pa.Array) -> npt.NDArray[np.int64]:
    """Seconds of the day from a column of its own: 16:00, 16:00:00, 160000, 1600, 0; -1 where it is none."""
    if pa.types.is_time(column.type):
        return np.asarray(pc.fill_null(column.cast(pa.time64("us")).cast(pa.int64()), -1_000_000)) // 1_000_000
    text = pc.fill_null(_text(column), "")
    pattern = r"^\s*(?P<hour>\d{1,2}):(?P<minute>\d{2})(?::(?P<second>\d{2}))?(?:\.\d+)?\s*(?P<half>[AaPp][Mm])?\s*$"
    parts = pc.extract_regex(text, pattern)
    padded = pc.utf8_lpad(pc.utf8_trim_whitespace(text), 4, "0")
    padded = pc.if_else(
        pc.equal(pc.utf8_length(padded), 4), pc.binary_join_element_wise(padded, "00", ""), pc.utf8_lpad(padded, 6, "0")
    )
    digits = pc.extract_regex(padded, r"^(?P<hour>\d{2})(?P<minute>\d{2})(?P<second>\d{2})$")
    result = np.full(len(text), -1)
    for found in (digits, parts):
        matched = pc.is_valid(found).to_numpy(zero_copy_only=False)
        if matched.any():
            one = found.filter(pa.array(matched))

            def number(name: str, one: Any = one) -> Ints:
                texts = one.field(name)
                return np.asarray(pc.if_else(pc.equal(texts, ""), "0", texts).cast(pa.int64()), dtype=np.int64)

            hour, minute, second = number("hour"), number("minute"), number("second")
            if "half" in [f.name for f in one.type]:
                half = pc.utf8_lower(one.field("half"))
                hour = np.where(np.asarray(pc.equal(half, "pm")).astype(bool) & (hour < 12), hour + 12, hour)
                hour = np.where(np.asarray(pc.equal(half, "am")).astype(bool) & (hour == 12), 0, hour)
            valid = (hour < 24) & (minute < 60) & (second < 61)
            result[matched] = np.where(valid, hour * 3600 + minute * 60 + second, -1)
    return result


def to_zone(utc: Times, zone: str) -> Times:
    """Instants as a zone's own clock shows them."""
    import pandas as pd

    index = pd.DatetimeIndex(utc, tz="UTC")
    return np.asarray(index.tz_convert(zone).tz_localize(None).to_numpy(), dtype="datetime64[s]")


def from_zone(local: Times, zone: str) -> Times:
    """Instants of what a zone's own clock shows; what it shows twice is its first hour, what it skips the one after."""
    import pandas as pd

    index = pd.DatetimeIndex(local).tz_localize(zone, ambiguous=np.ones(len(local), bool), nonexistent="shift_forward")
    return np.asarray(index.tz_convert("UTC").tz_localize(None).to_numpy(), dtype="datetime64[s]")
