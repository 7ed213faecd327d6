"""Between a file and the bars that are stored: each new bar is judged, and only good ones go on."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.compute as pc

from larder.errors import ConfigError
from larder.postgres import arrays, binary
from larder.quality.judge import Finding, Floats, Ints, Mask, Series, judge
from larder.quality.rules import FILE, NUMBERS, Rules

BARS = "market_data.ohlcv_daily"
EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
AT_ONCE = 250_000  # bars of a large file that are judged together

ARE_TABLES_THERE = "SELECT to_regclass('quality.quarantine') IS NOT NULL"
DECIDED = f"""
SELECT symbol, event_timestamp, state, {", ".join(NUMBERS)} FROM quality.quarantine
WHERE symbol = ANY(%s) AND state IN ('held', 'dropped')
"""  # noqa: S608 # names of columns
HOLD = f"""
INSERT INTO quality.quarantine AS known (symbol, event_timestamp, {", ".join(NUMBERS)}, reason, load_id, file, state)
SELECT *, %s, %s, 'held' FROM unnest(
    %s::text[], %s::timestamptz[], {", ".join(["%s::float8[]"] * len(NUMBERS))}, %s::text[]
)
ON CONFLICT (symbol, event_timestamp) DO UPDATE
SET ({", ".join(NUMBERS)}, reason, load_id, file, state, held_at, decided_at, decided_by)
  = ({", ".join(f"excluded.{name}" for name in NUMBERS)}, excluded.reason, excluded.load_id, excluded.file, 'held',
     excluded.held_at, NULL, NULL)
"""  # noqa: S608 # names of columns
REPLACED = """
UPDATE quality.quarantine AS known SET (state, decided_at, decided_by) = ('replaced', clock_timestamp(), %s)
FROM unnest(%s::text[], %s::timestamptz[]) AS good (symbol, event_timestamp)
WHERE (known.symbol, known.event_timestamp) = (good.symbol, good.event_timestamp) AND known.state IN ('held', 'dropped')
"""
KNOWN = "SELECT symbol, event_timestamp FROM quality.findings WHERE symbol = ANY(%s) AND load_id IS NOT NULL"
FORGET = """
DELETE FROM quality.findings AS known USING unnest(%s::text[], %s::timestamptz[]) AS again (symbol, event_timestamp)
WHERE (known.symbol, known.event_timestamp) = (again.symbol, again.event_timestamp) AND load_id IS NOT NULL
"""
NOTE = """
INSERT INTO quality.findings AS known (symbol, event_timestamp, rule, of, severity, message, load_id)
SELECT *, %s FROM unnest(%s::text[], %s::timestamptz[], %s::text[], %s::text[], %s::text[], %s::text[])
ON CONFLICT (symbol, event_timestamp, rule, of) DO UPDATE SET (severity, message, load_id, found_at)
  = (excluded.severity, excluded.message, excluded.load_id, excluded.found_at)
