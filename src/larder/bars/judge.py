"""Every bar of a surveyed file: taken, or rejected with its reason."""

from collections import Counter
from collections.abc import Iterator
from datetime import date
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from larder.bars import numbers, sheets
from larder.bars.model import NUMBERS, PRICES, Batch, Inspection
from larder.bars.survey import (
    NAME,
    NO_KEY,
    WEEKDAYS,
    Mask,
    Part,
    Survey,
    counts,
    days_of,
    keys_of,
    stamps_of,
    symbols_of,
)
from larder.errors import RefusedFileError

GOOD = pa.schema(
    [
        ("symbol", pa.string()),
        ("event_timestamp", pa.date32()),
        *((name, pa.float64()) for name in NUMBERS),
    ]
)
REJECTED = pa.schema(
    [("symbol", pa.string()), ("event_timestamp", pa.date32()), ("reason", pa.string()), ("bar", pa.string())]
)
LARGEST_VOLUME = 1e18
# Open and close may lie outside low and high by this share of the price: prices that are rounded, or adjusted, do.
ROUNDING = 1e-4
# A first or last day is whole where it lacks no more than this share of the usual hours: Fridays are shorter, too.
CUT = 0.1
CUT_SHOWN = 5
EXAMPLES = 10
Floats = npt.NDArray[np.float64]


def judge(found: Survey, told: Inspection) -> Iterator[Batch]:
    """The bars of a file. Raises RefusedFileError at the end where too many were rejected, or none is good."""
    row = 0
    first_of: dict[tuple[int, int], tuple[float, ...]] = {}
    days = _Days() if found.resample else None
    for part in found.parts:
        broken = sheets.Broken()
        for rows in sheets.rows(part.sheet, part.layout, broken):
            batch, seconds = _batch(found, part, rows, row, first_of, told)
            row += rows.count
            if days:
                days.add(batch.good, seconds)
                batch = Batch(GOOD.empty_table(), batch.rejected)
            _tell(told, batch)
            yield batch
        told.left_out += broken.remarks
        found.titles += broken.remarks
        if broken.count:
            batch = _broken(broken)
            _tell(told, batch, broken.count - batch.rejected.num_rows)
            yield batch
    if days:
        batch = Batch(days.bars(), REJECTED.empty_table())
        told.timeframe = "1 day, resampled"
        told.warnings += days.cut()
        _tell(told, batch)
        yield batch
    _refuse_most(found, told)


def _batch(
    found: Survey,
    part: Part,
    rows: sheets.Rows,
    row: int,
    first_of: dict[tuple[int, int], tuple[float, ...]],
    told: Inspection,
) -> tuple[Batch, npt.NDArray[np.int64]]:
    entry = part.layout.format
    symbols = symbols_of(part, rows)
    stamps = stamps_of(part, rows, found, (found.order,))[0][found.order]
    day, seconds = days_of(stamps, entry)
    keys = keys_of(symbols, day, found.symbols)
    values, faults = _values(part, rows)
    named = np.asarray(pc.fill_null(pc.match_substring_regex(symbols, NAME), False)).astype(np.bool_)
    with np.errstate(invalid="ignore"):
        faults = [
            ("the symbol is not a name", ~named),
            ("the date cannot be read", np.isnat(day)),
            (f"the date is before {found.options.first_day}", day < np.datetime64(found.options.first_day)),
            ("the date is in the future", day > np.datetime64(found.last_day)),
            *faults,
            ("high is below low", values["high"] < values["low"]),
            *((f"{name} is outside low and high", _outside(values, name)) for name in ("open", "close")),
        ]
    if entry.period and entry.period["column"] in rows.extra:
        period = pc.utf8_trim_whitespace(rows.extra[entry.period["column"]].cast(pa.string()))
        daily = np.asarray(pc.fill_null(pc.is_in(period, value_set=pa.array(entry.period["daily"])), False)).astype(
            np.bool_
        )
        if not entry.resample:
            faults.append(("the bar is not a daily one", ~daily))
    bad = np.any([mask for _, mask in faults], axis=0)
    kept = ~_remarks(found, part, rows, day, faults)
    if (counted := counts(part, rows)) is not None:
        kept &= counted
    told.left_out += int((~kept).sum())
    bad &= kept
    kept &= ~bad
    repeats = _repeats(found, row, keys, seconds, values, kept, first_of)
    kept &= repeats == 0
    good = pa.table(
        [
            symbols,
            pa.array(day, pa.date32()),
            *(pa.array(values[name]) for name in PRICES),
            pa.array(values["volume"], from_pandas=True),
        ],
        schema=GOOD,
    ).filter(pa.array(kept))
    bad |= repeats == 2
    where = np.flatnonzero(bad)
    again = "a second bar of the day with other values: the first one stays"
    return Batch(
        good,
        rejected(
            [symbols[int(i)].as_py() for i in where],
            [None if np.isnat(day[i]) or not _representable(day[i]) else day[i].item() for i in where],
            ["; ".join(reason for reason, mask in faults if mask[i]) or again for i in where],
            [_text(rows, int(i)) for i in where],
        ),
    ), seconds[kept]


