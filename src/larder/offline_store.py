"""Feast's PostgreSQL offline store, made for TimescaleDB: the same answers, from indexes and chunks.

It needs Feast, psycopg and PostgreSQL, TimescaleDB if there are hypertables, and nothing else of Larder. In
feature_store.yaml:

    offline_store:
      type: larder.offline_store.TimescaleOfflineStore
      host: ...          # and all other keys as for `type: postgres`

The user needs SELECT on the sources, and TEMPORARY on the database, which PostgreSQL grants to everybody.

What differs from `type: postgres`:

- Point-in-time joins: the entity rows are copied into a temporary table, sorted, analyzed, and cut into slices that
  each lie in one chunk. A source is probed once per entity row through its index on (join keys, event time); a source
  without such an index, or a query, is first copied into a temporary table that has one. The rows come in the order of
  the entity rows. Where several source rows are the newest at once, an entity row appears as often, as with stock.
- Newest rows, for materialization with `pull_latest_features`: one step through that index per key, however long the
  history is. It needs join keys that are declared NOT NULL.
- Every result is read by COPY, straight into Arrow.
- Pushes with `to: offline` or `online_and_offline`, which stock refuses.

Stock does the rest with its own SQL: retrieval by start_date and end_date, `entity_select_mode: embed_query`, join keys
whose type is not the source's (a float for a bigint, as pandas makes of integers with gaps), and newest rows of sources
without an index. Stock confuses entity rows whose several keys look the same when they are joined ('a' and 'bc', 'ab'
and 'c'); this does not.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import numpy as np
import pandas as pd
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from feast.data_source import DataSource
from feast.feature_view import FeatureView
from feast.infra.offline_stores import offline_utils
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres import (
    EntitySelectMode,
    PostgreSQLOfflineStore,
    PostgreSQLOfflineStoreConfig,
    PostgreSQLRetrievalJob,
    _get_entity_schema,
)
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import (
    PostgreSQLSource,
    SavedDatasetPostgreSQLStorage,
)
from feast.infra.offline_stores.offline_store import RetrievalJob
from feast.infra.offline_stores.offline_utils import FeatureViewQueryContext
from feast.infra.registry.base_registry import BaseRegistry
from feast.infra.utils.postgres.connection_utils import _get_conn
from feast.repo_config import RepoConfig
from feast.saved_dataset import SavedDatasetStorage
from feast.type_map import arrow_to_pg_type, pg_type_code_to_arrow
from psycopg import sql

# PostgreSQL's type codes.
TIMESTAMP, TIMESTAMPTZ = 1114, 1184
TIMES = frozenset({1082, TIMESTAMP, TIMESTAMPTZ})
# Types that are compared through one family of operators, so that an index on the one finds the other.
SAME_FAMILY = (frozenset({20, 21, 23}), frozenset({25, 1043}), TIMES)
# bool, int8, int2, int4, text, float4, float8, varchar, timestamp, timestamptz: their text says exactly what they are.
EXACT_AS_CSV = frozenset({16, 20, 21, 23, 25, 700, 701, 1043, TIMESTAMP, TIMESTAMPTZ})
BYTES_AT_ONCE = 16 << 20
ROWS_AT_ONCE = 10_000
# A statement for less than this costs more than the chunks that it spares.
ROWS_PER_STATEMENT = 500
ENTITIES, PROBES = "larder_entities", "larder_probes"
ROW, SLICE = "larder_row", "larder_slice"

# The btree indexes of a table: whether unique, their columns, which of those descend.
INDEXES = """
SELECT indisunique, ARRAY(
    SELECT attname::text FROM unnest(indkey[:indnkeyatts - 1]) WITH ORDINALITY AS key (number, place)
    JOIN pg_attribute ON attrelid = indrelid AND attnum = number ORDER BY place
), ARRAY(SELECT option & 1 = 1 FROM unnest(indoption) AS option)
FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid JOIN pg_am ON pg_am.oid = relam
WHERE indrelid = to_regclass(%s) AND amname = 'btree' AND indisvalid AND indpred IS NULL AND indexprs IS NULL
ORDER BY NOT indisunique, indexrelid
"""
NULLABLE = """
SELECT count(*) FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attname = ANY(%s) AND NOT attnotnull
"""
# Where the chunks of a hypertable begin and end.
BOUNDS = """
SELECT DISTINCT unnest(ARRAY[range_start, range_end]) FROM timescaledb_information.chunks
WHERE to_regclass(format('%%I.%%I', hypertable_schema, hypertable_name)) = to_regclass(%s)
AND primary_dimension = %s AND range_start IS NOT NULL ORDER BY 1
"""

EXACT_TEXT = "SET LOCAL datestyle = ISO; SET LOCAL extra_float_digits = 1;"
# The joins are written in the order in which they are to be made. What ChunkAppend would exclude as it runs, literals
# exclude before; it costs as much as the search in an index.
PLAIN_PLANS = "SET LOCAL jit = off; SET LOCAL join_collapse_limit = 1; SET LOCAL timescaledb.enable_chunk_append = off"

Columns = list[tuple[str, int]]  # names and type codes


class TimescaleOfflineStoreConfig(PostgreSQLOfflineStoreConfig):  # type: ignore[misc] # Feast is untyped
    """As `type: postgres`, with this class as the type."""

    type: Literal["larder.offline_store.TimescaleOfflineStore"] = "larder.offline_store.TimescaleOfflineStore"


class TimescaleOfflineStore(PostgreSQLOfflineStore):  # type: ignore[misc] # Feast is untyped
    """See the module."""

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | str | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        filter_by_created_timestamp: bool = False,
        **kwargs: Any,
    ) -> RetrievalJob:
        """The newest features of each entity row at its time, no older than the view's ttl."""
        stock = PostgreSQLOfflineStore.get_historical_features(
            config,
            feature_views,
            feature_refs,
            entity_df,
            registry,
            project,
            full_feature_names,
            filter_by_created_timestamp,
            **kwargs,
        )
        if entity_df is None or (
            isinstance(entity_df, str) and config.offline_store.entity_select_mode == EntitySelectMode.embed_query
        ):
            return TimescaleRetrievalJob(stock)

        def contexts() -> list[FeatureViewQueryContext]:
            times = (stock.metadata.min_event_timestamp, stock.metadata.max_event_timestamp)
            return [
                *offline_utils.get_feature_view_query_context(feature_refs, feature_views, registry, project, times)
            ]

        return PointInTimeJob(stock, entity_df, contexts, filter_by_created_timestamp)

    @staticmethod
    def pull_latest_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None,
        start_date: datetime,
        end_date: datetime,
    ) -> RetrievalJob:
        """The newest row of each key between the two times, both included."""
        stock = PostgreSQLOfflineStore.pull_latest_from_table_or_query(
            config,
            data_source,
            join_key_columns,
            feature_name_columns,
            timestamp_field,
            created_timestamp_column,
            start_date,
            end_date,
        )
        table = data_source._postgres_options._table
        timestamps = [timestamp_field, *([created_timestamp_column] if created_timestamp_column else [])]
        columns = [*join_key_columns, *feature_name_columns, *timestamps]
        if not (table and join_key_columns and feature_name_columns) or len({*columns}) < len(columns):
            return TimescaleRetrievalJob(stock)
        window = sql.SQL("source.{} BETWEEN {}::timestamptz AND {}::timestamptz").format(
            sql.Identifier(timestamp_field), sql.Literal(str(start_date)), sql.Literal(str(end_date))
        )

        def query(cursor: psycopg.Cursor) -> sql.Composed | None:
            index = _index(cursor, table, join_key_columns, timestamp_field)
            if index is None or cursor.execute(NULLABLE, [table, join_key_columns]).fetchall() != [(0,)]:
                return None
            return _newest_per_key(table, join_key_columns, index, columns, timestamps, window)

        return TimescaleRetrievalJob(stock, query)

    @staticmethod
    def pull_all_from_table_or_query(*args: Any, **kwargs: Any) -> RetrievalJob:
        """All rows between two times: stock's query."""
        return TimescaleRetrievalJob(PostgreSQLOfflineStore.pull_all_from_table_or_query(*args, **kwargs))

    @staticmethod
    def offline_write_batch(
        config: RepoConfig,
        feature_view: FeatureView,
        table: pa.Table,
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Insert pushed rows into the table of the view's batch source; a row that is there already stays as it is.

        Feast has renamed the columns to what the source's `field_mapping` says. A time without a zone is in UTC.
        """
        source = feature_view.batch_source
        if not isinstance(source, PostgreSQLSource) or not (target := source._postgres_options._table):
            raise TypeError(f"{feature_view.name}: a push to the offline store needs a PostgreSQLSource with a table.")
        column_of = {name: column for column, name in (source.field_mapping or {}).items()}
        relation = sql.SQL(target)  # as Feast reads it: a name with capitals stands in quotes
        with _get_conn(config.offline_store) as connection, connection.cursor() as cursor:
            cursor.execute("SET LOCAL TIME ZONE 'UTC'")
            # What is no column is the index of a frame: Feast has compared the rest.
            known = {name for name, _ in _describe(cursor, sql.SQL("SELECT * FROM {}").format(relation))}
            columns = {column_of.get(name, name): name for name in table.column_names}
            columns = {column: name for column, name in columns.items() if column in known}
            statement = sql.SQL("INSERT INTO {} ({}) VALUES ({}) ON CONFLICT DO NOTHING").format(
                relation, _commas(map(sql.Identifier, columns)), _commas(sql.Placeholder() * len(columns))
            )
            cursor.executemany(
                statement, list(zip(*(table[name].to_pylist() for name in columns.values()), strict=True))
            )
        if progress:
            progress(table.num_rows)


class TimescaleRetrievalJob(PostgreSQLRetrievalJob):  # type: ignore[misc] # Feast is untyped
    """A job of stock's, or a better query for the same rows if there is one, read by COPY."""

    def __init__(
        self, stock: PostgreSQLRetrievalJob, query: Callable[[psycopg.Cursor], sql.Composed | None] | None = None
    ) -> None:
        super().__init__(
            query=stock._query_generator,
            config=stock.config,
            full_feature_names=stock.full_feature_names,
            on_demand_feature_views=stock.on_demand_feature_views,
            metadata=stock.metadata,
        )
        self._query = query

    def to_sql(self) -> str:
        if self._query:
            with _get_conn(self.config.offline_store) as connection, connection.cursor() as cursor:
                if query := self._query(cursor):
                    return query.as_string()
        text: str = super().to_sql()
        return text

    def stream(self) -> Iterator[pa.Table]:
        """The result, some rows at a time; without on-demand features."""
        with (
            self._query_generator() as stock,
            _get_conn(self.config.offline_store) as connection,
            connection.cursor() as cursor,
        ):
            connection.read_only = True
            cursor.execute(EXACT_TEXT)
            query = self._query(cursor) if self._query else None
            query = query or sql.SQL("{}").format(sql.SQL(stock))
            columns = _describe(cursor, query)
            yield _schema(columns).empty_table()
            yield from _read(cursor, query, columns)

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:  # noqa: ARG002 -- as stock
        return pa.concat_tables(self.stream()).combine_chunks()

    def persist(
        self,
        storage: SavedDatasetStorage,
        allow_overwrite: bool | None = False,  # noqa: ARG002 -- as stock, whose CREATE TABLE fails on a table that is there
        timeout: int | None = None,
    ) -> None:
        """Write the result into a new table."""
        assert isinstance(storage, SavedDatasetPostgreSQLStorage)
        with _get_conn(self.config.offline_store) as connection, connection.cursor() as cursor:
            _upload(cursor, self.to_df(timeout=timeout), storage.postgres_options._table, temporary=False)


class PointInTimeJob(TimescaleRetrievalJob):
    """A point-in-time join. `to_sql` is stock's query."""

    def __init__(
        self,
        stock: PostgreSQLRetrievalJob,
        entity_df: pd.DataFrame | str,
        contexts: Callable[[], list[FeatureViewQueryContext]],
        filter_by_created: bool,
    ) -> None:
        super().__init__(stock)
        self._entity_df = entity_df
        self._contexts = contexts
        self._filter_by_created = filter_by_created

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        with _get_conn(self.config.offline_store) as connection, connection.cursor() as cursor:
            # One statement per slice, but one snapshot for all.
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            joined = self._join(cursor)
        return super()._to_arrow_internal(timeout) if joined is None else joined

    def _join(self, cursor: psycopg.Cursor) -> pa.Table | None:
        """The join, or None where stock has to make it."""
        contexts = self._contexts()
        schema = _get_entity_schema(self._entity_df, self.config)
        event_time = offline_utils.infer_event_timestamp_from_entity_df(schema)
        keys = {key for context in contexts for key in context.entities}
        offline_utils.assert_expected_columns_in_entity_df(schema, keys, event_time)

        cursor.execute(EXACT_TEXT + PLAIN_PLANS)
        if isinstance(self._entity_df, str):
            numbered = "SELECT row_number() OVER () - 1 AS {}, query.* FROM ({}\n) AS query"
            entities: sql.Composable = sql.SQL(numbered).format(sql.Identifier(ROW), sql.SQL(self._entity_df))
        else:
            frame = self._entity_df.assign(**{ROW: range(len(self._entity_df))})
            _upload(cursor, frame, ENTITIES, temporary=True)
            entities = sql.SQL("SELECT * FROM {}").format(sql.Identifier(ENTITIES))
        columns = _describe(cursor, entities)

        views = [_view(cursor, context, dict(columns), event_time) for context in contexts]
        sources = [source for source in views if source]
        features = [name for context in contexts for name in self._names(context)]
        if len(sources) < len(contexts) or len({*schema, *features}) < len(schema) + len(features):
            return None

        bounds = sorted({bound for source in sources for bound in source.bounds})
        _make_probes(cursor, entities, sorted(keys), event_time, bounds)
        for number, source in enumerate(sources):
            if not source.indexed:
                source.copy(cursor, f"larder_source_{number}")

        selected = [sql.Identifier("probe", name) for name, _ in columns]
        for number, source in enumerate(sources):
            selected += [sql.Identifier(f"view_{number}", f"f{i}") for i in range(len(source.features))]
            columns += zip(self._names(contexts[number]), source.codes, strict=True)
        parts: list[pa.Table] = []
        for first, last in _slices(cursor):
            start = bounds[first - 1] if first else None
            end = bounds[last] if last < len(bounds) else None
            joins = sql.SQL("").join(
                sql.SQL(" LEFT JOIN LATERAL {} AS {} ON true").format(
                    source.newest(start, end, filter_by_created=self._filter_by_created),
                    sql.Identifier(f"view_{number}"),
                )
                for number, source in enumerate(sources)
            )
            query = sql.SQL("SELECT {} FROM {} AS probe{} WHERE probe.{} BETWEEN {} AND {}").format(
                _commas(selected), sql.Identifier(PROBES), joins, sql.Identifier(SLICE), first, last
            )
            parts.extend(_read(cursor, query, columns))
        table = _table(parts, columns)
        return table.take(pc.sort_indices(table[ROW])).select([*schema, *features])

    def _names(self, context: FeatureViewQueryContext) -> list[str]:
        prefix = f"{context.name}__" if self.full_feature_names else ""
        return [prefix + context.field_mapping.get(feature, feature) for feature in context.features]


def _make_probes(
    cursor: psycopg.Cursor, entities: sql.Composable, keys: list[str], event_time: str, bounds: list[datetime]
) -> None:
    """The entity rows by slice, key and time: neighbours find the same pages of an index in the processor's cache."""
    number: sql.Composable = sql.SQL("0")
    if bounds:
        array = sql.SQL("ARRAY[{}]").format(_commas(map(_literal, bounds)))
        number = sql.SQL("coalesce(width_bucket({}, {}), 0)").format(sql.Identifier(event_time), array)
    order = _commas(map(sql.Identifier, [SLICE, *keys, event_time]))
    statement = "CREATE TEMPORARY TABLE {} AS SELECT *, {} AS {} FROM ({}) AS entity ORDER BY {}"
    probes, slice_ = sql.Identifier(PROBES), sql.Identifier(SLICE)
    cursor.execute(sql.SQL(statement).format(probes, number, slice_, entities, order))
    cursor.execute(sql.SQL("CREATE INDEX ON {} ({})").format(probes, slice_))
    cursor.execute(sql.SQL("ANALYZE {}").format(probes))


def _slices(cursor: psycopg.Cursor) -> list[tuple[int, int]]:
    """First and last number of the slices for each statement: those with few rows go together."""
    counts = sql.SQL("SELECT {0}, count(*) FROM {1} GROUP BY {0} ORDER BY {0}")
    found: list[tuple[int, int]] = []
    first, size = None, 0
    for number, rows in cursor.execute(counts.format(sql.Identifier(SLICE), sql.Identifier(PROBES))).fetchall():
        first, size = number if first is None else first, size + rows
        if size >= ROWS_PER_STATEMENT:
            found.append((first, number))
            first, size = None, 0
    return found if first is None else [*found, (first, number)]


@dataclass
class Source:
    """Where a feature view's rows are, and what helps to find the newest of them."""

    relation: sql.Composable
    keys: list[str]  # columns of the relation
    entities: list[str]  # the probes' columns that they are compared with
    event_time: str
    probe_time: str
    created: str | None
    features: list[str]
    codes: list[int]  # types of the features
    ttl: int  # seconds; 0 is for ever
    indexed: bool = False
    unique: bool = False  # one row at most is the newest
    bounds: list[datetime] = field(default_factory=list)  # of chunks, where there are some

    def copy(self, cursor: psycopg.Cursor, name: str) -> None:
        """Put what the probes may find into a temporary table with an index, and take that as the relation."""
        time, probe_time = sql.Identifier(self.event_time), sql.Identifier(self.probe_time)
        keys, probes = [*map(sql.Identifier, self.keys)], sql.Identifier(PROBES)
        conditions = [sql.SQL("{} <= (SELECT max({}) FROM {})").format(time, probe_time, probes)]
        if self.ttl:
            conditions.append(
                sql.SQL("{} >= (SELECT min({}) - {} FROM {})").format(time, probe_time, _seconds(self.ttl), probes)
            )
        if keys:
            entities = _commas(map(sql.Identifier, self.entities))
            conditions.append(sql.SQL("({}) IN (SELECT {} FROM {})").format(_commas(keys), entities, probes))
        columns = dict.fromkeys(
            [*self.keys, self.event_time, *([self.created] if self.created else []), *self.features]
        )
        table = sql.Identifier(name)
        cursor.execute(
            sql.SQL("CREATE TEMPORARY TABLE {} AS SELECT {} FROM {} AS source WHERE {}").format(
                table, _commas(map(sql.Identifier, columns)), self.relation, sql.SQL(" AND ").join(conditions)
            )
        )
        cursor.execute(sql.SQL("CREATE INDEX ON {} ({})").format(table, _commas([*keys, time])))
        cursor.execute(sql.SQL("ANALYZE {}").format(table))
        self.relation = table

    def newest(self, start: datetime | None, end: datetime | None, *, filter_by_created: bool) -> sql.Composable:
        """The newest rows for a probe whose time is not before start and before end; None is an open end."""
        time, probe_time = sql.Identifier("source", self.event_time), sql.Identifier("probe", self.probe_time)
        conditions: list[sql.Composable] = [
            sql.SQL("{} = {}").format(sql.Identifier("source", key), sql.Identifier("probe", entity))
            for key, entity in zip(self.keys, self.entities, strict=True)
        ]
        conditions.append(sql.SQL("{} <= {}").format(time, probe_time))
        if self.ttl:
            conditions.append(sql.SQL("{} >= {} - {}").format(time, probe_time, _seconds(self.ttl)))
        order = [sql.SQL("{} DESC").format(time)]
        if self.created:
            created = sql.Identifier("source", self.created)
            conditions.append(sql.SQL("{} IS NOT NULL").format(created))  # as stock, which takes max(created)
            if filter_by_created:
                conditions.append(sql.SQL("{} <= {}").format(created, probe_time))
            order.append(sql.SQL("{} DESC").format(created))
        columns = _commas(
            sql.SQL("{} AS {}").format(sql.Identifier("source", feature), sql.Identifier(f"f{number}"))
            for number, feature in enumerate(self.features)
        )

        def between(start: datetime | None, end: datetime | None) -> sql.Composable:
            # Literals, so that the planner leaves out all other chunks.
            window = [
                sql.SQL("{} " + operator + " {}").format(time, _literal(bound))
                for operator, bound in ((">=", start), ("<", end))
                if bound and self.bounds
            ]
            return sql.SQL("(SELECT {} FROM {} AS source WHERE {} ORDER BY {} FETCH FIRST 1 ROW {})").format(
                columns,
                self.relation,
                sql.SQL(" AND ").join([*conditions, *window]),
                _commas(order),
                sql.SQL("ONLY" if self.unique else "WITH TIES"),
            )

        oldest = _before(start, self.ttl)
        if not (start and self.bounds and self.unique):
            return between(oldest, end)
        # Most probes find their row in the first branch, one scan of one index. An Append opens the second only then,
        # when the first has nothing.
        return sql.SQL("({} UNION ALL {} LIMIT 1)").format(between(start, end), between(oldest, start))


def _view(
    cursor: psycopg.Cursor, context: FeatureViewQueryContext, probes: dict[str, int], event_time: str
) -> Source | None:
    """The source of a view; None where the types of its keys or times are not the probes', and no index helps."""
    keys = [selection.split(" AS ")[0] for selection in context.entity_selections]  # "column AS join_key"
    relation = sql.SQL(context.table_subquery)
    names = _commas(map(sql.Identifier, [*keys, context.timestamp_field, *context.features]))
    described = _describe(cursor, sql.SQL("SELECT {} FROM {} AS source").format(names, relation))
    codes = [code for _, code in described]
    compared = zip(codes, [*context.entities, event_time], strict=False)
    if not all(_comparable(code, probes.get(name)) for code, name in compared) or codes[len(keys)] not in TIMES:
        return None
    source = Source(
        relation=relation,
        keys=keys,
        entities=context.entities,
        event_time=context.timestamp_field,
        probe_time=event_time,
        created=context.created_timestamp_column or None,
        features=context.features,
        codes=codes[len(keys) + 1 :],
        ttl=context.ttl,
    )
    if not context.table_subquery.startswith("("):
        index = _index(cursor, context.table_subquery, keys, context.timestamp_field)
        source.indexed = index is not None
        source.unique = bool(index and index.unique and {*index.columns} <= {*keys, source.event_time, source.created})
        if index and codes[len(keys)] == probes[event_time]:
            naive = probes[event_time] == TIMESTAMP
            source.bounds = _bounds(cursor, context.table_subquery, source.event_time, naive=naive)
    return source


@dataclass(frozen=True)
class Index:
    """A btree index on (join keys, event time, …)."""

    unique: bool
    columns: list[str]
    descending: list[bool]


def _index(cursor: psycopg.Cursor, table: str, keys: Sequence[str], event_time: str) -> Index | None:
    """An index that finds the newest row of a key before a time, a unique one if there is one."""
    for unique, columns, descending in cursor.execute(INDEXES, [table]).fetchall():
        if {*columns[: len(keys)]} == {*keys} and columns[len(keys) : len(keys) + 1] == [event_time]:
            return Index(unique, columns, descending)
    return None


def _bounds(cursor: psycopg.Cursor, table: str, event_time: str, *, naive: bool) -> list[datetime]:
    if cursor.execute("SELECT to_regclass('timescaledb_information.chunks')").fetchall() == [(None,)]:
        return []
    times = [time.astimezone(UTC) for (time,) in cursor.execute(BOUNDS, [table, event_time]).fetchall()]
    return [time.replace(tzinfo=None) for time in times] if naive else times


def _newest_per_key(
    table: str, keys: Sequence[str], index: Index, columns: Sequence[str], times: Sequence[str], window: sql.Composable
) -> sql.Composed | None:
    """The newest row of every key in a window, by steps from key to key; None where the index has no such order.

    Read in the direction in which times descend, the index has the newest row of a key right behind the key before it.
    """
    backward = not index.descending[len(keys)]
    descending = {way != backward for way in index.descending[: len(keys)]}
    if len(descending) > 1:
        return None
    step, way = ("<", "DESC") if descending == {True} else (">", "ASC")
    ordered = index.columns[: len(keys)]

    def of(alias: str, names: Iterable[str]) -> sql.Composable:
        return _commas(sql.Identifier(alias, name) for name in names)

    def row(condition: sql.Composable) -> sql.Composable:
        return sql.SQL("SELECT {} FROM {} AS source WHERE {} AND {} ORDER BY {} LIMIT 1").format(
            of("source", columns),
            sql.SQL(table),
            window,
            condition,
            _commas(
                [
                    *(sql.SQL("{} " + way).format(sql.Identifier("source", key)) for key in ordered),
                    *(sql.SQL("{} DESC").format(sql.Identifier("source", time)) for time in times),
                ]
            ),
        )

    beyond = sql.SQL("({}) " + step + " ({})").format(of("source", ordered), of("newest", ordered))
    return sql.SQL(
        "WITH RECURSIVE newest AS (({}) UNION ALL SELECT next.* FROM newest CROSS JOIN LATERAL ({}) AS next) "
        "SELECT * FROM newest"
    ).format(row(sql.SQL("true")), row(beyond))


def _commas(parts: Iterable[sql.Composable]) -> sql.Composed:
    return sql.SQL(", ").join(parts)


def _literal(time: datetime) -> sql.Composable:
    kind = "timestamptz" if time.tzinfo else "timestamp"
    return sql.SQL("{}::" + kind).format(sql.Literal(time.isoformat(sep=" ")))


def _seconds(ttl: int) -> sql.Composable:
    return sql.SQL("{} * interval '1 second'").format(sql.Literal(ttl))


def _before(time: datetime | None, ttl: int) -> datetime | None:
    try:
        return time - timedelta(seconds=ttl) if time and ttl else None
    except OverflowError:
        return None


def _comparable(code: int, other: int | None) -> bool:
    return code == other or any({code, other} <= family for family in SAME_FAMILY)


def _describe(cursor: psycopg.Cursor, query: sql.Composable) -> Columns:
    """Names and type codes of the columns of a query."""
    cursor.execute(sql.SQL("SELECT * FROM ({}\n) AS query LIMIT 0").format(query))
    return [(column.name, column.type_code) for column in cursor.description or ()]


def _schema(columns: Columns) -> pa.Schema:
    return pa.schema([(name, pg_type_code_to_arrow(code)) for name, code in columns])


def _table(parts: Iterable[pa.Table], columns: Columns) -> pa.Table:
    return pa.concat_tables([_schema(columns).empty_table(), *parts]).combine_chunks()


def _read(cursor: psycopg.Cursor, query: sql.Composed, columns: Columns) -> Iterator[pa.Table]:
    """The rows of a query, in the types and with the values that stock gives them, some at a time."""
    schema = _schema(columns)
    if not all(code in EXACT_AS_CSV for _, code in columns):
        with cursor.connection.cursor(name="larder_rows") as rows:
            rows.execute(query)
            while some := rows.fetchmany(ROWS_AT_ONCE):
                yield pa.Table.from_arrays([pa.array(values) for values in zip(*some, strict=True)], schema=schema)
        return
    names = [f"c{number}" for number in range(len(columns))]
    values = _commas(
        sql.SQL("{} AT TIME ZONE 'UTC'" if code == TIMESTAMPTZ else "{}").format(sql.Identifier(name))
        for name, (_, code) in zip(names, columns, strict=True)
    )
    copied = sql.SQL("COPY (SELECT {} FROM ({}\n) AS query ({})) TO STDOUT (FORMAT csv)").format(
        values, query, _commas(map(sql.Identifier, names))
    )
    options = {
        "read_options": pyarrow.csv.ReadOptions(column_names=names),
        # Text may have line breaks; a single column that is NULL is an empty line.
        "parse_options": pyarrow.csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=False),
        "convert_options": pyarrow.csv.ConvertOptions(
            column_types=dict(zip(names, schema.types, strict=True)),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
            true_values=["t"],
            false_values=["f"],
        ),
    }

    def parse(lines: list[bytes]) -> pa.Table:
        return pyarrow.csv.read_csv(io.BytesIO(b"".join(lines)), **options).rename_columns(schema.names)

    with cursor.copy(copied) as copy:
        lines, size = [], 0
        for line in copy:
            lines.append(bytes(line))
            size += len(line)
            if size >= BYTES_AT_ONCE:
                yield parse(lines)
                lines, size = [], 0
        if lines:
            yield parse(lines)


