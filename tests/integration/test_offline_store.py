"""The offline store's answers are those of Feast's own PostgreSQL store, on random data in a real TimescaleDB."""

import os
import re
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from urllib.parse import quote, urlencode
from uuid import UUID

import numpy as np
import pandas as pd
import psycopg
import pyarrow as pa
import pytest
from feast import Entity, FeatureStore, FeatureView, Field, RequestSource, ValueType
from feast.errors import EntityTimestampInferenceException
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres import EntitySelectMode
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import (
    PostgreSQLSource,
    SavedDatasetPostgreSQLStorage,
)
from feast.infra.offline_stores.offline_utils import FeatureViewQueryContext
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import RepoConfig
from feast.transformation.pandas_transformation import PandasTransformation
from feast.types import Array, Bool, Float32, Float64, Int32, Int64, String, UnixTimestamp
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from larder.plugins import offline_store

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
# Keys of other types, one row each; the values as SQL.
KEYED = {
    "uuid": "'6f1ed002-ab5c-4a3b-9a3d-000000000001'",
    "char": "'ab'",
    "date": "'2024-03-28'",
    "timestamptz": "'2024-03-28 12:00+00'",
    "float8": "2.5",
    "real": "2.5",
    "numeric": "3",
    "bytea": "'\\x0061'",
    "bool": "true",
    "smallint": "3",
    "varchar": "'a\\b'",
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
KEYED_VIEWS = [view(f"by_{kind}", [K], 0, {"x": Int64}, table="keyed", mapping={f"as_{kind}": "k"}) for kind in KEYED]


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
                columns = ", ".join(f"as_{kind} {'char(4)' if kind == 'char' else kind}" for kind in KEYED)
                connection.execute(f"CREATE TABLE s.keyed ({columns}, ts timestamptz, x bigint)")
                values = ", ".join(KEYED.values())
                connection.execute(f"INSERT INTO s.keyed VALUES ({values}, '2024-01-01', 7)")
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
    stock.apply([K, N, *VIEWS, *KEYED_VIEWS, ON_DEMAND])
    return stock, store("larder.plugins.offline_store.TimescaleOfflineStore")


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


def fill(connection, random, rows, shared=None):
    """Some rows in every table, at the shared (key, time) if given; created times tie, and are NULL where they may."""
    for table, (columns, constraint, _) in TABLES.items():
        connection.execute(f"TRUNCATE s.{table}")
        names = [column.strip().split(" ")[0] for column in columns.split(",")]
        kinds = [column.strip().split(" ")[1] for column in columns.split(",")]
        made = [START + timedelta(days=day) for day in (0, 1, 9)] + ([] if constraint else [None])
        key = KEYS if constraint else [*KEYS, None]
        moments = (
            [shared[number] for number in random.integers(len(shared), size=rows)]
            if shared
            else [
                (key[random.integers(len(key))], time_of(random, days=2 if "made" in names else 10))
                for _ in range(rows)
            ]
        )
        values = [
            [
                k
                if name.strip('"').lower() in ("k", "key")
                else int(random.integers(3))
                if name == "n"
                else ts.replace(tzinfo=None if kind == "timestamp" else UTC)
                if name == "ts"
                else made[random.integers(len(made))]
                if name == "made"
                else value(random, kind)
                for name, kind in zip(names, kinds, strict=True)
            ]
            for k, ts in moments
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
    labels=st.lists(st.sampled_from(["larder_row", "c0", "row", "slice", "time", "source", "plain", "Ä"]), unique=True),
)
def test_a_point_in_time_join_is_that_of_stock(
    stores, connection, seed, rows, entities, zone, features, on_demand, full, by_created, as_sql, per_statement, labels
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
    else:
        frame = frame.assign(**dict.fromkeys(labels, 1))
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
        same(stock.to_arrow(), larder.to_arrow())


@settings(max_examples=30, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    seed=st.integers(0, 2**32),
    moments=st.sampled_from([4, 15, 40]),
    empty=st.sampled_from([None, "plain", "hyper", "quotes"]),
    features=st.permutations(FEATURES),
    by_created=st.booleans(),
    per_statement=st.sampled_from([1, 20, 500]),
)
def test_views_that_share_keys_and_times_answer_as_stock(
    stores, connection, seed, moments, empty, features, by_created, per_statement
):
    """Their ttl differ; each view lacks some of the moments, or has several rows at one; one view has no rows."""
    random = np.random.default_rng(seed)
    fill(connection, random, 60, [(KEYS[random.integers(4)], time_of(random)) for _ in range(moments)])
    if empty:
        connection.execute(f"TRUNCATE s.{empty}")
    frame = entity_rows(random, 40, "UTC")
    frame.iloc[3, frame.columns.get_loc("event_timestamp")] = pd.NaT
    stock, larder = (
        store.get_historical_features(frame, features, filter_by_created_timestamp=by_created) for store in stores
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offline_store, "ROWS_PER_STATEMENT", per_statement)
        same(stock.to_arrow(), larder.to_arrow())


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
    found = larder.to_arrow()
    same(stock.to_arrow(), found)
    assert sorted(found["q_float"].to_pylist()) == [1, 2]
    assert found["v_int"].to_pylist() == [1, 1]


def test_keys_of_another_type_are_compared_as_stock_does(stores, connection):
    random = np.random.default_rng(1)
    fill(connection, random, 60)
    frame = entity_rows(random, 20, "UTC").assign(n=[None, *random.integers(0, 3, 21)])  # pandas makes floats of them
    stock, larder = (store.get_historical_features(frame, ["pairs:value", "hyper:h_int"]) for store in stores)
    same(stock.to_arrow(), larder.to_arrow())


def test_columns_that_csv_cannot_carry_are_those_of_stock(stores, connection):
    random = np.random.default_rng(2)
    fill(connection, random, 60)
    frame = entity_rows(random, 40, "UTC")
    stock, larder = (store.get_historical_features(frame, ["odd:t_numeric", "odd:t_array"]) for store in stores)
    same(stock.to_arrow(), larder.to_arrow())


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
    """But stock saves integers with gaps as floats, NaN as NULL, and event times without a zone.

    West or east of UTC, stock then reads fewer rows than it wrote: the tables are compared.
    """
    fill(connection, np.random.default_rng(5), 60)
    frame = entity_rows(np.random.default_rng(5), 30, "UTC")[["k", "event_timestamp", "single"]]
    tables, types = [], []
    for number, store in enumerate(stores):
        name = f"saved_{number}"
        connection.execute(f"DROP TABLE IF EXISTS {name}")
        job = store.get_historical_features(frame, ["hyper:h_float", "plain:p_text", "types:t_time"])
        store.create_saved_dataset(job, name, SavedDatasetPostgreSQLStorage(table_ref=name))
        saved = f"SELECT k, event_timestamp::timestamp, single, nullif(h_float, 'NaN'), p_text, t_time FROM {name}"
        tables.append(sorted(map(repr, connection.execute(saved).fetchall())))
        columns = "SELECT column_name, data_type FROM information_schema.columns WHERE table_name = %s"
        types.append(dict(connection.execute(columns, [name]).fetchall()))
    assert tables[0] == tables[1]
    assert [kinds.pop("event_timestamp") for kinds in types] == [
        "timestamp without time zone",
        "timestamp with time zone",
    ]
    assert types[0] == types[1]


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
            same(expected, stores[1].get_historical_features(frame, FEATURES).to_arrow())
    finally:
        connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.mark.parametrize(("table", "interval"), [("weekly", "7 days"), ("yearly", "365 days")])
def test_a_probe_opens_one_chunk_of_each_view_and_looks_near_first(connection, database, table, interval):
    """Whatever the chunk interval: the plan has no Append over the chunks that a probe tries first.

    A view is searched first where the view before it has a row, and no further if there is one.
    """
    connection.execute(f"CREATE TABLE s.{table} (k text, ts timestamptz, f float8, PRIMARY KEY (k, ts))")
    connection.execute(f"SELECT create_hypertable('s.{table}', by_range('ts', interval '{interval}'))")
    connection.execute(
        f"INSERT INTO s.{table} SELECT 'k' || k, '2022-01-01'::timestamptz + d * interval '1 day', random() "
        "FROM generate_series(1, 100) k, generate_series(0, 700) d"
    )
    connection.execute(f"ANALYZE s.{table}")
    context = FeatureViewQueryContext(
        "v", 86400 * 365, ["k"], ["f"], {}, "ts", "", f"s.{table}", ["k AS k"], None, "", None, None
    )
    with psycopg.connect(database) as session, session.cursor() as cursor:
        cursor.execute(offline_store.PLAIN_PLANS)
        moment = pd.DataFrame({"k": ["k1"], "event_timestamp": [pd.Timestamp("2023-06-06 12:00", tz="UTC")]})
        entities = offline_store.Entities.of_frame(moment)
        entities.create(cursor, ["k"], table=True)
        probes = offline_store.Probes(cursor, entities)
        source = offline_store._view(cursor, context, probes)
        assert source.unique
        assert source.indexed
        probes.create(source.bounds, table=True)
        [(first, last)] = probes.slices()
        joins = offline_store._joins(
            [source, source], source.bounds[first - 1], source.bounds[last], filter_by_created=False
        )
        query = sql.SQL("EXPLAIN (ANALYZE, FORMAT JSON) SELECT * FROM {} AS probe{}").format(
            offline_store.PROBES, joins
        )
        plan = cursor.execute(query).fetchall()[0][0]
        scans = re.findall(r"'Relation Name': '_hyper\w+'[^{}]*'Actual Loops': [^0][^{}]*", repr(plan))
        assert ["GREATEST" in scan for scan in scans] == [False, True], scans


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


# What entity rows may look like. Where stock fails, pandas says what is right: merge_asof.


def as_of(connection, frame, days=5):
    """h_int of each row of a frame with k and event_timestamp (UTC), by pandas."""
    rows = connection.execute(
        "SELECT k, ts, h_int FROM s.hyper WHERE ts BETWEEN '1900-01-01' AND '2100-01-01'"
    ).fetchall()
    source = pd.DataFrame(rows, columns=["k", "ts", "h_int"]).astype({"h_int": "Int64"})
    source["ts"] = pd.to_datetime(source["ts"], utc=True).astype("datetime64[us, UTC]")
    probes = frame[["k", "event_timestamp"]].reset_index(drop=True).assign(row=range(len(frame)))
    probes = probes[probes["k"].notna() & probes["event_timestamp"].notna()]
    found = pd.merge_asof(
        probes.astype({"event_timestamp": "datetime64[us, UTC]"}).sort_values("event_timestamp"),
        source.sort_values("ts"),
        left_on="event_timestamp",
        right_on="ts",
        by="k",
        tolerance=pd.Timedelta(days=days),
    ).set_index("row")["h_int"]
    return [None if value is pd.NA else value for value in found.reindex(range(len(frame))).astype("Int64")]


def join(stores, entity_df, features=("hyper:h_int",), **arguments):
    return stores[1].get_historical_features(entity_df, list(features), **arguments)


def found_by(stores, entity_df):
    return join(stores, entity_df).to_arrow()["h_int"].to_pylist()


NOON = pd.Timestamp("2024-03-31 12:00", tz="UTC")


def moments(rows=8):
    """Entity rows that find something, nothing, and an unknown key."""
    keys = ["a", "b", "c d", "unknown"]
    times = [NOON + pd.Timedelta(hours=7 * row) for row in range(rows)]
    return pd.DataFrame({"k": [keys[row % 4] for row in range(rows)], "event_timestamp": times})


@pytest.fixture(scope="module")
def filled(connection):
    """Rows in s.hyper, newest every 8 hours, some values NULL."""
    connection.execute("TRUNCATE s.hyper")
    connection.execute(
        "INSERT INTO s.hyper SELECT k, %s + n * interval '8 hours', n, nullif(n, 5) + ascii(k) "
        "FROM unnest(%s::text[]) k, generate_series(0, 18) n",
        [START, KEYS],
    )


JUNK = [
    "4713-01-01 00:00+00 BC",
    "0044-03-15 00:00+00 BC",
    "0001-01-01 00:00+00 BC",
    "0001-01-01 00:00+00",
    "9999-12-31 23:59:59.999999+00",
    "200000-01-01 00:00+00",
]


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Tokyo"])
@pytest.mark.usefixtures("filled")
def test_rows_of_any_year_break_no_join(stores, connection, database, zone):
    """A hypertable makes chunks for them, before the year 1 and far away."""
    name = conninfo_to_dict(database)["dbname"]
    frame = moments()
    before = found_by(stores, frame)
    assert before == as_of(connection, frame)
    connection.execute(f"ALTER DATABASE {name} SET timezone = '{zone}'")
    try:
        for table, columns in (("hyper", "h_int"), ("plain", "p_int"), ("quotes", "q_float"), ("naive", "n_float")):
            # A hypertable takes no -infinity.
            for moment in (*JUNK, "infinity", *(["-infinity"] if table == "plain" else [])):
                for key in ("junk", "a"):
                    connection.execute(
                        f"INSERT INTO s.{table} (k, ts, {columns}) VALUES (%s, %s, 1) ON CONFLICT DO NOTHING",
                        [key, moment],
                    )
        assert found_by(stores, frame) == before
        features = ["hyper:h_int", "plain:p_int", "quotes:q_float", "naive:n_float", "query:double", "hour:o_int"]
        stock, larder = (store.get_historical_features(frame, features) for store in stores)
        same(stock.to_arrow(), larder.to_arrow())
        # Entity rows of any year, which only a query can have.
        times = ", ".join(f"('junk', '{moment}'::timestamptz, NULL::timestamptz)" for moment in JUNK)
        query = f"SELECT k, event_timestamp, label FROM (VALUES {times}) AS row (k, event_timestamp, label)"
        assert found_by(stores, query) == [1] * len(JUNK)
    finally:
        connection.execute(f"ALTER DATABASE {name} SET timezone = 'Europe/London'")
        for table in ("hyper", "plain", "quotes", "naive"):
            connection.execute(f"DELETE FROM s.{table} WHERE ts < '1900-01-01' OR ts > '2100-01-01'")


@pytest.mark.usefixtures("filled")
def test_a_feature_that_is_infinite_is_named(stores, connection):
    connection.execute("TRUNCATE s.types")
    connection.execute("INSERT INTO s.types (k, ts, t_time) VALUES ('a', %s, '0044-03-15 BC')", [START])
    times = join(stores, moments(1), ["types:t_time"]).to_arrow()["t_time"]
    [(micros,)] = connection.execute(
        "SELECT (extract(epoch FROM '0044-03-15 BC'::timestamptz) * 1e6)::bigint"
    ).fetchall()
    assert times.cast(pa.int64()).to_pylist() == [micros]
    connection.execute("UPDATE s.types SET t_time = 'infinity'")
    with pytest.raises(ValueError, match=r"t_time.* holds infinity"):
        join(stores, moments(1), ["types:t_time"]).to_arrow()


LABELS = [
    0, 7, -1, 1.5, None, True, "", " ", "hyper", "plain", "h_float", "f0", "c0", "c1", "k0", "row", "slice", "time",
    "probe", "source", "view_0", "larder_row", "larder_slice", "larder_entities", "larder_probes", "entity_timestamp",
    "entity_dataframe", "hyper__entity_row_unique_id", "created_timestamp", "row_number", "ts", "made", "Close",
    'with "quotes"', "100%", "%s", "%(k)s", "{}", "{0}", "it's", "a;b", "--", "é", "日本", "\N{BAR CHART}", "x" * 64,
    "x" * 63 + "y", "é" * 80, "select", "user", "\\", "two\nlines", "tab\t", "__index_level_0__", "index",
]  # fmt: skip


# The first text that Hypothesis makes on a host takes seconds: it looks at all of Unicode.
@settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    labels=st.lists(
        st.one_of(st.sampled_from(LABELS), st.text(max_size=70), st.integers()), unique_by=str, max_size=12
    ),
    full=st.booleans(),
    on_demand=st.booleans(),
)
@example(labels=LABELS, full=False, on_demand=True)
@example(labels=[*LABELS, "h_int", "total"], full=True, on_demand=False)
@pytest.mark.usefixtures("filled")
def test_labels_of_any_name_come_back_as_given(stores, connection, labels, full, on_demand):
    taken = {"k", "event_timestamp", "asked"} | (set() if full else {"h_int", "total", "h_float"})
    if on_demand:  # it reads the features of hyper
        taken |= {"h_float", "h_int", "hyper__h_float", "hyper__h_int"}
    try:
        labels = [label for label in labels if str(label) not in taken and str(label).encode()]
    except UnicodeEncodeError:  # half of a pair: no name for Arrow
        return
    frame = moments()
    for number, label in enumerate(labels):
        frame.insert(number % len(frame.columns), label, [f"{number}.{row}" for row in range(len(frame))])
    if on_demand:
        frame["asked"] = 0.5
    features = ["hyper:h_int", *(["plus:total"] if on_demand else [])]
    found = join(stores, frame, features, full_feature_names=full).to_df()
    assert [*found.columns[: len(frame.columns)]] == [*frame.columns]
    for number, label in enumerate(frame.columns):
        if label != "event_timestamp":
            assert found.iloc[:, number].tolist() == frame[label].tolist()
    expected = as_of(connection, frame)
    assert [None if pd.isna(value) else value for value in found["hyper__h_int" if full else "h_int"]] == expected


@pytest.mark.parametrize(
    ("columns", "full", "message"),
    [
        (["k", "event_timestamp", "h_int"], False, "'h_int', and so is a feature named.*full_feature_names=True"),
        (["k", "event_timestamp", "hyper__h_int"], True, "'hyper__h_int', and so is a feature named: rename"),
        (["k", "event_timestamp", "x", "x"], False, "several columns 'x': rename all but one"),
        (["k", "event_timestamp", 0, "0"], False, "several columns '0'"),
        (["event_timestamp", "key"], False, "no column 'k', the join key of hyper. They have: event_timestamp, key"),
    ],
)
@pytest.mark.usefixtures("filled")
def test_names_that_leave_no_right_answer_are_refused(stores, columns, full, message):
    frame = pd.DataFrame([["a", "b", "c", "d"][: len(columns)]], columns=columns)
    frame = frame.assign(event_timestamp=[NOON])
    with pytest.raises(ValueError, match=message):
        join(stores, frame, full_feature_names=full)


@pytest.mark.parametrize("label", ["h_float", "hyper__h_float", "h_int"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.usefixtures("filled")
def test_a_label_named_like_what_an_on_demand_view_reads_is_refused(stores, label, full):
    frame = moments().assign(asked=0.5)
    with pytest.raises(ValueError, match=f"'{label}'.*rename"):
        join(stores, frame.assign(**{label: 1.0}), ["plus:total"], full_feature_names=full)


@pytest.mark.usefixtures("filled")
def test_a_label_named_like_an_on_demand_feature_is_refused(stores):
    with pytest.raises(ValueError, match="'total', and so is a feature named"):
        join(stores, moments().assign(total=1, asked=0.5), ["plus:total"])


TIME_SHAPES = {
    "text": lambda t: t.dt.strftime("%Y-%m-%dT%H:%M:%SZ"),
    "text without a zone": lambda t: t.dt.strftime("%Y-%m-%d %H:%M:%S"),
    "text of several zones": lambda t: [
        (one.tz_convert("America/New_York") if row % 2 else one).isoformat() for row, one in enumerate(t)
    ],
    "string dtype": lambda t: t.astype(str).astype("string"),
    "Arrow strings": lambda t: t.astype(str).astype("string[pyarrow]"),
    "Arrow timestamps": lambda t: t.astype(pd.ArrowDtype(pa.timestamp("ms", "America/New_York"))),
    "Arrow timestamps without a zone": lambda t: t.dt.tz_localize(None).astype(pd.ArrowDtype(pa.timestamp("ns"))),
    "categories": lambda t: t.astype("category"),
    "categories of text": lambda t: t.astype(str).astype("category"),
    "objects": lambda t: t.astype(object),
    "datetimes": lambda t: pd.Series(list(t.dt.to_pydatetime()), dtype=object),
    "datetimes without a zone": lambda t: pd.Series(list(t.dt.tz_localize(None).dt.to_pydatetime()), dtype=object),
    "datetimes of several zones and none": lambda t: pd.Series(
        [
            [one, one.tz_convert("Asia/Kolkata").to_pydatetime(), one.tz_localize(None), one.isoformat()][row % 4]
            for row, one in enumerate(t)
        ],
        dtype=object,
    ),
    "numpy objects": lambda t: pd.Series([one.tz_localize(None).to_numpy() for one in t], dtype=object),
    "another zone": lambda t: t.dt.tz_convert("America/New_York"),
    "no zone": lambda t: t.dt.tz_localize(None),
    "datetime64[s]": lambda t: t.dt.tz_localize(None).astype("datetime64[s]"),
    "datetime64[ms]": lambda t: t.dt.tz_localize(None).astype("datetime64[ms]"),
    "datetime64[us]": lambda t: t.dt.tz_localize(None).astype("datetime64[us]"),
    "datetime64[ns]": lambda t: t.dt.tz_localize(None).astype("datetime64[ns]"),
}  # fmt: skip


@pytest.mark.parametrize("shape", TIME_SHAPES)
@pytest.mark.usefixtures("filled")
def test_event_times_of_any_kind_are_the_same_moments(stores, connection, shape):
    frame = moments()
    shaped = frame.assign(event_timestamp=TIME_SHAPES[shape](frame["event_timestamp"]))
    found = join(stores, shaped).to_arrow()
    assert found["h_int"].to_pylist() == as_of(connection, frame)
    assert found.schema.field("event_timestamp").type == pa.timestamp("us")
    assert found["event_timestamp"].to_pylist() == [one.tz_localize(None) for one in frame["event_timestamp"]]


@pytest.mark.parametrize("kind", [object, "string", "category", pd.ArrowDtype(pa.date32())])
@pytest.mark.usefixtures("filled")
def test_dates_are_midnight_in_utc(stores, connection, kind):
    days = [NOON.date() + timedelta(days=row) for row in range(4)]
    frame = pd.DataFrame({"k": ["a"] * 4, "event_timestamp": pd.to_datetime(days, utc=True)})
    given = pd.Series(days if kind != "string" else map(str, days), dtype=kind)
    assert found_by(stores, frame.assign(event_timestamp=given)) == as_of(connection, frame)


def test_the_first_and_the_last_year_are_moments(stores):
    times = [datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, 999999, UTC), "0099-12-31"]
    frame = pd.DataFrame({"k": ["a"] * 3, "event_timestamp": pd.Series(times, dtype=object)})
    found = join(stores, frame).to_arrow()["event_timestamp"].to_pylist()
    assert found == [*(moment.replace(tzinfo=None) for moment in times[:2]), datetime(99, 12, 31)]  # noqa: DTZ001


@pytest.mark.parametrize("missing", [None, pd.NaT, float("nan"), np.datetime64("NaT"), pd.NA])
@pytest.mark.parametrize("objects", [True, False])
@pytest.mark.usefixtures("filled")
def test_a_row_without_a_time_finds_nothing(stores, connection, missing, objects):
    frame = moments()
    frame["event_timestamp"] = frame["event_timestamp"].astype(object) if objects else frame["event_timestamp"]
    frame.loc[2, "event_timestamp"] = missing
    found = join(stores, frame).to_arrow()
    assert found["event_timestamp"].null_count == 1
    expected = as_of(connection, moments())
    expected[2] = None
    assert found["h_int"].to_pylist() == expected
    none = frame.assign(event_timestamp=[missing] * len(frame))
    assert found_by(stores, none) == [None] * len(frame)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (["2024-03-31", "03/04/2024"], "Row 1 .*'03/04/2024' as 'event_timestamp'.*ISO 8601"),
        (["", "2024-03-31"], "Row 0 .*''"),
        (pd.Series([NOON, 5], dtype=object), "Row 1 .*5 as"),
        (pd.Series([NOON, [NOON]], dtype=object), "Row 1 "),
        ([1711843200, 1711843201], "Row 0 .*1711843200 .*pandas.to_datetime"),
        ([1711843200.0, None], "Row 0 "),
        ([True, False], "Row 0 "),
        (pd.period_range("2024-03", periods=2, freq="M"), "periods, not moments.*to_timestamp"),
        (np.array(["-0044-03-15", "2024-03-31"], dtype="datetime64[s]"), "years beyond 1 to 9999"),
        (np.array(["12000-03-15", "2024-03-31"], dtype="datetime64[s]"), "years beyond 1 to 9999"),
    ],
)
@pytest.mark.usefixtures("filled")
def test_times_that_are_none_are_refused_with_their_row(stores, times, message):
    with pytest.raises(ValueError, match=message):
        join(stores, pd.DataFrame({"k": ["a", "b"], "event_timestamp": times}))


