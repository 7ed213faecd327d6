"""`larder compute`: features from bars, for the symbols whose bars changed."""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from time import monotonic

import numpy as np
import numpy.typing as npt
import psycopg
import pyarrow as pa
from psycopg import sql
from tqdm import tqdm

from larder.errors import SymbolsError, reason
from larder.features import definitions
from larder.features.indicators import COLUMNS, INTEGERS, MEMORY, TOTALS, VIEWS, Array, Bars, total
from larder.features.indicators import compute as features_of
from larder.log import event, logger, printable
from larder.postgres import binary, session, tables

WORKERS = 2  # while PostgreSQL writes the one's rows, the other computes
BARS_AT_ONCE = 50_000  # what one transaction holds in memory
EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
Times = npt.NDArray[np.int64]  # microseconds since EPOCH, as PostgreSQL has them

# In the order of symbols, as `larder load` notes them, so that neither waits for the other in a circle. From here to
# the end of the transaction a load of these symbols waits to note its bars; it then finds no note and makes a new one.
TAKE = """
WITH taken AS (SELECT symbol FROM market_data.pending_compute WHERE symbol = ANY(%s) ORDER BY symbol FOR UPDATE)
DELETE FROM market_data.pending_compute USING taken WHERE pending_compute.symbol = taken.symbol
RETURNING pending_compute.symbol, since
"""

SINCE_THE_FIRST = "SELECT symbol, min(event_timestamp) FROM market_data.ohlcv_daily GROUP BY symbol ORDER BY symbol"
PENDING = "SELECT symbol, since FROM market_data.pending_compute ORDER BY symbol"

# All bars from `since` on, and the last ones before it: all of them where their number is NULL. One row per symbol,
# each column the values' own bytes: a row per bar costs more than the bar. The columns share one, arbitrary, order.
BARS = """
SELECT symbol, bars.* FROM unnest(%s::text[], %s::timestamptz[]) AS wanted (symbol, since), LATERAL (
    SELECT string_agg(timestamptz_send(event_timestamp), ''), {values} FROM (
        (SELECT * FROM market_data.ohlcv_daily AS bar WHERE bar.symbol = wanted.symbol AND event_timestamp >= since)
        UNION ALL
        (SELECT * FROM market_data.ohlcv_daily AS bar WHERE bar.symbol = wanted.symbol AND event_timestamp < since
         ORDER BY event_timestamp DESC LIMIT %s)
    ) AS bar HAVING count(*) > 0
) AS bars
"""

# The online store has to be written from a symbol's newest bar on, whichever of its rows changed.
NOTE = """
INSERT INTO features.pending_materialize AS pending (symbol, since) SELECT * FROM unnest(%s::text[], %s::timestamptz[])
ON CONFLICT (symbol) DO UPDATE SET since = least(pending.since, excluded.since), noted_at = clock_timestamp()
"""


def compute(url: str, *, full: bool = False) -> int:
    """Recompute every symbol with a pending change; returns the number of feature rows written.

    With `full`, and where the definitions of the features have changed, every symbol is recomputed. A symbol that
    cannot be computed keeps no other out: SymbolsError at the end.
    """
    failed: dict[str, str] = {}
    with session.connect(url, "compute") as connection:
        # What one compute finds missing in the tables, no other one writes meanwhile.
        connection.execute("SELECT pg_advisory_lock(hashtextextended('larder compute', 0))")
        full = full or definitions.changed(connection)
        rows = connection.execute(SINCE_THE_FIRST if full else PENDING).fetchall()
        groups = deque(_groups(rows))
        with (
            tqdm(desc="compute", total=len(rows), unit=" symbols", disable=None, leave=False) as progress,
            ThreadPoolExecutor(WORKERS) as pool,
        ):
            try:
                workers = [
                    pool.submit(_work, url, groups, failed, progress, full=full)
                    for _ in range(min(WORKERS, len(groups)))
                ]
                written = sum(worker.result() for worker in workers)
            finally:
                groups.clear()
        if failed:
            raise SymbolsError(failed, written)
        definitions.note(connection)
    return written


