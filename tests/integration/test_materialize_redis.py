"""What the direct engine writes to Redis is byte for byte what Feast writes, in a real TimescaleDB and a real Redis."""

import os
import time
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
import redis
from feast import Entity, FeatureStore, FeatureView, Field, ValueType
from feast.infra.compute_engines.local.compute import LocalComputeEngine
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import PostgreSQLSource
from feast.repo_config import RepoConfig
from feast.types import Array, Bool, Bytes, Float32, Float64, Int32, Int64, String, UnixTimestamp
from psycopg.conninfo import conninfo_to_dict, make_conninfo

ADMIN = os.environ.get("LARDER_TEST_POSTGRES", "")
pytestmark = pytest.mark.skipif(not ADMIN, reason="LARDER_TEST_POSTGRES names no server; the pipeline scenario does")

DIRECT = "larder.plugins.compute_engine.DirectComputeEngine"
START = datetime(2024, 1, 1, tzinfo=UTC)
FIELDS = {
    "f_double": (Float64, "float8"),
    "f_int": (Int64, "bigint"),
    "f_small": (Int32, "int"),
    "f_real": (Float32, "real"),
    "f_text": (String, "text"),
    "f_bool": (Bool, "bool"),
    "f_bytes": (Bytes, "bytea"),
    "f_time": (UnixTimestamp, "timestamptz"),
}
COLUMNS = ", ".join(f"{name} {kind}" for name, (_, kind) in FIELDS.items())
K = Entity(name="k", join_keys=["k"], value_type=ValueType.STRING)
N = Entity(name="n", join_keys=["n"], value_type=ValueType.INT64)


def source(name, **more):
    return PostgreSQLSource(name=f"{name}_source", table=f"s.{name}", timestamp_field="ts", **more)


def schema(prefix=""):
    return [Field(name=prefix + name, dtype=kind) for name, (kind, _) in FIELDS.items()]


VIEWS = [
    FeatureView(name="scalars", entities=[K], schema=schema(), source=source("scalars")),
    FeatureView(
        name="renamed",
        entities=[K],
        schema=[Field(name="value", dtype=Float64)],
        source=PostgreSQLSource(
            name="renamed_source", table="s.scalars", timestamp_field="ts", field_mapping={"f_double": "value"}
        ),
    ),
    FeatureView(
        name="versions",
        entities=[N, K],
        schema=[Field(name="v", dtype=Int64)],
        source=source("versions", created_timestamp_column="made"),
    ),
    FeatureView(name="arrays", entities=[K], schema=[Field(name="a", dtype=Array(Float64))], source=source("arrays")),
]