VALUES = {
    "decimals": [Decimal("1.10"), None, Decimal(3)],
    "lists": [[1, 2], None, []],
    "lists of text": [["a"], ["b", None], []],
    "dicts": [{"a": 1}, None, {"a": 2}],
    "bytes": [b"\0", None, b""],
    "dates": [NOON.date(), None, NOON.date()],
    "times of day": [time(16), None, time(9, 30)],
    "durations": pd.to_timedelta(["1 day", None, "2h"]),
    "nothing": [None, None, None],
    "booleans with gaps": pd.array([True, None, False], dtype="boolean"),
    "integers with gaps": pd.array([2**62 + 1, None, -1], dtype="Int64"),
    "int8": np.array([-1, 0, 1], dtype="int8"),
    "uint64": np.array([2**64 - 1, 0, 1], dtype="uint64"),
    "large integers with gaps": pd.array([2**64 - 1, None, 1], dtype="UInt64"),
    "sparse": pd.arrays.SparseArray([1, 0, 0]),
    "intervals": pd.interval_range(0, 3),
    "UUIDs": [UUID(int=1), None, UUID(int=2)],
    "float16": np.array([0.5, 0, 1], dtype="float16"),
    "categories": pd.Categorical(["a", None, "b"]),
    "ordered categories": pd.Categorical([3, 1, 2], ordered=True),
    "periods": pd.period_range("2024-03", periods=3, freq="M"),
    "Arrow strings": pd.array(["a", None, "\0"], dtype="string[pyarrow]"),
    "Arrow large strings": pd.array(["a", None, "b"], dtype=pd.ArrowDtype(pa.large_string())),
    "Arrow decimals": pd.array([Decimal("1.1"), None, None], dtype=pd.ArrowDtype(pa.decimal128(9, 2))),
    "text with NUL and the end of COPY": ["a\0b", "\n\\.\n", "NULL"],
}


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.usefixtures("filled")
def test_labels_of_any_type_come_back_as_given(stores, connection, kind):
    frame = moments(3).assign(label=VALUES[kind])
    found = join(stores, frame).to_df()
    given = pa.array(
        frame["label"].astype("int64") if kind == "sparse" else frame["label"], from_pandas=True
    ).to_pylist()
    assert pa.array(found["label"], from_pandas=True).to_pylist() == given
    assert [None if pd.isna(value) else value for value in found["h_int"]] == as_of(connection, frame)


