"""A push into both stores, in a real PostgreSQL and a real Redis: the same in both, or refused with nothing written."""

import asyncio
import getpass
import json
import os
import shutil
import socket
import subprocess
import time
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime

import pandas as pd
import psycopg
import pytest
from feast import Entity, FeatureStore, FeatureView, Field, PushSource, ValueType, types
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import PostgreSQLSource
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from redis import Redis

from larder.serving import application

ADMIN = os.environ.get("LARDER_TEST_POSTGRES", "")
pytestmark = pytest.mark.skipif(not ADMIN, reason="LARDER_TEST_POSTGRES names no server; the pipeline scenario does")

CONFIG = """
project: trading
provider: local
registry: {{registry_type: sql, path: "sqlite:///{directory}/registry.db", cache_ttl_seconds: 60}}
offline_store:
  type: larder.plugins.offline_store.TimescaleOfflineStore
  host: {host}
  port: {port}
  database: {database}
  db_schema: public
  user: {user}
  password: "{password}"
  sslmode: {sslmode}
online_store: {{type: redis, connection_string: "127.0.0.1:{redis},socket_timeout=2,socket_connect_timeout=2"}}
entity_key_serialization_version: 3
"""
TABLES = """
CREATE SCHEMA s;
CREATE TABLE s."Quotes" (
    symbol text NOT NULL, ts timestamptz NOT NULL, made timestamptz NOT NULL, "Px" float8 CHECK ("Px" > 0), lots bigint,
    note varchar(5), heard timestamp, tags text[], extra jsonb, PRIMARY KEY (symbol, ts, made)
);
CREATE TABLE s.narrow (symbol text, ts timestamptz, size smallint, code bigint);
"""
ISO = "2026-01-02T03:04:05.678901Z"
TIME = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def definitions():
    symbol = Entity(name="symbol", join_keys=["symbol"], value_type=ValueType.STRING)

    def view(name, source, **schema):
        fields = [Field(name=feature, dtype=dtype) for feature, dtype in schema.items()]
        return FeatureView(name=name, entities=[symbol], source=source, schema=fields)

    quotes = PostgreSQLSource(
        name="quotes",
        table='s."Quotes"',
        timestamp_field="event_timestamp",
        created_timestamp_column="made",
        field_mapping={"Px": "price", "ts": "event_timestamp"},
    )
    narrow = PostgreSQLSource(name="narrow", table="s.narrow", timestamp_field="ts")
    query = PostgreSQLSource(name="query", query="SELECT * FROM s.narrow", timestamp_field="ts")
    source = PushSource(name="quotes_push", batch_source=quotes)
    narrow_push = PushSource(name="narrow_push", batch_source=narrow)
    return [
        symbol,
        view("prices", source, price=types.Float64),
        view("sizes", source, lots=types.Int64),
        view("narrow", narrow_push, size=types.Int64, code=types.String),
        view("asked", PushSource(name="query_push", batch_source=query), size=types.Int64),
    ]


@pytest.fixture(scope="module")
def database():
    name = f"larder_push_{os.getpid()}"
    with psycopg.connect(ADMIN, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}")
        admin.execute(f"ALTER DATABASE {name} SET timezone = 'America/New_York'")
        url = make_conninfo(ADMIN, dbname=name)
        try:
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute(TABLES)
            yield url
        finally:
            admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="module")
def redis():
    """A Redis without a file; Debian's package redis-tools has the server under another name."""
    binary = shutil.which("redis-server") or shutil.which("redis-check-rdb")
    assert binary, "these tests need Debian's package redis-tools"
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with subprocess.Popen(["redis-server", *options], executable=binary, stdout=subprocess.DEVNULL) as process:
        client = Redis(port=port)
        for _ in range(100):
            try:
                client.ping()
                break
            except Exception:
                time.sleep(0.05)
        yield client
        process.terminate()


