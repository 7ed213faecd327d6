"""What all of a file says: how its dates, numbers and days are to be read, and whether it holds daily bars.

A number or a date may be read in several ways (3/4/2026, 1,234), and only the file as a whole tells which. So a file is
gone through twice: the survey settles how it is read, or refuses it before a single bar was given.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from larder.bars import catalogue as formats
from larder.bars import dates, numbers, sheets
from larder.bars.catalogue import Catalogue, Format
from larder.bars.model import NUMBERS, Inspection, Options
from larder.bars.recognise import DAILY, Layout, recognise
from larder.bars.settings import command
from larder.bars.source import NoTableError, Sheet, Source, open_source, stem
from larder.errors import RefusedFileError

NAME_OF_FILE = re.compile(r"[^\s\x00-\x1f\x7f]{1,64}")
NAME = r"^[^\s[:cntrl:]]{1,64}$"
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
WEEKEND = (5, 6)
# Where a market may be whose midnight, or end of trading, a stamp in UTC is.
ZONES = (
    *(
        "America/New_York",
        "America/Chicago",
        "America/Los_Angeles",
        "America/Sao_Paulo",
        "Europe/London",
        "Europe/Berlin",
    ),
    *("Europe/Athens", "Europe/Moscow", "Asia/Dubai", "Asia/Kolkata", "Asia/Singapore", "Asia/Tokyo"),
    *("Australia/Sydney", "Pacific/Auckland"),
)
# What browsers and copying programs call a file that is not whole.
UNFINISHED = (".part", ".partial", ".crdownload", ".download", ".tmp", ".filepart", ".swp", "~")
# What the names of files call weekly and longer bars.
LONGER_NAMES = r"(?i:weekly|monthly|w1|mn1?|[wmqy]|10080|43200|1w|1mo)|1M"
LONGER = "one bar per trading day is allowed, and daily bars cannot be made of longer ones: export daily bars"
ZONE = "AREA/CITY"  # for the user to fill in
TABLES = (".csv", ".tsv", ".csv.gz", ".parquet")  # what by its name should hold one
NO_KEY = -1
FIRST_OF_INT32 = 1 << 31
Keys = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
UNIX_DAY = 86400


@dataclass
class Part:
    """A sheet and how it is read."""

    sheet: Sheet
    layout: Layout
    decimal: str = "."
    volume: int = 0  # which of the columns for the volume counts
    marks: numbers.Marks = field(default_factory=numbers.Marks)
    nonzero: set[int] = field(default_factory=set)


@dataclass
class Survey:
    """A file, understood. repeated: by row, whether its symbol and day (resampling: and time) come more than once."""

    source: Source
    options: Options
    catalogue: Catalogue
    parts: list[Part] = field(default_factory=list)
    order: str = "D/M/Y"
    resample: bool = False
    symbols: dict[str, int] = field(default_factory=dict)
    repeated: Mask = field(default_factory=lambda: np.zeros(0, np.bool_))
    last_day: date = date.max
    # So far: rows that are no bars, lines without a separator, and how often the header line came again.
    remarks: int = 0
    titles: int = 0
    headers: int = 0


@dataclass
class _Seen:
    """Of all rows, by order of day, month and year: key (symbol and day) and second of the day."""

    keys: dict[str, list[Keys]] = field(default_factory=dict)
    seconds: dict[str, list[Keys]] = field(default_factory=dict)
    bad: Counter[str] = field(default_factory=Counter)
    met: set[str] = field(default_factory=set)
    example: str = ""
    # The first date that is another day, or none, when its three numbers are read in another order.
    doubtful: str = ""
    rows: int = 0
    broken: int = 0
    readable: int = 0
    # Stamps that are instants and that no zone turns into days.
    clocks: Counter[int] = field(default_factory=Counter)
    instants: list[dates.Times] = field(default_factory=list)
    offsets: bool = False  # whether some name an offset from UTC


def survey(path: Path, options: Options, told: Inspection) -> Survey:
    """Go through a file once. Raises RefusedFileError; what is known by then stands in `told`."""
    _accept(path)
    catalogue = formats.load(options.formats)
    source = open_source(path)
    told.compression = source.compression
    found = Survey(
        source, options, catalogue, last_day=options.last_day or datetime.now(UTC).date() + timedelta(days=1)
    )
    seen = _Seen()
    for sheet in source.sheets:
        try:
            part = _part(sheet, found)
        except NoTableError as error:
            if len(source.sheets) == 1 or sheet.name.lower().endswith(TABLES):
                raise
            source.passed_over.append(error.message)
            continue
        found.parts.append(part)
        told.warnings += _odd_names(part, options)
        layout = part.layout
        told.format, told.why, told.encoding, told.delimiter = (
            layout.format.name,
            layout.why,
            layout.encoding,
            layout.delimiter,
        )
        _note(part, found, seen)
    if not found.parts:
        raise RefusedFileError(source.passed_over[0])
    told.warnings += [f"passed over: {message}" for message in source.passed_over]
    if not seen.rows + seen.broken:
        raise RefusedFileError("it holds no bars: nothing follows its header line.")
    if seen.broken > max(options.max_rejected, 0.5) * (seen.rows + seen.broken):
        raise RefusedFileError(
            f"{seen.broken} of its {seen.rows + seen.broken} lines have too few or too many columns; so look decimal "
            "commas without quotes between commas, lines with another separator than the header's, and a quotation "
            "mark that nothing ends."
        )
    _settle_numbers(found, told)
    _settle_order(found, seen, told)
    _settle_days(found, seen, told)
    return found


def _accept(path: Path) -> None:
    if any("\ud800" <= c <= "\udfff" for c in str(path)):
        raise RefusedFileError("its name is not UTF-8: rename it.")
    path.stat()  # says why it cannot be looked at
    if path.name.lower().endswith(UNFINISHED):
        raise RefusedFileError("by its name it is not whole yet; it is loaded under its final name.")
    if not path.is_file():
        raise RefusedFileError("it is no file.")


def _part(sheet: Sheet, found: Survey) -> Part:
    said, partitions = found.options, found.source.partitions
    header = None
    if sheet.parquet:
        with pa.parquet.ParquetFile(sheet.path) as file:
            header = file.schema_arrow.names
    try:
        layout = recognise(sheet, header, found.catalogue, said)
    except RefusedFileError as error:
        raise type(error)(
            f"{sheet.member} in the archive: {error.message}" if sheet.member else error.message
        ) from None
    # What the user says goes before what the format says.
    entry = replace(
        layout.format,
        zone=said.zone or layout.format.zone,
        day_starts=said.day_starts or (None if said.zone else layout.format.day_starts),
        dates=said.dates or layout.format.dates,
        decimal=said.decimal or layout.format.decimal,
        resample=said.resample or layout.format.resample,
    )
    partition = next((partitions[key] for key in ("symbol", "ticker", "instrument", "code") if key in partitions), None)
    columns = {name: places for name, places in layout.columns.items() if name != "symbol" or not said.symbol}
    if not (
        said.symbol or partition or layout.wide or "symbol" in columns or NAME_OF_FILE.fullmatch(layout.symbol or "A")
    ):
        raise RefusedFileError(
            f"its name ({stem(sheet.name)}) is no symbol, which has 1 to 64 characters and no blanks: rename it to "
            "SYMBOL.csv, or say --symbol NAME."
        )
    layout = replace(layout, format=entry, columns=columns, symbol=said.symbol or partition or layout.symbol)
    if not layout.symbol and not layout.wide and "symbol" not in columns:
        raise RefusedFileError(
            f"nothing names its symbol, no column and not its name ({stem(sheet.name)}): rename it to SYMBOL.csv, or "
            "say --symbol NAME or --columns symbol=…."
        )
    found.resample = found.resample or entry.resample
    return Part(sheet, layout)


def _odd_names(part: Part, said: Options) -> list[str]:
    """What to say of names that are taken as they are, and may mean something else."""
    layout, odd = part.layout, []
    by_name = not said.symbol and "symbol" not in layout.columns and stem(part.sheet.name) == layout.symbol
    if by_name and re.search(r"[-_ .](?:19|20)\d\d$", layout.symbol or ""):
        odd.append(f"the symbol {layout.symbol}, which is the file's name, ends in a year: --symbol gives another one")
    volumes = [cell for cell in layout.header if re.match(r"\s*vol(?:ume|(?![a-z]))", cell, re.IGNORECASE)]
    if volumes and "volume" not in layout.columns and not layout.wide:
        odd.append(f"no volume is taken, since {volumes[0]} may be another unit: --columns volume=… takes it")
    return odd


def counts(part: Part, rows: sheets.Rows) -> Mask | None:
    """Which rows the format counts; None where it counts all. The others are left out."""
    kept: Mask | None = None
    for name, values in part.layout.format.only.items():
        if name in rows.extra:
            text = pc.utf8_trim_whitespace(rows.extra[name].cast(pa.string()))
            mask = np.asarray(pc.fill_null(pc.is_in(text, value_set=pa.array(values)), False)).astype(np.bool_)
            kept = mask if kept is None else kept & mask
    return kept


def symbols_of(part: Part, rows: sheets.Rows) -> pa.Array:
    """The symbol of each row."""
    if rows.symbol is not None:
        return pa.array([rows.symbol] * rows.count, pa.string())
    if "symbol" in rows.columns:
        return pc.utf8_trim_whitespace(rows.columns["symbol"].cast(pa.string()))
    return pa.array([part.layout.symbol] * rows.count, pa.string())


def stamps_of(
    part: Part, rows: sheets.Rows, found: Survey, orders: Iterable[str]
) -> tuple[dict[str, dates.Stamps], set[str]]:
    """When each row's bar is of, by order of day, month and year; and the patterns that were met."""
    stamps, met = dates.parse(rows.columns["date"], found.catalogue.months, tuple(orders))
    if "time" in rows.columns:
        seconds = dates.clock(rows.columns["time"])
        clock = np.where(seconds < 0, 0, seconds).astype("timedelta64[s]")
        stamps = {
            order: dates.Stamps(
                np.where(seconds < 0, dates.NAT, one.local.astype("datetime64[D]").astype("datetime64[s]") + clock),
                one.offset,
            )
            for order, one in stamps.items()
        }
    zone = part.layout.format.stamps
    if zone:
        stamps = {order: _in_zone(one, zone) for order, one in stamps.items()}
    return stamps, met


