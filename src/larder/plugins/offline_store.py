"""Feast's PostgreSQL offline store, made for TimescaleDB: the same answers, from indexes and chunks.

It needs Feast, psycopg and PostgreSQL, TimescaleDB if there are hypertables, and nothing else of Larder. In
feature_store.yaml:

    offline_store:
      type: larder.plugins.offline_store.TimescaleOfflineStore
      host: ...          # and all other keys as for `type: postgres`

The user needs SELECT on the sources, and TEMPORARY on the database, which PostgreSQL grants to everybody.

With `standbys: [HOST, …]` joins read from the first of these hosts that answers as a standby, else from `host`. A
standby can have no temporary table: there, the entity rows come with each statement.

What differs from `type: postgres`:

- Point-in-time joins: keys and times of the entity rows are copied into a temporary table, sorted, analyzed, and cut
  into slices that each lie in one chunk. A source is probed once per entity row through its index on (join keys, event
  time); a source without such an index, or a query, is first copied into a temporary table that has one. Views with the
  same keys share the probe: each is searched first where those before it have found their rows, and further back only
  if it has none there. The rows come in the order of the entity rows. Where several source rows are the newest at once,
  an entity row appears as often, as with stock.
- Other columns of an entity dataframe never go to the database: they come back whatever they are named and hold.
- Event times may be strings in ISO 8601, dates, or datetimes of several zones; without a zone they are UTC.
- A join key may have another type of number than its source, as pandas makes floats of integers with gaps.
- Newest rows, for materialization with `pull_latest_features`: one step through that index per key, however long the
  history is. It needs join keys that are declared NOT NULL.
- Every result is read by COPY, straight into Arrow. Types that Feast does not know are text.
- Saved datasets are written in one transaction, and only if they can be read back.
- Pushes with `to: offline` or `online_and_offline`, which stock refuses.

Stock's own SQL does `entity_select_mode: embed_query` and newest rows of sources without an index. Stock confuses
entity rows whose several keys look the same when they are joined ('a' and 'bc', 'ab' and 'c'); the join does not.
"""

import contextlib
import io
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal

import numpy as np
import pandas as pd
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from feast.data_source import DataSource
from feast.errors import InvalidEntityType
from feast.feature_view import FeatureView
from feast.infra.offline_stores import offline_utils
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres import (
    MULTIPLE_FEATURE_VIEW_POINT_IN_TIME_JOIN,
    EntitySelectMode,
    PostgreSQLOfflineStore,
    PostgreSQLOfflineStoreConfig,
    PostgreSQLRetrievalJob,
    build_point_in_time_query,
)
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import (
    PostgreSQLSource,
    SavedDatasetPostgreSQLStorage,
)
from feast.infra.offline_stores.offline_store import RetrievalJob, RetrievalMetadata
from feast.infra.offline_stores.offline_utils import FeatureViewQueryContext
from feast.infra.registry.base_registry import BaseRegistry
from feast.infra.registry.sql import SqlRegistry
from feast.infra.utils.postgres.connection_utils import _get_conn, _get_conn_kwargs, _get_conninfo
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import RepoConfig
from feast.saved_dataset import SavedDatasetStorage
from feast.type_map import pg_type_code_to_arrow, pg_type_code_to_pg_type
from feast.utils import _strip_version_from_ref, compute_non_entity_date_range
from psycopg import sql
from psycopg.conninfo import make_conninfo

# PostgreSQL's type codes.
TEXT, BPCHAR, TIMESTAMP, TIMESTAMPTZ = 25, 1042, 1114, 1184
TIMES = frozenset({1082, TIMESTAMP, TIMESTAMPTZ})
INTEGERS, FLOATS, TEXTS = frozenset({20, 21, 23}), frozenset({700, 701}), frozenset({25, 1043})
NUMBERS = INTEGERS | FLOATS | {1700}
# Types that are compared through one family of operators, so that an index on the one finds the other.
SAME_FAMILY = (INTEGERS, FLOATS, TEXTS, TIMES)
# Read as text, beside those that Feast does not know: psycopg's values of json, time and uuid have no place in the
# Arrow types that Feast names for them.
READ_AS_TEXT = frozenset({114, 1083, 2950, 3802})
# bool, numbers but numeric, and text: their text says exactly what they are.
EXACT_AS_CSV = frozenset({16, *INTEGERS, *FLOATS, *TEXTS, *TIMES, *READ_AS_TEXT})
BYTES_AT_ONCE = 16 << 20
ROWS_AT_ONCE = 10_000
# A statement for less than this costs more than the chunks that it spares.
ROWS_PER_STATEMENT = 500
# In seconds: the newest of daily rows is at most this old, weekends included.
NEAR = 4 * 86_400
# Temporary tables. `pg_temp` is put last in the search path: tables of these names in a query are the user's own.
ENTITIES, PROBES = sql.Identifier("pg_temp", "larder_entities"), sql.Identifier("pg_temp", "larder_probes")
# Columns of the probes, beside c0, c1, … of the entity rows.
ROW, SLICE, TIME = "row", "slice", "time"
NAME_BYTES = 63  # PostgreSQL cuts longer names
EPOCH = datetime.fromtimestamp(0, UTC)
# In µs since then, what Python's datetime can hold.
FIRST = (datetime(1, 1, 1, tzinfo=UTC) - EPOCH) // timedelta(microseconds=1)
LAST = (datetime(9999, 12, 31, 23, 59, 59, 999999, UTC) - EPOCH) // timedelta(microseconds=1)
# What hides a semicolon in SQL, and a semicolon.
SEMICOLON = re.compile(
    r"""--[^\n]*|/\*.*?\*/|\bE'(?:[^'\\]|\\.|'')*'|'[^']*'|"[^"]*"|(\$\w*\$).*?\1|(;)""", re.DOTALL | re.IGNORECASE
)

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
# Where the chunks of a hypertable begin and end. A bound that Python's datetime cannot hold only widens the first slice
# or the last; the year between keeps zones from pushing one over the edge.
BOUNDS = """
SELECT DISTINCT bound FROM timescaledb_information.chunks CROSS JOIN unnest(ARRAY[range_start, range_end]) AS bound
WHERE to_regclass(format('%%I.%%I', hypertable_schema, hypertable_name)) = to_regclass(%s)
AND primary_dimension = %s AND bound BETWEEN '0002-01-01' AND '9998-12-31' ORDER BY 1
"""

EXACT_TEXT = "SET LOCAL extra_float_digits = 1;"
PG_TEMP_LAST = (
    "SELECT set_config('search_path', concat_ws(', ', nullif(current_setting('search_path'), ''), 'pg_temp'), true);"
)
# The joins are written in the order in which they are to be made. What ChunkAppend would exclude as it runs, literals
# exclude before; it costs as much as the search in an index. Near a row are few others: a bitmap of them saves nothing.
PLAIN_PLANS = (
    "SET LOCAL jit = off; SET LOCAL join_collapse_limit = 1; SET LOCAL timescaledb.enable_chunk_append = off; "
    "SET LOCAL enable_bitmapscan = off"
)

Columns = list[tuple[str, int]]  # names and type codes