def _work(url: str, groups: deque[list[str]], failed: dict[str, str], progress: tqdm, *, full: bool) -> int:
    """Compute groups until there are no more, each in a transaction; return the number of rows written.

    A group that fails is computed symbol by symbol, and the symbols that fail are noted with the reason.
    """
    written = 0
    with session.connect(url, "compute") as connection:
        for view, names in VIEWS.items():
            tables.stage(connection, f"staged_{view}", f"features.{view}", (*tables.KEY, *names))
        while True:
            try:
                group = groups.popleft()
            except IndexError:
                return written
            started = monotonic()
            try:
                with connection.transaction():
                    count = _compute_group(connection, group, full=full)
            except Exception as error:
                if not session.is_about_data(error):
                    raise
                logger.debug("compute", exc_info=True)
                if len(group) > 1:
                    groups.extend([symbol] for symbol in group)
                else:
                    failed[group[0]] = printable(reason(error))
                    event("failed", level=logging.ERROR, symbol=group[0], reason=failed[group[0]])
                continue
            written += count
            progress.update(len(group))
            event("computed", symbols=len(group), rows=count, seconds=monotonic() - started)


def _groups(rows: Sequence[tuple[str, datetime]]) -> Iterator[list[str]]:
    """Symbols whose bars will hardly be more than BARS_AT_ONCE: one per working day."""
    group: list[str] = []
    size = 0
    now = datetime.now(UTC)
    for symbol, since in rows:
        count = MEMORY + (now - since).days * 5 // 7
        if group and size + count > BARS_AT_ONCE:
            yield group
            group, size = [], 0
        group.append(symbol)
        size += count
    if group:
        yield group


def _compute_group(connection: psycopg.Connection, symbols: list[str], *, full: bool) -> int:
    since: dict[str, datetime] = dict(connection.execute(TAKE, [symbols]).fetchall())
    if full:
        since = dict.fromkeys(symbols, datetime(1, 1, 1, tzinfo=UTC))
    parts = _parts(connection, since)
    if not parts:  # another compute was quicker
        return 0
    changed: set[str] = set()
    count = 0
    for view, names in VIEWS.items():
        table = f"features.{view}"
        rows = pa.concat_tables(part.rows(view) for part in parts)
        written, others = tables.append(connection, table, rows, rows.column_names)
        changed.update(written["symbol"].unique().to_pylist())
        count += written.num_rows
        if others.num_rows:
            tables.copy_in(connection, f"staged_{view}", others)
            statement = tables.upsert(table, f"staged_{view}", (*tables.KEY, *names))
            per_symbol = connection.execute(
                sql.SQL("WITH changed AS ({}) SELECT symbol, count(*) FROM changed GROUP BY symbol").format(statement)
            ).fetchall()
            changed.update(symbol for symbol, _ in per_symbol)
            count += sum(rows for _, rows in per_symbol)
    newest = {part.symbol: part.time(-1) for part in parts}
    noted = sorted(changed)
    connection.execute(NOTE, [noted, [newest[symbol] for symbol in noted]])
    return count


@dataclass
class _Part:
    """A symbol's features, for its whole history or for the newest part of it."""

    symbol: str
    times: Times
    features: dict[str, Array]
    steps: dict[str, Array]  # of the features that are sums from the first bar on
    first: int  # the first row that may have changed

    def anchor(self) -> int | None:
        """The last row before the first that may have changed at which every sum has a value."""
        known = np.all([np.isfinite(steps[: self.first]) for steps in self.steps.values()], axis=0)
        rows = np.flatnonzero(known)
        return int(rows[-1]) if len(rows) else None

    def continue_from(self, row: int, totals: Mapping[str, float]) -> None:
        """Let each sum go on from what it is at a row."""
        for name, before in totals.items():
            self.features[name][row + 1 :] = total(self.steps[name][row + 1 :], before)

    def time(self, row: int) -> datetime:
        return EPOCH + timedelta(microseconds=int(self.times[row]))

    def rows(self, view: str) -> pa.Table:
        values = {name: _column(name, self.features[name][self.first :]) for name in VIEWS[view]}
        symbols = pa.DictionaryArray.from_arrays(np.zeros(len(self.times) - self.first, np.int32), [self.symbol])
        times = (self.times[self.first :] + binary.EPOCH).view("datetime64[us]")
        return pa.table({"symbol": symbols.cast(pa.string()), "event_timestamp": times, **values})