def _in_zone(stamps: dates.Stamps, zone: str) -> dates.Stamps:
    naive = (stamps.offset == dates.NAIVE) & ~np.isnat(stamps.local)
    offset = stamps.offset.copy()
    instants = dates.from_zone(stamps.local[naive], zone)
    offset[naive] = (stamps.local[naive] - instants).astype(np.int64)
    return dates.Stamps(stamps.local, offset)


def days_of(stamps: dates.Stamps, entry: Format) -> tuple[npt.NDArray[np.datetime64], Keys]:
    """The trading day of each bar (NaT where its date cannot be read), and the second of that day."""
    local = stamps.local
    if entry.zone:
        instants = stamps.offset != dates.NAIVE
        if instants.any():
            local = local.copy()
            local[instants] = dates.to_zone(stamps.utc[instants], entry.zone)
    if entry.day_starts:
        local = local + np.timedelta64(UNIX_DAY - formats.seconds_of(entry.day_starts), "s")
    day = local.astype("datetime64[D]")
    seconds = np.where(np.isnat(local), 0, (local - day).astype(np.int64))
    return day, seconds


def keys_of(symbols: pa.Array, day: npt.NDArray[np.datetime64], known: dict[str, int]) -> Keys:
    """Symbol and day of each row as one number, NO_KEY where one of them is missing."""
    words = symbols.dictionary_encode()
    named = np.asarray(pc.fill_null(pc.match_substring_regex(words.dictionary, NAME), False)).astype(np.bool_)
    texts = words.dictionary.to_pylist()
    codes = np.array([known.setdefault(t, len(known)) if ok else -1 for t, ok in zip(texts, named, strict=True)] + [-1])
    code = codes[words.indices.fill_null(len(texts)).to_numpy(zero_copy_only=False)]
    number = np.where(np.isnat(day), 0, day.astype(np.int64))
    usable = (code >= 0) & ~np.isnat(day) & (np.abs(number) < FIRST_OF_INT32)
    return np.where(usable, (code << 32) + number + FIRST_OF_INT32, NO_KEY)