class TimescaleOfflineStoreConfig(PostgreSQLOfflineStoreConfig):  # type: ignore[misc] # Feast is untyped
    """As `type: postgres`, with this class as the type."""

    type: Literal["larder.plugins.offline_store.TimescaleOfflineStore"] = (
        "larder.plugins.offline_store.TimescaleOfflineStore"
    )

    standbys: tuple[str, ...] = ()
    """Hosts of which the first that is a standby takes the joins; where none is, `host` does."""


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
        """The newest features of each entity row at its time, no older than the view's ttl.

        Raises ValueError where entity rows or names leave no right answer, and says what to change.
        """
        for view in feature_views:
            if not isinstance(view.batch_source, PostgreSQLSource):
                raise TypeError(f"The feature view {view.name} needs a PostgreSQLSource as its batch source.")
        # The times stand in the contexts for stock's retrieval by range only.
        contexts = [
            *offline_utils.get_feature_view_query_context(
                feature_refs, feature_views, registry, project, (EPOCH, EPOCH)
            )
        ]
        on_demand = OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry)
        request = Request(config, registry, contexts, feature_refs, on_demand, full_feature_names)
        if entity_df is None:
            if filter_by_created_timestamp:
                raise ValueError("filter_by_created_timestamp needs an entity_df: a range of times has no entity rows.")
            return _between(request, *_range(feature_views, kwargs.get("start_date"), kwargs.get("end_date")))
        if isinstance(entity_df, pd.DataFrame):
            return PointInTimeJob(request, Entities.of_frame(entity_df), filter_by_created_timestamp)
        if not isinstance(entity_df, str):
            raise InvalidEntityType(type(entity_df))
        embed = config.offline_store.entity_select_mode == EntitySelectMode.embed_query
        return PointInTimeJob(request, Entities.of_query(config, entity_df), filter_by_created_timestamp, embed=embed)

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

    registry: BaseRegistry | None = None
    sources: Sequence[FeatureViewQueryContext] = ()

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

    def to_remote_storage(self) -> list[str]:
        raise NotImplementedError(
            "PostgreSQL exports nothing to remote storage: write the result of to_arrow() where you want it, "
            "for example with pyarrow.parquet.write_table."
        )

    def persist(
        self,
        storage: SavedDatasetStorage,
        allow_overwrite: bool | None = False,
        timeout: int | None = None,
    ) -> None:
        """Write the result into a new table, in one transaction.

        Raises ValueError before anything is written where Feast could not read the saved dataset again.
        """
        if not isinstance(storage, SavedDatasetPostgreSQLStorage):
            raise TypeError(f"The storage is {type(storage).__name__}; it has to be SavedDatasetPostgreSQLStorage.")
        name = storage.postgres_options._table
        with _get_conn(self.config.offline_store) as connection, connection.cursor() as cursor:
            target = _new_table(cursor, name, self.sources, replacing=bool(allow_overwrite))
            if self.metadata:
                _assert_registry_is_writable(self.registry)
            table = self.to_arrow(timeout=timeout)
            if self.metadata:
                _assert_retrievable(table, self.metadata, full_feature_names=self.full_feature_names)
                # As an instant: a saved dataset is read between two instants, in whatever zone the session is.
                number = table.schema.get_field_index("event_timestamp")
                times = table[number].cast(pa.timestamp("us")).cast(pa.timestamp("us", "UTC"))
                table = table.set_column(number, "event_timestamp", times)
            if allow_overwrite:
                cursor.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(target))
            _upload(cursor, table, target)


@dataclass
class Request:
    """What get_historical_features was asked for, but for the entity rows."""

    config: RepoConfig
    registry: BaseRegistry
    contexts: list[FeatureViewQueryContext]
    feature_refs: list[str]
    on_demand: list[OnDemandFeatureView]
    full_feature_names: bool

    def names(self, context: FeatureViewQueryContext) -> list[str]:
        """A view's features as the result names them."""
        prefix = f"{context.name}__" if self.full_feature_names else ""
        return [prefix + context.field_mapping.get(feature, feature) for feature in context.features]

    def all_names(self) -> list[str]:
        """All features as the result names them, on-demand features too."""
        views = {view.projection.name_to_use() for view in self.on_demand}
        refs = [ref.split(":", 1) for ref in self.feature_refs]
        on_demand = [f"{view}__{name}" if self.full_feature_names else name for view, name in refs if view in views]
        return [*(name for context in self.contexts for name in self.names(context)), *on_demand]

    def keys(self) -> list[str]:
        return sorted({key for context in self.contexts for key in context.entities})


class PointInTimeJob(TimescaleRetrievalJob):
    """A point-in-time join. `to_sql` is stock's query; for an entity dataframe it reads a table that has to be made."""

    def __init__(self, request: Request, entities: "Entities", filter_by_created: bool, *, embed: bool = False) -> None:
        _assert_names(request, entities)
        self._request = request
        self._entities = entities
        self._filter_by_created = filter_by_created
        self._embed = embed
        self.registry, self.sources = request.registry, request.contexts

        @contextlib.contextmanager
        def query() -> Iterator[str]:
            yield self.to_sql()

        metadata = RetrievalMetadata(
            request.feature_refs, [name for name in entities.names if name != entities.event_time]
        )
        stock = PostgreSQLRetrievalJob(query, request.config, request.full_feature_names, request.on_demand, metadata)
        super().__init__(stock)

    @property
    def metadata(self) -> RetrievalMetadata:
        found: RetrievalMetadata = self._metadata
        if not found.max_event_timestamp:
            found.min_event_timestamp, found.max_event_timestamp = self._entities.range(self.config)
        return found

    def to_df(self, validation_reference: Any = None, timeout: int | None = None) -> pd.DataFrame:
        table = self.to_arrow(validation_reference, timeout)
        frame = table.to_pandas()
        labels, given = self._entities.labels, self._entities.frame
        if given is not None:
            for number, column in enumerate(given.columns):
                if pa.types.is_integer(column.type) and column.null_count:  # as floats, large ones are others
                    kind = pd.UInt64Dtype() if column.type == pa.uint64() else pd.Int64Dtype()
                    frame.isetitem(number, pd.array(table[number].to_pylist(), dtype=kind))
            frame.columns = [*labels, *frame.columns[len(labels) :]]  # Arrow has names only; a frame may have numbers
        return frame

    def to_sql(self) -> str:
        query = self._entities.query
        contexts = [asdict(context) for context in self._request.contexts]
        for context in contexts:
            context["entity_selections"] = [
                '"{}" AS "{}"'.format(*selection.split(" AS ")) for selection in context["entity_selections"]
            ]
        text: str = build_point_in_time_query(
            contexts,
            # In parentheses, a semicolon is an error, and a comment must end before them.
            _without_semicolon(query) + "\n" if query else offline_utils.get_temp_entity_table_name(),
            self._entities.event_time,
            dict.fromkeys(self._entities.names).keys(),
            MULTIPLE_FEATURE_VIEW_POINT_IN_TIME_JOIN,
            self.full_feature_names,
            use_cte=query is not None,
            filter_by_created_timestamp=self._filter_by_created,
        )
        return text

    def stream(self) -> Iterator[pa.Table]:
        if self._embed:
            yield from super().stream()
            return
        with _reading(self.config) as connection, connection.cursor() as cursor:
            # One statement per slice, but one snapshot for all.
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            yield self._join(cursor)

    def _join(self, cursor: psycopg.Cursor) -> pa.Table:
        request, entities = self._request, self._entities
        cursor.execute(EXACT_TEXT + PLAIN_PLANS)
        cursor.execute(PG_TEMP_LAST)
        [(on_standby,)] = cursor.execute("SELECT pg_is_in_recovery()").fetchall()
        labels = entities.create(cursor, request.keys(), table=not on_standby)
        probes = Probes(cursor, entities)
        sources = [_view(cursor, context, probes) for context in request.contexts]
        bounds = sorted({bound for source in sources for bound in source.bounds})
        probes.create(bounds, table=not on_standby)
        for number, (source, context) in enumerate(zip(sources, request.contexts, strict=True)):
            if not source.indexed and on_standby:
                keys = ", ".join([*source.keys, source.event_time])
                raise ValueError(
                    f"The source of {context.name} has no index on {keys}, and a standby can have no temporary table "
                    "that has one: make the index, or read from the primary."
                )
            if not source.indexed:
                source.copy(cursor, f"larder_source_{number}")

        columns, selected = [(ROW, 20)], [sql.Identifier("probe", ROW)]
        for number, (source, context) in enumerate(zip(sources, request.contexts, strict=True)):
            selected += [sql.Identifier(f"view_{number}", f"f{i}") for i in range(len(source.features))]
            columns += zip(request.names(context), source.codes, strict=True)
        parts: list[pa.Table] = []
        for first, last in probes.slices():
            start = bounds[first - 1] if first else None
            end = bounds[last] if last < len(bounds) else None
            query = sql.SQL("SELECT {} FROM {} AS probe{}").format(
                _commas(selected),
                probes.between(first, last),
                _joins(sources, start, end, filter_by_created=self._filter_by_created),
            )
            parts.extend(_read(cursor, query, columns))
        joined = _table(parts, columns)
        joined = joined.take(pc.sort_indices(joined[0]))
        labels = labels.take(joined[0])
        names = [*labels.column_names, *joined.column_names[1:]]
        return pa.Table.from_arrays([*labels.columns, *joined.columns[1:]], names=names)


