"""Drift: how the distribution of each feature in the newest window differs from that of a stored reference window.

Everything is counted in the database, in 100 bins whose edges are the reference's percentiles; only the counts come
here. PSI is that of `bins` bins of about equal counts, made of the 100; the Kolmogorov-Smirnov distance that at the
edges of the 100, so at most 0.01 below the exact one.

Without any drift, PSI is about (bins - 1) (1/n + 1/m), n and m being the sizes of the samples, and its deviation
sqrt(2 (bins - 1)) (1/n + 1/m) (Yurdakul, Naranjo: Statistical properties of the population stability index). The days
of a symbol are hardly independent, so n is the number of symbols, and m that of symbols times the windows which the
reference has.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, LiteralString

import numpy as np
import numpy.typing as npt
import psycopg
from psycopg import sql

from larder.features.definitions import Definitions, Feature, Source, View
from larder.log import event
from larder.operations.check import note
from larder.operations.credentials import Credentials
from larder.operations.facts import Fact, State
from larder.postgres import session
from larder.quality.rules import Drift, Rules

FINE = 100
FLOOR = 0.5  # an empty bin counts as half a value, so that PSI is finite, and small samples are not all drift
PSI_SURE = 3  # deviations
KS_SURE = 1.95  # times sqrt(1/n + 1/m): without drift one in a thousand is beyond
SCALE_ROWS, FEWEST_SCALE_ROWS = 252, 126
FEWEST_DAYS = 20  # of a reference
DAYS_AT_ONCE = 10  # that a check judges, where it was not made for a while
SHOWN = 5

# What features' values are divided by: the means of columns of a source over the rows up to each one.
SCALES = """
CREATE TEMP TABLE scales ON COMMIT DROP AS
WITH sums AS (
    SELECT {key} AS key, {time} AS time, {sums} FROM {source} AS source
    WHERE {time} > %(since)s - interval '400 days' AND {time} <= %(until)s
    WINDOW up_to AS (PARTITION BY {key} ORDER BY {time})
)
SELECT * FROM (SELECT key, time, {means} FROM sums WINDOW up_to AS (PARTITION BY key ORDER BY time)) AS means
WHERE time > %(since)s
"""
SUM = "sum({column}) OVER up_to AS {name}, count({column}) OVER up_to AS {count}"
MEAN = """
CASE WHEN {count} >= {fewest} THEN ({name} - coalesce(lag({name}, {rows}) OVER up_to, 0))
    / nullif({count} - coalesce(lag({count}, {rows}) OVER up_to, 0), 0) END AS {name}
"""
VALUES = """
WITH judged AS (
    SELECT pattern.symbols, feature.name, {view}.{time}::date AS day, feature.value FROM {table} AS {view} {join}
    JOIN LATERAL (VALUES {features}) AS feature (name, value, counts) ON counts
    JOIN unnest(%(names)s::text[], %(patterns)s::text[]) AS pattern (symbols, expression)
        ON expression IS NULL OR {view}.{key}::text ~ expression
    WHERE {view}.{time} > %(since)s AND {view}.{time} <= %(until)s
)
"""
EDGES = """
SELECT name, symbols, percentile_cont(%(shares)s::float8[]) WITHIN GROUP (ORDER BY value)
FROM judged GROUP BY name, symbols
"""
# Materialized, so that the edges are read once, not for each value.
COUNTS = """
, known AS MATERIALIZED (
    SELECT name, symbols, edges::float8[] FROM unnest(%(of)s::text[], %(within)s::text[], %(edges)s::text[])
        AS known (name, symbols, edges)
)
SELECT judged.name, judged.symbols, {day}, width_bucket(value, edges), count(*), sum(value), sum(value * value)
FROM judged JOIN known ON (known.name, known.symbols) = (judged.name, judged.symbols)
GROUP BY 1, 2, 3, 4
"""
SYMBOLS = """
SELECT pattern.symbols, count(DISTINCT {key}) FROM {table} AS view
JOIN unnest(%(names)s::text[], %(patterns)s::text[]) AS pattern (symbols, expression)
    ON expression IS NULL OR {key}::text ~ expression