def _upload(cursor: psycopg.Cursor, frame: pd.DataFrame, name: str, *, temporary: bool) -> None:
    """Create a table of a frame's rows, of the types that stock gives it."""
    table = pa.Table.from_pandas(frame, preserve_index=False)
    target = sql.Identifier(name)
    columns = _commas(
        sql.SQL("{} " + arrow_to_pg_type(str(field.type))).format(sql.Identifier(field.name)) for field in table.schema
    )
    kind = sql.SQL("TEMPORARY TABLE" if temporary else "TABLE")
    cursor.execute(sql.SQL("CREATE {} {} ({})").format(kind, target, columns))
    if not all(map(_plain, table.schema.types)):
        rows = frame.replace({np.nan: None}).to_numpy().tolist()
        places = _commas(sql.Placeholder() * len(table.schema))
        cursor.executemany(sql.SQL("INSERT INTO {} VALUES ({})").format(target, places), rows)
        return
    for number, column in enumerate(table.schema):
        if pa.types.is_timestamp(column.type):
            times = pc.floor_temporal(table[number], unit="microsecond") if column.type.unit == "ns" else table[number]
            zone = "UTC" if column.type.tz else None
            table = table.set_column(number, column.name, times.cast(pa.timestamp("us", zone)))
        elif pa.types.is_float32(column.type):  # 0.1f is another number as text
            table = table.set_column(number, column.name, table[number].cast(pa.float64()))
    buffer = io.BytesIO()
    pyarrow.csv.write_csv(table, buffer, pyarrow.csv.WriteOptions(include_header=False))
    with cursor.copy(sql.SQL("COPY {} FROM STDIN (FORMAT csv)").format(target)) as copy:
        copy.write(buffer.getbuffer())


def _plain(kind: pa.DataType) -> bool:
    tests = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_string, pa.types.is_timestamp)
    return any(test(kind) for test in tests)
