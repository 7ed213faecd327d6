"""The offline store's answers are those of Feast's own PostgreSQL store, on random data in a real TimescaleDB."""

import os
import re
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import psycopg
import pyarrow as pa
import pytest
from feast import Entity, FeatureStore, FeatureView, Field, RequestSource, ValueType
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import (
    PostgreSQLSource,
    SavedDatasetPostgreSQLStorage,
)
from feast.infra.offline_stores.offline_utils import FeatureViewQueryContext
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import RepoConfig
from feast.transformation.pandas_transformation import PandasTransformation
from feast.types import Array, Bool, Float32, Float64, Int32, Int64, String, UnixTimestamp
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from larder import offline_store

ADMIN = os.environ.get("LARDER_TEST_POSTGRES", "")
pytestmark = pytest.mark.skipif(not ADMIN, reason="LARDER_TEST_POSTGRES names no server; the pipeline scenario does")

START = datetime(2024, 3, 28, tzinfo=UTC)  # the clocks of London change three days later
KEYS = ["a", "b", "c d", 'q"u,o\nte']

# name: columns, constraint, chunk interval
TABLES = {
    "plain": ("k text, ts timestamptz, p_float float8, p_int bigint, p_text text", "PRIMARY KEY (k, ts)", None),
    "hyper": ("k text, ts timestamptz, h_float float8, h_int bigint", "PRIMARY KEY (k, ts)", "1 day"),
    # Other chunks; several rows may be the newest; NULL wherever there may be one.
    "quotes": ("k text, ts timestamptz NOT NULL, made timestamptz, q_float float8", None, "3 days"),
    "versions": ("k text, ts timestamptz, made timestamptz, v_int bigint", "PRIMARY KEY (k, ts, made)", "2 days"),
    # No index that helps, several keys, columns that have other names in Feast.
    "pairs": ('"Key" text, n bigint, ts timestamptz, made timestamptz, "Value" float8', None, None),
    "naive": ("k text, ts timestamp, n_float float8", "PRIMARY KEY (k, ts)", "1 day"),
    "types": (
        """k text, ts timestamptz, t_bool bool, t_small smallint, t_real real, t_time timestamptz, t_numeric numeric,
        t_array float8[], t_bytes bytea""",
        "PRIMARY KEY (k, ts)",
        None,
    ),
    "market": ("ts timestamptz, m_float float8", "PRIMARY KEY (ts)", "1 day"),
}
K = Entity(name="k", join_keys=["k"], value_type=ValueType.STRING)
N = Entity(name="n", join_keys=["n"], value_type=ValueType.INT64)


def view(name, entities, days, features, table=None, query=None, created="", mapping=None):
    source = PostgreSQLSource(
        name=f"{name}_source",
        table=f"s.{table or name}" if not query else None,
        query=query,
        timestamp_field="ts",
        created_timestamp_column=created,
        field_mapping=mapping,
    )
    return FeatureView(
        name=name,
        entities=entities,
        ttl=timedelta(days=days) if days else None,
        schema=[Field(name=feature, dtype=kind) for feature, kind in features.items()],
        source=source,
    )


VIEWS = [
    view("plain", [K], 2, {"p_float": Float64, "p_int": Int64, "p_text": String}),
    view("hyper", [K], 5, {"h_float": Float64, "h_int": Int64}),
    view("hour", [K], 1 / 24, {"o_int": Int64}, table="hyper", mapping={"h_int": "o_int"}),
    view("quotes", [K], 0, {"q_float": Float64}, created="made"),
    view("versions", [K], 3, {"v_int": Int64}, created="made"),
    view("pairs", [K, N], 2, {"value": Float64}, created="made", mapping={"Key": "k", "Value": "value"}),
    view("query", [K], 0, {"double": Float64}, query="SELECT k, ts, p_float * 2 AS double FROM s.plain"),
    view("naive", [K], 4, {"n_float": Float64}),
    view("types", [K], 4, {"t_bool": Bool, "t_small": Int32, "t_real": Float32, "t_time": UnixTimestamp}),
    view("odd", [K], 4, {"t_numeric": Float64, "t_array": Array(Float64), "t_bool": Bool}, table="types"),
    view("market", [], 1, {"m_float": Float64}),
]


def plus(inputs):
    return pd.DataFrame({"total": inputs["h_float"] + inputs["asked"]})


ON_DEMAND = OnDemandFeatureView(
    name="plus",
    sources=[VIEWS[1], RequestSource(name="request", schema=[Field(name="asked", dtype=Float64)])],
    schema=[Field(name="total", dtype=Float64)],
    feature_transformation=PandasTransformation(udf=plus, udf_string="plus"),
)


