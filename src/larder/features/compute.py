"""`larder compute`: features from the rows of their sources, for the keys whose rows changed."""

import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from time import monotonic

import numpy as np
import psycopg
import pyarrow as pa
from psycopg import sql
from tqdm import tqdm

from larder.errors import SymbolsError, reason
from larder.features import record
from larder.features.definitions import RUN, SCHEMA, Feature, Source, View
from larder.features.formulas import Array, Formulas, running_total
from larder.log import event, logger, printable
from larder.postgres import arrays, binary, session, tables
from larder.postgres.arrays import Key, Times

WORKERS = 2  # while PostgreSQL writes the one's rows, the other computes
ROWS_AT_ONCE = 50_000  # what one transaction holds in memory
EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
BEGINNING = datetime(1, 1, 1, tzinfo=UTC)

# In the order of keys, as `larder load` notes them, so that neither waits for the other in a circle. From here to the
# end of the transaction a load of these keys waits to note its bars; it then finds no note and makes a new one.
TAKE = """
WITH taken AS (SELECT {key} FROM {notes} WHERE {key} = ANY(%s) ORDER BY {key} FOR UPDATE)
DELETE FROM {notes} AS noted USING taken WHERE noted.{key} = taken.{key} RETURNING noted.{key}, since
"""

SINCE_THE_FIRST = "SELECT {key}, min({time}) FROM {source} GROUP BY {key} ORDER BY {key}"
PENDING = "SELECT {key}, since FROM {notes} ORDER BY {key}"

# Keys whose rows are not those that were computed, where nobody notes what changed.
DIFFERENT = """
SELECT key, since, checksum FROM (
    SELECT {key} AS key, min({time}) AS since,
           count(*) || ' ' || sum(hashtextextended(ROW({time}, {columns})::text, 0)::numeric) AS checksum
    FROM {source} GROUP BY {key}
) AS present
WHERE (%s::text, key::text, checksum) NOT IN (SELECT source, key, checksum FROM features.computed_rows)
ORDER BY key
"""
COMPUTED = """
INSERT INTO features.computed_rows (source, key, checksum) SELECT %s, * FROM unnest(%s::text[], %s::text[])
ON CONFLICT (source, key) DO UPDATE SET checksum = excluded.checksum
"""

# The online store has to be written from a key's newest row on, whichever of its rows changed.
NOTE = """
INSERT INTO features.pending_materialize AS pending (symbol, since)
SELECT key, max(newest) FROM unnest(%s::text[], %s::timestamptz[]) AS changed (key, newest) GROUP BY key ORDER BY key
ON CONFLICT (symbol) DO UPDATE SET since = least(pending.since, excluded.since), noted_at = clock_timestamp()
"""


def compute(url: str, formulas: Formulas, *, full: bool = False) -> int:
    """Recompute every key with a pending change; returns the number of feature rows written.

    With `full`, and where the definitions of the features have changed, every key is recomputed. A key that cannot be
    computed keeps no other out: SymbolsError at the end.
    """
    failed: dict[str, str] = {}
    written = 0
    if not formulas.definitions.views:
        return 0
    with session.connect(url, "compute") as connection:
        # What one compute finds missing in the tables, no other one writes meanwhile.
        connection.execute("SELECT pg_advisory_lock(hashtextextended('larder compute', 0))")
        full = full or record.changed(connection, formulas)
        if full:
            formulas.try_out()
        for source in formulas.definitions.sources.values():
            written += _Computation(url, formulas, source, failed, full=full).run(connection)
        if failed:
            raise SymbolsError(failed, written)
        record.note(connection, formulas)
    return written


def statement(template: str, source: Source) -> sql.Composed:
    """A statement about a source: its table, its key and time, its columns."""
    return sql.SQL(template).format(
        source=session.identifier(source.table),
        key=sql.Identifier(source.key),
        key_type=sql.SQL(source.key_type),
        time=sql.Identifier(source.time),
        notes=session.identifier(source.notes or ""),
        columns=sql.SQL(", ").join(map(sql.Identifier, source.columns)),
    )


