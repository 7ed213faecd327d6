"""`larder materialize` and `larder status` over the repository's own views, in a real PostgreSQL and a real Redis."""

import os
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
import redis
import yaml
from click.testing import CliRunner
from psycopg.conninfo import conninfo_to_dict

from larder.cli import main
from larder.features import definitions
from larder.operations import feast_store, pipeline
from larder.operations.apply import apply
from larder.operations.materialize import materialize
from larder.operations.status import status

ADMIN = os.environ.get("LARDER_TEST_POSTGRES", "")
pytestmark = pytest.mark.skipif(not ADMIN, reason="LARDER_TEST_POSTGRES names no server; the pipeline scenario does")
REPO = Path(__file__).parents[2] / "feature_repo"
VIEWS = [view.name for view in definitions.read(REPO).views]
NOW = datetime.now(UTC)
WAITS = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'features.pending_materialize'::regclass"


class Stack:
    """The two stores, the repository's views in the registry, and what people do with them."""

    def __init__(self, url, credentials, redis_address):
        self.url, self.credentials = url, credentials
        host, _, port = redis_address.partition(":")
        self.redis = redis.Redis(host, int(port))
        given = conninfo_to_dict(url)
        with psycopg.connect(url) as connection:
            user = connection.info.user
        config = yaml.safe_load(credentials.feature_store.read_text())
        self.project = config["project"] = f"claims_{os.getpid()}"
        config |= {
            "provider": "local",
            "offline_store": {
                "type": "larder.plugins.offline_store.TimescaleOfflineStore",
                "host": given["host"],
                "port": int(given.get("port") or 5432),
                "database": given["dbname"],
                "user": user,
                "password": given.get("password") or "none",
                "sslmode": "prefer",
            },
            "online_store": {"type": "redis", "connection_string": redis_address, "skip_dedup": True},
            "batch_engine": {"type": "larder.plugins.compute_engine.DirectComputeEngine"},
            "materialization": {"pull_latest_features": True},
            "entity_key_serialization_version": 3,
        }
        credentials.feature_store.write_text(yaml.safe_dump(config))
        assert apply(credentials, REPO)

    def larder(self, *arguments):
        return CliRunner().invoke(main, ["--credentials", str(self.credentials.directory), *arguments])

    def put(self, **newest):
        """Write a row of every view for each symbol, as `larder compute` does for a symbol that it notes nowhere."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            for view in VIEWS:
                for symbol, time in newest.items():
                    connection.execute(
                        f"INSERT INTO features.{view} (symbol, event_timestamp) VALUES (%s, %s)", [symbol, time]
                    )

    def note(self, symbol, since):
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(
                "INSERT INTO features.pending_materialize (symbol, since) VALUES (%s, %s)", [symbol, since]
            )

    def served(self, *symbols):
        """Those of the symbols that the online store knows."""
        keys = [key for key in self.redis.scan_iter() if key.endswith(self.project.encode())]
        return [symbol for symbol in symbols if any(symbol.encode() in key for key in keys)]

    def lose_the_online_store(self):
        for key in self.redis.scan_iter(match=f"*{self.project}"):
            self.redis.delete(key)


@pytest.fixture
def stack(url, credentials, redis_address):
    made = Stack(url, credentials, redis_address)
    yield made
    made.lose_the_online_store()


def test_the_window_is_as_many_days_long_as_it_is_told(stack):
    stack.put(FIRST=NOW - timedelta(days=90))
    materialize(stack.credentials)
    assert stack.served("FIRST") == ["FIRST"], "the first time, from the beginning"
    stack.put(THREE=NOW - timedelta(days=3) + timedelta(hours=1), FOUR=NOW - timedelta(days=3, hours=1))
    materialize(stack.credentials, days=3)
    assert stack.served("THREE", "FOUR") == ["THREE"]
    pipeline.run(stack.credentials, ["materialize"], [], REPO, days=3)
    assert stack.served("FOUR") == []
    assert stack.larder("materialize", "--days", "4").exit_code == 0
    assert stack.served("FOUR") == ["FOUR"]
    stack.put(SEVEN=NOW - timedelta(days=7) + timedelta(hours=1), EIGHT=NOW - timedelta(days=7, hours=1))
    assert stack.larder("materialize").exit_code == 0
    assert stack.served("SEVEN", "EIGHT") == ["SEVEN"], "a week, if nothing is said"
    stack.note("EIGHT", NOW - timedelta(days=7, hours=1))
    materialize(stack.credentials, days=3)
    assert stack.served("EIGHT") == ["EIGHT"], "it has changed"


def test_an_emptied_online_store_is_filled_again_from_the_day_that_is_told(stack):
    stack.put(OLD=NOW - timedelta(days=300), NEW=NOW - timedelta(days=1))
    materialize(stack.credentials)
    stack.lose_the_online_store()
    materialize(stack.credentials)
    assert stack.served("OLD", "NEW") == ["NEW"], "what did not change is not written again"
    assert stack.larder("materialize", "--since", f"{NOW - timedelta(days=100):%Y-%m-%d}").exit_code == 0
    assert stack.served("OLD", "NEW") == ["NEW"]
    assert stack.larder("materialize", "--since", "2000-01-01").exit_code == 0
    assert stack.served("OLD", "NEW") == ["OLD", "NEW"]


def test_of_two_materializations_at_once_one_leaves_it_to_the_other(stack, monkeypatch):
    stack.put(ALONE=NOW - timedelta(days=1))
    first = threading.Thread(target=materialize, args=[stack.credentials])
    with psycopg.connect(stack.url) as other:
        other.execute("LOCK TABLE features.pending_materialize IN ACCESS EXCLUSIVE MODE")
        first.start()
        with psycopg.connect(stack.url, autocommit=True) as looking:
            while looking.execute(WAITS).fetchone() == (0,):
                assert first.is_alive()
        monkeypatch.setenv(
            "PGOPTIONS", "-c lock_timeout=5s"
        )  # one that waited as well would wait for this block to end
        second = stack.larder("materialize")
    first.join()
    assert second.exit_code == 4
    assert "Another larder materialize is running" in second.output
    assert stack.served("ALONE") == ["ALONE"]


def test_a_materialization_that_is_too_old_is_not_healthy(stack):
    store = feast_store.open_store(stack.credentials.feature_store)
    end = datetime.now(UTC) - timedelta(hours=27)
    for view in feast_store.batch_views(store):
        store.registry.apply_materialization(view, store.project, end - timedelta(days=7), end)

    def told(hours):
        return [
            problem for problem in status(stack.credentials, max_age_hours=hours).problems if "hours old" in problem
        ]

    # Not to the minute: on a busy host some pass meanwhile.
    assert [problem[:31] for problem in told(26.5)] == ["The last materialization is 27."]
    assert told(27.5) == []
    assert "hours old" in stack.larder("status").output
    assert "hours old" not in stack.larder("status", "--max-age", "28").output