@pytest.fixture(scope="module")
def database():
    name = f"larder_offline_{os.getpid()}"
    with psycopg.connect(ADMIN, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
        url = make_conninfo(ADMIN, dbname=name)
        try:
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute("CREATE EXTENSION timescaledb")
                connection.execute("CREATE SCHEMA s")
                # What is compared with naive times depends on it.
                connection.execute(f"ALTER DATABASE {name} SET timezone = 'Europe/London'")
                for table, (columns, constraint, interval) in TABLES.items():
                    connection.execute(f"CREATE TABLE s.{table} ({columns}{', ' + constraint if constraint else ''})")
                    if interval:
                        by = f"by_range('ts', interval '{interval}')"
                        connection.execute(f"SELECT create_hypertable('s.{table}', {by})")
                connection.execute("CREATE INDEX ON s.quotes (k, ts DESC)")
            yield url
        finally:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="module")
def stores(database, tmp_path_factory):
    """Stock's feature store and Larder's, on one registry."""
    directory = tmp_path_factory.mktemp("registry")
    given = conninfo_to_dict(database)

    def store(kind):
        return FeatureStore(
            config=RepoConfig(
                project="test",
                provider="local",
                registry={"registry_type": "file", "path": str(directory / "registry.db")},
                online_store={"type": "sqlite", "path": str(directory / "online.db")},
                offline_store={
                    "type": kind,
                    "host": given["host"],
                    "port": int(given.get("port") or 5432),
                    "database": given["dbname"],
                    "user": given.get("user") or psycopg.connect(database).info.user,
                    "password": given.get("password") or "none",
                    "sslmode": "prefer",
                },
                entity_key_serialization_version=3,
            )
        )

    stock = store("postgres")
    stock.apply([K, N, *VIEWS, ON_DEMAND])
    return stock, store("larder.offline_store.TimescaleOfflineStore")


@pytest.fixture(scope="module")
def connection(database):
    with psycopg.connect(database, autocommit=True, options="-c timezone=UTC") as connection:
        yield connection


def time_of(random, *, days=10):
    """On a grid of six hours, so that equal times and times at the very end of a ttl are frequent."""
    time = START + timedelta(hours=6 * int(random.integers(0, 4 * days)))
    return time + timedelta(microseconds=int(random.choice([0, 0, 0, -1, 1, 123456])))


def value(random, kind):
    if random.random() < 0.15:
        return None
    number = float(random.choice([random.normal(), 0.1, 1e300, -0.0, float("nan"), float("inf"), 3.0]))
    return {
        "text": lambda: str(random.choice(["", "x", "NULL", 'a"b', "two\nlines", "é,"])),
        "float8": lambda: number,
        "real": lambda: number if abs(number) < 10 else 0.1,
        "bigint": lambda: int(random.choice([2**62 + 1, -1, 7])),
        "smallint": lambda: int(random.integers(-9, 9)),
        "bool": lambda: bool(random.integers(2)),
        "numeric": lambda: round(float(random.normal()), 9),
        "float8[]": lambda: [number, None],
        "bytea": lambda: b"\0x",
        "timestamptz": lambda: time_of(random),
    }[kind]()


def fill(connection, random, rows):
    """Some rows in every table; created times tie, and are NULL where they may."""
    for table, (columns, constraint, _) in TABLES.items():
        connection.execute(f"TRUNCATE s.{table}")
        names = [column.strip().split(" ")[0] for column in columns.split(",")]
        kinds = [column.strip().split(" ")[1] for column in columns.split(",")]
        made = [START + timedelta(days=day) for day in (0, 1, 9)] + ([] if constraint else [None])
        key = KEYS if constraint else [*KEYS, None]
        values = [
            [
                key[random.integers(len(key))]
                if name.strip('"').lower() in ("k", "key")
                else int(random.integers(3))
                if name == "n"
                else time_of(random, days=2 if "made" in names else 10).replace(
                    tzinfo=None if kind == "timestamp" else UTC
                )
                if name == "ts"
                else made[random.integers(len(made))]
                if name == "made"
                else value(random, kind)
                for name, kind in zip(names, kinds, strict=True)
            ]
            for _ in range(rows)
        ]
        places = ", ".join(["%s"] * len(names))
        with connection.cursor() as cursor:
            cursor.executemany(f"INSERT INTO s.{table} VALUES ({places}) ON CONFLICT DO NOTHING", values)


