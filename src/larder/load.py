"""`larder load`: bars from files into market_data.ohlcv_daily."""

import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from time import monotonic

import numpy as np
import psycopg
import pyarrow as pa
from psycopg import sql
from tqdm import tqdm

from larder import bars, db
from larder.errors import RefusedFileError
from larder.log import event, logger

TABLE = "market_data.ohlcv_daily"
COLUMNS = (*db.KEY, *bars.PRICES, "volume")
BARS_IN_MEMORY = 1 << 19  # of one file; where it has more, they wait in a temporary table

STAGE = """
CREATE TEMP TABLE staged_bars (
    symbol text, event_timestamp timestamptz, open float8, high float8, low float8, close float8, adjusted_close float8,
    volume float8, seconds int, line bigint GENERATED ALWAYS AS IDENTITY
) ON COMMIT DELETE ROWS;
CREATE TEMP TABLE staged_rejects (
    symbol text, event_timestamp timestamptz, reason text, bar text
) ON COMMIT DELETE ROWS
"""

INTRADAY = """
SELECT symbol, event_timestamp::date, min(seconds) * interval '1 second', max(seconds) * interval '1 second'
FROM staged_bars GROUP BY 1, 2 HAVING min(seconds) <> max(seconds) LIMIT 1
"""

# The first of several bars of one symbol and date stays; the others go, as rejects where they say something else.
DUPLICATES = """
WITH twice AS (
    SELECT symbol, event_timestamp, min(line) AS first FROM staged_bars GROUP BY 1, 2 HAVING count(*) > 1
), gone AS (
    DELETE FROM staged_bars s USING twice t
    WHERE (s.symbol, s.event_timestamp) = (t.symbol, t.event_timestamp) AND s.line <> t.first
    RETURNING s.*, t.first
)
INSERT INTO staged_rejects
SELECT g.symbol, g.event_timestamp, 'a duplicate with other values: the first one stays',
       format('open=%s high=%s low=%s close=%s adjusted_close=%s volume=%s',
              g.open, g.high, g.low, g.close, g.adjusted_close, g.volume)
FROM gone g JOIN staged_bars f ON f.line = g.first
WHERE (g.open, g.high, g.low, g.close, g.adjusted_close, g.volume)
    IS DISTINCT FROM (f.open, f.high, f.low, f.close, f.adjusted_close, f.volume)
"""

REJECT = """
INSERT INTO market_data.rejected_bars (bar_id, symbol, event_timestamp, reason, bar, file)
SELECT md5(concat_ws('|', coalesce(symbol, ''), event_timestamp::date, bar))::uuid,
       symbol, event_timestamp, reason, bar, %s
FROM staged_rejects ON CONFLICT DO NOTHING
"""

MERGE = "WITH changed AS ({upsert}) SELECT symbol, min(event_timestamp)::date, count(*) FROM changed GROUP BY symbol"

# Symbols in order, as in compute, so that neither waits for the other in a circle.
NOTE = """
INSERT INTO market_data.pending_compute AS pending (symbol, since)
SELECT symbol, min(since) FROM unnest(%s::text[], %s::date[]) AS changed (symbol, since)
GROUP BY symbol ORDER BY symbol
ON CONFLICT (symbol) DO UPDATE SET since = least(pending.since, excluded.since), noted_at = clock_timestamp()
"""

KNOWN = "SELECT FROM market_data.loaded_files WHERE (path, size, sha256) = (%s, %s, %s)"
REMEMBER = """
INSERT INTO market_data.loaded_files (path, size, sha256) VALUES (%s, %s, %s)
ON CONFLICT (path) DO UPDATE SET (size, sha256, loaded_at) = (excluded.size, excluded.sha256, now())
"""


@dataclass
class Loaded:
    """What a load did: bars read, bars that were new or other than before, bars rejected, files refused as a whole."""

    bars: int = 0
    changed: int = 0
    rejected: int = 0
    refused: int = 0


def load(url: str, paths: Iterable[Path]) -> Loaded:
    """Load files, and of directories each new or changed file. A file that is refused does not keep the others out."""
    total = Loaded()
    with db.connect(url, "load") as connection:
        connection.execute(STAGE)
        # Each file is whole or not there, but need not wait for the disk: the last transaction does, for all of them.
        connection.execute("SET synchronous_commit = off")
        for path, once in _files(paths):
            try:
                one = _load_file(connection, path, once=once)
            except RefusedFileError as error:
                event("refused", level=logging.ERROR, reason=error.message)
                total.refused += 1
            else:
                total.bars += one.bars
                total.changed += one.changed
                total.rejected += one.rejected
        connection.execute("SET synchronous_commit TO DEFAULT")
        connection.execute("SELECT pg_logical_emit_message(true, 'larder', 'loaded')")
    return total