@dataclass
class Entities:
    """The entity rows: the columns of a frame as Arrow has them, or a query and the types of its columns.

    In the database they are a temporary table, whose columns are c0, c1, …: names as a user gives them meet no others.
    A standby gets them as literals.
    """

    labels: list[Any]
    event_time: str
    query: str | None = None
    codes: list[int] = field(default_factory=list)
    frame: pa.Table | None = None
    times: pa.ChunkedArray | None = None  # of the frame
    read: tuple[datetime | None, datetime | None] | None = None
    relation: sql.Composable = field(default_factory=lambda: ENTITIES)
    described: sql.Composable = field(default_factory=lambda: ENTITIES)  # the same columns, and perhaps no rows

    @property
    def names(self) -> list[str]:
        return [str(label) for label in self.labels]

    def column(self, name: str) -> str:
        return f"c{self.names.index(name)}"

    @classmethod
    def of_frame(cls, frame: pd.DataFrame) -> "Entities":
        """Take a frame's columns; the event times as ISO 8601, dates or datetimes, the rest whatever they are."""
        labels = [*frame.columns]
        if isinstance(frame.columns, pd.MultiIndex):
            raise ValueError(
                "The columns of the entity dataframe are a MultiIndex: give them plain names, for example by "
                "entity_df.columns = ['_'.join(map(str, label)) for label in entity_df.columns]."
            )
        _assert_distinct(labels)
        schema = dict(zip(map(str, labels), frame.dtypes, strict=True))
        event_time = offline_utils.infer_event_timestamp_from_entity_df(schema)
        place = [*schema].index(event_time)
        times = _moments(event_time, frame.iloc[:, place])
        columns = [
            times if number == place else _column(label, frame.iloc[:, number]) for number, label in enumerate(labels)
        ]
        table = pa.Table.from_arrays([*map(_as_stock, columns)], names=[*schema])
        return cls(labels, event_time, frame=table, times=times)

    @classmethod
    def of_query(cls, config: RepoConfig, query: str) -> "Entities":
        """Ask PostgreSQL for the columns of a query, which is not run."""
        with _get_conn(config.offline_store) as connection:
            prepared = connection.pgconn.prepare(b"", query.encode(connection.info.encoding, "replace"))
            described = connection.pgconn.describe_prepared(b"")
            if prepared.status != psycopg.pq.ExecStatus.COMMAND_OK:
                message = prepared.error_message.decode(connection.info.encoding, "replace").strip()
                if "multiple commands" in message:
                    message = "it holds several statements, and has to be one"
                raise ValueError(f"The entity query cannot be run: {message}")
            labels = [(described.fname(n) or b"").decode(connection.info.encoding) for n in range(described.nfields)]
            codes = [described.ftype(n) for n in range(described.nfields)]
        if not labels:
            raise ValueError("The entity query is to be a SELECT: it has no columns.")
        _assert_distinct(labels)
        known = dict(zip(labels, codes, strict=True))
        event_time = offline_utils.infer_event_timestamp_from_entity_df(
            {name: np.dtype("datetime64[us]" if code in TIMES else object) for name, code in known.items()}
        )
        if known[event_time] not in TIMES:
            raise ValueError(
                f"The column {event_time!r} of the entity query has to be a timestamp: write "
                f'"{event_time}"::timestamptz AS "{event_time}".'
            )
        return cls(labels, event_time, query=query, codes=codes)

    def create(self, cursor: psycopg.Cursor, keys: list[str], *, table: bool) -> pa.Table:
        """Create the temporary table, or literals, with keys and times at least. Return all columns of all rows."""
        needed = [*dict.fromkeys([*keys, self.event_time])]
        names = [self.column(name) for name in needed]
        if self.frame is not None:
            assert self.times is not None
            columns = [self.times if name == self.event_time else _key(name, self.frame[name]) for name in needed]
            if table:
                _upload(cursor, pa.Table.from_arrays(columns, names=names), ENTITIES, temporary=True)
            else:
                self._as_literals(names, columns, [str(_pg_type(column.type)) for column in columns])
            return self.frame
        described: Columns = [(f"c{number}", code) for number, code in enumerate(self.codes)]
        if table:
            self._run(cursor)
            every = sql.SQL("SELECT * FROM {}").format(ENTITIES)
            labels = _table(_read(cursor, every, described), described)
        else:
            # Run once: its rows may be others, or in another order, when it runs again. Text is exact.
            every = sql.SQL("SELECT *, {} FROM ({}\n) AS query ({})").format(
                _commas(sql.SQL("{}::text").format(sql.Identifier(name)) for name in names),
                sql.SQL(_without_semicolon(self.query or "")),
                _commas(sql.Identifier(name) for name, _ in described),
            )
            both = [*described, *((f"text of {name}", TEXT) for name in names)]
            labels = _table(_read(cursor, every, both), both)
            kinds = [_element(cursor, self.codes[self.names.index(name)]) for name in needed]
            self._as_literals(names, labels.columns[len(described) :], kinds)
            labels = labels.select(range(len(described)))
        labels = labels.rename_columns(self.names)
        self.read = _least_and_greatest(labels[self.event_time])
        return labels

    def _as_literals(self, names: list[str], columns: list[pa.ChunkedArray], kinds: list[str]) -> None:
        self.relation = _literals(names, [column.to_pylist() for column in columns], kinds)
        self.described = _literals(names, [[] for _ in columns], kinds)

    def _run(self, cursor: psycopg.Cursor) -> None:
        assert self.query is not None
        names = _commas(sql.Identifier(f"c{number}") for number in range(len(self.labels)))
        # The query comes last and without parentheses: it may end in a semicolon or a comment.
        statement = sql.SQL("CREATE TEMPORARY TABLE {} ({}) AS ").format(ENTITIES, names) + sql.SQL(self.query)
        try:
            cursor.execute(statement)
        except psycopg.errors.SyntaxError as error:
            raise ValueError(f"The entity query is to be a SELECT: {error}") from error

    def range(self, config: RepoConfig) -> tuple[datetime | None, datetime | None]:
        """The first and the last event time."""
        if self.times is not None:
            return _least_and_greatest(self.times)
        if self.read is None:
            with _get_conn(config.offline_store) as connection, connection.cursor() as cursor:
                cursor.execute(PG_TEMP_LAST)
                self._run(cursor)
                column = self.column(self.event_time)
                query = sql.SQL("SELECT {} FROM {}").format(sql.Identifier(column), ENTITIES)
                columns = [(column, self.codes[self.names.index(self.event_time)])]
                self.read = _least_and_greatest(_table(_read(cursor, query, columns), columns)[0])
        return self.read


