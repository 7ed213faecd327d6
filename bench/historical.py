#!/usr/bin/env python3
"""Point-in-time joins: Larder, Feast's own PostgreSQL store, and SQL by hand, side by side and with equal answers.

    python bench/historical.py feature_store.yaml --symbols 500 --days 1000 --rows 100000

feature_store.yaml names an offline store whose user may create a schema (see bench/data.py). Entity rows are random
symbols at random moments. The ways:

- `larder`: get_historical_features with larder.plugins.offline_store.TimescaleOfflineStore, to Arrow;
- `stock`: the same with `type: postgres`;
- `stock_best`: with entity_select_mode: embed_query, the entity rows being in the database already, with an index;
- `sql`: COPY of the entity rows into an analyzed table with an index, LATERAL … LIMIT 1 for each view, fetchall;
- `sql_copy`: the same with all views in one statement, read by COPY into Arrow;
- `floor`: the least that can be done, knowing that all views have the same keys and times, a row in each week, and
  nothing older than the ttl. The entity rows are sorted, the event time of each is found once, and all views are joined
  at it by their primary key, chunk by chunk; COPY is binary both ways.

`floor` is what the others are compared with. Prints one JSON document; progress is on standard error.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.feather

import data
from data import INTEGERS, VIEWS
from larder.postgres import binary, tables
from measure import measure, report

FEATURES = [f"{view}:{name}" for view, names in VIEWS.items() for name in names]
NAMES = [name for names in VIEWS.values() for name in names]


def entity_rows(symbols: int, days: int, rows: int) -> pd.DataFrame:
    random = np.random.default_rng(rows)
    moments = data.days_before(days)[random.integers(0, days, rows)] + random.integers(0, 86_400_000_000, rows)
    names = [data.symbol(number) for number in random.integers(0, symbols, rows)]
    return pd.DataFrame({"symbol": names, "event_timestamp": pd.to_datetime(moments).tz_localize("UTC")})


def labels(schema: str, rows: int) -> str:
    return f"{schema}.labels_{rows}"


def prepare(conninfo: str, schema: str, rows: pd.DataFrame) -> None:
    """The entity rows as a table."""
    table = labels(schema, len(rows))
    with psycopg.connect(conninfo) as connection:
        connection.execute(f"DROP TABLE IF EXISTS {table}")
        connection.execute(f"CREATE TABLE {table} (symbol text, event_timestamp timestamptz)")
        connection.execute(f"SET LOCAL search_path = {schema}")
        tables.copy_in(connection, f"labels_{len(rows)}", pa.Table.from_pandas(rows))
        connection.execute(f"CREATE INDEX ON {table} (symbol, event_timestamp)")
        connection.execute(f"ANALYZE {table}")


def leave(directory: Path, answer: Callable[[], pa.Table]) -> None:
    pyarrow.feather.write_feather(answer(), directory / "answer.feather")


def feast(
    directory: Path, *, given: Path, schema: str, ttl: timedelta, rows: pd.DataFrame, sql: bool = False, **store: Any
) -> Callable[[], Any]:
    features = data.feature_store(given, directory, schema, ttl, offline_store=store)
    query = f"SELECT symbol, event_timestamp FROM {labels(schema, len(rows))}"

    def run() -> Callable[[], None]:
        table = features.get_historical_features(query if sql else rows, FEATURES).to_arrow()
        return partial(leave, directory, lambda: table)

    return run


def by_hand(
    directory: Path, *, conninfo: str, schema: str, ttl: timedelta, rows: pd.DataFrame, copy: bool
) -> Callable[[], Any]:
    def newest(view: str) -> str:
        return (
            f"LEFT JOIN LATERAL (SELECT {', '.join(VIEWS[view])} FROM {schema}.{view} AS source"
            " WHERE source.symbol = entity.symbol AND source.event_timestamp <= entity.event_timestamp"
            f" AND source.event_timestamp >= entity.event_timestamp - interval '{ttl.total_seconds()} seconds'"
            f" ORDER BY source.event_timestamp DESC LIMIT 1) AS {view} ON true"
        )

    def run() -> Callable[[], None]:
        with psycopg.connect(conninfo) as connection:
            connection.execute("SET timezone = 'UTC'")
            connection.execute("CREATE TEMP TABLE entity (symbol text, event_timestamp timestamptz, number bigint)")
            tables.copy_in(connection, "entity", pa.Table.from_pandas(rows.assign(number=range(len(rows)))))
            connection.execute("CREATE INDEX ON entity (symbol, event_timestamp)")
            connection.execute("ANALYZE entity")
            if not copy:
                found = {}
                for view, names in VIEWS.items():
                    query = f"SELECT number, {', '.join(names)} FROM entity {newest(view)}"
                    found[view] = connection.execute(query).fetchall()
                return partial(leave, directory, lambda: assembled(found, rows))
            joins = " ".join(map(newest, VIEWS))
            query = f"SELECT entity.symbol, event_timestamp AT TIME ZONE 'UTC', {', '.join(NAMES)} FROM entity {joins}"
            with connection.cursor() as cursor, cursor.copy(f"COPY ({query}) TO STDOUT (FORMAT csv)") as lines:
                table = pyarrow.csv.read_csv(io.BytesIO(b"".join(lines)), COLUMNS, convert_options=TYPES)
            return partial(leave, directory, lambda: table)

    return run


def floor(directory: Path, *, conninfo: str, schema: str, rows: pd.DataFrame) -> Callable[[], Any]:
    first, *_ = VIEWS

    def within(table: str, start: datetime, end: datetime) -> str:
        return f"{table}.event_timestamp >= '{start}' AND {table}.event_timestamp < '{end}'"

    def newest(start: datetime, end: datetime) -> str:
        return (
            f"(SELECT event_timestamp FROM {schema}.{first} AS source WHERE source.symbol = entity.symbol"
            f" AND source.event_timestamp <= entity.event_timestamp AND {within('source', start, end)}"
            " AND source.event_timestamp >= entity.event_timestamp - interval '7 days'"
            " ORDER BY event_timestamp DESC LIMIT 1)"
        )

    def run() -> Callable[[], None]:
        entities = pa.Table.from_pandas(rows.assign(number=np.arange(len(rows))), preserve_index=False)
        with psycopg.connect(conninfo) as connection:
            connection.execute(SETTINGS)
            for table in ("entity", "moment"):
                connection.execute(
                    f"CREATE TEMP TABLE {table} (symbol text, event_timestamp timestamptz, number bigint)"
                )
            by = [("symbol", "ascending"), ("event_timestamp", "ascending")]
            tables.copy_in(connection, "entity", entities.sort_by(by))
            chunks = connection.execute(CHUNKS, [schema, first]).fetchall()
            for start, end in chunks:
                connection.execute(
                    "INSERT INTO moment SELECT symbol, found.event_timestamp, number FROM entity CROSS JOIN LATERAL"
                    f" ({newest(start, end)} UNION ALL {newest(start - timedelta(days=7), start)} LIMIT 1) AS found"
                    f" WHERE {within('entity', start, end)}"
                )
            connection.execute("ANALYZE moment")
            parts = []
            for start, end in chunks:
                joins = " ".join(
                    f"JOIN {schema}.{view} ON {view}.symbol = moment.symbol"
                    f" AND {view}.event_timestamp = moment.event_timestamp AND {within(view, start, end)}"
                    for view in VIEWS
                )
                query = f"SELECT number, {', '.join(NAMES)} FROM moment {joins} WHERE {within('moment', start, end)}"
                with connection.cursor() as cursor, cursor.copy(f"COPY ({query}) TO STDOUT (FORMAT binary)") as copy:
                    parts.append(parsed([*map(bytes, copy)]))
        found = pa.concat_tables(parts)
        found = found.take(pc.sort_indices(found["number"]))
        times = entities["event_timestamp"].cast(pa.timestamp("us"))
        table = pa.Table.from_arrays([entities["symbol"], times, *found.columns[1:]], schema=SCHEMA)
        return partial(leave, directory, lambda: table)

    return run


SETTINGS = "SET timezone = 'UTC'; SET jit = off; SET timescaledb.enable_chunk_append = off"
CHUNKS = """
SELECT range_start, range_end FROM timescaledb_information.chunks
WHERE hypertable_schema = %s AND hypertable_name = %s ORDER BY 1
"""


def parsed(lines: list[bytes]) -> pa.Table:
    """Rows of COPY BINARY: the number, and the features, which are 8 bytes each or NULL."""
    lines[0] = lines[0].removeprefix(binary.HEADER)
    rows = [line for line in lines if line not in (b"", binary.END)]
    data = b"".join([*rows, bytes(8)])
    lengths, values = (np.ndarray(len(data) - 7, kind, data, strides=(1,)) for kind in (">i4", ">i8"))  # at each byte
    at = np.cumsum([2, *map(len, rows)])[:-1]
    columns = {}
    for name in ["number", *NAMES]:
        null = lengths[at] < 0
        column = values[at + 4].astype(np.int64)
        columns[name] = pa.array(column if name in {"number", *INTEGERS} else column.view(np.float64), mask=null)
        at += np.where(null, 4, 12)
    return pa.table(columns)


SCHEMA = pa.schema(
    [
        ("symbol", pa.string()),
        ("event_timestamp", pa.timestamp("us")),
        *((name, pa.int64() if name in INTEGERS else pa.float64()) for name in NAMES),
    ]
)
COLUMNS = pyarrow.csv.ReadOptions(column_names=SCHEMA.names)
TYPES = pyarrow.csv.ConvertOptions(column_types=SCHEMA)


def assembled(found: dict[str, list[tuple[Any, ...]]], rows: pd.DataFrame) -> pa.Table:
    columns = [
        pa.array(rows["symbol"]),
        pa.array(rows["event_timestamp"].dt.tz_localize(None)).cast(pa.timestamp("us")),
    ]
    for values in found.values():
        columns += [pa.array(column) for column in list(zip(*sorted(values), strict=True))[1:]]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def sorted_answer(directory: Path) -> pa.Table:
    table = pyarrow.feather.read_table(directory / "answer.feather").cast(SCHEMA)
    return table.sort_by([("symbol", "ascending"), ("event_timestamp", "ascending")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("feature_store", type=Path)
    parser.add_argument("--bars", type=Path, default=data.ROOT / ".larder/trial/bars")
    parser.add_argument("--symbols", type=int, default=500)
    parser.add_argument("--days", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--ttl-days", type=int, default=data.TTL.days)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--stock-runs", type=int, default=1, help="Feast's own store takes minutes")
    parser.add_argument("--stock-best-runs", type=int, default=1, help="and so does this; 0: leave it out")
    parser.add_argument("--limit", type=float, default=1800, help="seconds after which a run is given up")
    options = parser.parse_args()
    conninfo = data.conninfo(options.feature_store)
    schema = data.fill(conninfo, options.symbols, options.days, options.bars)
    rows = entity_rows(options.symbols, options.days, options.rows)
    prepare(conninfo, schema, rows)
    ttl = timedelta(days=options.ttl_days)
    store = partial(feast, given=options.feature_store, schema=schema, ttl=ttl, rows=rows)
    hand = partial(by_hand, conninfo=conninfo, schema=schema, ttl=ttl, rows=rows)
    ways = {
        "larder": (partial(store, type="larder.plugins.offline_store.TimescaleOfflineStore"), options.runs),
        "floor": (partial(floor, conninfo=conninfo, schema=schema, rows=rows), options.runs),
        "sql": (partial(hand, copy=False), options.runs),
        "sql_copy": (partial(hand, copy=True), options.runs),
        "stock": (partial(store, type="postgres"), options.stock_runs),
        "stock_best": (
            partial(store, type="postgres", entity_select_mode="embed_query", sql=True),
            options.stock_best_runs,
        ),
    }
    with tempfile.TemporaryDirectory() as directory:
        measured = measure(ways, Path(directory), limit=options.limit, conninfo=conninfo)
        expected = sorted_answer(Path(directory, "floor"))
        for name, one in measured.items():
            if one.seconds:
                assert sorted_answer(Path(directory, name)).equals(expected), f"{name} answers something else"
    sizes = {key: getattr(options, key) for key in ("symbols", "days", "rows", "ttl_days")}
    print(report({**sizes, "features": len(NAMES)}, measured, "floor"))


if __name__ == "__main__":
    main()