def _files(paths: Iterable[Path]) -> Iterator[tuple[Path, bool]]:
    """Files, and whether to load each only if it is new. The oldest come first: the newest has the last word."""
    for path in paths:
        if path.is_dir():
            found = [p for p in path.rglob("*") if p.name.lower().endswith(bars.SUFFIXES) and p.is_file()]
            whole = [p for p in found if not p.name.startswith(".")]  # rsync and others write .name until it is whole
            yield from ((p, True) for p in sorted(whole, key=lambda p: (p.stat().st_mtime_ns, p)))
        else:
            yield path, False


def _load_file(connection: psycopg.Connection, path: Path, *, once: bool) -> Loaded:
    """In one transaction: the bars, the rejects, the note for compute and the note of the file."""
    started = monotonic()
    try:
        before = path.stat()
        with path.open("rb") as file:
            identity = [str(path.resolve()), before.st_size, hashlib.file_digest(file, "sha256").hexdigest()]
    except OSError as error:
        raise RefusedFileError(f"{path} cannot be read: {error.strerror}.") from error
    if once and connection.execute(KNOWN, identity).rowcount:
        logger.debug("unchanged file=%s", path)
        return Loaded()
    result = Loaded()
    with connection.transaction():
        today = connection.execute("SELECT current_date").fetchall()[0][0]
        held: list[pa.Table] = []
        rows = 0
        with tqdm(desc=path.name, unit=" bars", unit_scale=True, disable=None, leave=False) as progress:
            for batch in bars.read(path, np.datetime64(today)):
                held.append(batch.good.set_column(7, "volume", batch.good["volume"].cast(pa.float64())))
                rows += batch.good.num_rows
                if rows > BARS_IN_MEMORY:
                    _stage(connection, held)
                if batch.rejected.num_rows:
                    db.copy_in(connection, "staged_rejects", batch.rejected)
                progress.update(batch.good.num_rows + batch.rejected.num_rows)
        # Two loads of the same symbols would otherwise lock the same rows in different orders.
        connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('larder load', 0))")
        changed = _append(connection, held) if rows <= BARS_IN_MEMORY else []
        result.bars = result.changed = sum(count for _, _, count in changed)
        if result.bars < rows:
            _stage(connection, held)
            if intraday := connection.execute(INTRADAY).fetchone():
                symbol, day, first, last = intraday
                raise RefusedFileError(
                    f"{path} holds intraday bars ({symbol} has {first} and {last} on {day}); "
                    "one bar per day is allowed."
                )
            connection.execute(DUPLICATES)
            result.bars += connection.execute("SELECT count(*) FROM staged_bars").fetchall()[0][0]
            merge = sql.SQL(MERGE).format(upsert=db.upsert(TABLE, "staged_bars", COLUMNS))
            merged = connection.execute(merge).fetchall()
            result.changed += sum(count for _, _, count in merged)
            changed += merged
        result.rejected = connection.execute("SELECT count(*) FROM staged_rejects").fetchall()[0][0]
        if result.rejected:
            connection.execute(REJECT, [path.name])
        if changed:
            connection.execute(NOTE, [[symbol for symbol, _, _ in changed], [since for _, since, _ in changed]])
        after = path.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise RefusedFileError(f"{path} changed while it was read; load it again when it is complete.")
        connection.execute(REMEMBER, identity)
    if result.rejected:
        event("rejected", level=logging.WARNING, file=path.name, bars=result.rejected, see="market_data.rejected_bars")
    event("loaded", file=path.name, bars=result.bars, changed=result.changed, seconds=monotonic() - started)
    return result


def _append(connection: psycopg.Connection, held: list[pa.Table]) -> list[tuple[str, date, int]]:
    """Write the held bars that are newer than all of their symbol; the others stay held, and all where a key is twice.

    Returns symbols, the first bar of each that was written, and how many.
    """
    if not held:
        return []
    rows = pa.concat_tables(held)
    symbols = rows["symbol"].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64)
    keys = (symbols << 32) + rows["event_timestamp"].cast(pa.int32()).to_numpy()
    if len(np.unique(keys)) < len(keys):
        return []
    written, others = db.append(connection, TABLE, rows, COLUMNS)
    held[:] = [others]
    first = written.group_by("symbol").aggregate([("event_timestamp", "min"), ("event_timestamp", "count")])
    return list(zip(*(column.to_pylist() for column in first.select((0, 1, 2)).columns), strict=True))


def _stage(connection: psycopg.Connection, held: list[pa.Table]) -> None:
    if held:
        db.copy_in(connection, "staged_bars", pa.concat_tables(held))
        held.clear()