def _without_semicolon(query: str) -> str:
    """One statement without the semicolon that ends it, and what follows."""
    return next((query[: found.start()] for found in SEMICOLON.finditer(query) if found[2]), query)


def _assert_distinct(labels: list[Any]) -> None:
    if twice := [name for name, count in Counter(map(str, labels)).items() if count > 1]:
        raise ValueError(f"The entity rows have several columns {twice[0]!r}: rename all but one.")


def _assert_names(request: Request, entities: Entities) -> None:
    """Every join key is a column of the entity rows, and no column is named like a feature of the result."""
    for context in request.contexts:
        for key in context.entities:
            if key not in entities.names:
                raise ValueError(
                    f"The entity rows have no column {key!r}, the join key of {context.name}. They have: "
                    f"{', '.join(entities.names)}. If it is the index of a dataframe, give entity_df.reset_index()."
                )
    features = request.all_names()
    if both := [name for name in entities.names if name in features]:
        raise ValueError(
            f"The entity rows have a column {both[0]!r}, and so is a feature named: rename the column"
            f"{'' if request.full_feature_names else ', or ask with full_feature_names=True'}."
        )
    # An on-demand view finds its features by either of their names, whatever the names in the result.
    for view in request.on_demand:
        for source in view.source_feature_view_projections.values():
            either = {name for feature in source.features for name in (feature.name, f"{source.name}__{feature.name}")}
            if both := [name for name in entities.names if name in either]:
                raise ValueError(
                    f"The entity rows have a column {both[0]!r}, and the on-demand view {view.name} reads a feature of "
                    "that name: rename the column."
                )
    if twice := [name for name, count in Counter(features).items() if count > 1]:
        raise ValueError(f"Several features are named {twice[0]!r}: ask with full_feature_names=True.")


def _moments(name: str, series: pd.Series) -> pa.ChunkedArray:
    """Event times as Arrow timestamps in µs; they are UTC where they say no zone."""
    if isinstance(series.dtype, pd.PeriodDtype):
        raise ValueError(
            f"The column {name!r} of the entity dataframe holds periods, not moments: say whether their start or their "
            f"end is meant, by entity_df[{name!r}].dt.to_timestamp(how='end')."
        )
    if pd.api.types.is_datetime64_any_dtype(series.dtype) and pa.types.is_timestamp((found := _chunked(series)).type):
        if found.type.unit == "ns":
            found = pc.floor_temporal(found, unit="microsecond")
        try:
            found = found.cast(pa.timestamp("us", found.type.tz)).cast(pa.timestamp("us", "UTC"))
            beyond = found.cast(pa.int64())
            beyond = pc.any(pc.or_(pc.less(beyond, FIRST), pc.greater(beyond, LAST))).as_py()
        except pa.ArrowInvalid:
            beyond = True
        if beyond:
            raise ValueError(f"The column {name!r} of the entity dataframe holds years beyond 1 to 9999.")
        return found
    if series.isna().all():
        return pa.chunked_array([pa.nulls(len(series), pa.timestamp("us", "UTC"))])
    moments = []
    for row, value in enumerate(series.astype(object)):
        try:
            moments.append(_moment(value))
        except (ValueError, OverflowError) as error:
            raise ValueError(
                f"Row {row} of the entity dataframe has {value!r} as {name!r}. It may be a datetime, a date, or text "
                "in ISO 8601 such as 2024-03-28 or 2024-03-28T16:00:00-04:00; otherwise convert the column with "
                "pandas.to_datetime."
            ) from error
    return pa.chunked_array([pa.array(moments, pa.timestamp("us", "UTC"))])


def _moment(value: Any) -> datetime | None:
    if value is None or value is pd.NaT or value is pd.NA:
        return None
    if isinstance(value, float | np.datetime64) and value != value:
        return None
    if isinstance(value, np.datetime64):
        value = pd.Timestamp(value)
    if isinstance(value, str):
        value = datetime.fromisoformat(value.strip())
    elif isinstance(value, pd.Timestamp):
        value = value.to_pydatetime(warn=False)
    elif isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)  # noqa: DTZ001 -- it gets its zone below
    if not isinstance(value, datetime):
        raise ValueError("not a time")
    return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)


def _least_and_greatest(times: pa.ChunkedArray) -> tuple[datetime | None, datetime | None]:
    """The first and the last of times in µs, as UTC; what Python cannot hold is its first or its last."""
    found = pc.min_max(times.cast(pa.int64())).as_py()
    least, greatest = (
        None if micros is None else EPOCH + timedelta(microseconds=min(max(micros, FIRST), LAST))
        for micros in (found["min"], found["max"])
    )
    return least, greatest


def _column(label: Any, series: pd.Series) -> pa.ChunkedArray:
    try:
        return _chunked(series)
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        raise ValueError(
            f"The column {label!r} of the entity dataframe cannot be kept, because Arrow has no type for all its "
            f"values: {error}. Give it one type, for example by entity_df[{label!r}].astype(str), or leave it out."
        ) from error


def _chunked(series: pd.Series) -> pa.ChunkedArray:
    if isinstance(series.dtype, pd.SparseDtype):
        series = series.astype(series.dtype.subtype)
    found = pa.array(series, from_pandas=True)
    return found if isinstance(found, pa.ChunkedArray) else pa.chunked_array([found])