WHERE {time} > %(since)s AND {time} <= %(until)s GROUP BY 1
"""
# One step of the index for each day.
DAYS = """
WITH RECURSIVE days (newest) AS (
    SELECT max({time}) FROM {table} AS source WHERE {time} <= now()
    UNION ALL
    SELECT (SELECT max({time}) FROM {table} AS source WHERE {time} < date_trunc('day', days.newest)) FROM days
    WHERE days.newest > %(since)s
)
SELECT newest::date FROM days WHERE newest IS NOT NULL
"""
REFERENCES = """
SELECT feature, symbols, judged, since, until, edges, counts, nulls, symbol_count, mean, deviation
FROM quality.references WHERE view = %s
"""
FORGET: tuple[LiteralString, ...] = (
    "DELETE FROM quality.references WHERE (view, feature, symbols) = (%s, %s, %s)",
    "DELETE FROM quality.drift WHERE (view, feature, symbols) = (%s, %s, %s)",
)
KEEP_REFERENCE = """
INSERT INTO quality.references
    (view, feature, symbols, judged, since, until, edges, counts, nulls, symbol_count, mean, deviation)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
"""
BEFORE = """
SELECT DISTINCT ON (feature, symbols) feature, symbols, days_beyond, days_within, moved FROM quality.drift
WHERE view = %s AND day < %s ORDER BY feature, symbols, day DESC
"""
LAST = "SELECT max(day) FROM quality.drift WHERE view = %s"
KEEP = """
INSERT INTO quality.drift ({columns}) VALUES ({values})
ON CONFLICT (view, feature, symbols, day) DO UPDATE SET ({columns}) = ROW({excluded})
"""
NEWEST = """
SELECT DISTINCT ON (view, feature, symbols) {columns} FROM quality.drift ORDER BY view, feature, symbols, day DESC
"""
MOVED_SINCE = """
SELECT min(day) FROM quality.drift AS later WHERE (view, feature, symbols) = (%(view)s, %(feature)s, %(symbols)s)
AND moved AND day > coalesce((SELECT max(day) FROM quality.drift AS earlier
    WHERE (view, feature, symbols) = (%(view)s, %(feature)s, %(symbols)s) AND NOT moved), '-infinity')
"""

Counts = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reference:
    """A feature's distribution in its reference window; `counts` has one more bin than there are edges."""

    feature: str
    symbols: str
    judged: str
    since: datetime
    until: datetime
    edges: Sequence[float]
    counts: Sequence[int]
    nulls: int
    symbol_count: int
    mean: float | None
    deviation: float | None


@dataclass(frozen=True)
class Judged:
    """How a feature's distribution in the window up to a day differs; a ratio is None where there are no values."""

    day: date
    view: str
    feature: str
    symbols: str
    counts: list[int]
    nulls: int
    symbol_count: int
    psi: float | None
    psi_expected: float | None
    ks: float | None
    null_ratio: float | None
    reference_null_ratio: float | None
    mean: float | None
    deviation: float | None
    days_beyond: int
    days_within: int
    moved: bool

    @property
    def name(self) -> str:
        return f"{self.view}:{self.feature}" + (f" of {self.symbols}" if self.symbols else "")


@dataclass
class _Counted:
    counts: Counts
    nulls: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, other: "_Counted") -> None:
        self.counts = self.counts + other.counts
        self.nulls += other.nulls
        self.total += other.total
        self.squares += other.squares

    @property
    def mean(self) -> float | None:
        n = self.counts.sum()
        return float(self.total / n) if n else None

    @property
    def deviation(self) -> float | None:
        n = self.counts.sum()
        if n < 2:
            return None
        return float(np.sqrt(max(self.squares - self.total * self.total / n, 0.0) / (n - 1)))


def merged(reference: Counts, bins: int) -> npt.NDArray[np.int64]:
    """Which of about `bins` bins of equal reference counts each fine bin is part of."""
    total = reference.sum()
    before = np.concatenate(([0.0], np.cumsum(reference)[:-1]))
    middle = before + reference / 2
    wide = (
        np.minimum((middle / total * bins).astype(np.int64), bins - 1) if total else np.zeros(len(reference), np.int64)
    )
    return np.unique(wide, return_inverse=True)[1]