def _parts(connection: psycopg.Connection, since: Mapping[str, datetime]) -> list[_Part]:
    """Compute from the newest part of each history, or from the whole where a sum before it is needed and not known."""
    found = list(_computed(connection, since, MEMORY))
    # Where there are fewer bars before, these are all. A sum that nothing is added to (no volume) needs none before it.
    cut = {
        part.symbol: part
        for part in found
        if part.first == MEMORY and any(np.isfinite(steps[part.first :]).any() for steps in part.steps.values())
    }
    anchors = {symbol: row for symbol, part in cut.items() if (row := part.anchor()) is not None}
    known = _totals(connection, {symbol: cut[symbol].time(row) for symbol, row in anchors.items()})
    for symbol in known:
        cut.pop(symbol).continue_from(anchors[symbol], known[symbol])
    return [part for part in found if part.symbol not in cut] + list(
        _computed(connection, {symbol: since[symbol] for symbol in cut}, None)
    )


def _computed(connection: psycopg.Connection, since: Mapping[str, datetime], before: int | None) -> Iterator[_Part]:
    if not since:
        return
    query = sql.SQL(BARS).format(values=_bytes(COLUMNS))
    prices = definitions.prices()
    for symbol, times, values in _arrays(connection, query, [list(since), list(since.values()), before], COLUMNS):
        bars = Bars(values, prices)
        features = {name: column for view in VIEWS for name, column in features_of(view, bars).items()}
        steps = {name: function(bars) for name, function in TOTALS[1].items()}
        changed = (since[symbol] - EPOCH) // timedelta(microseconds=1)
        yield _Part(symbol, times, features, steps, int(np.searchsorted(times, changed)))


def _totals(connection: psycopg.Connection, rows: Mapping[str, datetime]) -> dict[str, dict[str, float]]:
    """What is stored of the sums from the first bar on, at one row of each symbol; nothing where it is null."""
    view, names = TOTALS
    query = sql.SQL(
        "SELECT symbol, {names} FROM {table} AS stored JOIN unnest(%s::text[], %s::timestamptz[]) "
        "AS wanted (symbol, event_timestamp) USING (symbol, event_timestamp) WHERE ({names}) IS NOT NULL"
    ).format(names=sql.SQL(", ").join(map(sql.Identifier, names)), table=session.identifier(f"features.{view}"))
    found = connection.execute(query, [list(rows), list(rows.values())]) if rows else ()
    return {symbol: dict(zip(names, totals, strict=True)) for symbol, *totals in found}


def _bytes(names: Iterable[str]) -> sql.Composed:
    each = "string_agg(float8send(coalesce({}::float8, 'NaN')), '')"
    return sql.SQL(", ").join(sql.SQL(each).format(sql.Identifier(name)) for name in names)


def _arrays(
    connection: psycopg.Connection, query: sql.Composed, parameters: Sequence[object], names: Iterable[str]
) -> Iterator[tuple[str, Times, dict[str, Array]]]:
    """Symbols with their times and values, the oldest first."""
    for symbol, stamps, *values in connection.cursor(binary=True).execute(query, parameters):
        times = np.frombuffer(stamps, ">i8").astype(np.int64)
        order = np.argsort(times)
        columns = (np.frombuffer(column, ">f8").astype(np.float64)[order] for column in values)
        yield symbol, times[order], dict(zip(names, columns, strict=True))


def _column(name: str, values: Array) -> pa.Array:
    column = pa.array(values, from_pandas=True)  # NaN becomes NULL
    return column.cast(pa.int64()) if name in INTEGERS else column