def _as_stock(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column in the type that it has with stock after its way through PostgreSQL; others stay as they are."""
    kind = column.type
    if pa.types.is_timestamp(kind):
        if kind.unit == "ns":
            column = pc.floor_temporal(column, unit="microsecond")
        return column.cast(pa.timestamp("us", kind.tz)).cast(pa.timestamp("us"))
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return column.cast(pa.string())
    target = {
        pa.uint8(): pa.int32(),
        pa.int16(): pa.int32(),
        pa.uint16(): pa.int32(),
        pa.uint32(): pa.int64(),
        pa.float32(): pa.float64(),
    }
    return column.cast(target[kind]) if kind in target else column


def _key(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A join key as it is sent to PostgreSQL."""
    if column.null_count == len(column):
        return pa.chunked_array([pa.nulls(len(column))])
    if pa.types.is_dictionary(column.type):
        column = _as_stock(column.cast(column.type.value_type))
    if column.type == pa.uuid():
        return pa.chunked_array([pa.array([str(one) if one else None for one in column.to_pylist()], pa.string())])
    if pa.types.is_nested(column.type):
        raise ValueError(f"The join key {name!r} of the entity dataframe holds {column.type}: it has to be one value.")
    if not _pg_type(column.type):
        raise ValueError(
            f"The join key {name!r} of the entity dataframe is {column.type}, and PostgreSQL has no type for that: "
            "convert it."
        )
    if pa.types.is_timestamp(column.type):
        return column.cast(pa.timestamp("us", "UTC"))
    if pa.types.is_string(column.type):
        # PostgreSQL has no text with NUL, so that such a key finds nothing.
        column = pc.if_else(pc.match_substring(column, "\0"), pa.scalar(None, pa.string()), column)
    return column


class Probes:
    """The temporary table of the rows that look for features: their number, their time, their keys, their slice."""

    def __init__(self, cursor: psycopg.Cursor, entities: Entities) -> None:
        self._cursor = cursor
        self._entities = entities
        described = dict(_describe(cursor, sql.SQL("SELECT * FROM {}").format(entities.described)))
        self._codes = {name: described.get(entities.column(name)) for name in entities.names}
        self.time_code = described[entities.column(entities.event_time)]
        self._keys: dict[str, sql.Composable] = {}
        # On a standby: the rows, their values as text, and the names and types of their columns.
        self._rows: list[tuple[Any, ...]] | None = None
        self._names: list[str] = []
        self._kinds: list[str] = []

    def key(self, context: FeatureViewQueryContext, name: str, code: int) -> tuple[str, bool]:
        """The column that is compared with a key of a source of this type, and whether the source's has to be text."""
        column, own = self._entities.column(name), self._codes[name]
        value: sql.Composable = sql.Identifier(column)
        as_text = False
        frame = self._entities.frame
        if frame is not None and frame[name].null_count == len(frame):
            column, value = f"{column}_null_{code}", sql.SQL("NULL::{}").format(sql.SQL(_type(self._cursor, code)))
        elif own == code or any({own, code} <= family for family in SAME_FAMILY):
            pass
        elif own in NUMBERS and code in INTEGERS:
            # 2^63 as a float is exact; NaN is greater than any number.
            column, value = (
                f"{column}_integer",
                sql.SQL("CASE WHEN {0} = trunc({0}) AND {0} >= -2^63 AND {0} < 2^63 THEN {0}::bigint END").format(
                    value
                ),
            )
        elif own in NUMBERS and code in NUMBERS:
            kind = "float8" if code in FLOATS else "numeric"
            column, value = f"{column}_{kind}", sql.SQL("{}::" + kind).format(value)
        elif own in {1042, 2950} and code in TEXTS:
            column, value = f"{column}_text", sql.SQL("{}::text").format(value)
        elif own in TEXTS and code not in NUMBERS | TIMES | {16, 17}:
            as_text = True
        else:
            kinds = [_type(self._cursor, one) for one in (own, code)]
            raise ValueError(
                f"The join key {name!r} is {kinds[0]} in the entity rows and {kinds[1]} in the source of "
                f"{context.name}: give it the type of the source, for example with astype or a cast."
            )
        self._keys[column] = value
        return column, as_text

    def create(self, bounds: list[datetime], *, table: bool) -> None:
        """Create them by slice, key and time: neighbours find the same pages of an index in the processor's cache."""
        time = sql.Identifier(self._entities.column(self._entities.event_time))
        number: sql.Composable = sql.SQL("0")
        if bounds:
            array = sql.SQL("ARRAY[{}]").format(_commas(map(_literal, bounds)))
            number = sql.SQL("coalesce(width_bucket({}, {}), 0)").format(time, array)
        values = {ROW: sql.SQL("row_number() OVER () - 1"), TIME: time, SLICE: number, **self._keys}
        selected = _commas(sql.SQL("{} AS {}").format(value, sql.Identifier(name)) for name, value in values.items())
        rows = sql.SQL("SELECT * FROM (SELECT {} FROM {}) AS entity ORDER BY {}")
        order = _commas(map(sql.Identifier, [SLICE, *self._keys, TIME]))
        if not table:
            columns = _describe(self._cursor, rows.format(selected, self._entities.described, order))
            self._names = [name for name, _ in columns]
            self._kinds = [_element(self._cursor, code) for _, code in columns]
            texts = _commas(sql.SQL("{}::text").format(sql.Identifier(name)) for name in self._names)
            query = sql.SQL("SELECT {}, {} FROM ({}) AS probe").format(
                sql.Identifier(SLICE), texts, rows.format(selected, self._entities.relation, order)
            )
            self._rows = self._cursor.execute(query).fetchall()
            return
        statement = sql.SQL("CREATE TEMPORARY TABLE {} AS ").format(PROBES)
        self._cursor.execute(statement + rows.format(selected, ENTITIES, order))
        self._cursor.execute(sql.SQL("CREATE INDEX ON {} ({})").format(PROBES, sql.Identifier(SLICE)))
        self._cursor.execute(sql.SQL("ANALYZE {}").format(PROBES))

    def slices(self) -> list[tuple[int, int]]:
        """First and last number of the slices for each statement: those with few rows go together."""
        counts = sql.SQL("SELECT {0}, count(*) FROM {1} GROUP BY {0} ORDER BY {0}")
        if self._rows is not None:
            sizes = sorted(Counter(row[0] for row in self._rows).items())
        else:
            sizes = self._cursor.execute(counts.format(sql.Identifier(SLICE), PROBES)).fetchall()
        found: list[tuple[int, int]] = []
        first, size = None, 0
        for number, rows in sizes:
            first, size = number if first is None else first, size + rows
            if size >= ROWS_PER_STATEMENT:
                found.append((first, number))
                first, size = None, 0
        return found if first is None else [*found, (first, number)]

    def between(self, first: int, last: int) -> sql.Composable:
        """The rows of the slices from the first to the last number."""
        if self._rows is None:
            rows = sql.SQL("(SELECT * FROM {} WHERE {} BETWEEN {} AND {})")
            return rows.format(PROBES, sql.Identifier(SLICE), first, last)
        within = [row[1:] for row in self._rows if first <= row[0] <= last]
        return _literals(self._names, [[*column] for column in zip(*within, strict=True)], self._kinds)


def _range(views: list[FeatureView], start: Any, end: Any) -> tuple[datetime, datetime]:
    for name, value in (("start_date", start), ("end_date", end)):
        if value is not None and not isinstance(value, datetime):
            raise ValueError(
                f"{name} is {value!r}; it has to be a datetime, for example pandas.Timestamp({str(value)!r})."
            )
    found: tuple[datetime, datetime] = compute_non_entity_date_range(views, start_date=start, end_date=end)
    return found


def _between(request: Request, start: datetime, end: datetime) -> RetrievalJob:
    """The features between two times, both included: a view's rows, or the join of several views at all their times."""

    def rows(context: FeatureViewQueryContext, columns: Iterable[sql.Composable], distinct: str = "") -> str:
        query = sql.SQL("SELECT {} {} FROM {} AS source WHERE source.{} BETWEEN {} AND {}")
        time = sql.Identifier(context.timestamp_field)
        relation = sql.SQL(context.table_subquery)
        text: str = query.format(
            sql.SQL(distinct), _commas(columns), relation, time, _literal(start), _literal(end)
        ).as_string()
        return text

    def renamed(pairs: Iterable[tuple[str, str]]) -> Iterator[sql.Composable]:
        return (
            sql.SQL("source.{} AS {}").format(sql.Identifier(column), sql.Identifier(name)) for column, name in pairs
        )

    def keys(context: FeatureViewQueryContext) -> list[tuple[str, str]]:
        pairs = zip(_key_columns(context), context.entities, strict=True)
        return sorted(pairs, key=lambda pair: pair[1])

    if len({frozenset(context.entities) for context in request.contexts}) > 1:
        raise ValueError(
            f"The feature views {', '.join(context.name for context in request.contexts)} have different entities, so "
            "that a range of times makes no common rows: ask for them one by one, or give an entity_df."
        )
    names = [name for context in request.contexts for name in request.names(context)]
    metadata = RetrievalMetadata(request.feature_refs, request.keys(), start, end)
    if len(request.contexts) == 1:
        [context] = request.contexts
        pairs = [(context.timestamp_field, "event_timestamp")]
        if context.created_timestamp_column:
            pairs.append((context.created_timestamp_column, "created_timestamp"))
        pairs += [
            *zip(_key_columns(context), context.entities, strict=True),
            *zip(context.features, names, strict=True),
        ]
        query = rows(context, renamed(pairs))
        stock = PostgreSQLRetrievalJob(query, request.config, request.full_feature_names, request.on_demand, metadata)
        job = TimescaleRetrievalJob(stock)
        job.registry, job.sources = request.registry, request.contexts
        return job
    times = " UNION ".join(
        rows(context, renamed([(context.timestamp_field, "event_timestamp"), *keys(context)]), "DISTINCT")
        for context in request.contexts
    )
    entities = Entities.of_query(request.config, f"{times} ORDER BY event_timestamp")
    # As stock: a value from before the range is not seen in it.
    within = [
        replace(context, table_subquery=f"({rows(context, [sql.SQL('source.*')])})") for context in request.contexts
    ]
    return PointInTimeJob(replace(request, contexts=within), entities, filter_by_created=False)


def _new_table(
    cursor: psycopg.Cursor, name: str, sources: Iterable[FeatureViewQueryContext], *, replacing: bool
) -> sql.Identifier:
    """The table that is to be created; its name is understood as where it is read: unquoted letters are small ones."""
    try:
        [(parts,)] = cursor.execute("SELECT parse_ident(%s)", [name]).fetchall()
    except psycopg.errors.InvalidParameterValue as error:
        raise ValueError(f"The table of a saved dataset cannot be named {name!r}: {error}") from error
    found = cursor.execute("SELECT relkind::text FROM pg_class WHERE oid = to_regclass(%s)", [name]).fetchall()
    if found and not replacing:
        raise ValueError(f"The table {name} is there already: choose another name, or give allow_overwrite=True.")
    if found not in ([], [("r",)]):
        raise ValueError(f"{name} is no plain table, and is not overwritten: choose another name.")
    for context in sources:
        same = "SELECT to_regclass(%s) = to_regclass(%s)"
        if found and cursor.execute(same, [name, context.table_subquery]).fetchall() == [(True,)]:
            raise ValueError(f"{name} is a source of {context.name}, and is not overwritten: choose another name.")
    return sql.Identifier(*parts)


def _assert_registry_is_writable(registry: BaseRegistry | None) -> None:
    if not isinstance(registry, SqlRegistry) or registry.write_engine.dialect.name != "postgresql":
        return
    with registry.write_engine.connect() as connection:
        allowed = connection.exec_driver_sql("SELECT has_table_privilege('saved_datasets', 'INSERT, UPDATE')").scalar()
    if not allowed:
        raise ValueError(
            "This account may not write the registry, so that Feast would not find the saved dataset again: keep the "
            "result of to_arrow() or to_df() as a file, for example as Parquet."
        )


def _assert_retrievable(table: pa.Table, metadata: RetrievalMetadata, *, full_feature_names: bool) -> None:
    """Feast reads a saved dataset by fixed names, between the first and the last event time."""
    if "event_timestamp" not in table.column_names:
        raise ValueError("Feast reads saved datasets by the column 'event_timestamp': name the column of times so.")
    if not metadata.min_event_timestamp or not metadata.max_event_timestamp:
        raise ValueError("No entity row has an event time, and Feast reads saved datasets by it: nothing is saved.")
    if metadata.max_event_timestamp.year >= 9999:
        raise ValueError("Feast cannot read saved datasets with event times in the year 9999: leave those rows out.")
    for ref in metadata.features:
        name = _strip_version_from_ref(ref).replace(":", "__") if full_feature_names else ref.split(":")[1]
        if name not in table.column_names:
            raise ValueError(f"Feast would look for a column {name!r} in the saved dataset, and there is none.")


@dataclass
class Source:
    """Where a feature view's rows are, and what helps to find the newest of them."""

    relation: sql.Composable
    keys: list[str]  # columns of the relation
    as_text: list[bool]  # whether they are to be compared as text
    entities: list[str]  # the probes' columns that they are compared with
    event_time: str
    time_code: int
    created: str | None
    features: list[str]
    codes: list[int]  # types of the features
    ttl: int  # seconds; 0 is for ever
    indexed: bool = False
    unique: bool = False  # one row at most is the newest
    bounds: list[datetime] = field(default_factory=list)  # of chunks, where there are some

    def copy(self, cursor: psycopg.Cursor, name: str) -> None:
        """Put what the probes may find into a temporary table with an index, and take that as the relation."""
        time, probe_time = sql.Identifier("source", self.event_time), sql.Identifier(TIME)
        keys: list[sql.Composable] = [
            sql.SQL("{}::text" if as_text else "{}").format(sql.Identifier("source", key))
            for key, as_text in zip(self.keys, self.as_text, strict=True)
        ]
        conditions = [sql.SQL("{} <= (SELECT max({}) FROM {})").format(time, probe_time, PROBES)]
        if self.ttl:
            conditions.append(
                sql.SQL("{} >= (SELECT min({}) - {} FROM {})").format(time, probe_time, _seconds(self.ttl), PROBES)
            )
        if keys:
            entities = _commas(map(sql.Identifier, self.entities))
            conditions.append(sql.SQL("({}) IN (SELECT {} FROM {})").format(_commas(keys), entities, PROBES))
        # Keys have names of their own: a column may be a key and, as it is, a feature.
        own = [f"k{number}" for number in range(len(keys))]
        columns = dict.fromkeys([self.event_time, *([self.created] if self.created else []), *self.features])
        selected = [
            *(sql.Identifier("source", column) for column in columns),
            *(sql.SQL("{} AS {}").format(key, sql.Identifier(f"key {k}")) for k, key in zip(own, keys, strict=True)),
        ]
        table = sql.Identifier("pg_temp", name)
        cursor.execute(
            sql.SQL("CREATE TEMPORARY TABLE {} AS SELECT {} FROM {} AS source WHERE {}").format(
                table, _commas(selected), self.relation, sql.SQL(" AND ").join(conditions)
            )
        )
        self.keys = [f"key {k}" for k in own]
        indexed = _commas(map(sql.Identifier, [*self.keys, self.event_time]))
        cursor.execute(sql.SQL("CREATE INDEX ON {} ({})").format(table, indexed))
        cursor.execute(sql.SQL("ANALYZE {}").format(table))
        self.relation = table

    def newest(
        self,
        start: datetime | None,
        end: datetime | None,
        *,
        filter_by_created: bool,
        found: Sequence[sql.Composable] = (),
    ) -> sql.Composable:
        """The newest rows for a probe whose time is not before start and before end; None is an open end.

        `found` are the times of the rows that other views have for the probe: this view is first searched from the
        latest of them on. Whatever they are, the rows are the same; but without a lower bound near the row, the search
        reads all older rows of the key in a page of the index.
        """
        time, probe_time = sql.Identifier("source", self.event_time), sql.Identifier("probe", TIME)
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
            sql.SQL("{} AS {}").format(sql.Identifier("source", column), sql.Identifier(name))
            for name, column in {TIME: self.event_time, **{f"f{i}": f for i, f in enumerate(self.features)}}.items()
        )

        def between(start: datetime | None, end: datetime | None, *more: sql.Composable) -> sql.Composable:
            # Literals, so that the planner leaves out all other chunks.
            window = [
                sql.SQL("{} " + operator + " {}").format(time, _literal(bound))
                for operator, bound in ((">=", start), ("<", end))
                if bound and self.bounds
            ]
            return sql.SQL("(SELECT {} FROM {} AS source WHERE {} ORDER BY {} FETCH FIRST 1 ROW {})").format(
                columns,
                self.relation,
                sql.SQL(" AND ").join([*conditions, *more, *window]),
                _commas(order),
                sql.SQL("ONLY" if self.unique else "WITH TIES"),
            )

        oldest = _before(start, self.ttl)
        if not self.unique:
            return between(oldest, end)
        # Most probes find their row in the first branch, one scan of one index. An Append opens the next only when
        # those before it have nothing.
        known = [sql.SQL("greatest({})").format(_commas(found))] if found else []
        known += [sql.SQL("{} - {}").format(probe_time, _seconds(NEAR))]
        near = sql.SQL("{} >= coalesce({})").format(time, _commas(known))
        older = [between(start, end), between(oldest, start)] if start and self.bounds else [between(oldest, end)]
        branches = [between(start, end, near), *older]
        return sql.SQL("({} LIMIT 1)").format(sql.SQL(" UNION ALL ").join(branches))