def entity_rows(random, rows, zone):
    frame = pd.DataFrame(
        {
            "n": random.integers(0, 3, rows),
            "event_timestamp": pd.Series([time_of(random, days=14) for _ in range(rows)], dtype="datetime64[us, UTC]"),
            "extra": pd.Series([str(random.choice(["", "é", "a,b"])) for _ in range(rows)], dtype=object),
            # Stock has no table for a column that is NULL throughout.
            "k": pd.Series(["a", *(random.choice([*KEYS, "unknown", None]) for _ in range(rows - 1))], dtype=object),
            "asked": random.choice([0.5, np.nan], rows),
            "single": np.full(rows, 0.1, dtype=np.float32),
        }
    )
    if rows > 2:
        frame = pd.concat([frame, frame.head(2)])  # rows that are there twice, and an index that is not unique
    times = frame["event_timestamp"]
    return frame.assign(event_timestamp=times.dt.tz_convert(zone) if zone else times.dt.tz_localize(None))


def same(expected: pa.Table, found: pa.Table) -> None:
    """The same columns of the same types with the same rows; stock gives them in any order."""
    assert found.schema == expected.schema
    rows, others = (sorted(map(repr, zip(*table.to_pydict().values(), strict=True))) for table in (expected, found))
    assert others == rows


