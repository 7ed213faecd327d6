"""`larder compute`: features from bars, for the symbols whose bars changed."""

import io
from collections.abc import Iterator, Sequence
from datetime import datetime
from time import monotonic

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from psycopg import sql
from tqdm import tqdm

from larder import db, definitions
from larder.indicators import INTEGERS, VIEWS, Array, Bars
from larder.indicators import compute as features_of
from larder.log import event

BARS_AT_ONCE = 100_000  # what one transaction holds in memory
COLUMNS = {
    "symbol": pa.string(),
    "event_timestamp": pa.timestamp("us"),
    **dict.fromkeys(("open", "high", "low", "close", "adjusted_close", "volume"), pa.float64()),
}

# In the order of symbols, as `larder load` notes them, so that neither waits for the other in a circle. From here to
# the end of the transaction a load of these symbols waits to note its bars; it then finds no note and makes a new one.
TAKE = """
WITH taken AS (SELECT symbol FROM market_data.pending_compute WHERE symbol = ANY(%s) ORDER BY symbol FOR UPDATE)
DELETE FROM market_data.pending_compute USING taken WHERE pending_compute.symbol = taken.symbol
RETURNING pending_compute.symbol, since
"""

BARS = """
SELECT symbol, event_timestamp AT TIME ZONE 'UTC', open, high, low, close, adjusted_close, volume
FROM market_data.ohlcv_daily WHERE symbol = ANY(%s) ORDER BY symbol, event_timestamp
"""

# The online store has to be written from a symbol's newest bar on, whichever of its rows changed.
NOTE = """
INSERT INTO features.pending_materialize AS pending (symbol, since) SELECT * FROM unnest(%s::text[], %s::timestamptz[])
ON CONFLICT (symbol) DO UPDATE SET since = least(pending.since, excluded.since), noted_at = clock_timestamp()
"""


def compute(url: str, *, full: bool = False) -> int:
    """Recompute every symbol with a pending change; returns the number of feature rows written.

    With `full`, and where the definitions of the features have changed, every symbol is recomputed.
    """
    written = 0
    with db.connect(url, "compute") as connection:
        full = full or definitions.changed(connection)
        for view, names in VIEWS.items():
            types = ", ".join(f"{name} {'bigint' if name in INTEGERS else 'float8'}" for name in names)
            columns = sql.SQL(f"symbol text, event_timestamp timestamptz, {types}")
            stage = sql.Identifier(f"staged_{view}")
            connection.execute(sql.SQL("CREATE TEMP TABLE {} ({}) ON COMMIT DELETE ROWS").format(stage, columns))
        rows = connection.execute(
            "SELECT symbol, count(*) FROM market_data.ohlcv_daily "
            "WHERE %s OR symbol IN (SELECT symbol FROM market_data.pending_compute) GROUP BY symbol ORDER BY symbol",
            [full],
        ).fetchall()
        with tqdm(desc="compute", total=len(rows), unit=" symbols", disable=None, leave=False) as progress:
            for group in _groups(rows):
                started = monotonic()
                with connection.transaction():
                    count = _compute_group(connection, group, full=full)
                written += count
                progress.update(len(group))
                event("computed", symbols=len(group), rows=count, seconds=monotonic() - started)
        definitions.note(connection)
    return written


def _groups(rows: Sequence[tuple[str, int]]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for symbol, count in rows:
        if group and size + count > BARS_AT_ONCE:
            yield group
            group, size = [], 0
        group.append(symbol)
        size += count
    if group:
        yield group


def _compute_group(connection: psycopg.Connection, symbols: list[str], *, full: bool) -> int:
    since: dict[str, datetime] = dict(connection.execute(TAKE, [symbols]).fetchall())
    wanted = symbols if full else sorted(since)
    if not wanted:  # another compute was quicker
        return 0
    histories = _histories(connection, wanted)
    for view in VIEWS:
        parts = [_features(view, history, None if full else since[symbol]) for symbol, history in histories.items()]
        db.copy_in(connection, f"staged_{view}", pa.concat_tables(parts))
    changed: set[str] = set()
    count = 0
    for view, names in VIEWS.items():
        statement = db.upsert(f"features.{view}", f"staged_{view}", (*db.KEY, *names))
        per_symbol = connection.execute(
            sql.SQL("WITH changed AS (") + statement + sql.SQL(") SELECT symbol, count(*) FROM changed GROUP BY symbol")
        ).fetchall()
        changed.update(symbol for symbol, _ in per_symbol)
        count += sum(rows for _, rows in per_symbol)
    newest = {symbol: history["event_timestamp"][-1].as_py() for symbol, history in histories.items()}
    noted = sorted(changed)
    connection.execute(NOTE, [noted, [newest[symbol] for symbol in noted]])
    return count


def _histories(connection: psycopg.Connection, symbols: list[str]) -> dict[str, pa.Table]:
    text = db.copy_out(connection, BARS, [symbols])
    if not text:
        return {}
    table = pa.csv.read_csv(
        io.BytesIO(text),
        pa.csv.ReadOptions(column_names=list(COLUMNS)),
        convert_options=pa.csv.ConvertOptions(column_types=COLUMNS),
    ).combine_chunks()
    table = table.set_column(1, "event_timestamp", pc.assume_timezone(table["event_timestamp"], "UTC"))
    names = table["symbol"].to_numpy()
    starts = np.flatnonzero(np.concatenate(([True], names[1:] != names[:-1])))
    ends = np.concatenate((starts[1:], [len(names)]))
    return {names[start]: table.slice(start, end - start) for start, end in zip(starts, ends, strict=True)}


def _features(view: str, history: pa.Table, since: datetime | None) -> pa.Table:
    bars = Bars({name: history[name].to_numpy() for name in COLUMNS if name not in db.KEY})
    values = {name: _column(name, column) for name, column in features_of(view, bars).items()}
    times = history["event_timestamp"]
    table = pa.table({"symbol": history["symbol"], "event_timestamp": times, **values})
    return table if since is None else table.filter(pc.greater_equal(times, pa.scalar(since, times.type)))


def _column(name: str, values: Array) -> pa.Array:
    column = pa.array(values, from_pandas=True)  # NaN becomes NULL
    return column.cast(pa.int64()) if name in INTEGERS else column