def _remarks(found: Survey, part: Part, rows: sheets.Rows, day: Any, faults: list[tuple[str, Mask]]) -> Mask:
    """Rows that are no bars: the header line again, and a few with no date and no price, or with a text for prices."""
    reasons = dict(faults)
    missing, wrong = (
        {name: reasons[f"{name} is {what}"] for name in PRICES[:4]} for what in ("missing", "not a number")
    )
    priceless = np.all([missing[name] | wrong[name] for name in PRICES[:4]], axis=0)
    dividend = wrong["open"] & missing["high"] & missing["low"] & missing["close"]  # or a split
    others = np.flatnonzero((np.isnat(day) & priceless) | dividend)
    again = np.zeros(rows.count, np.bool_)
    if not len(others):
        return again
    if part.layout.header and pa.types.is_string(rows.columns["date"].type):
        (place,) = part.layout.columns["date"]
        same = pc.equal(pc.utf8_trim_whitespace(rows.columns["date"]), part.layout.header[place].strip())
        again = priceless & np.asarray(pc.fill_null(same, False)).astype(np.bool_)
    remarks = again.copy()
    few = [i for i in others if not again[i]][: sheets.REMARKS - found.remarks]
    remarks[few] = True
    found.remarks += len(few)
    found.headers += int(again.sum())
    return remarks


def _representable(day: np.datetime64) -> bool:
    return isinstance(day.item(), date)


def _values(part: Part, rows: sheets.Rows) -> tuple[dict[str, Floats], list[tuple[str, Mask]]]:
    """Prices and volume, NaN for what is not there; and what is wrong with them."""
    values: dict[str, Floats] = {}
    faults: list[tuple[str, Mask]] = []
    for name in PRICES:
        if name not in rows.columns:
            continue
        values[name], nothing = numbers.parse(rows.columns[name], part.decimal)
        if name == "adjusted_close":
            values[name] = np.where(nothing, values["close"], values[name])
            faults.append((f"{name} is not a number", ~np.isfinite(values[name]) & ~nothing))
        else:
            faults.append((f"{name} is missing", nothing))
            faults.append((f"{name} is not a number", ~np.isfinite(values[name]) & ~nothing))
        with np.errstate(invalid="ignore"):
            faults.append((f"{name} is not positive", np.isfinite(values[name]) & (values[name] <= 0)))
    values.setdefault("adjusted_close", values["close"])
    if rows.volumes:
        volume, nothing = numbers.parse(rows.volumes[part.volume], part.decimal, units=True)
        volume = volume * part.layout.format.volume_factor
        with np.errstate(invalid="ignore"):
            faults.append(("volume is not a number", ~np.isfinite(volume) & ~nothing))
            faults.append(("volume is negative", volume < 0))
            faults.append(("volume is too large", np.isfinite(volume) & (volume > LARGEST_VOLUME)))
        values["volume"] = np.where(nothing, np.nan, volume)
    else:
        values["volume"] = np.full(rows.count, np.nan)
    return values, faults


