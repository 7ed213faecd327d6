"""`larder quarantine`: the bars that a rule holds back, and what becomes of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date, datetime
from typing import Any

import psycopg
from psycopg import sql

from larder import origin
from larder.bars import load
from larder.errors import ConfigError
from larder.log import event
from larder.operations.credentials import Credentials
from larder.postgres import session
from larder.quality.rules import NUMBERS

HELD = """
SELECT symbol, event_timestamp, {numbers}, reason, load_id, file, held_at FROM quality.quarantine
WHERE state = 'held' AND (%(symbol)s::text IS NULL OR symbol = %(symbol)s)
  AND (%(day)s::date IS NULL OR event_timestamp::date = %(day)s)
  AND (%(rule)s::text IS NULL OR starts_with(reason, %(rule)s || ':'))
ORDER BY symbol, event_timestamp
"""
DECIDE = """
UPDATE quality.quarantine AS known SET (state, decided_at, decided_by) = (%s, clock_timestamp(), %s)
FROM unnest(%s::text[], %s::timestamptz[]) AS decided (symbol, event_timestamp)
WHERE (known.symbol, known.event_timestamp) = (decided.symbol, decided.event_timestamp)
"""
STORE = """
INSERT INTO {table} AS stored (symbol, event_timestamp, {columns})
SELECT symbol, event_timestamp, {columns} FROM quality.quarantine
JOIN unnest(%s::text[], %s::timestamptz[]) AS decided (symbol, event_timestamp) USING (symbol, event_timestamp)
ON CONFLICT (symbol, event_timestamp) DO UPDATE SET ({columns}) = ROW({excluded})
"""


@dataclass(frozen=True)
class Held:
    """A bar in quarantine."""

    symbol: str
    event_timestamp: datetime
    open: float
    high: float
    low: float
    close: float
    adjusted_close: float
    volume: float | None
    reason: str
    load_id: int | None
    file: str
    held_at: datetime

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Which:
    """Which bars of those in quarantine: all where nothing is said."""

    symbol: str | None = None
    day: date | None = None
    rule: str | None = None


def held(connection: psycopg.Connection, which: Which) -> list[Held]:
    query = sql.SQL(HELD).format(numbers=sql.SQL(", ").join(map(sql.Identifier, NUMBERS)))
    return [Held(*row) for row in connection.execute(query, asdict(which))]


def listed(credentials: Credentials, which: Which) -> list[Held]:
    with session.connect(credentials.pipeline_url, "quarantine") as connection:
        return held(connection, which)


def decide(credentials: Credentials, which: Which, *, release: bool) -> int:
    """Let bars be stored and computed with by the next run, or drop them for good; returns how many.

    A dropped bar that comes again is left out; one with other values is judged. Raises ConfigError for none.
    """
    with session.connect(credentials.load_url, "quarantine") as connection, connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(hashtextextended('larder load', 0))")
        those = held(connection, which)
        if not those:
            raise ConfigError("No bar in quarantine is one of these: larder quarantine list shows them.")
        keys: list[list[Any]] = [[bar.symbol for bar in those], [bar.event_timestamp for bar in those]]
        if release:
            _store(connection, keys)
        connection.execute(DECIDE, ["released" if release else "dropped", origin.host(), *keys])
    event(
        "released" if release else "dropped", bars=len(those), symbols=" ".join(sorted({b.symbol for b in those})[:8])
    )
    return len(those)


def _store(connection: psycopg.Connection, keys: Sequence[Sequence[Any]]) -> None:
    columns = [*NUMBERS]
    if connection.execute(load.ARE_LOADS_NOTED).fetchall()[0][0]:
        columns.append("load_id")
    query = sql.SQL(STORE).format(
        table=session.identifier(load.TABLE),
        columns=sql.SQL(", ").join(map(sql.Identifier, columns)),
        excluded=sql.SQL(", ").join(sql.Identifier("excluded", name) for name in columns),
    )
    connection.execute(query, keys)
    connection.execute(load.NOTE, keys)


def as_text(bars: Sequence[Held]) -> str:
    if not bars:
        return "No bar is in quarantine."
    width = max(len(bar.symbol) for bar in bars) + 2
    lines = [
        f"{bar.symbol:<{width}}{bar.event_timestamp:%Y-%m-%d}  {bar.close:>12g}  {bar.reason} ({bar.file})"
        for bar in bars
    ]
    more = "larder quarantine release, or drop, with --symbol, --day, --rule or --all"
    return "\n".join([f"{'symbol':<{width}}day         {'close':>12}  why", *lines, "", f"Next: {more}"])
