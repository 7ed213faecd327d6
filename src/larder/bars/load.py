"""`larder load`: bars from files into market_data.ohlcv_daily; and what `larder inspect` tells of it before."""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import psycopg
import pyarrow as pa
from psycopg import sql
from tqdm import tqdm

from larder import bars, origin
from larder.bars.judge import rejected
from larder.bars.reader import Reader, check_file
from larder.bars.report import SYMBOLS
from larder.bars.settings import Files
from larder.errors import LarderError, RefusedFileError, reason
from larder.log import event, logger, printable
from larder.postgres import session, tables
from larder.quality.gate import Gate, Verdict
from larder.quality.rules import Rules

TABLE = "market_data.ohlcv_daily"
COLUMNS = (*tables.KEY, *bars.PRICES, "volume")
BARS_IN_MEMORY = 1 << 19  # of one file; where it has more, they wait in a temporary table

REJECT = """
INSERT INTO market_data.rejected_bars (bar_id, symbol, event_timestamp, reason, bar, file)
SELECT md5(concat_ws('|', coalesce(symbol, ''), event_timestamp::date, bar))::uuid,
       symbol, event_timestamp, reason, bar, %s
FROM staged_rejects ON CONFLICT DO NOTHING
"""

# Of the staged bars: which are new, and which are stored with other values.
COMPARE = """
SELECT count(*) FILTER (WHERE kept.symbol IS NULL), count(kept.symbol) - count(*) FILTER (WHERE {differs}),
       count(*) FILTER (WHERE {differs}),
       min(staged.event_timestamp) FILTER (WHERE {differs})::date,
       max(staged.event_timestamp) FILTER (WHERE {differs})::date,
       coalesce(array_agg(DISTINCT kept.symbol) FILTER (WHERE {differs}), '{{}}')
FROM staged_bars AS staged LEFT JOIN {table} AS kept USING (symbol, event_timestamp)
"""

MERGE = """
WITH changed AS ({upsert})
SELECT symbol, min(event_timestamp)::date, count(*), count(*) FILTER (WHERE replaced),
       min(event_timestamp) FILTER (WHERE replaced)::date, max(event_timestamp) FILTER (WHERE replaced)::date
FROM changed GROUP BY symbol ORDER BY symbol
"""

# Symbols in order, as in compute, so that neither waits for the other in a circle.
NOTE = """
INSERT INTO market_data.pending_compute AS pending (symbol, since)
SELECT symbol, min(since) FROM unnest(%s::text[], %s::date[]) AS changed (symbol, since)
GROUP BY symbol ORDER BY symbol
ON CONFLICT (symbol) DO UPDATE SET since = least(pending.since, excluded.since), noted_at = clock_timestamp()
"""

KNOWN = "SELECT (size, sha256) = (%s, %s) FROM market_data.loaded_files WHERE path = %s"
REMEMBER = """
INSERT INTO market_data.loaded_files (size, sha256, path) VALUES (%s, %s, %s)
ON CONFLICT (path) DO UPDATE SET (size, sha256, loaded_at) = (excluded.size, excluded.sha256, now())
"""

# For a repository of one's own whose tables.yml does not have these.
ARE_LOADS_NOTED = "SELECT to_regclass('market_data.loads') IS NOT NULL"
# The lock of a load keeps out another one that would take the same number.
NEXT_LOAD = "SELECT coalesce(max(load_id), 0) + 1 FROM market_data.loads"
NOTE_LOAD = """
INSERT INTO market_data.loads (load_id, path, sha256, format, changed, host, code, invocation)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s)
"""

REFUSE = """
INSERT INTO market_data.refused_files AS known (path, reason) VALUES (%s, %s)
ON CONFLICT (path) DO UPDATE SET (reason, refused_at) = (excluded.reason, excluded.refused_at)
WHERE known.reason <> excluded.reason
"""
ACCEPT = "DELETE FROM market_data.refused_files WHERE path = %s"
# Those that are no longer in a directory.
FORGET = "DELETE FROM market_data.refused_files WHERE (path = %s OR starts_with(path, %s)) AND path <> ALL (%s)"


@dataclass
class Loaded:
    """What a load did: bars read, bars that were new or other than before, bars rejected, files refused as a whole.

    Bars in quarantine are those of the files, also where they were there before.
    """

    bars: int = 0
    changed: int = 0
    rejected: int = 0
    refused: int = 0
    quarantined: int = 0


