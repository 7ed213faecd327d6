"""`larder load`: bars from files into market_data.ohlcv_daily."""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import numpy as np
import psycopg
from psycopg import sql
from tqdm import tqdm

from larder import bars, db
from larder.errors import RefusedFileError
from larder.log import event, logger

COLUMNS = ("symbol", "event_timestamp", *bars.PRICES, "volume")

STAGE = """
CREATE TEMP TABLE IF NOT EXISTS staged_bars (
    symbol text, event_timestamp timestamptz, open float8, high float8, low float8, close float8, adjusted_close float8, volume bigint,
    seconds int, line bigint GENERATED ALWAYS AS IDENTITY
) ON COMMIT DELETE ROWS;
CREATE TEMP TABLE IF NOT EXISTS staged_rejects (symbol text, event_timestamp timestamptz, reason text, bar text) ON COMMIT DELETE ROWS
"""

INTRADAY = """
SELECT symbol, event_timestamp::date, min(seconds) * interval '1 second', max(seconds) * interval '1 second' FROM staged_bars
GROUP BY 1, 2 HAVING min(seconds) <> max(seconds) LIMIT 1
"""

# The first of several bars of one symbol and date stays; the others go, as rejects where they say something else.
DUPLICATES = """
WITH ranked AS (
    SELECT *, first_value(line) OVER same AS first FROM staged_bars WINDOW same AS (PARTITION BY symbol, event_timestamp ORDER BY line)
), gone AS (
    DELETE FROM staged_bars s USING ranked r WHERE s.line = r.line AND r.line <> r.first
    RETURNING s.*, r.first
)
INSERT INTO staged_rejects
SELECT g.symbol, g.event_timestamp, 'a duplicate with other values: the first one stays',
       format('open=%s high=%s low=%s close=%s adjusted_close=%s volume=%s', g.open, g.high, g.low, g.close, g.adjusted_close, g.volume)
FROM gone g JOIN ranked f ON f.line = g.first
WHERE (g.open, g.high, g.low, g.close, g.adjusted_close, g.volume)
    IS DISTINCT FROM (f.open, f.high, f.low, f.close, f.adjusted_close, f.volume)
"""

REJECT = """
INSERT INTO market_data.rejected_bars (bar_id, symbol, event_timestamp, reason, bar, file)
SELECT md5(concat_ws('|', coalesce(symbol, ''), event_timestamp::date, bar))::uuid, symbol, event_timestamp, reason, bar, %s
FROM staged_rejects ON CONFLICT DO NOTHING
"""

# Symbols in order, as in compute, so that neither waits for the other in a circle.
NOTE = """
, noted AS (
    INSERT INTO market_data.pending_compute AS pending (symbol, since)
    SELECT symbol, min(event_timestamp) FROM changed GROUP BY symbol ORDER BY symbol
    ON CONFLICT (symbol) DO UPDATE SET since = least(pending.since, excluded.since), noted_at = clock_timestamp()
)
SELECT count(*) FROM changed
"""


@dataclass
class Loaded:
    """What one or several loads did."""

    bars: int = 0
    changed: int = 0
    rejected: int = 0
    files: int = 0
    refused: int = 0


def load(url: str, paths: Iterable[Path]) -> Loaded:
    """Load files, and of directories each new or changed file. A file that is refused does not keep the others out."""
    total = Loaded()
    with db.connect(url, "load") as connection:
        connection.execute(STAGE)
        for path, once in _files(paths):
            try:
                one = _load_file(connection, path, once=once)
            except RefusedFileError as error:
                event("refused", level=40, reason=error.message)
                total.refused += 1
                continue
            if one is None:
                continue
            total.files += 1
            total.bars += one.bars
            total.changed += one.changed
            total.rejected += one.rejected
    return total


def _files(paths: Iterable[Path]) -> Iterator[tuple[Path, bool]]:
    """Files, and whether to load each only when it is new. Of a directory the oldest first, so that the newest has the last word."""
    for path in paths:
        if path.is_dir():
            found = [
                p
                for p in path.rglob("*")
                if p.name.lower().endswith(bars.SUFFIXES) and not p.name.startswith(".") and p.is_file()
            ]
            yield from ((p, True) for p in sorted(found, key=lambda p: (p.stat().st_mtime_ns, p)))
        else:
            yield path, False


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RefusedFileError(f"{path} cannot be read: {error.strerror}.") from error


def _load_file(connection: psycopg.Connection, path: Path, *, once: bool) -> Loaded | None:
    """One transaction: bars, rejects, the note for compute and the note of the file go in together or not at all."""
    started = monotonic()
    digest = _digest(path)
    before = path.stat()
    name = str(path.resolve())
    if (
        once
        and connection.execute(
            "SELECT FROM market_data.loaded_files WHERE (path, size, sha256) = (%s, %s, %s)",
            [name, before.st_size, digest],
        ).fetchone()
    ):
        logger.debug("unchanged file=%s", path)
        return None
    result = Loaded()
    with connection.transaction():
        row = connection.execute("SELECT current_date").fetchone()
        assert row  # noqa: S101 - for the type checker: a SELECT without FROM has a row
        progress = tqdm(desc=path.name, unit=" bars", unit_scale=True, disable=None, file=sys.stderr, leave=False)
        with progress:
            for batch in bars.read(path, np.datetime64(row[0])):
                db.copy_in(connection, "staged_bars", batch.good)
                db.copy_in(connection, "staged_rejects", batch.rejected)
                progress.update(batch.good.num_rows + batch.rejected.num_rows)
        if intraday := connection.execute(INTRADAY).fetchone():
            symbol, day, first, last = intraday
            raise RefusedFileError(
                f"{path} holds intraday bars ({symbol} has {first} and {last} on {day}); one bar per day is allowed."
            )
        connection.execute(DUPLICATES)
        # Two loads of the same symbols would otherwise lock the same rows in different orders.
        connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('larder load', 0))")
        connection.execute(REJECT, [path.name])
        counts = connection.execute(
            "SELECT (SELECT count(*) FROM staged_bars), (SELECT count(*) FROM staged_rejects)"
        ).fetchone()
        result.bars, result.rejected = counts or (0, 0)
        merged = connection.execute(
            sql.SQL("WITH changed AS (")
            + db.upsert("market_data.ohlcv_daily", "staged_bars", COLUMNS)
            + sql.SQL(")")
            + sql.SQL(NOTE)
        ).fetchone()
        result.changed = merged[0] if merged else 0
        after = path.stat()
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise RefusedFileError(f"{path} changed while it was read; load it again when it is complete.")
        connection.execute(
            "INSERT INTO market_data.loaded_files (path, size, sha256) VALUES (%s, %s, %s) "
            "ON CONFLICT (path) DO UPDATE SET (size, sha256, loaded_at) = (excluded.size, excluded.sha256, now())",
            [name, before.st_size, digest],
        )
    if result.rejected:
        event("rejected", level=30, file=path.name, bars=result.rejected, reasons="market_data.rejected_bars")
    event(
        "loaded",
        file=path.name,
        bars=result.bars,
        changed=result.changed,
        rejected=result.rejected,
        seconds=monotonic() - started,
    )
    return result
