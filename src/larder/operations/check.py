"""What lies in the database, judged after compute by the rules of quality.yml for days and features; in SQL."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from larder import origin
from larder.features.definitions import Definitions, Source, View
from larder.postgres import session
from larder.quality.rules import Rule, Rules

BARS = "market_data.ohlcv_daily"
RECENT = timedelta(days=30)  # of features: what is older was judged when it was new
MOST_FINDINGS = 1000  # of a rule and a feature
# What TA-Lib's sums may be off.
MARGIN = 1e-6

NEWEST_DAY = "SELECT max({time}) FROM {table} AS source WHERE {time} <= now() + interval '1 day'"
# A day of the market is one on which most of the symbols of these days have a bar.
GAPS = """
WITH recent AS MATERIALIZED (
    SELECT symbol, event_timestamp::date AS day FROM market_data.ohlcv_daily
    WHERE event_timestamp > %(newest)s - %(days)s
), present AS (
    SELECT symbol, (
        SELECT min(event_timestamp)::date FROM market_data.ohlcv_daily AS bar WHERE bar.symbol = known.symbol
    ) AS began FROM (SELECT DISTINCT symbol FROM recent) AS known
), market AS (
    SELECT day FROM recent GROUP BY day HAVING count(*) > (SELECT count(*) FROM present) / 2.0
)
SELECT symbol, count(*), min(day), max(day) FROM present CROSS JOIN market
WHERE day >= began AND NOT EXISTS (SELECT FROM recent WHERE (recent.symbol, recent.day) = (present.symbol, market.day))
  AND NOT EXISTS (
    SELECT FROM quality.quarantine AS bar
    WHERE bar.symbol = present.symbol AND event_timestamp::date = market.day AND state IN ('held', 'dropped')
) GROUP BY symbol ORDER BY symbol
"""
FROZEN = """
SELECT count(*), count(*) FILTER (WHERE bars = %(bars)s AND different = 1) FROM (
    SELECT symbol FROM market_data.ohlcv_daily WHERE event_timestamp >= %(day)s
) AS today, LATERAL (
    SELECT count(*) AS bars, count(DISTINCT (open, high, low, close)) AS different FROM (
        SELECT open, high, low, close FROM market_data.ohlcv_daily AS bar WHERE bar.symbol = today.symbol
        ORDER BY event_timestamp DESC LIMIT %(bars)s
    ) AS newest
) AS last
"""
OUTSIDE = """
SELECT {key}::text, {time}, rule.name, rule.value, rule.least, rule.most FROM {table},
LATERAL (VALUES {values}) AS rule (name, value, least, most)
WHERE {time} > %(since)s AND (rule.value < rule.least - %(margin)s OR rule.value > rule.most + %(margin)s)
ORDER BY {time} DESC, 1 LIMIT %(most)s
"""
NULLS = """
SELECT count(*), {nulls} FROM {table} AS newest
WHERE {time} >= %(day)s AND (%(after)s = 0 OR EXISTS (
    SELECT FROM {table} AS before WHERE before.{key} = newest.{key} AND before.{time} < %(day)s
    ORDER BY before.{time} DESC OFFSET %(after)s - 1 LIMIT 1
))
"""
FORGET = "DELETE FROM quality.findings WHERE load_id IS NULL"
NOTE = """
INSERT INTO quality.findings AS known (symbol, event_timestamp, rule, of, severity, message)
SELECT * FROM unnest(%s::text[], %s::timestamptz[], %s::text[], %s::text[], %s::text[], %s::text[])
ON CONFLICT (symbol, event_timestamp, rule, of) DO NOTHING
"""
CHECKED = """
INSERT INTO quality.checks (what, host, noted) VALUES (%s, %s, %s)
ON CONFLICT (what) DO UPDATE SET (checked_at, host, noted) = (clock_timestamp(), excluded.host, excluded.noted)
"""


@dataclass(frozen=True)
class Found:
    """What a rule found; the symbol is empty where it is about all."""

    symbol: str
    event_timestamp: datetime
    rule: str
    of: str
    severity: str
    message: str


def note(connection: psycopg.Connection, what: str, **noted: Any) -> None:
    """Note that this was checked now, and what was measured."""
    connection.execute(CHECKED, [what, origin.host(), Jsonb(noted)])


def check(connection: psycopg.Connection, rules: Rules, definitions: Definitions) -> list[Found]:
    """Judge days and features; what was found before is forgotten."""
    found: list[Found] = []
    if rules.days and connection.execute("SELECT to_regclass(%s) IS NOT NULL", [BARS]).fetchall()[0][0]:
        found += _days(connection, rules)
    for view in definitions.views:
        found += _view(connection, rules, definitions.sources[view.source], view)
    with connection.transaction():
        connection.execute(FORGET)
        columns = [[getattr(one, name) for one in found] for name in Found.__dataclass_fields__]
        connection.execute(NOTE, columns)
        note(connection, "quality", findings=len(found))
    return found


def _newest(connection: psycopg.Connection, table: str, time: str) -> datetime | None:
    query = sql.SQL(NEWEST_DAY).format(table=session.identifier(table), time=sql.Identifier(time))
    newest: datetime | None = connection.execute(query).fetchall()[0][0]
    return newest.astimezone(UTC) if newest else None


def _midnight(time: datetime) -> datetime:
    return time.replace(hour=0, minute=0, second=0, microsecond=0)


def _days(connection: psycopg.Connection, rules: Rules) -> Iterator[Found]:
    newest = _newest(connection, BARS, "event_timestamp")
    if newest is None:
        return
    for rule in rules.days:
        if rule.rule == "gap":
            rows = connection.execute(GAPS, {"newest": newest, "days": timedelta(days=rule["days"])}).fetchall()
            for symbol, count, first, last in rows:
                span = f"{first}" if count == 1 else f"{count} days, {first} to {last}"
                said = f"no bar of {span}, when most symbols have one"
                yield Found(
                    symbol, datetime(last.year, last.month, last.day, tzinfo=UTC), "gap", "", rule.severity, said
                )
        else:
            day = _midnight(newest)
            total, same = connection.execute(FROZEN, {"day": day, "bars": rule["bars"]}).fetchall()[0]
            if total and same > rule["most"] * total:
                said = (
                    f"{same:,} of {total:,} symbols with a bar of {day:%Y-%m-%d} have the same open, high, low and "
                    f"close in their last {rule['bars']} bars: the feed repeats itself"
                )
                yield Found("", day, "frozen", "", rule.severity, said)


def _view(connection: psycopg.Connection, rules: Rules, source: Source, view: View) -> Iterator[Found]:
    names = {f"{view.name}:{feature.name}": feature.name for feature in view.features}
    ranges = [rule for rule in rules.features if rule.rule == "range" and rule.of in names]
    nulls = [rule for rule in rules.features if rule.rule == "nulls" and (rule.of in names or rule.of == view.name)]
    newest = _newest(connection, view.table, source.time) if ranges or nulls else None
    if newest is None:
        return
    if ranges:
        yield from _outside(connection, source, view, ranges, names, newest)
    for rule in nulls:
        those = [names[rule.of]] if rule.of in names else list(names.values())
        yield from _nulls(connection, source, view, rule, those, _midnight(newest))


def _outside(
    connection: psycopg.Connection,
    source: Source,
    view: View,
    ranges: Sequence[Rule],
    names: dict[str, str],
    newest: datetime,
) -> Iterator[Found]:
    severities = {names[rule.of]: rule.severity for rule in ranges}
    values = [
        sql.SQL("({name}, {column}::float8, {least}::float8, {most}::float8)").format(
            name=sql.Literal(names[rule.of]),
            column=sql.Identifier(names[rule.of]),
            least=sql.Literal(str(rule.given.get("least", "-infinity"))),
            most=sql.Literal(str(rule.given.get("most", "infinity"))),
        )
        for rule in ranges
    ]
    query = sql.SQL(OUTSIDE).format(
        key=sql.Identifier(source.key),
        time=sql.Identifier(source.time),
        table=session.identifier(view.table),
        values=sql.SQL(", ").join(values),
    )
    given = {"since": newest - RECENT, "margin": MARGIN, "most": MOST_FINDINGS}
    for key, time, name, value, least, most in connection.execute(query, given).fetchall():
        said = f"{name} is {value:g}; it may be {least:g} to {most:g}"
        yield Found(key, time, "range", f"{view.name}:{name}", severities[name], said)


def _nulls(
    connection: psycopg.Connection, source: Source, view: View, rule: Rule, features: Sequence[str], day: datetime
) -> Iterator[Found]:
    query = sql.SQL(NULLS).format(
        key=sql.Identifier(source.key),
        time=sql.Identifier(source.time),
        table=session.identifier(view.table),
        nulls=sql.SQL(", ").join(
            sql.SQL("count(*) FILTER (WHERE {} IS NULL)").format(sql.Identifier(name)) for name in features
        ),
    )
    after = rule.given.get("after", 0)
    total, *nulls = connection.execute(query, {"day": day, "after": after}).fetchall()[0]
    for name, count in zip(features, nulls, strict=True):
        if total and count > rule["most"] * total:
            of_old = f" that have {after} rows before" if after else ""
            said = f"{name} is null for {count:,} of {total:,} keys with a row of {day:%Y-%m-%d}{of_old}"
            yield Found("", day, "nulls", f"{view.name}:{name}", rule.severity, said)