def _joins(
    sources: Sequence[Source], start: datetime | None, end: datetime | None, *, filter_by_created: bool
) -> sql.Composable:
    """The newest rows of all sources for a probe: view_0, view_1, …; each looks first where those before it found."""
    found: defaultdict[Any, list[sql.Composable]] = defaultdict(list)
    joins = []
    for number, source in enumerate(sources):
        view = f"view_{number}"
        alike = found[tuple(sorted(source.entities)), source.time_code]
        newest = source.newest(start, end, filter_by_created=filter_by_created, found=alike)
        joins.append(sql.SQL(" LEFT JOIN LATERAL {} AS {} ON true").format(newest, sql.Identifier(view)))
        alike.append(sql.Identifier(view, TIME))
    return sql.SQL("").join(joins)


def _view(cursor: psycopg.Cursor, context: FeatureViewQueryContext, probes: Probes) -> Source:
    """The source of a view, whose keys and times can be compared with those of the probes."""
    keys = _key_columns(context)
    relation = sql.SQL(context.table_subquery)
    names = _commas(sql.Identifier("source", name) for name in [*keys, context.timestamp_field, *context.features])
    codes = [code for _, code in _describe(cursor, sql.SQL("SELECT {} FROM {} AS source").format(names, relation))]
    time_code = codes[len(keys)]
    if time_code not in TIMES:
        raise ValueError(
            f"The column {context.timestamp_field!r} in the source of {context.name} is {_type(cursor, time_code)}: "
            "event times have to be timestamptz."
        )
    compared = [probes.key(context, name, code) for name, code in zip(context.entities, codes, strict=False)]
    source = Source(
        relation=relation,
        keys=keys,
        as_text=[as_text for _, as_text in compared],
        entities=[column for column, _ in compared],
        event_time=context.timestamp_field,
        time_code=time_code,
        created=context.created_timestamp_column or None,
        features=context.features,
        codes=codes[len(keys) + 1 :],
        ttl=context.ttl,
    )
    if not context.table_subquery.startswith("(") and not any(source.as_text):
        index = _index(cursor, context.table_subquery, keys, context.timestamp_field)
        source.indexed = index is not None
        source.unique = bool(index and index.unique and {*index.columns} <= {*keys, source.event_time, source.created})
        if index and time_code == probes.time_code:
            naive = time_code == TIMESTAMP
            source.bounds = _bounds(cursor, context.table_subquery, source.event_time, naive=naive)
    return source