def psi(reference: Counts, now: Counts, bins: int) -> tuple[float, int]:
    """The population stability index, and of how many bins."""
    which = merged(reference, bins)
    count = int(which.max()) + 1
    p, q = (np.maximum(np.bincount(which, values, count), FLOOR) / values.sum() for values in (now, reference))
    return float(((p - q) * np.log(p / q)).sum()), count


def ks(reference: Counts, now: Counts) -> float:
    """The Kolmogorov-Smirnov distance at the bins' edges."""
    return float(np.abs(np.cumsum(now) / now.sum() - np.cumsum(reference) / reference.sum()).max())


def _begin(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


def _end(day: date) -> datetime:
    return _begin(day) + timedelta(days=1, microseconds=-1)


class _View:
    """The features of a view that are judged."""

    def __init__(self, connection: psycopg.Connection, drift: Drift, source: Source, view: View) -> None:
        self.connection, self.drift, self.source, self.view = connection, drift, source, view
        self.features = [f for f in view.features if f"{view.name}:{f.name}" not in drift.left_out]
        self.patterns = {"": None, **drift.groups}
        self.scales = sorted({column for feature in self.features if (column := self._scale(feature))})

    def _scale(self, feature: Feature) -> str | None:
        return self.drift.scaled.get(f"{self.view.name}:{feature.name}")

    def _divisor(self, feature: Feature) -> sql.Composable | None:
        column = self._scale(feature)
        return sql.SQL("nullif(scales.{}, 0)").format(sql.Identifier(column)) if column else None

    def asked(self, feature: Feature, symbols: str) -> str:
        """What a reference is made for; with anything else it is made anew."""
        drift = self.drift
        return repr((feature.formula, self._scale(feature), drift.reference_days, self.patterns[symbols]))

    def scale(self, since: datetime, until: datetime) -> None:
        """Make the temporary table of what values in a window are divided by; it goes with the transaction."""
        if not self.scales:
            return
        identifier = sql.Identifier
        each = [
            {
                "column": identifier(c),
                "name": identifier(c),
                "count": identifier(f"{c} rows"),
                "fewest": sql.Literal(FEWEST_SCALE_ROWS),
                "rows": sql.Literal(SCALE_ROWS),
            }
            for c in self.scales
        ]
        query = sql.SQL(SCALES).format(
            key=identifier(self.source.key),
            time=identifier(self.source.time),
            source=session.identifier(self.source.table),
            sums=sql.SQL(", ").join(sql.SQL(SUM).format(**one) for one in each),
            means=sql.SQL(", ").join(sql.SQL(MEAN).format(**one) for one in each),
        )
        # Dates and times of its own making: a statement that makes a table takes no parameters.
        given = {"since": since, "until": until}
        with psycopg.ClientCursor(self.connection) as cursor:
            cursor.execute(query, given)
        self.connection.execute("ANALYZE scales")

    def _query(self, rest: LiteralString, names: Collection[str], **more: sql.Composable) -> sql.Composed:
        """A statement about the values of some features."""
        identifier = sql.Identifier
        parts: dict[str, sql.Composable] = {
            "key": identifier(self.source.key),
            "time": identifier(self.source.time),
            "table": session.identifier(self.view.table),
            "view": identifier("rows"),
        }
        join = "JOIN scales ON ({view}.{key}, {view}.{time}) = (scales.key, scales.time)" if self.scales else ""
        parts["join"] = sql.SQL(join).format(**parts)
        parts["features"] = sql.SQL(", ").join(
            sql.SQL("({}, {}.{}::float8{}, {})").format(
                sql.Literal(feature.name),
                parts["view"],
                identifier(feature.name),
                sql.SQL(" / {}").format(scale) if scale else sql.SQL(""),
                sql.SQL("{} <> 0").format(scale) if scale else sql.SQL("true"),
            )
            for feature, scale in ((feature, self._divisor(feature)) for feature in self.features)
            if feature.name in names
        )
        return sql.SQL(VALUES).format(**parts) + sql.SQL(rest).format(**more)

    def _given(self, since: datetime, until: datetime) -> dict[str, Any]:
        return {
            "since": since,
            "until": until,
            "names": list(self.patterns),
            "patterns": list(self.patterns.values()),
        }

    def days(self, since: datetime) -> list[date]:
        """Days that have rows, the newest first."""
        query = sql.SQL(DAYS).format(time=sql.Identifier(self.source.time), table=session.identifier(self.view.table))
        return [day for (day,) in self.connection.execute(query, {"since": since})]

    def symbols(self, since: datetime, until: datetime) -> dict[str, int]:
        query = sql.SQL(SYMBOLS).format(
            key=sql.Identifier(self.source.key),
            time=sql.Identifier(self.source.time),
            table=session.identifier(self.view.table),
        )
        return dict(self.connection.execute(query, self._given(since, until)).fetchall())

    def counted(
        self, edges: Mapping[tuple[str, str], Sequence[float]], since: datetime, until: datetime, *, by_day: bool
    ) -> dict[tuple[str, str], dict[date | None, _Counted]]:
        """The values of each feature and group by bin, day by day or in all; to be called after `scale`."""
        given = self._given(since, until) | {
            "of": [name for name, _ in edges],
            "within": [symbols for _, symbols in edges],
            "edges": ["{" + ",".join(map(repr, map(float, each))) + "}" for each in edges.values()],
        }
        found: dict[tuple[str, str], dict[date | None, _Counted]] = {key: {} for key in edges}
        names = {name for name, _ in edges}
        query = self._query(COUNTS, names, day=sql.SQL("day" if by_day else "NULL::date"))
        for name, symbols, day, place, count, total, squares in self.connection.execute(query, given):
            key = name, symbols
            one = found[key].setdefault(day, _Counted(np.zeros(len(edges[key]) + 1)))
            if place is None:
                one.nulls += count
            else:
                one.counts[place] += count
                one.total += total
                one.squares += squares
        return found

    def make_references(self, which: Sequence[tuple[str, str]], first: date, until: datetime) -> None:
        """Of the window up to a time; where there are rows from `first` on only, it is shorter."""
        since = max(until - timedelta(days=self.drift.reference_days), _begin(first) - timedelta(microseconds=1))
        symbols = self.symbols(since, until)
        if max(symbols.values(), default=0) < self.drift.fewest_symbols:
            return
        shares = [n / FINE for n in range(1, FINE)]
        with self.connection.transaction():
            self.scale(since, until)
            self._make(which, since, until, symbols, shares)

    def _make(
        self,
        which: Sequence[tuple[str, str]],
        since: datetime,
        until: datetime,
        symbols: Mapping[str, int],
        shares: Sequence[float],
    ) -> None:
        rows = self.connection.execute(
            self._query(EDGES, {name for name, _ in which}), {**self._given(since, until), "shares": shares}
        ).fetchall()
        edges = {
            (name, group): sorted(set(each))
            for name, group, each in rows
            if (name, group) in which
            and each
            and each[0] is not None
            and symbols.get(group, 0) >= self.drift.fewest_symbols
        }
        if not edges:
            return
        features = {feature.name: feature for feature in self.features}
        for (name, group), days in self.counted(edges, since, until, by_day=False).items():
            one = days[None]
            key = [self.view.name, name, group]
            for statement in FORGET:
                self.connection.execute(statement, key)
            asked = self.asked(features[name], group)
            counts = [int(count) for count in one.counts]
            row = [asked, since, until, edges[name, group], counts, one.nulls, symbols[group], one.mean, one.deviation]
            self.connection.execute(KEEP_REFERENCE, key + row)

    def references(self) -> dict[tuple[str, str], Reference]:
        rows = self.connection.execute(REFERENCES, [self.view.name]).fetchall()
        found = {(row[0], row[1]): Reference(*row) for row in rows}
        asked = {(f.name, group): self.asked(f, group) for f in self.features for group in self.patterns}
        return {key: one for key, one in found.items() if asked.get(key) == one.judged}

    def judge(self, days: Sequence[date], references: Mapping[tuple[str, str], Reference]) -> list[Judged]:
        """Judge the windows up to each of these days, in their order; returns the last day's."""
        window = timedelta(days=self.drift.window_days)
        found: list[Judged] = []
        with self.connection.transaction():
            edges = {key: one.edges for key, one in references.items()}
            since, until = _end(days[0]) - window, _end(days[-1])
            self.scale(since, until)
            counted = self.counted(edges, since, until, by_day=True)
            for day in days:
                symbols = self.symbols(_end(day) - window, _end(day))
                rows = self.connection.execute(BEFORE, [self.view.name, day]).fetchall()
                before = {(row[0], row[1]): row[2:] for row in rows}
                found = []
                for key, by_day in counted.items():
                    if symbols.get(key[1], 0) < self.drift.fewest_symbols:
                        continue
                    now = _Counted(np.zeros(len(edges[key]) + 1))
                    for other, one in by_day.items():
                        if other and day - window < other <= day:
                            now.add(one)
                    found.append(
                        self._judged(day, references[key], now, symbols[key[1]], before.get(key, (0, 0, False)))
                    )
                self._keep(found)
        return found

    def _keep(self, judged: Sequence[Judged]) -> None:
        columns = list(Judged.__dataclass_fields__)
        query = sql.SQL(KEEP).format(
            columns=sql.SQL(", ").join(map(sql.Identifier, columns)),
            values=sql.SQL(", ").join(sql.Placeholder() * len(columns)),
            excluded=sql.SQL(", ").join(sql.Identifier("excluded", column) for column in columns),
        )
        with self.connection.cursor() as cursor:
            cursor.executemany(query, [[getattr(one, column) for column in columns] for one in judged])

    def _judged(self, day: date, reference: Reference, now: _Counted, n: int, before: tuple[int, int, bool]) -> Judged:
        drift = self.drift
        windows = max((reference.until - reference.since).days / drift.window_days, 1)
        m = reference.symbol_count * windows
        of_reference = np.asarray(reference.counts, dtype=np.float64)
        values, total = int(now.counts.sum()), int(now.counts.sum()) + now.nulls
        index = expected = distance = None
        beyond = False
        if values and of_reference.sum():
            index, bins = psi(of_reference, now.counts, drift.bins)
            expected = (bins - 1) * (1 / n + 1 / m)
            distance = ks(of_reference, now.counts)
            chance = expected + PSI_SURE * np.sqrt(2 * (bins - 1)) * (1 / n + 1 / m)
            beyond = index > drift.psi + chance or distance > max(drift.ks, KS_SURE * np.sqrt(1 / n + 1 / m))
        null_ratio = now.nulls / total if total else None
        judged = int(of_reference.sum()) + reference.nulls
        reference_null_ratio = reference.nulls / judged if judged else None
        if null_ratio is not None and reference_null_ratio is not None:
            beyond = beyond or null_ratio - reference_null_ratio > drift.nulls
        days_beyond, days_within, moved = before
        days_beyond, days_within = (days_beyond + 1, 0) if beyond else (0, days_within + 1)
        moved = days_within < drift.clear_after if moved else days_beyond >= drift.raise_after
        return Judged(
            day=day,
            view=self.view.name,
            feature=reference.feature,
            symbols=reference.symbols,
            counts=[int(count) for count in now.counts],
            nulls=now.nulls,
            symbol_count=n,
            psi=index,
            psi_expected=expected,
            ks=distance,
            null_ratio=null_ratio,
            reference_null_ratio=reference_null_ratio,
            mean=now.mean,
            deviation=now.deviation,
            days_beyond=days_beyond,
            days_within=days_within,
            moved=bool(moved),
        )


def drift(
    connection: psycopg.Connection, rules: Rules, definitions: Definitions, *, new_reference: bool = False
) -> list[Judged]:
    """Judge the newest days that were not judged yet, and the newest one again; returns the newest day's.

    A reference is made where there is none for what is declared now; with `new_reference`, all are made anew.
    """
    found: list[Judged] = []
    if not rules.drift:
        return found
    for view in definitions.views:
        one = _View(connection, rules.drift, definitions.sources[view.source], view)
        window = timedelta(days=rules.drift.window_days)
        days = one.days(datetime.now(UTC) - timedelta(days=rules.drift.reference_days) - 2 * window)
        if not one.features or len(days) < FEWEST_DAYS:
            continue
        last = connection.execute(LAST, [view.name]).fetchall()[0][0]
        due = sorted(day for day in days[:DAYS_AT_ONCE] if last is None or day > last or day == days[0])
        references = {} if new_reference else one.references()
        lacking = [(f.name, group) for f in one.features for group in one.patterns if (f.name, group) not in references]
        if lacking:
            one.make_references(lacking, days[-1], _begin(due[0]) - window)
            references = one.references()
            if made := sum(key in references for key in lacking):
                event("referenced", view=view.name, features=made)
        if references:
            found += one.judge(due, references)
        _forget_others(connection, one, references)
    note(connection, "drift", judged=len(found), moved=sum(one.moved for one in found))
    return found


def _forget_others(connection: psycopg.Connection, one: _View, references: Mapping[tuple[str, str], Reference]) -> None:
    """Forget features and groups that are no longer declared, or are left out by now."""
    known = connection.execute("SELECT DISTINCT feature, symbols FROM quality.drift WHERE view = %s", [one.view.name])
    for feature, symbols in {*known.fetchall()} - references.keys():
        for statement in FORGET:
            connection.execute(statement, [one.view.name, feature, symbols])


def newest(connection: psycopg.Connection) -> list[Judged]:
    """The newest day of each feature."""
    columns = sql.SQL(", ").join(map(sql.Identifier, Judged.__dataclass_fields__))
    return [Judged(*row) for row in connection.execute(sql.SQL(NEWEST).format(columns=columns))]


def read(credentials: Credentials) -> list[Judged]:
    with session.connect(credentials.pipeline_url, "drift") as connection:
        return newest(connection)


def facts(connection: psycopg.Connection) -> Iterator[Fact]:
    """How many features have moved, of all symbols and of each group."""
    name = "drifted_features_ratio"
    with suppress(*session.MISSING):
        by_group: dict[str, list[Judged]] = {}
        for one in newest(connection):
            by_group.setdefault(one.symbols, []).append(one)
        for group, judged in by_group.items():
            moved = sorted((one for one in judged if one.moved), key=lambda one: -(one.psi or 0))
            ratio = len(moved) / len(judged)
            if not moved:
                said = f"Of {len(judged)} features none has moved away from its reference."
                yield Fact(name, State.OK, 0, said, group)
                continue
            most = ", and so has most of the market or of its feed" if ratio > 0.5 else ""
            lines = [
                f"{len(moved)} of {len(judged)} features have moved away from their references{most}; larder drift."
            ]
            lines += [f"{one.name}: {differs(one)}, since {_since(connection, one)}." for one in moved[:SHOWN]]
            yield Fact(name, State.WARNING, ratio, "\n".join(lines), group)


def _since(connection: psycopg.Connection, one: Judged) -> date:
    given = {"view": one.view, "feature": one.feature, "symbols": one.symbols}
    since: date = connection.execute(MOVED_SINCE, given).fetchall()[0][0]
    return since


def differs(one: Judged) -> str:
    parts = []
    if one.psi is not None and one.psi_expected is not None and one.ks is not None:
        parts += [f"PSI {one.psi:.2f} ({one.psi_expected:.2f} without drift)", f"KS {one.ks:.2f}"]
    if one.null_ratio is not None and one.reference_null_ratio is not None:
        parts.append(f"null {one.null_ratio:.0%} (in the reference {one.reference_null_ratio:.0%})")
    return ", ".join(parts)


def as_text(judged: Sequence[Judged]) -> str:
    if not judged:
        return "Nothing was judged yet: larder check does it, where there are enough days and symbols."
    ordered = sorted(judged, key=lambda one: (not one.moved, -(one.psi or 0), one.name))
    width = max(len(one.name) for one in ordered) + 2
    lines = [f"{'feature':<{width}}{'day':<12}{'PSI':>7}{'expected':>10}{'KS':>7}{'null':>7}{'symbols':>9}  "]

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    for one in ordered:
        figures = f"{number(one.psi):>7}{number(one.psi_expected):>10}{number(one.ks):>7}{number(one.null_ratio):>7}"
        state = "moved" if one.moved else f"beyond for {one.days_beyond} days" if one.days_beyond else ""
        lines.append(f"{one.name:<{width}}{one.day!s:<12}{figures}{one.symbol_count:>9,}  {state}".rstrip())
    return "\n".join(line.rstrip() for line in lines)


def as_dicts(judged: Sequence[Judged]) -> list[dict[str, Any]]:
    return [asdict(one) for one in judged]