@pytest.mark.parametrize(
    "values", [[1, "a", None], [2**70, 1, 1], [1j, 2j, 3j], [object(), None, None], ["\ud800", "a", "b"]]
)
@pytest.mark.usefixtures("filled")
def test_labels_that_arrow_cannot_hold_are_named(stores, values):
    with pytest.raises(ValueError, match=r"The column 'label' .* cannot be kept.*astype\(str\)"):
        join(stores, moments(3).assign(label=pd.Series(values, dtype=None if values[0] == 1j else object)))


KEY_SHAPES = {
    "categories": lambda k: k.astype("category"),
    "string dtype": lambda k: k.astype("string"),
    "Arrow strings": lambda k: k.astype("string[pyarrow]"),
    "Arrow large strings": lambda k: k.astype(pd.ArrowDtype(pa.large_string())),
    "Arrow dictionary": lambda k: k.astype(pd.ArrowDtype(pa.dictionary(pa.int32(), pa.string()))),
    "NUL in text": lambda k: k.where(k != "unknown", "un\0known"),
    "the end of COPY in text": lambda k: k.where(k != "unknown", "a\n\\.\nb"),
    "gaps": lambda k: k.where(k != "unknown", None),
    "nothing at all": lambda k: pd.Series([None] * len(k), dtype=object),
    "nothing, as floats": lambda k: pd.Series([np.nan] * len(k)),
}


