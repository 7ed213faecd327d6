"""Joins that read from a standby are those of the primary, and of Feast's own store: random data, a real standby."""

import os
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import psycopg
import pytest
import test_offline_store
from psycopg.conninfo import make_conninfo
from test_offline_store import (  # noqa: F401 -- fixtures
    ADMIN,
    FEATURES,
    connection,
    database,
    entity_rows,
    fill,
    same,
    stores,
)

from larder.plugins import offline_store

BINARIES = Path("/usr/lib/postgresql/17/bin")
pytestmark = pytest.mark.skipif(
    not ADMIN or not BINARIES.exists() or os.getuid() == 0,
    reason="these tests start PostgreSQL 17 with TimescaleDB, not as root; the pipeline scenario does",
)
# A standby can hold no table for sources without an index.
INDEXED = [feature for feature in FEATURES if not feature.startswith(("pairs:", "query:"))]


@pytest.fixture(scope="module", autouse=True)
def servers(tmp_path_factory):
    """A primary and a standby of the tests' own: each has a directory, as hosts have addresses, and both one port."""
    directory = tmp_path_factory.mktemp("servers")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(name):
        place = directory / name
        settings = {"port": port, "unix_socket_directories": place, "listen_addresses": "", "fsync": "off"}
        settings["shared_preload_libraries"] = "timescaledb"
        options = " ".join(f"-c {setting}='{value}'" for setting, value in settings.items())
        command = [BINARIES / "pg_ctl", "-D", place / "data", "-w", "-l", place / "log"]
        subprocess.run([*command, "-o", options, "start"], check=True)
        return [*command, "-m", "immediate", "stop"]

    (directory / "primary").mkdir()
    (directory / "standby").mkdir()
    subprocess.run([BINARIES / "initdb", "-A", "trust", "-E", "UTF8", "-D", directory / "primary/data"], check=True)
    stops = [start("primary")]
    admin = make_conninfo(host=str(directory / "primary"), port=port, dbname="postgres", user="postgres")
    try:
        copy = [BINARIES / "pg_basebackup", "-d", admin, "-D", directory / "standby/data", "-R", "-c", "fast"]
        subprocess.run(copy, check=True)
        stops.append(start("standby"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(test_offline_store, "ADMIN", admin)
            yield directory, admin
    finally:
        for stop in reversed(stops):
            subprocess.run(stop, check=True)


@pytest.fixture
def reading(stores, servers):  # noqa: F811 -- a fixture
    """Larder's store, whose joins read from the standby."""
    store = stores[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.config.offline_store, "standbys", (str(servers[0] / "standby"),))
        yield store


def caught_up(connection, servers):  # noqa: F811 -- a fixture
    directory, admin = servers
    [(written,)] = connection.execute("SELECT pg_current_wal_lsn()").fetchall()
    with psycopg.connect(make_conninfo(admin, host=str(directory / "standby")), autocommit=True) as other:
        end = time.monotonic() + 60
        while not other.execute("SELECT pg_last_wal_replay_lsn() >= %s", [written]).fetchone()[0]:
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("as_sql", [False, True])
def test_a_join_on_a_standby_is_that_of_stock(stores, connection, servers, reading, seed, as_sql):  # noqa: F811
    random = np.random.default_rng(seed)
    fill(connection, random, 60)
    frame = entity_rows(random, [0, 1, 40][seed % 3] or 3, ["UTC", "America/New_York", None][seed % 3])
    if as_sql:
        connection.execute("DROP TABLE IF EXISTS s.labels")
        columns = "n int, event_timestamp timestamptz, extra text, k varchar, asked float8, single real"
        connection.execute(f"CREATE TABLE s.labels ({columns})")
        with connection.cursor() as cursor:
            values = frame.astype(object).where(frame.notna(), None).to_numpy().tolist()
            cursor.executemany("INSERT INTO s.labels VALUES (%s, %s, %s, %s, %s, %s)", values)
        frame = "SELECT * FROM s.labels -- of all;\n;"
    arguments = {"entity_df": frame, "features": INDEXED, "full_feature_names": bool(seed % 2)}
    plain = "SELECT * FROM s.labels" if as_sql else frame
    expected = stores[0].get_historical_features(**arguments | {"entity_df": plain})
    caught_up(connection, servers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offline_store, "ROWS_PER_STATEMENT", [1, 20, 500][seed % 3])
        same(expected.to_arrow(), reading.get_historical_features(**arguments).to_arrow())


def test_the_standby_is_asked_and_the_primary_where_it_is_not_there(reading, servers):
    def recovers():
        with offline_store._reading(reading.config) as connected:
            return connected.execute("SELECT pg_is_in_recovery()").fetchone()[0]

    assert recovers()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading.config.offline_store, "standbys", (str(servers[0] / "nobody"),))
        assert not recovers()
        # A host that has become the primary is no standby.
        patch.setattr(reading.config.offline_store, "standbys", (str(servers[0] / "primary"),))
        assert not recovers()


def test_a_source_without_an_index_is_refused_on_a_standby(reading):
    frame = entity_rows(np.random.default_rng(0), 3, "UTC")
    with pytest.raises(ValueError, match="The source of pairs has no index on Key, n, ts, and a standby can have no"):
        reading.get_historical_features(frame, ["pairs:value"]).to_arrow()


@pytest.mark.parametrize("key", ["'ab'::char(4)", "'a'::text", "'a'::varchar", "NULL::text"])
def test_a_key_of_an_entity_query_keeps_its_type_on_a_standby(stores, connection, servers, reading, key):  # noqa: F811
    fill(connection, np.random.default_rng(5), 60)
    query = f"SELECT {key} AS k, '2024-04-04 12:00+00'::timestamptz AS event_timestamp"
    expected = stores[0].get_historical_features(query, ["plain:p_int", "hyper:h_float"]).to_arrow()
    caught_up(connection, servers)
    same(expected, reading.get_historical_features(query, ["plain:p_int", "hyper:h_float"]).to_arrow())