@pytest.fixture(scope="module")
def database():
    name = f"larder_engine_{os.getpid()}"
    with psycopg.connect(ADMIN, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
        url = make_conninfo(ADMIN, dbname=name)
        try:
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute("CREATE EXTENSION timescaledb")
                connection.execute("CREATE SCHEMA s")
                connection.execute(f"CREATE TABLE s.scalars (k text, ts timestamptz, {COLUMNS}, PRIMARY KEY (k, ts))")
                connection.execute("SELECT create_hypertable('s.scalars', by_range('ts', interval '3 days'))")
                connection.execute(
                    "CREATE TABLE s.versions (k text, n bigint, ts timestamptz, made timestamptz, v bigint,"
                    " PRIMARY KEY (k, n, ts, made))"
                )
                connection.execute("CREATE TABLE s.arrays (k text, ts timestamptz, a float8[], PRIMARY KEY (k, ts))")
                connection.execute(
                    """
                    INSERT INTO s.scalars SELECT
                        'key ' || k, '2024-01-01'::timestamptz + d * interval '1 day 1 microsecond',
                        (ARRAY[k / 7.0, 'nan', NULL, -0.0, 'infinity', 0])[1 + (k + d) % 6],
                        (ARRAY[k, 0, -1, NULL, 2 ^ 52])[1 + (k + d) % 5], (ARRAY[k, 0, -d])[1 + (k + d) % 3],
                        (ARRAY[k / 3.0, NULL, 0])[1 + (k + d) % 3], (ARRAY['', 'é', NULL, E'a\\n"b'])[1 + (k + d) % 4],
                        (ARRAY[true, NULL, false])[1 + (k + d) % 3], convert_to(d::text, 'UTF8'),
                        '1969-12-31 23:00+00'::timestamptz + d * interval '10 minutes'
                    FROM generate_series(1, 30) k, generate_series(0, 9) d WHERE (k + d) % 4 > 0
                    """
                )
                connection.execute(
                    "INSERT INTO s.versions SELECT 'key ' || k, n, '2024-01-01'::timestamptz + d * interval '1 day',"
                    " '2024-02-01'::timestamptz + m * interval '1 h', m"
                    " FROM generate_series(1, 5) k, generate_series(1, 3) n, generate_series(1, 4) d,"
                    " generate_series(1, 2) m"
                )
                connection.execute("INSERT INTO s.arrays SELECT k, ts, ARRAY[f_double] FROM s.scalars")
            yield url
        finally:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def store(database, redis_address, tmp_path):
    given = conninfo_to_dict(database)
    names = []

    def store(project, *, engine=DIRECT, views=VIEWS, latest=True, size=None, **online):
        names.append(project)
        made = FeatureStore(
            config=RepoConfig(
                project=project,
                provider="local",
                registry={"registry_type": "file", "path": str(tmp_path / f"{project}.db")},
                online_store={"type": "redis", "connection_string": redis_address, **online},
                offline_store={
                    "type": "postgres" if engine == "local" else "larder.plugins.offline_store.TimescaleOfflineStore",
                    "host": given["host"],
                    "port": int(given.get("port") or 5432),
                    "database": given["dbname"],
                    "user": given.get("user") or psycopg.connect(database).info.user,
                    "password": given.get("password") or "none",
                    "sslmode": "prefer",
                },
                batch_engine={"type": engine},
                materialization={"pull_latest_features": latest, "online_write_batch_size": size},
                entity_key_serialization_version=3,
            )
        )
        made.apply([K, N, *views])
        return made

    yield store
    client = client_of(redis_address)
    for name in names:
        for key in client.scan_iter(match=f"*{name}"):
            client.delete(key)


def client_of(address):
    host, port = address.split(":")
    return redis.Redis(host, int(port))


def hashes(address, project):
    """Every hash of a project, by its key without the project's name, and how many seconds each of them has to live."""
    client = client_of(address)
    keys = {key.removesuffix(project.encode()): key for key in client.scan_iter(match=f"*{project}")}
    return {name: client.hgetall(key) for name, key in keys.items()}, {
        name: client.ttl(key) for name, key in keys.items()
    }


@pytest.fixture
def nothing_is_left_to_feast(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("left to Feast")

    monkeypatch.setattr(LocalComputeEngine, "_materialize_one", fail)


@pytest.mark.parametrize("size", [None, 7])
@pytest.mark.parametrize("days", [(0, 30), (2, 5), (20, 30)])
def test_the_hashes_are_those_of_feast(store, redis_address, size, days):
    start, end = (START + timedelta(days=day) for day in days)
    store("of_stock", engine="local", key_ttl_seconds=900).materialize(start, end)
    store("of_larder", size=size, key_ttl_seconds=900).materialize(start, end)
    expected, _ = hashes(redis_address, "of_stock")
    found, _ = hashes(redis_address, "of_larder")
    assert found == expected
    assert bool(expected) == (days[0] < 20)


@pytest.mark.usefixtures("nothing_is_left_to_feast")
@pytest.mark.parametrize(("ttl", "shortest", "longest"), [(900, 600, 900), (None, -1, -1)])
def test_plain_views_take_the_direct_way_and_every_key_has_its_time_to_live(
    store, redis_address, ttl, shortest, longest
):
    store("direct", views=VIEWS[:3], key_ttl_seconds=ttl).materialize(START, START + timedelta(days=30))
    found, lives = hashes(redis_address, "direct")
    assert len(found) == 30 + 15
    assert [seconds for seconds in lives.values() if not shortest <= seconds <= longest] == []


def test_views_side_by_side_share_a_client(store, monkeypatch):
    """One that is made a second time ends the connections of the first, which another view is using."""
    made = []

    class SlowlyMade(redis.Redis):
        def __init__(self, *arguments, **options):
            time.sleep(0.2)
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr("feast.infra.online_stores.redis.Redis", SlowlyMade)
    store("shared", views=VIEWS[:3]).materialize(START, START + timedelta(days=30))
    assert len(made) == 1


@pytest.mark.parametrize("skip_dedup", [False, True])
def test_an_older_or_equal_row_is_written_only_without_comparison(store, redis_address, database, skip_dedup):
    """As RedisOnlineStore does it: skip_dedup writes whatever comes."""
    stores = [store("of_stock", engine="local", skip_dedup=skip_dedup), store("of_larder", skip_dedup=skip_dedup)]
    with psycopg.connect(database, autocommit=True) as connection:
        for one in stores:
            one.materialize(START, START + timedelta(days=30), ["scalars"])
            before, _ = hashes(redis_address, one.project)
        connection.execute("UPDATE s.scalars SET f_double = 42")
        try:
            for one in stores:
                one.materialize(START, START + timedelta(days=30), ["scalars"])  # corrected, at the same time
                one.materialize(START, START + timedelta(days=5), ["scalars"])  # older
        finally:
            connection.execute("UPDATE s.scalars SET f_double = 1")
    expected, found = (hashes(redis_address, one.project)[0] for one in stores)
    assert found == expected
    assert (found == before) != skip_dedup


def test_intervals_are_those_of_feast(store):
    stores = [store("of_stock", engine="local"), store("of_larder")]
    for one in stores:
        one.materialize(START, START + timedelta(days=3))
        one.materialize_incremental(START + timedelta(days=6))
    expected, found = ([one.get_feature_view(view.name).materialization_intervals for view in VIEWS] for one in stores)
    assert found == expected


def test_one_view_that_fails_is_told_and_stops_no_other(store, redis_address, database):
    one = store("failing")
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("ALTER TABLE s.scalars RENAME COLUMN f_int TO away")
        try:
            with pytest.raises(psycopg.errors.UndefinedColumn, match="f_int"):
                one.materialize(START, START + timedelta(days=30))
        finally:
            connection.execute("ALTER TABLE s.scalars RENAME COLUMN away TO f_int")
    assert not one.get_feature_view("scalars").materialization_intervals
    assert one.get_feature_view("versions").materialization_intervals
    assert hashes(redis_address, "failing")[0]


@pytest.mark.parametrize(("latest", "expected"), [(True, {"arrays"}), (False, {view.name for view in VIEWS})])
def test_what_is_not_plain_is_left_to_feast(store, monkeypatch, latest, expected):
    left = set()
    feast = LocalComputeEngine._materialize_one

    def note(engine, registry, task, **options):
        left.add(task.feature_view.name)
        return feast(engine, registry, task, **options)

    monkeypatch.setattr(LocalComputeEngine, "_materialize_one", note)
    store("left", latest=latest).materialize(START, START + timedelta(days=30))
    assert left == expected