@pytest.mark.parametrize("shape", KEY_SHAPES)
@pytest.mark.usefixtures("filled")
def test_text_keys_of_any_kind_find_their_rows(stores, connection, shape):
    frame = moments()
    shaped = frame.assign(k=KEY_SHAPES[shape](frame["k"]))
    assert found_by(stores, shaped) == as_of(connection, shaped.astype({"k": object}))


NUMBER_SHAPES = {
    "int64": [1, 2, 2**53 + 1],
    "int8": np.array([1, 2, 3], dtype="int8"),
    "uint64": np.array([1, 2, 2**64 - 1], dtype="uint64"),
    "Int64": pd.array([1, None, 2**53 + 1], dtype="Int64"),
    "float64": [1.0, None, 2.5],
    "float32": np.array([1, np.inf, np.nan], dtype="float32"),
    "floats beyond integers": [1e300, 2.0, 9223372036854775808.0],
    "decimals": [Decimal("1.00"), Decimal("2.5"), None],
    "Arrow integers": pd.array([1, None, 2], dtype=pd.ArrowDtype(pa.int32())),
    "categories": pd.Categorical([1, 2, 2]),
    "nothing": [None, None, None],
}


@pytest.mark.parametrize("shape", NUMBER_SHAPES)
def test_numbers_of_any_kind_are_the_same_key(stores, connection, shape):
    connection.execute("TRUNCATE s.pairs")
    known = {("a", 1): 1.0, ("a", 2): 2.0, ("a", 2**53 + 1): 3.0, ("a", 2**53): 4.0}
    for (key, number), value in known.items():
        connection.execute("INSERT INTO s.pairs VALUES (%s, %s, %s, %s, %s)", [key, number, START, START, value])
    frame = moments(3).assign(k="a", event_timestamp=START + timedelta(days=1), n=NUMBER_SHAPES[shape])
    expected = [
        next((value for (_, n), value in known.items() if not pd.isna(number) and n == number), None)
        for number in frame["n"].astype(object)
    ]
    assert join(stores, frame, ["pairs:value"]).to_arrow()["value"].to_pylist() == expected


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("uuid", UUID("6f1ed002-ab5c-4a3b-9a3d-000000000001")),
        ("uuid", "6f1ed002-ab5c-4a3b-9a3d-000000000001"),
        ("char", "ab"),
        ("date", date(2024, 3, 28)),
        ("date", pd.Timestamp("2024-03-28", tz="UTC")),
        ("timestamptz", pd.Timestamp("2024-03-28 12:00", tz="UTC")),
        ("timestamptz", pd.Timestamp("2024-03-28 08:00", tz="America/New_York")),
        ("float8", 2.5),
        ("float8", Decimal("2.5")),
        ("real", np.float32(2.5)),
        ("numeric", 3),
        ("numeric", Decimal("3.0")),
        ("numeric", 3.0),
        ("smallint", 3.0),
        ("bytea", b"\0a"),
        ("bool", True),
        ("varchar", "a\\b"),
    ],
)
def test_keys_of_other_types_find_their_row(stores, kind, value):
    frame = pd.DataFrame({"k": [value, None], "event_timestamp": [NOON, NOON]})
    assert join(stores, frame, [f"by_{kind}:x"]).to_arrow()["x"].to_pylist() == [7, None]
    query = f"SELECT {KEYED[kind]}::{kind}{'(4)' if kind == 'char' else ''} AS k, now() AS event_timestamp"
    assert join(stores, query, [f"by_{kind}:x"]).to_arrow()["x"].to_pylist() == [7]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("n", pd.period_range("2024-01", periods=3, freq="M"), r"join key 'n' .* no type"),
        ("n", ["1", "2", "3"], "'n' is text in the entity rows and bigint in the source of pairs"),
        ("n", [True, False, True], "'n' is boolean in the entity rows and bigint"),
        ("n", pd.Series([[1], [2], [3]], dtype=object), "'n' .* holds list<item: int64>: it has to be one value"),
        ("k", [600519, 1, 2], "'k' is bigint in the entity rows and text in the source of pairs"),
        ("k", [NOON, NOON, NOON], "'k' is timestamp with time zone in the entity rows and text"),
    ],
)
@pytest.mark.usefixtures("filled")
def test_keys_of_a_type_that_cannot_be_compared_are_refused(stores, column, values, message):
    frame = moments(3).assign(n=1)
    frame[column] = values
    with pytest.raises(ValueError, match=message):
        join(stores, frame, ["pairs:value"]).to_arrow()