"""


@dataclass
class Verdict:
    """What became of the bars of a file."""

    held: int = 0
    dropped: int = 0  # such as somebody has dropped
    warned: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    rejected: list[tuple[str, date, str, str]] = field(default_factory=list)  # symbol, day, reason, bar

    def most_reasons(self) -> str:
        return ", ".join(f"{rule} ({count:,})" for rule, count in self.reasons.most_common(5))


class Gate:
    """Judges the bars of one load by a repository's rules; lets all pass where there are none."""

    def __init__(self, connection: psycopg.Connection, rules: Rules) -> None:
        """Raises ConfigError where the database has no tables for what the rules find."""
        self.connection, self.rules = connection, rules
        if rules.bars and not connection.execute(ARE_TABLES_THERE).fetchall()[0][0]:
            raise ConfigError(f"{FILE} has rules of bars, and the database lacks its tables: site.yml makes them.")

    def judged(self, bars: pa.Table, file: str, load_id: int | None, told: Verdict) -> pa.Table:
        """The bars that are good; what became of the others is noted in the database and told."""
        if not self.rules.bars or not bars.num_rows:
            return bars
        keys = bars["symbol"].combine_chunks().dictionary_encode()
        batch = _Batch(
            symbols=keys.dictionary.to_pylist(),
            symbol=keys.indices.to_numpy().astype(np.int64),
            time=binary.field(bars["event_timestamp"])[0].astype(np.int64),
            columns={name: _floats(bars[name]) for name in NUMBERS},
        )
        out = self._judge(batch, file, load_id, told)
        return bars.filter(pa.array(~out)) if out.any() else bars

    def staged(self, table: str, file: str, load_id: int | None, told: Verdict) -> None:
        """The same of the bars of a temporary table: those that are not good are deleted there."""
        if not self.rules.bars:
            return
        run = self.connection.execute
        run(f"CREATE INDEX staged_symbols ON {table} (symbol)")
        counts = run(f"SELECT symbol, count(*) FROM {table} GROUP BY symbol ORDER BY symbol").fetchall()  # noqa: S608
        for names in _groups(counts):
            batch = _Batch.of(names, arrays.read(self.connection, table, NUMBERS, dict.fromkeys(names, EPOCH), None))
            out = self._judge(batch, file, load_id, told)
            if out.any():
                symbols, times = batch.keys(np.flatnonzero(out).tolist())
                run(
                    f"DELETE FROM {table} AS bar USING unnest(%s::text[], %s::timestamptz[]) AS bad (symbol, time) "  # noqa: S608
                    "WHERE (bar.symbol, bar.event_timestamp) = (bad.symbol, bad.time)",
                    [symbols, times],
                )
        run("DROP INDEX staged_symbols")

    def _judge(self, batch: "_Batch", file: str, load_id: int | None, told: Verdict) -> Mask:
        """Which bars of a batch are not to be stored."""
        out, differing = self._decided(batch, told)
        stored = self._stored(batch)
        series, row_of = _series(batch, stored, out)
        found = judge(self.rules, series)
        # A bar that is not stored leaves no other finding.
        severities = {"reject": [f for f in found if f.severity == "reject"]}
        rejected = {f.row for f in severities["reject"]}
        held = {f.row for f in found if f.severity == "quarantine"} - rejected
        reasons: dict[int, list[str]] = {}
        for each in found:
            told.reasons[each.rule] += 1
            if each.severity != "warn":
                reasons.setdefault(each.row, []).append(f"{each.rule}: {each.message}")
        for row in rejected:
            place = row_of[row]
            bar = " ".join(f"{name}={batch.columns[name][place]:g}" for name in NUMBERS)
            told.rejected.append((batch.name(place), batch.day(place), "; ".join(reasons[row]), bar))
        if held:
            self._hold(batch, {int(row_of[row]): "; ".join(reasons[row]) for row in sorted(held)}, file, load_id)
        warned = [f for f in found if f.row not in rejected]
        told.warned += sum(f.severity == "warn" for f in warned)
        told.held += len(held)
        out[row_of[sorted(rejected | held)]] = True
        self._note(batch, warned, row_of, series, load_id)
        if good := [place for place in differing if not out[place]]:
            self.connection.execute(REPLACED, [file, *batch.keys(good)])
        return out

    def _decided(self, batch: "_Batch", told: Verdict) -> tuple[Mask, list[int]]:
        """Which bars are those that are held or were dropped; and which are others of their day."""
        out = np.zeros(len(batch.symbol), np.bool_)
        differing: list[int] = []
        rows = self.connection.execute(DECIDED, [batch.symbols]).fetchall()
        if not rows:
            return out, differing
        places = batch.places()
        for symbol, time, state, *values in rows:
            place = places.get((symbol, _microseconds(time)))
            if place is None:
                continue
            if not batch.equals(place, values):
                differing.append(place)
            else:
                out[place] = True
                told.dropped += state == "dropped"
                told.held += state == "held"
        return out, differing

    def _stored(self, batch: "_Batch") -> "_Batch":
        """The stored bars from the first new one of each symbol on, and as many before as rules look at."""
        first = np.full(len(batch.symbols), np.iinfo(np.int64).max)
        np.minimum.at(first, batch.symbol, batch.time)
        since: dict[arrays.Key, datetime] = {
            name: EPOCH + timedelta(microseconds=int(time)) for name, time in zip(batch.symbols, first, strict=True)
        }
        rows = arrays.read(self.connection, BARS, NUMBERS, since, self.rules.bars_before)
        return _Batch.of(batch.symbols, rows)

    def _hold(self, batch: "_Batch", reasons: Mapping[int, str], file: str, load_id: int | None) -> None:
        places = list(reasons)
        values = [[None if np.isnan(v) else float(v) for v in batch.columns[name][places]] for name in NUMBERS]
        self.connection.execute(HOLD, [load_id, file, *batch.keys(places), *values, list(reasons.values())])

    def _note(
        self, batch: "_Batch", found: Sequence[Finding], row_of: Ints, series: Series, load_id: int | None
    ) -> None:
        known = self.connection.execute(KNOWN, [batch.symbols]).fetchall()
        if known:
            judged = batch.places()
            again = [(s, t) for s, t in known if (s, _microseconds(t)) in judged]
            # What is stored and comes again is not judged: what was found of it stays.
            fresh = {*row_of[series.judged].tolist()}
            again = [(s, t) for s, t in again if judged[s, _microseconds(t)] in fresh]
            if again:
                self.connection.execute(FORGET, [[s for s, _ in again], [t for _, t in again]])
        if found:
            symbols, times = batch.keys([int(row_of[f.row]) for f in found])
            told = [[getattr(f, name) for f in found] for name in ("rule", "of", "severity", "message")]
            self.connection.execute(NOTE, [load_id, symbols, times, *told])