def _outside(values: dict[str, Floats], name: str) -> Mask:
    margin = ROUNDING * np.abs(values[name])
    outside: Mask = (values[name] > values["high"] + margin) | (values[name] < values["low"] - margin)
    return outside & (values["high"] >= values["low"])


def _repeats(
    found: Survey,
    row: int,
    keys: npt.NDArray[np.int64],
    seconds: npt.NDArray[np.int64],
    values: dict[str, Floats],
    kept: Mask,
    first_of: dict[tuple[int, int], tuple[float, ...]],
) -> npt.NDArray[np.int8]:
    """Of each row: 0 for the first good bar of its symbol and day, 1 for one that says the same, 2 for any other."""
    result = np.zeros(len(keys), np.int8)
    for i in np.flatnonzero(found.repeated[row : row + len(keys)] & kept & (keys != NO_KEY)):
        key = (int(keys[i]), int(seconds[i]) if found.resample else 0)
        bar = tuple(float(np.nan_to_num(values[name][i], nan=-1.0)) for name in NUMBERS)
        first = first_of.setdefault(key, bar)
        if first is not bar:
            result[i] = 1 if first == bar else 2
    return result


def _text(rows: sheets.Rows, i: int) -> str:
    cells = {name: column[i].as_py() for name, column in rows.columns.items()}
    if rows.volumes:
        cells["volume"] = rows.volumes[0][i].as_py()
    return " ".join(f"{name}={'' if value is None else value}" for name, value in cells.items())


def rejected(symbols: list[str | None], days: list[date | None], reasons: list[str], bars: list[str]) -> pa.Table:
    def clean(texts: list[Any]) -> pa.Array:  # PostgreSQL's text holds no NUL
        return pa.array([None if t is None else t.replace("\0", "")[:1000] for t in texts], pa.string())

    return pa.table([clean(symbols), pa.array(days, pa.date32()), clean(reasons), clean(bars)], schema=REJECTED)


def _broken(broken: sheets.Broken) -> Batch:
    unknown: list[Any] = [None] * len(broken.lines)
    reasons = ["the line has too few or too many columns"] * len(broken.lines)
    return Batch(GOOD.empty_table(), rejected(unknown, unknown, reasons, broken.lines))


class _Days:
    """Daily bars of intraday ones: first open, highest high, lowest low, last close, sum of volume."""

    COLUMNS = ("symbol", "event_timestamp")

    def __init__(self) -> None:
        self.parts: list[pa.Table] = []

    def add(self, good: pa.Table, seconds: npt.NDArray[np.int64]) -> None:
        if good.num_rows:
            stamped = good.append_column("began", pa.array(seconds)).append_column("ended", pa.array(seconds))
            self.parts.append(self._merge(stamped.append_column("count", pa.array(np.ones(len(seconds), np.int64)))))
        if len(self.parts) > 64:
            self.parts = [self._merge(pa.concat_tables(self.parts))]

    def _merge(self, rows: pa.Table) -> pa.Table:
        by_begin = rows.sort_by([(name, "ascending") for name in (*self.COLUMNS, "began")])
        by_end = rows.sort_by([(name, "ascending") for name in (*self.COLUMNS, "ended")])
        firsts = by_begin.group_by(self.COLUMNS, use_threads=False).aggregate(
            [("open", "first"), ("high", "max"), ("low", "min"), ("volume", "sum"), ("began", "min"), ("count", "sum")]
        )
        lasts = by_end.group_by(self.COLUMNS, use_threads=False).aggregate(
            [("close", "last"), ("adjusted_close", "last"), ("ended", "max")]
        )
        columns = {name: firsts[name] for name in self.COLUMNS}
        columns |= {"open": firsts["open_first"], "high": firsts["high_max"], "low": firsts["low_min"]}
        columns |= {"close": lasts["close_last"], "adjusted_close": lasts["adjusted_close_last"]}
        columns |= {"volume": firsts["volume_sum"], "began": firsts["began_min"], "ended": lasts["ended_max"]}
        columns["count"] = firsts["count_sum"]
        return pa.table(columns)

    def bars(self) -> pa.Table:
        if not self.parts:
            return GOOD.empty_table()
        self.parts = [self._merge(pa.concat_tables(self.parts))]
        return self.parts[0].select(GOOD.names).cast(GOOD)

    def cut(self) -> list[str]:
        """What to say of first and last days that begin later, or end earlier, than days of their symbol do."""
        found = []
        for rows in self.parts:  # one, after bars()
            days = rows.sort_by([(name, "ascending") for name in self.COLUMNS])
            symbols, day, began, ended, count = (
                days[name].to_numpy() for name in (*self.COLUMNS, "began", "ended", "count")
            )
            firsts = np.flatnonzero(np.append(True, symbols[1:] != symbols[:-1]))
            for first, end in zip(firsts, [*firsts[1:], len(symbols)], strict=True):
                opens, closes, usual = (int(np.median(each[first:end])) for each in (began, ended, count))
                margin = CUT * (closes - opens)
                for which, at, lacking in (
                    ("first", first, began[first] - opens),
                    ("last", end - 1, closes - ended[end - 1]),
                ):
                    if lacking > margin and count[at] < usual:
                        found.append(f"the {which} day of {symbols[at]}, {day[at]}, has {count[at]} of usually {usual}")
        if not found:
            return []
        more = [f"{len(found) - CUT_SHOWN:,} more like these"] * (len(found) > CUT_SHOWN)
        return [f"the file seems to begin or end in the middle of a day: {'; '.join([*found[:CUT_SHOWN], *more])} bars"]