def days_in(keys: Keys) -> Keys:
    """The days that are in keys, counted from 1970."""
    return (keys & 0xFFFFFFFF) - FIRST_OF_INT32


def _note(part: Part, found: Survey, seen: _Seen) -> None:
    entry = part.layout.format
    orders = (entry.dates,) if entry.dates else dates.SHORT
    broken = sheets.Broken()
    first, last = (np.datetime64(day, "D").astype(np.int64) for day in (found.options.first_day, found.last_day))
    for rows in sheets.rows(part.sheet, part.layout, broken):
        kept = counts(part, rows)
        stamps, met = stamps_of(part, rows, found, orders)
        seen.met |= met
        symbols = symbols_of(part, rows)
        if not seen.example and rows.count:
            seen.example = str(rows.columns["date"][0].as_py())
        if not seen.doubtful:
            chosen, *others = ({id(one): one for one in stamps.values()}).values()
            differ = np.zeros(len(chosen.local), bool)
            for one in others:
                differ |= (chosen.local != one.local) & ~(np.isnat(chosen.local) & np.isnat(one.local))
            if differ.any():
                seen.doubtful = str(rows.columns["date"][int(differ.argmax())].as_py())
        noted: dict[int, tuple[Keys, Keys]] = {}
        bad: dict[str, Mask] = {}
        for order, one in stamps.items():
            if id(one) not in noted:  # the same for all orders, where the order is no matter
                day, seconds = days_of(one, entry)
                keys = keys_of(symbols, day, found.symbols)
                if kept is not None:
                    keys = np.where(kept, keys, NO_KEY)
                noted[id(one)] = keys, seconds
            keys, seconds = noted[id(one)]
            seen.keys.setdefault(order, []).append(keys)
            seen.seconds.setdefault(order, []).append(seconds)
            day_numbers = days_in(keys)
            bad[order] = (keys == NO_KEY) | (day_numbers < first) | (day_numbers > last)
        # What no order reads, such as a remark below the bars, tells nothing of the order.
        unread = np.all(list(bad.values()), axis=0)
        seen.bad.update({order: int((mask & ~unread).sum()) for order, mask in bad.items()})
        one = next(iter(stamps.values()))
        seen.rows += rows.count
        seen.readable += max(int((~np.isnat(each.local)).sum()) for each in stamps.values())
        seen.offsets = seen.offsets or bool((one.offset != dates.NAIVE).any())
        if not entry.zone:
            instants = (one.offset == 0) & ~np.isnat(one.local)
            if instants.any():
                clock, count = np.unique(
                    days_of(dates.Stamps(one.local[instants], one.offset[instants]), entry)[1], return_counts=True
                )
                seen.clocks.update(dict(zip(clock.tolist(), count.tolist(), strict=True)))
                if sum(map(len, seen.instants)) < 10_000:
                    seen.instants.append(one.local[instants])
        for name in NUMBERS:
            if name in rows.columns:
                part.marks.note(rows.columns[name])
        for n, column in enumerate(rows.volumes):
            part.marks.note(column)
            # Only numbers count: junk in one bar must not make a column of zeros the volume of all others.
            if n not in part.nonzero and any(
                np.any(np.nan_to_num(numbers.parse(column, mark, units=True)[0])) for mark in numbers.STYLES
            ):
                part.nonzero.add(n)
    seen.broken += broken.count