INDEXES = {
    "not unique": lambda frame: frame.set_axis([0] * len(frame)),
    "times": lambda frame: frame.set_axis(frame["event_timestamp"].rename("index")),
    "named like a column": lambda frame: frame.set_axis(pd.Index(range(len(frame)), name="k")),
    "several levels": lambda frame: frame.set_axis(pd.MultiIndex.from_product([["x"], range(len(frame))])),
    "backwards": lambda frame: frame.iloc[::-1],
    "columns backwards": lambda frame: frame.iloc[:, ::-1],
    "a view of another": lambda frame: pd.concat([frame, frame]).iloc[::2],
}


@pytest.mark.parametrize("index", INDEXES)
@pytest.mark.usefixtures("filled")
def test_rows_and_columns_come_in_the_order_given(stores, connection, index):
    frame = INDEXES[index](moments().assign(label=range(8)))
    found = join(stores, frame).to_df()
    assert [*found.columns] == [*frame.columns, "h_int"]
    assert found["label"].tolist() == frame["label"].tolist()
    assert [None if pd.isna(value) else value for value in found["h_int"]] == as_of(connection, frame)


@pytest.mark.usefixtures("filled")
def test_a_key_in_the_index_is_asked_for(stores):
    with pytest.raises(ValueError, match=r"no column 'k'.*reset_index\(\)"):
        join(stores, moments().set_index("k"))
    with pytest.raises(ValueError, match=r"columns .* are a MultiIndex"):
        join(stores, pd.concat({"x": moments()}, axis=1))


