"""`larder quality`: what is doubted of the bars and features, in all or of one symbol; and the same as facts."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any

import psycopg

from larder.errors import ConfigError
from larder.operations import quarantine
from larder.operations.credentials import Credentials
from larder.operations.facts import Fact, State
from larder.operations.quarantine import Held, Which
from larder.postgres import session

SHOWN = 5
LATELY = timedelta(days=7)  # what a load found is a fact for so long
STATES = {"fail": State.FAILED, "warn": State.WARNING}

HELD = "SELECT count(*), count(DISTINCT symbol) FROM quality.quarantine WHERE state = 'held'"
NEWEST_HELD = """
SELECT symbol, event_timestamp::date, reason FROM quality.quarantine WHERE state = 'held'
ORDER BY event_timestamp DESC, symbol LIMIT %s
"""
# Findings of quarantined bars are told with the quarantine.
FOUND = """
WITH lately AS (
    SELECT * FROM quality.findings WHERE severity IN ('warn', 'fail') AND (load_id IS NULL OR found_at > now() - %s)
), numbered AS (
    SELECT *, row_number() OVER (PARTITION BY rule, severity ORDER BY event_timestamp DESC, symbol, of) AS number
    FROM lately
)
SELECT rule, severity, count(*), count(DISTINCT symbol) FILTER (WHERE symbol <> ''),
       array_agg(concat_ws(' ', nullif(symbol, ''), event_timestamp::date::text) || ': ' || message ORDER BY number)
           FILTER (WHERE number <= %s)