class _Computation:
    """The views of one source."""

    def __init__(self, url: str, formulas: Formulas, source: Source, failed: dict[str, str], *, full: bool) -> None:
        self.url, self.formulas, self.source, self.full = url, formulas, source, full
        self.failed = failed
        self.key = (source.key, source.time)
        self.views = formulas.definitions.views_of(source)
        self.totals = [(view, feature) for view in self.views for feature in view.features if feature.running_total]
        self.checksums: dict[Key, str] = {}
        self.noted: dict[str, int] = {}

    def run(self, connection: psycopg.Connection) -> int:
        """Compute what is to be computed; return the number of rows written."""
        groups = deque(_groups(self._changed(connection), self.source.rows_before))
        count = sum(map(len, groups))
        if groups:
            self.noted[RUN] = record.begin(connection, self.formulas, self.source)
        with (
            tqdm(desc=f"compute {self.source.table}", total=count, disable=None, leave=False) as progress,
            ThreadPoolExecutor(WORKERS) as pool,
        ):
            try:
                workers = [pool.submit(self._work, groups, progress) for _ in range(min(WORKERS, len(groups)))]
                return sum(worker.result() for worker in workers)
            finally:
                groups.clear()

    def _changed(self, connection: psycopg.Connection) -> list[tuple[Key, datetime]]:
        """The keys to compute, each with the first row that may have changed."""
        if self.source.notes:
            return connection.execute(statement(SINCE_THE_FIRST if self.full else PENDING, self.source)).fetchall()
        if self.full:
            connection.execute("DELETE FROM features.computed_rows WHERE source = %s", [self.source.table])
        rows = connection.execute(statement(DIFFERENT, self.source), [self.source.table]).fetchall()
        self.checksums = {key: checksum for key, _, checksum in rows}
        return [(key, since) for key, since, _ in rows]

    def _work(self, groups: deque[list[Key]], progress: tqdm) -> int:
        """Compute groups until there are no more, each in a transaction; return the number of rows written.

        A group that fails is computed key by key, and the keys that fail are noted with the reason.
        """
        written = 0
        with session.connect(self.url, "compute") as connection:
            for view in self.views:
                tables.stage(connection, f"staged_{view.name}", view.table, (*self.key, *_names(view)))
            while True:
                try:
                    group = groups.popleft()
                except IndexError:
                    return written
                started = monotonic()
                try:
                    with connection.transaction():
                        count = self._group(connection, group)
                except Exception as error:
                    if not session.is_about_data(error):
                        raise
                    logger.debug("compute", exc_info=True)
                    if len(group) > 1:
                        groups.extend([key] for key in group)
                    else:
                        name = str(group[0])
                        self.failed[name] = printable(reason(error))
                        event("failed", level=logging.ERROR, symbol=name, reason=self.failed[name])
                    continue
                written += count
                progress.update(len(group))
                event("computed", symbols=len(group), rows=count, seconds=monotonic() - started)

    def _group(self, connection: psycopg.Connection, keys: list[Key]) -> int:
        since = dict.fromkeys(keys, BEGINNING)
        if self.source.notes:
            taken: dict[Key, datetime] = dict(connection.execute(statement(TAKE, self.source), [keys]).fetchall())
            since = since if self.full else taken
        parts = self._parts(connection, since)
        if not parts:  # another compute was quicker
            return 0
        changed: set[Key] = set()
        count = 0
        for view in self.views:
            rows = pa.concat_tables(part.rows(view) for part in parts)
            written, others = tables.append(connection, view.table, rows, rows.column_names, self.key, self.noted)
            changed.update(written[self.source.key].unique().to_pylist())
            count += written.num_rows
            if others.num_rows:
                staged = f"staged_{view.name}"
                tables.copy_in(connection, staged, others)
                upsert = tables.upsert(view.table, staged, rows.column_names, self.key, self.noted)
                per_key = connection.execute(
                    sql.SQL("WITH changed AS ({}) SELECT {key}, count(*) FROM changed GROUP BY {key}").format(
                        upsert, key=sql.Identifier(self.source.key)
                    )
                ).fetchall()
                changed.update(key for key, _ in per_key)
                count += sum(rows for _, rows in per_key)
        newest = {part.key: part.time(-1) for part in parts}
        connection.execute(NOTE, [list(map(str, changed)), [newest[key] for key in changed]])
        if self.checksums:
            done = [self.checksums[key] for key in keys]
            connection.execute(COMPUTED, [self.source.table, list(map(str, keys)), done])
        return count

    def _parts(self, connection: psycopg.Connection, since: Mapping[Key, datetime]) -> list["_Part"]:
        """Compute from the newest part of each history, or from the whole where a total before it is not known."""
        before = self.source.rows_before
        found = list(self._computed(connection, since, before))
        # Where there are fewer rows before, these are all. A total that nothing is added to (no volume) needs none.
        cut = {
            part.key: part
            for part in found
            if part.first == before and any(np.isfinite(steps[part.first :]).any() for steps in part.steps.values())
        }
        anchors = {key: row for key, part in cut.items() if (row := part.anchor()) is not None}
        known = self._totals(connection, {key: cut[key].time(row) for key, row in anchors.items()})
        for key in known:
            cut.pop(key).continue_from(anchors[key], known[key])
        return [part for part in found if part.key not in cut] + list(
            self._computed(connection, {key: since[key] for key in cut}, None)
        )

    def _computed(
        self, connection: psycopg.Connection, since: Mapping[Key, datetime], before: int | None
    ) -> Iterator["_Part"]:
        source = self.source
        read = arrays.read(
            connection, source.table, source.columns, since, before, key=self.key, key_type=source.key_type
        )
        for key, times, columns in read:
            rows = self.formulas.of(self.source, columns)
            features = {view.name: rows.features(view) for view in self.views}
            steps = {feature.name: rows.steps(feature) for _, feature in self.totals}
            changed = (since[key] - EPOCH) // timedelta(microseconds=1)
            yield _Part(self.source, key, times, features, steps, int(np.searchsorted(times, changed)))

    def _totals(
        self, connection: psycopg.Connection, rows: Mapping[Key, datetime]
    ) -> dict[Key, dict[tuple[str, str], float]]:
        """What is stored of the running totals at one row of each key; nothing where one is null."""
        found: dict[Key, dict[tuple[str, str], float]] = {}
        by_view: dict[str, list[Feature]] = {}
        for view, feature in self.totals:
            by_view.setdefault(view.name, []).append(feature)
        for view_name, features in by_view.items():
            names = [feature.name for feature in features]
            query = sql.SQL(
                "SELECT {key}, {names} FROM {table} AS stored JOIN unnest(%s::{key_type}[], %s::timestamptz[]) "
                "AS wanted ({key}, {time}) USING ({key}, {time}) WHERE ({names}) IS NOT NULL"
            ).format(
                key=sql.Identifier(self.source.key),
                key_type=sql.SQL(self.source.key_type),
                time=sql.Identifier(self.source.time),
                names=sql.SQL(", ").join(map(sql.Identifier, names)),
                table=sql.Identifier(SCHEMA, view_name),
            )
            for key, *totals in connection.execute(query, [list(rows), list(rows.values())]) if rows else ():
                known = found.setdefault(key, {})
                known |= {(view_name, name): total for name, total in zip(names, totals, strict=True)}
        return {key: known for key, known in found.items() if len(known) == len(self.totals)}