@dataclass
class _Batch:
    """Bars in some order."""

    symbols: Sequence[str]
    symbol: Ints
    time: Ints
    columns: Mapping[str, Floats]

    @classmethod
    def of(cls, names: Sequence[str], rows: Iterator[tuple[arrays.Key, arrays.Times, dict[str, Floats]]]) -> "_Batch":
        number = {name: n for n, name in enumerate(names)}
        read = [(number[str(name)], times, columns) for name, times, columns in rows]
        none: Any = np.zeros(0)
        return cls(
            names,
            np.concatenate([np.full(len(times), n) for n, times, _ in read] or [none]).astype(np.int64),
            np.concatenate([times for _, times, _ in read] or [none]).astype(np.int64),
            {name: np.concatenate([columns[name] for *_, columns in read] or [none]) for name in NUMBERS},
        )

    def name(self, place: int) -> str:
        return self.symbols[int(self.symbol[place])]

    def stamp(self, place: int) -> datetime:
        return EPOCH + timedelta(microseconds=int(self.time[place]))

    def day(self, place: int) -> date:
        return self.stamp(place).date()

    def keys(self, places: Sequence[int]) -> tuple[list[str], list[datetime]]:
        return [self.name(place) for place in places], [self.stamp(place) for place in places]

    def places(self) -> dict[tuple[str, int], int]:
        return {
            (self.symbols[symbol], time): place
            for place, (symbol, time) in enumerate(zip(self.symbol.tolist(), self.time.tolist(), strict=True))
        }

    def equals(self, place: int, values: Sequence[float | None]) -> bool:
        mine = [float(self.columns[name][place]) for name in NUMBERS]
        return all((other is None and np.isnan(own)) or own == other for own, other in zip(mine, values, strict=True))


def _series(batch: _Batch, stored: _Batch, out: Mask) -> tuple[Series, Ints]:
    """What is stored and what is new, by symbol and time; and the place in the batch of each bar that is new.

    A new bar takes the place of the stored one of its day, unless both are equal. What is left out is not in it.
    """
    places = np.flatnonzero(~out)
    symbol = np.concatenate((stored.symbol, batch.symbol[places]))
    time = np.concatenate((stored.time, batch.time[places]))
    columns = {name: np.concatenate((stored.columns[name], batch.columns[name][places])) for name in NUMBERS}
    place = np.concatenate((np.full(len(stored.symbol), -1), places))
    order = np.lexsort((place, time, symbol))
    symbol, time, place = symbol[order], time[order], place[order]
    columns = {name: values[order] for name, values in columns.items()}
    pair = (symbol[1:] == symbol[:-1]) & (time[1:] == time[:-1])
    equal = pair.copy()
    for values in columns.values():
        equal &= (values[1:] == values[:-1]) | (np.isnan(values[1:]) & np.isnan(values[:-1]))
    keep = np.ones(len(symbol), np.bool_)
    keep[:-1] &= ~pair | equal
    keep[1:] &= ~equal
    kept = np.flatnonzero(keep)
    series = Series(
        batch.symbols,
        symbol[kept],
        time[kept],
        {name: values[kept] for name, values in columns.items()},
        place[kept] >= 0,
    )
    return series, place[kept]


def _floats(column: pa.ChunkedArray) -> Floats:
    return np.asarray(pc.fill_null(column, np.nan).to_numpy(), dtype=np.float64)


def _microseconds(time: datetime) -> int:
    return (time - EPOCH) // timedelta(microseconds=1)


def _groups(counts: Sequence[tuple[str, int]]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for name, count in counts:
        if group and size + count > AT_ONCE:
            yield group
            group, size = [], 0
        group.append(name)
        size += count
    if group:
        yield group