def load(
    url: str,
    paths: Iterable[Path],
    files: Files | None = None,
    given: Mapping[str, Any] | None = None,
    rules: Rules | None = None,
) -> Loaded:
    """Load files, and of directories each new or changed file; `given` are options that hold for each of them.

    Each new bar is judged by the rules. Whatever a file holds, and whatever happens while it is read: it is refused,
    and the others are loaded.
    """
    total = Loaded()
    options = (files or Files()).options(given or {})
    with session.connect(url, "load") as connection, Reader() as reader:
        tables.stage(connection, "staged_bars", TABLE, COLUMNS)
        tables.stage(connection, "staged_rejects", "market_data.rejected_bars", (*tables.KEY, "reason", "bar"))
        # Each file is whole or not there, but need not wait for the disk: the last transaction does, for all of them.
        connection.execute("SET synchronous_commit = off")
        gate = Gate(connection, rules or Rules())
        for path, once in _files(connection, paths):
            try:
                one = _load_file(connection, reader, gate, path, options, once=once)
            except Exception as error:
                if not (isinstance(error, RefusedFileError) or session.is_about_data(error)):
                    raise
                _refuse(connection, path, error, remember=once)
                total.refused += 1
            else:
                total.bars += one.bars
                total.changed += one.changed
                total.rejected += one.rejected
                total.quarantined += one.quarantined
        connection.execute("SET synchronous_commit TO DEFAULT")
        connection.execute("SELECT pg_logical_emit_message(true, 'larder', 'loaded')")
    return total


def inspect(paths: Iterable[Path], options: bars.Options, url: str | None = None) -> Iterator[bars.Inspection]:
    """What a load of each file would do; with a database also how its bars compare with those that are stored."""
    with ExitStack() as stack:
        reader, connection = stack.enter_context(Reader()), None
        if url:
            try:
                connection = stack.enter_context(_stage_of(url))
            except LarderError as error:
                event("not compared with stored bars", level=logging.WARNING, reason=error.message)
        for path in paths:
            if connection is None:
                yield reader.inspect(path, options)
                continue
            with connection.transaction():
                told = reader.inspect(path, options, partial(tables.copy_in, connection, "staged_bars"))
                told.stored = None if told.refusal else _compare(connection)
            yield told


@contextmanager
def _stage_of(url: str) -> Iterator[psycopg.Connection]:
    with session.connect(url, "inspect") as connection:
        tables.stage(connection, "staged_bars", TABLE, COLUMNS)
        yield connection


def _compare(connection: psycopg.Connection) -> bars.Stored:
    values = [column for column in COLUMNS if column not in tables.KEY]
    kept, staged = (sql.SQL(", ").join(sql.Identifier(side, c) for c in values) for side in ("kept", "staged"))
    differs = sql.SQL("kept.symbol IS NOT NULL AND ({}) IS DISTINCT FROM ({})").format(kept, staged)
    query = sql.SQL(COMPARE).format(differs=differs, table=session.identifier(TABLE))
    return bars.Stored(*connection.execute(query).fetchall()[0])


def _files(connection: psycopg.Connection, paths: Iterable[Path]) -> Iterator[tuple[Path, bool]]:
    """Files, and whether to load each only if it is new. The oldest come first: the newest has the last word."""

    def age(path: Path) -> tuple[int, Path]:
        try:
            return path.stat().st_mtime_ns, path
        except OSError:  # it is refused when it is its turn
            return 0, path

    for path in paths:
        if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises where it may not look
            found = sorted(bars.candidates(path), key=age)
            connection.execute(FORGET, [_key(path), f"{_key(path).rstrip('/')}/", [_key(file) for file in found]])
            yield from ((file, True) for file in found)
        else:
            yield path, False


def _key(path: Path) -> str:
    return printable(path.absolute())


def _refuse(connection: psycopg.Connection, path: Path, error: Exception, *, remember: bool) -> None:
    if not isinstance(error, RefusedFileError):
        logger.debug("load", exc_info=error)
        error = RefusedFileError(f"{path}: it cannot be loaded: {reason(error)}.")
    message = printable(error.message)
    event("refused", level=logging.ERROR, reason=message)
    if remember:
        connection.execute(REFUSE, [_key(path), message])