def _key_columns(context: FeatureViewQueryContext) -> list[str]:
    return [selection.rsplit(" AS ", 1)[0] for selection in context.entity_selections]  # "column AS join_key"


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


def _reading(config: RepoConfig) -> psycopg.Connection:
    """Connect to the first standby that answers as one, else to the host that is configured."""
    store: TimescaleOfflineStoreConfig = config.offline_store
    for host in store.standbys:
        info = make_conninfo(_get_conninfo(store), host=host)
        with contextlib.suppress(psycopg.OperationalError):
            return psycopg.connect(info, connect_timeout=5, target_session_attrs="standby", **_get_conn_kwargs(store))
    connection: psycopg.Connection = _get_conn(store)
    return connection


def _literals(names: list[str], columns: Sequence[list[Any]], kinds: list[str]) -> sql.Composed:
    """Rows as a relation that needs no table."""
    arrays = _commas(
        sql.SQL("{}::{}[]").format(sql.Literal(column), sql.SQL(kind))
        for column, kind in zip(columns, kinds, strict=True)
    )
    relation = sql.SQL("(SELECT * FROM unnest({}) AS literal ({}))")
    return relation.format(arrays, _commas(map(sql.Identifier, names)))


def _element(cursor: psycopg.Cursor, code: int | None) -> str:
    """The type of an array's elements: `character` would be one character."""
    return "bpchar" if code == BPCHAR else _type(cursor, code)


def _type(cursor: psycopg.Cursor, code: int | None) -> str:
    """The name of a type, as SQL has it."""
    [(name,)] = cursor.execute("SELECT %s::oid::regtype::text", [code]).fetchall()
    return str(name)