def _settle_numbers(found: Survey, told: Inspection) -> None:
    for part in found.parts:
        if part.marks.treasury and part.marks.treasury == part.marks.apostrophes:
            raise RefusedFileError(
                "its prices (such as 108'165) can be read with an apostrophe between thousands and as thirty-seconds: "
                "write them with a decimal point."
            )
        mark = part.layout.format.decimal
        if not mark:
            # Semicolons separate columns where a comma is the decimal mark.
            points = part.layout.delimiter == ";"
            mark, why = part.marks.decimal(found.options.max_rejected, points=points)
            if not mark:
                where = f"{part.sheet.member} in the archive: " if part.sheet.member else ""
                raise RefusedFileError(f"{where}{why}; --decimal . or --decimal , says which it is.")
        part.decimal = told.decimal = mark
        part.volume = min(part.nonzero, default=0)


def _settle_order(found: Survey, seen: _Seen, told: Inspection) -> None:
    """Which of three numbers is the day."""
    if not seen.readable:
        raise RefusedFileError(
            f"no value of its date column is a date (the first is {seen.example[:60]!r}); allowed are {dates.ALLOWED}. "
            "--columns date=… names another column."
        )
    told.dates = ", ".join(sorted(seen.met - {"three numbers"}))
    said = {part.layout.format.dates for part in found.parts} - {None}
    if "three numbers" not in seen.met or len(said) == 1 == len(seen.keys):
        found.order = next(iter(seen.keys))
        told.dates = next(iter(said), None) if "three numbers" in seen.met else told.dates
        return
    orders = dates.SHORT if "a year of two digits" in seen.met else dates.LONG
    best, second = sorted(orders, key=lambda order: seen.bad[order])[:2]
    # A wrong reading has many bad dates; a few of them may be the file's own.
    if seen.bad[second] <= 5 * seen.bad[best] or seen.bad[second] == 0:
        readings = " and ".join(
            {"D/M/Y": "day/month", "M/D/Y": "month/day", "Y/M/D": "year/month/day"}[o] for o in (second, best)
        )
        example = (seen.doubtful or seen.example)[:30]
        raise RefusedFileError(
            f"its dates ({example}) can be read as {readings}; --dates D/M/Y or M/D/Y says which it is."
        )
    found.order = told.dates = best