def _load_file(
    connection: psycopg.Connection, reader: Reader, gate: Gate, path: Path, options: bars.Options, *, once: bool
) -> Loaded:
    """In one transaction: the bars, the rejects, the note for compute and the note of the file."""
    started = monotonic()
    before = check_file(path)
    try:
        with path.open("rb") as file:
            identity = [before.st_size, hashlib.file_digest(file, "sha256").hexdigest(), str(path.resolve())]
    except OSError as error:
        raise RefusedFileError(f"{path}: it cannot be read: {error.strerror}.") from error
    known = connection.execute(KNOWN, identity).fetchone()
    if once and known and known[0]:
        logger.debug("unchanged file=%s", path)
        connection.execute(ACCEPT, [_key(path)])
        return Loaded()
    result = Loaded()
    replaced: list[tuple[str, int, date, date]] = []
    verdict = Verdict()
    with connection.transaction():
        held: list[pa.Table] = []
        with tqdm(desc=path.name, unit=" bars", unit_scale=True, disable=None, leave=False) as progress:
            for batch in reader.read(path, options):
                held.append(batch.good)
                result.bars += batch.good.num_rows
                result.rejected += batch.rejected.num_rows
                if result.bars > BARS_IN_MEMORY:
                    _stage(connection, held)
                if batch.rejected.num_rows:
                    tables.copy_in(connection, "staged_rejects", batch.rejected)
                progress.update(batch.good.num_rows + batch.rejected.num_rows)
        # Two loads of the same symbols would otherwise lock the same rows in different orders.
        connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('larder load', 0))")
        noted = {}
        if connection.execute(ARE_LOADS_NOTED).fetchall()[0][0]:
            noted["load_id"] = connection.execute(NEXT_LOAD).fetchall()[0][0]
        if in_memory := result.bars <= BARS_IN_MEMORY:
            held[:] = [gate.judged(pa.concat_tables(held), path.name, noted.get("load_id", 0), verdict)]
        else:
            _stage(connection, held)
            gate.staged("staged_bars", path.name, noted.get("load_id", 0), verdict)
        result.quarantined = verdict.held
        if verdict.rejected:
            result.rejected += len(verdict.rejected)
            symbols, days, reasons, texts = zip(*verdict.rejected, strict=True)
            table = rejected([*symbols], [*days], [*reasons], [*texts])
            tables.copy_in(connection, "staged_rejects", table)
        changed = _append(connection, held, noted) if in_memory else []
        if not in_memory or held[0].num_rows:
            _stage(connection, held)
            merge = sql.SQL(MERGE).format(upsert=tables.upsert(TABLE, "staged_bars", COLUMNS, noted=noted))
            merged = connection.execute(merge).fetchall()
            changed += [row[:3] for row in merged]
            replaced = [(symbol, *row) for symbol, _, _, *row in merged if row[0]]
        if result.rejected:
            connection.execute(REJECT, [path.name])
        if changed:
            connection.execute(NOTE, [[symbol for symbol, _, _ in changed], [since for _, since, _ in changed]])
        result.changed = sum(count for _, _, count in changed)
        assert reader.told
        if noted and result.changed:
            _, sha256, resolved = identity
            who = [origin.host(), origin.code(), origin.invocation()]
            load_id = noted["load_id"]
            connection.execute(NOTE_LOAD, [load_id, resolved, sha256, reader.told.format, result.changed, *who])
        if _state(check_file(path)) != _state(before):
            raise RefusedFileError(f"{path}: it changed while it was read: load it when it is complete.")
        connection.execute(REMEMBER, identity)
        connection.execute(ACCEPT, [_key(path)])
    for warning in reader.told.warnings:
        event("odd", level=logging.WARNING, file=path.name, what=warning)
    if replaced:
        # A file that comes again corrects its own bars; one that was never loaded replaces those of another.
        event("replaced", level=logging.INFO if known else logging.WARNING, file=path.name, **_replaced(replaced))
    if result.rejected:
        event(
            "rejected",
            level=logging.WARNING,
            file=path.name,
            bars=result.rejected,
            reasons=reader.told.most_reasons(),
            see="market_data.rejected_bars",
        )
    if verdict.held or verdict.warned or verdict.dropped:
        event(
            "doubted",
            level=logging.WARNING,
            file=path.name,
            quarantined=verdict.held,
            warned=verdict.warned,
            dropped=verdict.dropped,
            rules=verdict.most_reasons(),
            see="larder quality",
        )
    event("loaded", file=path.name, bars=result.bars, changed=result.changed, seconds=monotonic() - started)
    return result


def _replaced(by_symbol: list[tuple[str, int, date, date]]) -> dict[str, Any]:
    symbols, counts, firsts, lasts = zip(*by_symbol, strict=True)
    shown = ", ".join(symbols[:SYMBOLS]) + " …" * (len(symbols) > SYMBOLS)
    return {"bars": sum(counts), "first": min(firsts), "last": max(lasts), "symbols": shown}


def _state(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _append(
    connection: psycopg.Connection, held: list[pa.Table], noted: Mapping[str, int]
) -> list[tuple[str, date, int]]:
    """Write the held bars that are newer than all of their symbol; the others stay held.

    Returns symbols, the first bar of each that was written, and how many.
    """
    written, others = tables.append(connection, TABLE, pa.concat_tables(held), COLUMNS, noted=noted)
    held[:] = [others]
    first = written.group_by("symbol").aggregate([("event_timestamp", "min"), ("event_timestamp", "count")])
    return list(zip(*(column.to_pylist() for column in first.select((0, 1, 2)).columns), strict=True))


def _stage(connection: psycopg.Connection, held: list[pa.Table]) -> None:
    if held:
        tables.copy_in(connection, "staged_bars", pa.concat_tables(held))
        held.clear()