@pytest.mark.usefixtures("filled")
def test_a_time_of_another_name_is_found_if_it_is_the_only_one(stores, connection):
    frame = moments()
    assert found_by(stores, frame.rename(columns={"event_timestamp": "when"})) == as_of(connection, frame)
    query = "SELECT 'a'::text AS k, '2024-03-31 12:00+00'::timestamptz AS \"When\""
    assert found_by(stores, query) == as_of(connection, frame.head(1))
    for none in (moments().drop(columns="event_timestamp"), pd.DataFrame(), "SELECT 'a' AS k"):
        with pytest.raises(EntityTimestampInferenceException):
            join(stores, none)


@pytest.mark.parametrize("kind", [None, object, "datetime64[ns]", "datetime64[us, UTC]", "string"])
@pytest.mark.usefixtures("filled")
def test_no_rows_are_an_answer(stores, kind):
    frame = pd.DataFrame({"k": [], "event_timestamp": pd.Series([], dtype=kind), "label": pd.Series([], dtype="int64")})
    found = join(stores, frame, ["hyper:h_int", "hyper:h_float"]).to_arrow()
    assert found.num_rows == 0
    assert found.column_names == ["k", "event_timestamp", "label", "h_int", "h_float"]
    assert found.schema.field("h_int").type == pa.int64()
    assert found.schema.field("event_timestamp").type == pa.timestamp("us")


ROWS = "SELECT k, event_timestamp, n AS label FROM s.labels"
QUERIES = [
    ROWS,
    f"{ROWS};",
    f"  \n{ROWS} ; \n\n",
    f"{ROWS} -- all of them",
    f"{ROWS}; -- all of them",
    f"/* ; */ {ROWS} /* all; */",
    f"-- first\n{ROWS}\n;-- all",
    f"WITH every AS ({ROWS}) SELECT * FROM every;",
    f"({ROWS})",
    f"({ROWS}) UNION ALL ({ROWS}) -- 100% of 'em",
    f"{ROWS} WHERE k LIKE '%' AND k <> '{{}}' AND k <> ';--' ORDER BY n DESC;",
    "TABLE s.labels;",
    'SELECT k, event_timestamp, n AS larder_row, n AS c0, n AS "100%", n AS "Close" FROM s.labels',
    f"SELECT * FROM ({ROWS}) AS larder_entities",
    "SELECT k, event_timestamp, label FROM larder_entities",  # a table of the user's
    "SELECT k::char(9), event_timestamp, n FROM s.labels",
    "SELECT k, event_timestamp, '{1}'::json, '1 day'::interval, '10.0.0.1'::inet AS at, '16:00'::time, "
    "gen_random_uuid() AS id, ARRAY[1, 2] AS list, 1.5 AS number, NULL AS nothing, k::bytea, '2024-03-31'::date "
    "AS day FROM s.labels".replace("k::bytea", "k::bytea AS bytes").replace("'{1}'::json", "'{}'::json AS json"),
    f"{ROWS} LIMIT 0;",
]


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("mode", ["temp_table", "embed_query"])
@pytest.mark.usefixtures("filled")
def test_queries_of_any_shape_are_understood(stores, connection, query, mode):
    connection.execute("DROP TABLE IF EXISTS s.labels, larder_entities")
    connection.execute("CREATE TABLE s.labels (k text, event_timestamp timestamptz, n int)")
    for number, (key, moment) in enumerate(moments().itertuples(index=False)):
        connection.execute("INSERT INTO s.labels VALUES (%s, %s, %s)", [key, moment, number])
    connection.execute(f"CREATE TABLE larder_entities AS {ROWS}")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stores[1].config.offline_store, "entity_select_mode", EntitySelectMode(mode))
            job = join(stores, query)
            found = job.to_arrow()
        frame = found.select(["k", "event_timestamp"]).to_pandas()
        frame["event_timestamp"] = frame["event_timestamp"].dt.tz_localize("UTC")
        assert found["h_int"].to_pylist() == as_of(connection, frame.assign(k=frame["k"].str.strip()))
        rows = connection.execute(query.encode()).fetchall()
        assert sorted(map(str, found["k"].to_pylist())) == sorted(str(row[0]) for row in rows)
        if mode == "temp_table":  # with embed_query, the order is PostgreSQL's
            assert found["k"].to_pylist() == [row[0] for row in rows]
        # What to_sql gives can be run as it is.
        assert len(connection.execute(job.to_sql().encode()).fetchall()) == len(rows)
    finally:
        connection.execute("DROP TABLE larder_entities")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (f"{ROWS}; SELECT 1", "several statements"),
        ("", "to be a SELECT"),
        ("-- nothing", "to be a SELECT"),
        ("CREATE TABLE s.never (k text)", "to be a SELECT"),
        ("SELECT 1 AS x, 2 AS x, now() AS event_timestamp", "several columns 'x'"),
        ("SELECT 'a' AS k, now() AS event_timestamp, 1 AS h_int", "'h_int', and so is a feature named"),
        ("SELECT 'a' AS k, '2024-03-31' AS event_timestamp", "has to be a timestamp: write.*::timestamptz"),
        ("SELECT 'a' AS k, 5 AS event_timestamp", "has to be a timestamp"),
        ("SELECT 'a' AS key, now() AS event_timestamp", "no column 'k'"),
        ("SELECT k FROM s.no_such_table", 'cannot be run: .*relation "s.no_such_table" does not exist'),
        ("SELEC k", "cannot be run: .*syntax error"),
    ],
)
@pytest.mark.usefixtures("filled")
def test_queries_that_leave_no_right_answer_are_refused(stores, connection, query, message):
    with pytest.raises(ValueError, match=message):
        join(stores, query)
    assert connection.execute("SELECT to_regclass('s.never')").fetchall() == [(None,)]