FROM numbered GROUP BY rule, severity ORDER BY severity, rule
"""
FINDINGS = """
SELECT symbol, event_timestamp, rule, of, severity, message, load_id, found_at FROM quality.findings
WHERE %(symbol)s::text IS NULL OR symbol = %(symbol)s ORDER BY event_timestamp DESC, symbol, rule, of LIMIT %(most)s
"""
RULES = """
SELECT rule, severity, count(*), count(DISTINCT nullif(symbol, '')), max(event_timestamp)::date FROM quality.findings
GROUP BY rule, severity ORDER BY severity, rule
"""
SPAN = "SELECT count(*), min(event_timestamp), max(event_timestamp) FROM market_data.ohlcv_daily WHERE symbol = %s"
REJECTED = """
SELECT event_timestamp::date, reason, bar, file FROM market_data.rejected_bars WHERE symbol = %s
ORDER BY event_timestamp DESC NULLS FIRST LIMIT 50
"""
DECIDED = """
SELECT event_timestamp::date, state, reason, decided_at, decided_by FROM quality.quarantine
WHERE symbol = %s AND state <> 'held' ORDER BY event_timestamp DESC LIMIT 50
"""
CHECKED = "SELECT checked_at FROM quality.checks WHERE what = 'quality'"


def counts(connection: psycopg.Connection) -> tuple[int, dict[tuple[str, str], int]]:
    """How many bars are in quarantine, and how many findings there are by rule and severity."""
    held = connection.execute(HELD).fetchall()[0][0]
    return held, {(rule, severity): count for rule, severity, count, *_ in connection.execute(FOUND, [LATELY, 0])}


def facts(connection: psycopg.Connection, now: datetime, late: timedelta) -> Iterator[Fact]:
    """What is doubted; nothing where the repository has no rules."""
    with suppress(*session.MISSING):
        yield _quarantined(connection)
        yield from _findings(connection)
        yield _age(connection, now, late)


def _quarantined(connection: psycopg.Connection) -> Fact:
    count, symbols = connection.execute(HELD).fetchall()[0]
    if not count:
        return Fact("quarantined_bars", State.OK, 0, "No bar is in quarantine.")
    rows = connection.execute(NEWEST_HELD, [SHOWN]).fetchall()
    lines = [f"Bars in quarantine, which no feature uses: {count:,}, of {symbols:,} symbols; larder quarantine list."]
    lines += [f"{symbol} {day}: {reason}." for symbol, day, reason in rows]
    return Fact("quarantined_bars", State.WARNING, count, "\n".join(lines))


def _findings(connection: psycopg.Connection) -> Iterator[Fact]:
    by_rule: dict[str, list[tuple[str, int, int, list[str]]]] = {}
    for rule, *row in connection.execute(FOUND, [LATELY, SHOWN]):
        by_rule.setdefault(rule, []).append((row[0], row[1], row[2], row[3]))
    if not by_rule:
        yield Fact("quality_findings", State.OK, 0, "No rule of quality.yml finds anything.")
    for rule, rows in by_rule.items():
        state = State.FAILED if any(severity == "fail" for severity, *_ in rows) else State.WARNING
        total = sum(count for _, count, *_ in rows)
        lines = [f"{line}." for *_, examples in rows for line in examples][:SHOWN]
        if total > len(lines):
            lines.append(f"{total - len(lines):,} more like these; larder quality.")
        yield Fact("quality_findings", state, total, "\n".join(lines), rule)


def _age(connection: psycopg.Connection, now: datetime, late: timedelta) -> Fact:
    name = "quality_check_age_seconds"
    row = connection.execute(CHECKED).fetchone()
    if row is None:
        return Fact(name, State.UNKNOWN, None, "Days and features have not been judged yet: larder check does it.")
    age = (now - row[0]).total_seconds()
    said = f"Days and features were judged at {row[0]:%Y-%m-%d %H:%M} UTC."
    state = State.OK if age <= late.total_seconds() else State.WARNING
    return Fact(name, state, age, said)


@dataclass
class Page:
    """All that is doubted, or of one symbol."""

    symbol: str | None
    bars: int | None = None
    first: date | None = None
    last: date | None = None
    quarantine: list[Held] = field(default_factory=list)
    findings: list[dict[str, Any]] = field(default_factory=list)
    rules: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    decided: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def page(credentials: Credentials, symbol: str | None, most: int = 200) -> Page:
    with session.connect(credentials.pipeline_url, "quality") as connection:
        told = Page(symbol, quarantine=quarantine.held(connection, Which(symbol)))
        names = ("symbol", "event_timestamp", "rule", "of", "severity", "message", "load_id", "found_at")
        told.findings = _dicts(connection, FINDINGS, {"symbol": symbol, "most": most}, names)
        if symbol is None:
            told.rules = _dicts(connection, RULES, None, ("rule", "severity", "count", "symbols", "newest"))
            return told
        with suppress(*session.MISSING):  # a repository with views of its own has no bars
            told.bars, first, last = connection.execute(SPAN, [symbol]).fetchall()[0]
            told.first, told.last = (time and time.astimezone(UTC).date() for time in (first, last))
            told.rejected = _dicts(connection, REJECTED, [symbol], ("day", "reason", "bar", "file"))
        told.decided = _dicts(connection, DECIDED, [symbol], ("day", "state", "reason", "decided_at", "decided_by"))
        if not any((told.bars, told.quarantine, told.findings, told.rejected, told.decided)):
            raise ConfigError(f"Nothing is known of {symbol!r}: there is no bar of it, neither good nor bad.")
        return told


def _dicts(connection: psycopg.Connection, query: str, given: Any, names: tuple[str, ...]) -> list[dict[str, Any]]:
    return [dict(zip(names, row, strict=True)) for row in connection.execute(query, given)]


def as_text(told: Page) -> str:
    lines = []
    if told.symbol:
        span = f", {told.first} to {told.last}" if told.bars else ""
        lines.append(f"{told.symbol}: {told.bars or 0:,} bars{span}")
    for row in told.rules:
        of = f" of {row['symbols']:,} symbols" if row["symbols"] else ""
        lines.append(f"{row['severity']:<12}{row['rule']:<8}{row['count']:>8,}{of}, the newest of {row['newest']}")

    def part(title: str, rows: list[str]) -> None:
        if rows:
            lines.extend(["", f"{title}:", *rows])

    part("in quarantine", [f"{b.symbol} {b.event_timestamp:%Y-%m-%d}  {b.reason} ({b.file})" for b in told.quarantine])
    part(
        "findings",
        [
            " ".join(
                word
                for word in (f["symbol"], f"{f['event_timestamp']:%Y-%m-%d} ", f["severity"], f["rule"], f["of"])
                if word
            )
            + f": {f['message']}"
            for f in told.findings
        ],
    )
    part("rejected", [f"{row['day']}  {row['reason']} ({row['file']})" for row in told.rejected])
    part("decided", [f"{row['day']}  {row['state']}: {row['reason']}" for row in told.decided])
    return "\n".join(lines).strip() or "Nothing is doubted."