class Server:
    def __init__(self, runner, url, redis):
        self.runner, self.url, self.redis = runner, url, redis
        self.app = application.create_app()
        self.lifespan = self.app.router.lifespan_context(self.app)
        runner.run(self.lifespan.__aenter__())

    def close(self):
        self.runner.run(self.lifespan.__aexit__(None, None, None))

    def ask(self, path, body):
        sent = []
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "client": ("::1", 1)}
        scope["headers"] = [(b"content-type", b"application/json")]

        async def receive():
            return {"type": "http.request", "body": json.dumps(body).encode()}

        async def send(message):
            sent.append(message)

        self.runner.run(self.app(scope, receive, send))
        written = b"".join(m.get("body", b"") for m in sent[1:])
        return sent[0]["status"], json.loads(written) if written else None

    def push(self, df, source="quotes_push", to="online_and_offline"):
        return self.ask("/push", {"push_source_name": source, "df": df, "to": to})

    def served(self, feature, symbol):
        answer = self.ask("/get-online-features", {"features": [feature], "entities": {"symbol": [symbol]}})[1]
        return answer["results"][1]["values"][0], answer["results"][1]["event_timestamps"][0]

    def rows(self, symbol, columns="*", table='s."Quotes"'):
        with psycopg.connect(self.url) as connection:
            return connection.execute(f"SELECT {columns} FROM {table} WHERE symbol = %s", [symbol]).fetchall()

    @contextmanager
    def without_postgresql(self):
        port = self.app.store.config.offline_store.port
        self.app.store.config.offline_store.port = 1
        yield
        self.app.store.config.offline_store.port = port

    @contextmanager
    def full_redis(self):
        self.redis.config_set("maxmemory", "1")
        yield
        self.redis.config_set("maxmemory", "0")


@pytest.fixture(scope="module")
def server(database, redis, tmp_path_factory):
    directory = tmp_path_factory.mktemp("store")
    config, given = directory / "feature_store.yaml", conninfo_to_dict(database)
    config.write_text(
        CONFIG.format(
            directory=directory,
            redis=redis.connection_pool.connection_kwargs["port"],
            host=given["host"],
            port=given.get("port", 5432),
            database=given["dbname"],
            user=given.get("user", getpass.getuser()),
            password=given.get("password", "none"),
            sslmode=given.get("sslmode", "prefer"),
        )
    )
    FeatureStore(fs_yaml_file=config).apply(definitions())
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name in ("CREDENTIALS_DIRECTORY", "RUNTIME_DIRECTORY"):
            patch.setenv(name, str(directory))
        runner = stack.enter_context(asyncio.Runner())
        server = Server(runner, database, redis)
        yield server
        server.close()


def quote(symbol, **columns):
    row = {"symbol": [symbol], "event_timestamp": [ISO], "made": [ISO], "price": [42.5], "lots": [2**53 + 1]}
    row |= {"note": ["n"], "heard": [ISO], "tags": [["a", 'b"']], "extra": [{"a": {"b": None}}]} | columns
    return {name: values for name, values in row.items() if values is not None}


@pytest.mark.parametrize("names", ["of the views", "of the table"])
def test_a_push_is_the_same_in_both_stores_under_either_names(server, names):
    df = quote(names)
    if names == "of the table":
        df = {{"price": "Px", "event_timestamp": "ts"}.get(name, name): values for name, values in df.items()}
    assert server.push(df) == (200, None)
    assert server.served("prices:price", names) == (42.5, ISO)
    assert server.served("sizes:lots", names) == (2**53 + 1, ISO)
    # Columns that are no features, a time without a zone in the server's zone or not, an array, an object.
    naive = TIME.replace(tzinfo=None)
    assert server.rows(names) == [(names, TIME, TIME, 42.5, 2**53 + 1, "n", naive, ["a", 'b"'], {"a": {"b": None}})]


def test_a_quote_with_epoch_times_is_at_the_same_instant_in_both_stores(server):
    df = quote("PUSHE", event_timestamp=[1764111157], made=[1764111157], price=[1.5], lots=[None])
    assert server.push(df) == (200, None)
    assert server.served("prices:price", "PUSHE") == (1.5, "2025-11-25T22:52:37Z")
    assert server.rows("PUSHE", "ts, made, lots") == [(*[datetime(2025, 11, 25, 22, 52, 37, tzinfo=UTC)] * 2, None)]