def _settle_days(found: Survey, seen: _Seen, told: Inspection) -> None:
    """Whether the bars are daily ones, of days that can be known; and which of them come twice."""
    keys, seconds = (np.concatenate(each[found.order]) for each in (seen.keys, seen.seconds))
    entry = found.parts[0].layout.format
    told.zone = (
        f"{entry.zone}, days begin at {entry.day_starts}"
        if entry.zone and entry.day_starts
        else entry.zone or "as written"
    )
    for part in found.parts:
        named = part.layout.timeframe
        if named and named.lower() not in DAILY and not found.resample:
            way = LONGER if re.fullmatch(LONGER_NAMES, named) else _resampling(found, seen)
            raise RefusedFileError(f"its name says that its bars are {named}, not daily ones; {way}.")
    rows = np.flatnonzero(keys != NO_KEY)
    order = rows[np.lexsort((seconds[rows], keys[rows]))]
    ordered, clock = keys[order], seconds[order]
    same_day = ordered[1:] == ordered[:-1]
    same_time = clock[1:] == clock[:-1]
    told.timeframe = "1 day"
    if (several := same_day & ~same_time).any():
        told.timeframe = "intraday"
        days = len(ordered) - np.count_nonzero(same_day)
        share = len(np.unique(ordered[1:][several])) / days
        if not found.resample and share > found.options.max_rejected:
            first = int(np.flatnonzero(several)[0])
            symbol = list(found.symbols)[ordered[first] >> 32]
            day = np.datetime64(int(days_in(ordered[first : first + 1])[0]), "D")
            times = f"{_clock(clock[first])} and {_clock(clock[first + 1])} on {day}"
            raise RefusedFileError(f"it holds intraday bars ({symbol} has {times}); {_resampling(found, seen)}.")
    _refuse_instants(found, seen, ordered, clock, told)
    if not found.resample:
        _refuse_longer(ordered, same_day, told)
    again = same_day & same_time if found.resample else same_day
    found.repeated = np.zeros(len(keys), np.bool_)
    found.repeated[order[1:][again]] = found.repeated[order[:-1][again]] = True
    told.warnings += _weekend(found, ordered)