@pytest.mark.parametrize(
    "query", ["INSERT INTO s.market VALUES (now(), 1) RETURNING 'a'::text AS k, ts", "SHOW server_version"]
)
@pytest.mark.usefixtures("filled")
def test_a_statement_that_is_no_select_changes_nothing(stores, connection, query):
    before = connection.execute("SELECT count(*) FROM s.market").fetchall()
    with pytest.raises((ValueError, EntityTimestampInferenceException)):
        join(stores, query).to_arrow()
    assert connection.execute("SELECT count(*) FROM s.market").fetchall() == before


@settings(max_examples=40, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    seed=st.integers(0, 2**32),
    rows=st.sampled_from([1, 7, 30]),
    times=st.sampled_from([*TIME_SHAPES]),
    keys=st.sampled_from([*KEY_SHAPES]),
    index=st.sampled_from([*INDEXES]),
    labels=st.lists(st.sampled_from(LABELS), unique_by=str, max_size=4),
    per_statement=st.sampled_from([1, 500]),
)
@pytest.mark.usefixtures("filled")
def test_entity_rows_of_any_shape_find_what_pandas_finds(
    stores, connection, seed, rows, times, keys, index, labels, per_statement
):
    random = np.random.default_rng(seed)
    plain = pd.DataFrame(
        {
            "k": pd.Series([str(random.choice([*KEYS, "unknown"])) for _ in range(rows)], dtype=object),
            "event_timestamp": [NOON + pd.Timedelta(minutes=int(random.integers(-9000, 9000))) for _ in range(rows)],
        }
    )
    shaped = plain.assign(k=KEY_SHAPES[keys](plain["k"]))
    plain = plain.assign(k=shaped["k"].astype(object))
    shaped = shaped.assign(event_timestamp=TIME_SHAPES[times](plain["event_timestamp"]))
    for label in labels:
        if label not in ("h_int", "h_float"):
            shaped[label] = random.integers(0, 9, rows)
    plain["event_timestamp"] = plain["event_timestamp"].dt.floor("s" if "[s]" in times else "us")
    shaped, plain = INDEXES[index](shaped), INDEXES[index](plain)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offline_store, "ROWS_PER_STATEMENT", per_statement)
        found = join(stores, shaped).to_df()
    assert [*found.columns] == [*shaped.columns, "h_int"]
    assert [None if pd.isna(value) else value for value in found["h_int"]] == as_of(connection, plain)


@pytest.mark.usefixtures("filled")
def test_a_write_between_two_slices_is_not_seen(stores, connection):
    """One join, one snapshot: what commits while it runs is in no row of it, or in all."""
    frame = moments(40).assign(k="a")
    before = found_by(stores, frame)
    read, slices = offline_store._read, []

    def read_and_write(*arguments):
        if slices:
            connection.execute("UPDATE s.hyper SET h_int = -1")
        slices.append(arguments)
        return read(*arguments)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(offline_store, "ROWS_PER_STATEMENT", 1)
            patch.setattr(offline_store, "_read", read_and_write)
            assert found_by(stores, frame) == before
        assert len(slices) > 2
        assert {*found_by(stores, frame.head(3))} == {-1}
    finally:
        connection.execute("UPDATE s.hyper SET h_int = nullif(h_float, 5) + ascii(k)")


@pytest.mark.usefixtures("filled")
def test_remote_storage_is_refused_with_a_way_on(stores):
    with pytest.raises(NotImplementedError, match=r"to_arrow\(\).*pyarrow.parquet"):
        join(stores, moments()).to_remote_storage()


def saved(stores, job, name, **arguments):
    storage = SavedDatasetPostgreSQLStorage(table_ref=name)
    return stores[1].create_saved_dataset(job, "saved", storage, **arguments)


def drop(connection, *names):
    for name in names:
        connection.execute(f"DROP TABLE IF EXISTS {name}")