def fast(job):
    """The job's own answer: what stock would have to make fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offline_store.TimescaleRetrievalJob, "_to_arrow_internal", None)
        return job.to_arrow()


FEATURES = [f"{view.name}:{feature.name}" for view in VIEWS for feature in view.features if view.name != "odd"]


@settings(max_examples=30, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    seed=st.integers(0, 2**32),
    rows=st.sampled_from([0, 5, 60]),
    entities=st.sampled_from([1, 3, 40]),
    zone=st.sampled_from(["UTC", "America/New_York", None]),
    features=st.one_of(st.just(FEATURES), st.lists(st.sampled_from(FEATURES), min_size=1, unique=True)),
    on_demand=st.booleans(),
    full=st.booleans(),
    by_created=st.booleans(),
    as_sql=st.booleans(),
    per_statement=st.sampled_from([1, 20, 500]),
)
def test_a_point_in_time_join_is_that_of_stock(
    stores, connection, seed, rows, entities, zone, features, on_demand, full, by_created, as_sql, per_statement
):
    random = np.random.default_rng(seed)
    fill(connection, random, rows)
    frame = entity_rows(random, entities, zone)
    if as_sql:
        connection.execute("DROP TABLE IF EXISTS s.labels")
        kind = "timestamptz" if zone else "timestamp"
        connection.execute(
            f"CREATE TABLE s.labels (n int, event_timestamp {kind}, extra text, k varchar, asked float8, single real)"
        )
        with connection.cursor() as cursor:
            values = frame.astype(object).where(frame.notna(), None).to_numpy().tolist()
            cursor.executemany("INSERT INTO s.labels VALUES (%s, %s, %s, %s, %s, %s)", values)
        frame = "SELECT * FROM s.labels"
    arguments = {
        "entity_df": frame,
        "features": [*features, *(["plus:total"] if on_demand else [])],
        "full_feature_names": full,
        "filter_by_created_timestamp": by_created,
    }
    stock, larder = (store.get_historical_features(**arguments) for store in stores)
    assert isinstance(larder, offline_store.PointInTimeJob)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offline_store, "ROWS_PER_STATEMENT", per_statement)
        same(stock.to_arrow(), fast(larder))


def test_the_row_made_last_counts_and_ties_are_all_there(stores, connection):
    connection.execute("TRUNCATE s.quotes, s.versions")
    early, late = START + timedelta(hours=1), START + timedelta(hours=2)
    for made, number in ((late, 1), (late, 2), (early, 3)):
        connection.execute("INSERT INTO s.quotes VALUES ('a', %s, %s, %s)", [START, made, number])
    connection.execute("INSERT INTO s.quotes VALUES ('a', %s, NULL, 4)", [late])
    for made, number in ((late, 1), (early, 2)):
        connection.execute("INSERT INTO s.versions VALUES ('a', %s, %s, %s)", [START, made, number])
    frame = pd.DataFrame({"k": ["a"], "event_timestamp": [START + timedelta(days=1)]})
    stock, larder = (store.get_historical_features(frame, ["quotes:q_float", "versions:v_int"]) for store in stores)
    found = fast(larder)
    same(stock.to_arrow(), found)
    assert sorted(found["q_float"].to_pylist()) == [1, 2]
    assert found["v_int"].to_pylist() == [1, 1]


def test_keys_of_another_type_are_left_to_stock(stores, connection):
    random = np.random.default_rng(1)
    fill(connection, random, 60)
    frame = entity_rows(random, 20, "UTC").assign(n=[None, *random.integers(0, 3, 21)])  # pandas makes floats of them
    stock, larder = (store.get_historical_features(frame, ["pairs:value", "hyper:h_int"]) for store in stores)
    same(stock.to_arrow(), larder.to_arrow())
    with pytest.raises(TypeError, match="NoneType"):
        fast(larder)


def test_columns_that_csv_cannot_carry_are_those_of_stock(stores, connection):
    random = np.random.default_rng(2)
    fill(connection, random, 60)
    frame = entity_rows(random, 40, "UTC")
    stock, larder = (store.get_historical_features(frame, ["odd:t_numeric", "odd:t_array"]) for store in stores)
    same(stock.to_arrow(), fast(larder))


def test_rows_come_in_the_order_of_the_entity_rows(stores, connection):
    fill(connection, np.random.default_rng(3), 60)
    frame = entity_rows(np.random.default_rng(3), 40, "UTC")
    found = stores[1].get_historical_features(frame, ["hyper:h_int", "plain:p_text"]).to_df()
    times = frame["event_timestamp"].dt.tz_localize(None).reset_index(drop=True)
    pd.testing.assert_series_equal(found["event_timestamp"], times)


@pytest.mark.parametrize("features", [["hyper:h_int", "hyper:h_float"], ["hyper:h_int", "plain:p_text"]])
def test_a_range_of_times_is_that_of_stock(stores, connection, features):
    fill(connection, np.random.default_rng(4), 60)
    window = {"start_date": START + timedelta(days=2), "end_date": START + timedelta(days=6)}
    stock, larder = (store.get_historical_features(features=features, **window) for store in stores)
    assert stock.to_arrow().num_rows
    same(stock.to_arrow(), larder.to_arrow())


def test_a_saved_dataset_is_that_of_stock(stores, connection):
    fill(connection, np.random.default_rng(5), 60)
    frame = entity_rows(np.random.default_rng(5), 30, "UTC")[["k", "event_timestamp", "single"]]
    tables = []
    for number, store in enumerate(stores):
        name = f"saved_{number}"
        connection.execute(f"DROP TABLE IF EXISTS {name}")
        job = store.get_historical_features(frame, ["hyper:h_int", "plain:p_text", "types:t_time"])
        saved = store.create_saved_dataset(job, name, SavedDatasetPostgreSQLStorage(table_ref=name))
        tables.append(saved.to_arrow())
        columns = "SELECT column_name, data_type FROM information_schema.columns WHERE table_name = %s"
        tables.append(pa.table({"columns": [repr(sorted(connection.execute(columns, [name]).fetchall()))]}))
    same(tables[0], tables[2])
    same(tables[1], tables[3])


def test_to_sql_is_that_of_stock(stores, connection):
    fill(connection, np.random.default_rng(6), 5)
    frame = entity_rows(np.random.default_rng(6), 3, "UTC")
    first, second = (
        re.sub(r"feast_entity_df_\w+", "", store.get_historical_features(frame, ["hyper:h_int"]).to_sql())
        for store in stores
    )
    assert first == second


def test_nothing_but_reading_and_temporary_tables_is_needed(stores, connection):
    random = np.random.default_rng(7)
    fill(connection, random, 60)
    frame = entity_rows(random, 40, "UTC")
    role = f"larder_reader_{os.getpid()}"
    connection.execute(f"CREATE ROLE {role} LOGIN")
    try:
        connection.execute(f"GRANT USAGE ON SCHEMA s TO {role}; GRANT SELECT ON ALL TABLES IN SCHEMA s TO {role}")
        expected = stores[0].get_historical_features(frame, FEATURES).to_arrow()
        with pytest.MonkeyPatch.context() as patch:
            connect = offline_store._get_conn

            def as_reader(config):
                session = connect(config)
                session.execute(f"SET SESSION AUTHORIZATION {role}")
                session.commit()
                return session

            patch.setattr(offline_store, "_get_conn", as_reader)
            same(expected, fast(stores[1].get_historical_features(frame, FEATURES)))
    finally:
        connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.mark.parametrize(("table", "interval"), [("weekly", "7 days"), ("yearly", "365 days")])
def test_a_probe_opens_only_the_chunk_of_its_slice(connection, database, table, interval):
    """Whatever the chunk interval: the plan of a statement has no Append over the chunks that a probe tries first."""
    connection.execute(f"CREATE TABLE s.{table} (k text, ts timestamptz, f float8, PRIMARY KEY (k, ts))")
    connection.execute(f"SELECT create_hypertable('s.{table}', by_range('ts', interval '{interval}'))")
    connection.execute(
        f"INSERT INTO s.{table} SELECT 'k' || k, '2022-01-01'::timestamptz + d * interval '1 day', random() "
        "FROM generate_series(1, 20) k, generate_series(0, 700) d"
    )
    connection.execute(f"ANALYZE s.{table}")
    context = FeatureViewQueryContext(
        "v", 86400 * 365, ["k"], ["f"], {}, "ts", "", f"s.{table}", ["k AS k"], None, "", None, None
    )
    with psycopg.connect(database) as session, session.cursor() as cursor:
        cursor.execute(offline_store.PLAIN_PLANS)
        probes = "SELECT 0 AS larder_row, 'k1' AS k, '2023-06-06 12:00+00'::timestamptz AS event_timestamp"
        source = offline_store._view(
            cursor, context, dict(offline_store._describe(cursor, sql.SQL(probes))), "event_timestamp"
        )
        assert source
        assert source.unique
        assert source.indexed
        offline_store._make_probes(cursor, sql.SQL(probes), ["k"], "event_timestamp", source.bounds)
        [(first, last)] = offline_store._slices(cursor)
        newest = source.newest(source.bounds[first - 1], source.bounds[last], filter_by_created=False)
        query = sql.SQL("EXPLAIN (ANALYZE, FORMAT JSON) SELECT * FROM {} AS probe, LATERAL {} AS found").format(
            sql.Identifier(offline_store.PROBES), newest
        )
        plan = cursor.execute(query).fetchall()[0][0]
        opened = re.findall(r"'Relation Name': '(_hyper\w+)'[^{}]*'Actual Loops': (\d+)", repr(plan))
        assert sum(int(loops) for _, loops in opened) == 1, opened


@settings(max_examples=20, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    seed=st.integers(0, 2**32),
    rows=st.sampled_from([0, 10, 60]),
    table=st.sampled_from(["plain", "hyper", "versions", "naive", "types"]),
    first=st.integers(-1, 12),
    days=st.integers(0, 12),
)
def test_the_newest_rows_are_those_of_stock(stores, connection, seed, rows, table, first, days):
    fill(connection, np.random.default_rng(seed), rows)
    [view] = [view for view in VIEWS if view.name == table]
    created = view.batch_source.created_timestamp_column
    arguments = {
        "data_source": view.batch_source,
        "join_key_columns": ["k"],
        "feature_name_columns": [feature.name for feature in view.features],
        "timestamp_field": "ts",
        "created_timestamp_column": created or None,
        "start_date": START + timedelta(days=first),
        "end_date": START + timedelta(days=first + days),
    }
    stock, larder = (
        store._get_provider().offline_store.pull_latest_from_table_or_query(config=store.config, **arguments)
        for store in stores
    )
    assert "RECURSIVE" in larder.to_sql()
    same(stock.to_arrow(), larder.to_arrow())


@pytest.mark.parametrize("columns", ["k, n, ts DESC", "k DESC, n DESC, ts", "n, k, ts"])
def test_the_newest_rows_of_several_keys_are_those_of_stock(stores, connection, columns):
    random = np.random.default_rng(8)
    connection.execute("DROP TABLE IF EXISTS s.several")
    connection.execute("CREATE TABLE s.several (k text NOT NULL, n bigint NOT NULL, ts timestamptz, f float8)")
    connection.execute(f"CREATE UNIQUE INDEX ON s.several ({columns})")
    with connection.cursor() as cursor:
        rows = [
            (KEYS[random.integers(4)], int(random.integers(3)), time_of(random), random.random()) for _ in range(90)
        ]
        cursor.executemany("INSERT INTO s.several VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING", rows)
    source = PostgreSQLSource(name="several", table="s.several", timestamp_field="ts")
    arguments = (source, ["k", "n"], ["f"], "ts", None, START, START + timedelta(days=8))
    stock, larder = (
        store._get_provider().offline_store.pull_latest_from_table_or_query(store.config, *arguments)
        for store in stores
    )
    assert "RECURSIVE" in larder.to_sql()
    same(stock.to_arrow(), larder.to_arrow())


@pytest.mark.parametrize(("table", "keys"), [("pairs", ["n"]), ("quotes", ["k"])])
def test_the_newest_rows_without_an_index_or_with_null_keys_are_left_to_stock(stores, table, keys):
    source = PostgreSQLSource(name=table, table=f"s.{table}", timestamp_field="ts")
    job = (
        stores[1]
        ._get_provider()
        .offline_store.pull_latest_from_table_or_query(
            stores[1].config, source, keys, ["made"], "ts", None, START, START
        )
    )
    assert "ROW_NUMBER" in job.to_sql()