def _describe(cursor: psycopg.Cursor, query: sql.Composable) -> Columns:
    """Names and type codes of the columns of a query."""
    cursor.execute(sql.SQL("SELECT * FROM ({}\n) AS query LIMIT 0").format(query))
    return [(column.name, column.type_code) for column in cursor.description or ()]


def _read_as_text(code: int) -> bool:
    return code in READ_AS_TEXT or pg_type_code_to_pg_type(code) == "unknown"


def _schema(columns: Columns) -> pa.Schema:
    return pa.schema(
        [(name, pa.string() if _read_as_text(code) else pg_type_code_to_arrow(code)) for name, code in columns]
    )


def _table(parts: Iterable[pa.Table], columns: Columns) -> pa.Table:
    return pa.concat_tables([_schema(columns).empty_table(), *parts]).combine_chunks()


def _read(cursor: psycopg.Cursor, query: sql.Composed, columns: Columns) -> Iterator[pa.Table]:
    """The rows of a query, in the types and with the values that stock gives them, some at a time."""
    schema = _schema(columns)
    names = [f"c{number}" for number in range(len(columns))]

    def value(name: str, code: int) -> sql.Composable:
        # Times are read as µs since 1970: as text, Arrow takes none before the year 1 or after 9999.
        way = "(extract(epoch FROM {}) * 1000000)::bigint" if code in TIMES else "{}"
        return sql.SQL("{}::text" if _read_as_text(code) else way).format(sql.Identifier(name))

    values = _commas(value(name, code) for name, (_, code) in zip(names, columns, strict=True))
    plain = sql.SQL("SELECT {} FROM ({}\n) AS query ({})").format(values, query, _commas(map(sql.Identifier, names)))
    kinds = [pa.int64() if code in TIMES else kind for kind, (_, code) in zip(schema.types, columns, strict=True)]

    def typed(arrays: Iterable[Any]) -> pa.Table:
        return pa.Table.from_arrays(
            [array.cast(kind) for array, kind in zip(arrays, schema.types, strict=True)], schema=schema
        )

    try:
        if all(code in EXACT_AS_CSV or _read_as_text(code) for _, code in columns):
            for lines in _copied(cursor, plain):
                yield typed(_parsed(lines, names, kinds).columns)
            return
        with cursor.connection.cursor(name="larder_rows") as rows:
            rows.execute(plain)
            while some := rows.fetchmany(ROWS_AT_ONCE):
                yield typed(pa.array(column) for column in zip(*some, strict=True))
    except psycopg.errors.FeatureNotSupported as error:
        times = ", ".join(name for name, code in columns if code in TIMES)
        raise ValueError(
            f"One of the columns of times ({times}) holds infinity, for which Arrow and pandas have no value: "
            "make it NULL in the source or in the query."
        ) from error


def _copied(cursor: psycopg.Cursor, query: sql.Composed) -> Iterator[bytes]:
    """The rows of a query as CSV, some at a time."""
    with cursor.copy(sql.SQL("COPY ({}) TO STDOUT (FORMAT csv)").format(query)) as copy:
        lines, size = [], 0
        for line in copy:
            lines.append(bytes(line))
            size += len(line)
            if size >= BYTES_AT_ONCE:
                yield b"".join(lines)
                lines, size = [], 0
        if lines:
            yield b"".join(lines)


def _parsed(lines: bytes, names: list[str], kinds: list[pa.DataType]) -> pa.Table:
    return pyarrow.csv.read_csv(
        io.BytesIO(lines),
        read_options=pyarrow.csv.ReadOptions(column_names=names),
        # Text may have line breaks; a single column that is NULL is an empty line.
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=False),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict(zip(names, kinds, strict=True)),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
            true_values=["t"],
            false_values=["f"],
        ),
    )


def _upload(cursor: psycopg.Cursor, table: pa.Table, target: sql.Identifier, *, temporary: bool = False) -> None:
    """Create a table of an Arrow table's rows. Raises ValueError for what PostgreSQL cannot hold."""
    arrays, kinds = [], []
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if len(name.encode()) > NAME_BYTES:
            raise ValueError(f"PostgreSQL has no names of more than {NAME_BYTES} bytes: rename the column {name!r}.")
        if not (kind := _pg_type(column.type)):
            raise ValueError(f"PostgreSQL has no type for the column {name!r}, {column.type}: leave it out.")
        if (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)) and pc.any(
            pc.match_substring(column, "\0")
        ).as_py():
            raise ValueError(f"The column {name!r} holds text with the character NUL, which PostgreSQL cannot hold.")
        arrays.append(column)
        kinds.append(kind)
    columns = _commas(
        sql.SQL("{} " + kind).format(sql.Identifier(name)) for name, kind in zip(table.column_names, kinds, strict=True)
    )
    create = sql.SQL("CREATE {} {} ({})").format(sql.SQL("TEMPORARY TABLE" if temporary else "TABLE"), target, columns)
    cursor.execute(create)
    if not all(map(_plain, arrays)):
        rows = zip(*(array.to_pylist() for array in arrays), strict=True)
        escaped = sql.SQL(target.as_string().replace("%", "%%"))
        statement = sql.SQL("INSERT INTO {} VALUES ({})").format(escaped, _commas(sql.Placeholder() * len(kinds)))
        cursor.executemany(statement, [*rows])
        return
    # 0.1 as a float of 32 bits is another number as text.
    arrays = [array.cast(pa.float64()) if pa.types.is_float32(array.type) else array for array in arrays]
    buffer = io.BytesIO()
    written = pa.Table.from_arrays(arrays, names=table.column_names)
    pyarrow.csv.write_csv(written, buffer, pyarrow.csv.WriteOptions(include_header=False))
    with cursor.copy(sql.SQL("COPY {} FROM STDIN (FORMAT csv)").format(target)) as copy:
        copy.write(buffer.getbuffer())


def _pg_type(kind: pa.DataType) -> str | None:
    """PostgreSQL's type for an Arrow type; None where it has none."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        element = _pg_type(kind.value_type)
        return f"{element}[]" if element else None
    if pa.types.is_timestamp(kind):
        return "timestamptz" if kind.tz else "timestamp"
    names: list[tuple[Callable[[pa.DataType], bool], str]] = [
        (pa.types.is_boolean, "boolean"),
        (pa.types.is_int64, "bigint"),
        (pa.types.is_uint32, "bigint"),
        (pa.types.is_uint64, "numeric"),
        (pa.types.is_integer, "integer"),
        (pa.types.is_floating, "double precision"),
        (pa.types.is_decimal, "numeric"),
        (pa.types.is_string, "text"),
        (pa.types.is_large_string, "text"),
        (pa.types.is_null, "text"),
        (pa.types.is_binary, "bytea"),
        (pa.types.is_date, "date"),
    ]
    return next((name for test, name in names if test(kind)), None)


def _plain(column: pa.ChunkedArray) -> bool:
    """Whether COPY in CSV carries it."""
    kind = column.type
    if pa.types.is_string(kind):
        # Up to version 17, PostgreSQL takes a line of \. for the end, in quotes as well.
        return not pc.any(pc.match_substring(column, "\\.")).as_py()
    tests = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_timestamp, pa.types.is_null)
    return any(test(kind) for test in tests)