@pytest.mark.parametrize("name", ["saved_set", "Saved_Set", '"Saved Set"', "s.saved_set", 's."100%"'])
@pytest.mark.parametrize("zone", ["UTC", "America/New_York"])
@pytest.mark.parametrize("as_sql", [False, True])
@pytest.mark.usefixtures("filled")
def test_a_saved_dataset_comes_back_whole(stores, connection, database, name, zone, as_sql):
    drop(connection, name)
    frame = moments().assign(lists=[[1.5]] * 8, **{"0": 1}).astype({"k": "category"})
    if as_sql:
        rows = ", ".join(
            f"('{k}', '{t}'::timestamptz)" for k, t in frame[["k", "event_timestamp"]].itertuples(index=False)
        )
        frame = f"SELECT * FROM (VALUES {rows}) AS row (k, event_timestamp); -- end"
    database_name = conninfo_to_dict(database)["dbname"]
    connection.execute(f"ALTER DATABASE {database_name} SET timezone = '{zone}'")
    try:
        job = join(stores, frame, ["hyper:h_int", "hyper:h_float"])
        expected = job.to_arrow().select(["k", "h_int", "h_float", "event_timestamp"])
        expected = expected.set_column(0, "k", expected["k"].cast(pa.string()))
        saved(stores, job, name)
        same(expected, stores[1].get_saved_dataset("saved").to_arrow())
        with pytest.raises(ValueError, match=r"is there already.*allow_overwrite=True"):
            saved(stores, job, name)
        smaller = join(stores, moments(2), ["hyper:h_int"])
        saved(stores, smaller, name, allow_overwrite=True)
        assert stores[1].get_saved_dataset("saved").to_arrow().num_rows == 2
    finally:
        connection.execute(f"ALTER DATABASE {database_name} SET timezone = 'Europe/London'")
        drop(connection, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frame: frame.rename(columns={"event_timestamp": "when"}), "by the column 'event_timestamp'"),
        (lambda frame: frame.head(0), "No entity row has an event time"),
        (lambda frame: frame.assign(event_timestamp=pd.NaT), "No entity row has an event time"),
        (lambda frame: frame.assign(label=[{"a": 1}] * 8), "no type for the column 'label'"),
        (lambda frame: frame.assign(label="\0"), "'label' holds text with the character NUL"),
        (lambda frame: frame.assign(**{"x" * 64: 1}), "no names of more than 63 bytes"),
        (lambda frame: frame.assign(event_timestamp=["9999-12-31"] * 8), "year 9999"),
    ],
)
@pytest.mark.usefixtures("filled")
def test_what_cannot_be_read_again_is_not_saved(stores, connection, change, message):
    drop(connection, "refused")
    job = join(stores, change(moments()))
    with pytest.raises(ValueError, match=message):
        saved(stores, job, "refused")
    assert connection.execute("SELECT to_regclass('refused')").fetchall() == [(None,)]


@pytest.mark.usefixtures("filled")
def test_tables_that_are_no_datasets_are_not_overwritten(stores, connection):
    connection.execute("CREATE OR REPLACE VIEW s.view AS SELECT 1 AS one")
    job = join(stores, moments())
    with pytest.raises(ValueError, match="is no plain table"):
        saved(stores, job, "s.view", allow_overwrite=True)
    with pytest.raises(ValueError, match="is a source of hyper"):
        saved(stores, job, "s.hyper", allow_overwrite=True)
    with pytest.raises(ValueError, match="cannot be named 'a b'"):
        saved(stores, job, "a b")


@pytest.mark.usefixtures("filled")
def test_an_account_that_may_not_write_the_registry_saves_nothing(stores, connection, database):
    given = conninfo_to_dict(database)
    role = f"larder_trainer_{os.getpid()}"
    # As parameters: the host may be the folder of a socket.
    path = f"postgresql+psycopg:///{given.pop('dbname')}?{urlencode(given, quote_via=quote)}"

    def store(options=""):
        registry = {"registry_type": "sql", "path": path + options, "cache_ttl_seconds": 60}
        config = stores[1].config
        return FeatureStore(
            config=RepoConfig(
                project="test",
                provider="local",
                registry=registry,
                online_store=config.online_store.model_dump(),
                offline_store=config.offline_store.model_dump(),
                entity_key_serialization_version=3,
            )
        )

    connection.execute(f"CREATE ROLE {role}")
    try:
        store().apply([K, N, *VIEWS, ON_DEMAND])
        connection.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
        trainer = store(f"&options=-c%20role%3D{role}")
        job = trainer.get_historical_features(moments(), ["hyper:h_int"])
        storage = SavedDatasetPostgreSQLStorage(table_ref="refused")
        with pytest.raises(ValueError, match=r"may not write the registry.*Parquet"):
            trainer.create_saved_dataset(job, "refused", storage)
        assert connection.execute("SELECT to_regclass('refused')").fetchall() == [(None,)]
        store().create_saved_dataset(store().get_historical_features(moments(), ["hyper:h_int"]), "allowed", storage)
        assert store().get_saved_dataset("allowed").to_arrow().num_rows == 8
    finally:
        connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


WINDOW = {"start_date": START + timedelta(days=1), "end_date": START + timedelta(days=3)}


@pytest.mark.usefixtures("filled")
def test_a_range_of_times_of_a_view_with_mapped_keys(stores, connection):
    """Stock asks the source for the column k, which has another name there."""
    connection.execute("TRUNCATE s.pairs")
    connection.execute("INSERT INTO s.pairs VALUES ('a', 1, %s, %s, 2.5)", [WINDOW["start_date"], START])
    found = stores[1].get_historical_features(features=["pairs:value"], **WINDOW).to_arrow()
    assert found.to_pylist() == [
        {
            "event_timestamp": WINDOW["start_date"].replace(tzinfo=None),
            "created_timestamp": START.replace(tzinfo=None),
            "k": "a",
            "n": 1,
            "value": 2.5,
        }
    ]


@pytest.mark.parametrize("views", [["market:m_float"], ["versions:v_int", "hyper:h_int"]])
@pytest.mark.usefixtures("filled")
def test_a_range_of_times_of_other_views(stores, connection, views):
    connection.execute("TRUNCATE s.market, s.versions")
    connection.execute("INSERT INTO s.market VALUES (%s, 2.5)", [WINDOW["end_date"]])
    for made, number in ((1, 1), (3, 3), (2, 2)):
        time_made = START + timedelta(days=made)
        connection.execute("INSERT INTO s.versions VALUES ('a', %s, %s, %s)", [WINDOW["start_date"], time_made, number])
    found = stores[1].get_historical_features(features=views, **WINDOW).to_df()
    if "m_float" in found:
        assert found["m_float"].tolist() == [2.5]
    else:
        assert {*found[(found["k"] == "a") & found["v_int"].notna()]["v_int"]} == {3}  # the one made last
        assert found["event_timestamp"].is_monotonic_increasing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": ["pairs:value", "hyper:h_int"], **WINDOW}, "different entities"),
        (
            {"features": ["hyper:h_int"], "start_date": "2024-03-31"},
            "start_date is '2024-03-31'; it has to be a datetime",
        ),
        ({"features": ["hyper:h_int"], **WINDOW, "filter_by_created_timestamp": True}, "needs an entity_df"),
    ],
)
@pytest.mark.usefixtures("filled")
def test_ranges_without_a_right_answer_are_refused(stores, arguments, message):
    with pytest.raises(ValueError, match=message):
        stores[1].get_historical_features(**arguments)