def _tell(told: Inspection, batch: Batch, more_rejected: int = 0) -> None:
    good, bad = batch.good, batch.rejected
    told.bars += good.num_rows
    told.rejected += bad.num_rows + more_rejected
    reasons = Counter(told.reasons)
    reasons.update(bad["reason"].to_pylist())
    if more_rejected:
        reasons[bad["reason"][0].as_py()] += more_rejected
    told.reasons = dict(reasons)
    if len(told.examples) < EXAMPLES:
        told.examples += bad.slice(0, EXAMPLES - len(told.examples)).to_pylist()
    if not good.num_rows:
        return
    if len(told.head) < EXAMPLES // 2:
        told.head += good.slice(0, EXAMPLES // 2 - len(told.head)).to_pylist()
    told.symbols = sorted({*told.symbols, *good["symbol"].unique().to_pylist()})
    told.symbol_count = len(told.symbols)
    low, high = (pc.min_max(good["event_timestamp"])[side].as_py() for side in ("min", "max"))
    told.first_day = min(told.first_day or low, low)
    told.last_day = max(told.last_day or high, high)
    numbers_of = pc.value_counts(pc.day_of_week(good["event_timestamp"].cast(pa.timestamp("s")))).to_pylist()
    weekdays = Counter(told.weekdays)
    weekdays.update({WEEKDAYS[one["values"]]: one["counts"] for one in numbers_of})
    told.weekdays = {name: weekdays[name] for name in WEEKDAYS if weekdays[name]}


def _refuse_most(found: Survey, told: Inspection) -> None:
    named = found.options.symbol or any("symbol" in part.layout.columns for part in found.parts)
    if found.headers and found.titles and not named:
        raise RefusedFileError(
            "its header line comes again, and lines that are no bars stand between: it seems to hold tables of several "
            "symbols; split it, or say --symbol NAME if all of it is one."
        )
    judged = told.bars + told.rejected
    most = told.most_reasons()
    example = f"; the first: {told.examples[0]['bar'][:200]}" if told.examples else ""
    if not told.bars:
        if not told.rejected:
            raise RefusedFileError(
                f"none of its {told.left_out} rows counts: they are no bars, or {told.format} leaves them out."
            )
        raise RefusedFileError(f"none of its {judged} bars can be taken: {most}{example}.")
    # One bad bar alone is never more than a few, however short the file is.
    if told.rejected > max(1, found.options.max_rejected * judged):
        raise RefusedFileError(
            f"{told.rejected} of its {judged} bars cannot be taken ({told.rejected / judged:.0%}; "
            f"{found.options.max_rejected:.0%} are allowed): {most}{example}."
        )