def _groups(rows: Sequence[tuple[Key, datetime]], rows_before: int) -> Iterator[list[Key]]:
    """Keys whose rows will hardly be more than ROWS_AT_ONCE: one per working day."""
    group: list[Key] = []
    size = 0
    now = datetime.now(UTC)
    for key, since in rows:
        count = rows_before + (now - since).days * 5 // 7
        if group and size + count > ROWS_AT_ONCE:
            yield group
            group, size = [], 0
        group.append(key)
        size += count
    if group:
        yield group


def _names(view: View) -> list[str]:
    return [feature.name for feature in view.features]


@dataclass
class _Part:
    """A key's features by view, for its whole history or for the newest part of it."""

    source: Source
    key: Key
    times: Times
    features: dict[str, dict[str, Array]]
    steps: dict[str, Array]  # of the running totals
    first: int  # the first row that may have changed

    def anchor(self) -> int | None:
        """The last row before the first that may have changed at which every running total has a value."""
        known = np.all([np.isfinite(steps[: self.first]) for steps in self.steps.values()], axis=0)
        rows = np.flatnonzero(known)
        return int(rows[-1]) if len(rows) else None

    def continue_from(self, row: int, totals: Mapping[tuple[str, str], float]) -> None:
        """Let each running total go on from what it is at a row."""
        for (view, name), before in totals.items():
            self.features[view][name][row + 1 :] = running_total(self.steps[name][row + 1 :], before)

    def time(self, row: int) -> datetime:
        return EPOCH + timedelta(microseconds=int(self.times[row]))

    def rows(self, view: View) -> pa.Table:
        values = {f.name: _column(f, self.features[view.name][f.name][self.first :]) for f in view.features}
        keys = pa.DictionaryArray.from_arrays(np.zeros(len(self.times) - self.first, np.int32), [self.key])
        times = (self.times[self.first :] + binary.EPOCH).view("datetime64[us]")
        return pa.table({self.source.key: keys.dictionary_decode(), self.source.time: times, **values})


def _column(feature: Feature, values: Array) -> pa.Array:
    column = pa.array(values, from_pandas=True)  # NaN becomes NULL
    return column.cast(pa.int64()) if feature.type == "Int64" else column