def test_a_push_that_is_repeated_is_there_once(server):
    for _ in range(2):
        assert server.push(quote("AGAIN")) == (200, None)
    assert len(server.rows("AGAIN")) == 1


def test_without_postgresql_nothing_is_written_but_what_goes_online_alone(server):
    with server.without_postgresql():
        assert server.push(quote("NOPG")) == (503, {"detail": "a store is not available"})
        assert server.served("prices:price", "NOPG")[0] is None
        df = {name: quote("NOPG")[name] for name in ("symbol", "event_timestamp", "made", "price", "lots")}
        assert server.push(df, to="online") == (200, None)
    assert server.served("prices:price", "NOPG")[0] == 42.5


def test_a_push_that_redis_did_not_take_is_completed_by_repeating_it(server):
    with server.full_redis():
        assert server.push(quote("FULL")) == (503, {"detail": "a store is not available"})
    assert server.served("prices:price", "FULL")[0] is None
    assert server.push(quote("FULL")) == (200, None)
    assert server.served("prices:price", "FULL")[0] == 42.5
    assert len(server.rows("FULL")) == 1


@pytest.mark.parametrize(
    ("df", "source", "expected"),
    [
        (quote("BAD", price=[-1.0]), "quotes_push", "does not take these rows: Quotes_Px_check"),
        (quote("BAD", note=["too long"]), "quotes_push", "does not take these rows: value too long for type"),
        (quote("BAD", heard=["x"]), "quotes_push", 'heard of row 1 is "x": it takes ISO 8601'),
        (quote("BAD", tags=[[1]]), "quotes_push", "a list in which 1 would be a string"),
        (quote("BAD", note=None), "quotes_push", "note is missing in df"),
        (quote("BAD", noise=[1]), "quotes_push", "noise is no column of the table of prices and sizes"),
        (
            {"symbol": ["BAD"], "ts": [ISO], "size": [70_000], "code": ["1"]},
            "narrow_push",
            "does not take these rows: smallint out of range",
        ),
        ({"symbol": ["BAD"], "ts": [ISO], "size": [1]}, "query_push", 'can be pushed "to": "online" alone'),
    ],
)
def test_what_the_table_does_not_take_is_refused_and_in_neither_store(server, df, source, expected):
    good = {name: [*values, *df[name]] for name, values in {**df, "symbol": ["GOOD"]}.items()}
    for name in ("price", "size"):
        if name in good:
            good[name][0] = 1
    before = server.redis.keys("*")
    status, answer = server.push(good, source)
    assert status == 422, answer
    assert expected in answer["detail"]
    assert server.redis.keys("*") == before
    assert not server.rows("GOOD")
    assert not server.rows("GOOD", table="s.narrow")


def test_a_table_that_is_not_what_the_registry_says_is_the_servers_fault(server, caplog):
    answer = server.push({"symbol": ["BUG"], "ts": [ISO], "size": [1], "code": ["words"]}, "narrow_push")
    assert answer == (500, {"detail": "internal error"})
    assert "InvalidTextRepresentation" in caplog.text
    assert server.served("narrow:size", "BUG")[0] is None


def test_a_frame_that_is_written_by_feast_itself_arrives_too(server):
    """With an index, and with times without a zone, which are in UTC."""
    df = pd.DataFrame(
        {"symbol": ["SDK", "x"], "ts": [TIME.replace(tzinfo=None)] * 2, "size": [1, 2], "code": ["1", "2"]}
    )
    server.app.store.write_to_offline_store("narrow", df[df["symbol"] == "SDK"])
    df = df.assign(symbol="SDK2").set_index(pd.Index([7, 9], name="place"))
    server.app.store.write_to_offline_store("narrow", df)
    assert server.rows("SDK", table="s.narrow") == [("SDK", TIME, 1, 1)]
    assert len(server.rows("SDK2", table="s.narrow")) == 2