def _resampling(found: Survey, seen: _Seen) -> str:
    zone = {"zone": ZONE} if seen.clocks else {}
    return f"to make daily bars: {command(found.source.path, found.options, resample='1d', **zone)}"


def _clock(seconds: int) -> str:
    return f"{seconds // 3600:02}:{seconds % 3600 // 60:02}" + (f":{seconds % 60:02}" if seconds % 60 else "")


def _refuse_instants(found: Survey, seen: _Seen, keys: Keys, clock: Keys, told: Inspection) -> None:
    """Instants that are no midnights in UTC are a market's, or its ends of trading; of which, only the user knows."""
    odd = {clock: count for clock, count in seen.clocks.items() if clock}
    if sum(odd.values()) > found.options.max_rejected * sum(seen.clocks.values()):
        clocks = " and ".join(_clock(c) for c, _ in Counter(odd).most_common(2))
        instants = np.concatenate(seen.instants)
        likely = [] if found.resample else _likely_zones(instants[instants.astype("datetime64[D]") != instants])
        hint = f"that looks like midnight in {' or '.join(likely)}; " if likely else ""
        raise RefusedFileError(
            f"its times are instants in UTC and no midnights there ({clocks}); {hint}say whose days they are: "
            f"{command(found.source.path, found.options, zone=ZONE)}."
        )
    weekdays = set(((days_in(keys) + 3) % 7).tolist())
    stamped = told.zone == "as written" and bool((clock > 0).any())
    if stamped and not found.resample and 6 in weekdays and 4 not in weekdays and len(keys) >= 10:
        begin = _clock(int(np.bincount(clock).argmax()))
        more = {"zone": ZONE} if seen.offsets else {"day_starts": begin}
        raise RefusedFileError(
            f"it has bars on Sundays and none on Fridays, and times that are no midnights ({begin}): they may be a day "
            f"early; {command(found.source.path, found.options, **more)} moves them, and --zone of a market that is "
            "open on Sundays takes them as they are."
        )


def _likely_zones(instants: dates.Times) -> list[str]:
    """Zones in which the instants are midnights; at most three, by different offsets."""
    if not len(instants):
        return []
    likely: list[str] = []
    for zone in ZONES:
        local = dates.to_zone(instants, zone)
        if (local.astype("datetime64[D]") == local).mean() > 0.9:
            likely.append(zone)
    return likely[:3]


def _refuse_longer(keys: Keys, same_day: Mask, told: Inspection) -> None:
    """Weekly and monthly bars: no two of a symbol are closer than five days."""
    ordered = keys[np.append(True, ~same_day)] if len(keys) else keys
    code, gap = ordered >> 32, np.diff(ordered)
    within = code[1:] == code[:-1]
    if not within.any() or (gap[within] < 5).any() or np.unique(code, return_counts=True)[1].max() < 4:
        return
    days = int(np.median(gap[within]))
    told.timeframe = f"{days} days"
    raise RefusedFileError(f"it holds bars that are {days} days apart (weekly or monthly ones); {LONGER}.")


def _weekend(found: Survey, keys: Keys) -> list[str]:
    """Bars on a weekend where the file has hardly any."""
    weekday = (days_in(keys) + 3) % 7
    rare = np.isin(weekday, WEEKEND)
    if not rare.any():
        return []
    weekdays = set(weekday.tolist())
    if weekdays == {0, 1, 2, 3, 6} and len(keys) >= 10:
        return ["bars on Sundays and none on Fridays: a market of such weeks, or dates that are a day early"]
    if weekdays == {1, 2, 3, 4, 5} and len(keys) >= 10:
        return ["bars on Saturdays and none on Mondays: the dates may be a day late"]
    if rare.mean() > 0.1:  # a market that is open on weekends
        return []
    symbols = list(found.symbols)
    named = [
        f"{symbols[key >> 32]} {np.datetime64(int(day), 'D')}"
        for key, day in zip(keys[rare][:5], days_in(keys[rare][:5]), strict=True)
    ]
    return [f"{int(rare.sum())} bars on a weekend, where the others have none: {', '.join(named)}"]
