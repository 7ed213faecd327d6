"""State that was lost or changed by hand is found by status, and one command brings it back."""

import getpass
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
import redis
import yaml
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families
from psycopg.conninfo import conninfo_to_dict

from larder.bars.load import load
from larder.cli import main
from larder.errors import LarderError
from larder.features import definitions
from larder.features.compute import compute
from larder.features.formulas import Formulas
from larder.operations import metrics, pipeline
from larder.operations import status as operation
from larder.operations.apply import apply
from larder.operations.facts import State
from larder.operations.materialize import materialize
from larder.operations.status import status

pytestmark = pytest.mark.skipif(
    not os.environ.get("LARDER_TEST_POSTGRES"),
    reason="LARDER_TEST_POSTGRES names no server; the pipeline scenario does",
)
REPOSITORY = Path(__file__).parents[2] / "feature_repo"
VIEWS = [view.name for view in definitions.read(REPOSITORY).views]
SYMBOLS = [f"S{n:03}" for n in range(30)]
TODAY = datetime.now(UTC).date()


@pytest.fixture
def online(redis_address):
    host, port = redis_address.split(":")
    return redis.Redis(host, int(port))


@pytest.fixture
def stack(url, credentials, online, redis_address, tmp_path):
    """Thirty symbols, applied, loaded, computed and materialized: status is healthy."""
    online.flushall()
    database = conninfo_to_dict(url)
    config = yaml.safe_load(credentials.feature_store.read_text())
    config |= {
        "provider": "local",
        "offline_store": {
            "type": "larder.plugins.offline_store.TimescaleOfflineStore",
            "host": database["host"],
            "port": int(database.get("port", 5432)),
            "database": database["dbname"],
            "user": database.get("user") or getpass.getuser(),
            "password": "none",
            "sslmode": database.get("sslmode", "prefer"),
        },
        "online_store": {
            "type": "redis",
            "connection_string": redis_address,
            "key_ttl_seconds": 31_536_000,
            "skip_dedup": True,
        },
        "batch_engine": {"type": "larder.plugins.compute_engine.DirectComputeEngine"},
        "entity_key_serialization_version": 3,
    }
    credentials.feature_store.write_text(yaml.safe_dump(config))
    days = [TODAY - timedelta(n) for n in range(40, 0, -1)]
    rows = [f"{symbol},{day},10,12,9,11,100" for symbol in SYMBOLS for day in days]
    bars = tmp_path / "bars.csv"
    bars.write_text("Symbol,Date,Open,High,Low,Close,Volume\n" + "\n".join(rows) + "\n")
    apply(credentials, REPOSITORY)
    load(credentials.load_url, [bars])
    compute(credentials.pipeline_url, Formulas(REPOSITORY))
    materialize(credentials)
    assert problems(credentials) == []
    return credentials


def problems(credentials):
    return status(credentials, max_age_hours=26).problems


def registry(credentials, statement):
    with psycopg.connect(credentials.registry_url, autocommit=True) as connection:
        assert connection.execute(statement).rowcount > 0


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("DELETE FROM feature_views WHERE feature_view_name = 'volume_indicators'", "feature view volume_indicators"),
        ("DELETE FROM on_demand_feature_views", "on demand feature view price_change"),
        ("DELETE FROM feature_services", "feature service trading_signals"),
        ("DELETE FROM data_sources WHERE data_source_name = 'ma_source'", "data source"),
        ("DELETE FROM entities WHERE entity_name = 'symbol'", "entity symbol"),
        ("DELETE FROM feature_views", "feature view price_action"),
    ],
)
def test_objects_that_were_deleted_in_the_registry_are_told_and_apply_brings_them_back(stack, statement, named):
    if "ma_source" in statement:
        statement = "DELETE FROM data_sources WHERE data_source_name = 'technical_indicators_ma_source'"
    registry(stack, statement)
    assert any("The registry lost" in problem and named in problem for problem in problems(stack))
    assert apply(stack, REPOSITORY) is True
    assert not any("registry" in problem for problem in problems(stack))
    materialize(stack)
    assert problems(stack) == []
    assert apply(stack, REPOSITORY) is False


def test_entities_that_redis_evicted_are_counted_and_named_and_materialize_since_writes_them(stack, online):
    keys = sorted(online.keys())
    assert len(keys) == len(SYMBOLS)
    online.delete(*keys[:-1])
    (told,) = problems(stack)
    assert "volume_indicators: of 29 of 30 entities the online store has nothing (S0" in told
    since = told.partition("--since ")[2][:10]
    materialize(stack, since=datetime.strptime(since, "%Y-%m-%d").replace(tzinfo=UTC))
    assert problems(stack) == []


def test_one_entity_whose_values_were_lost_is_named(stack, online):
    key = next(key for key in online.keys() if b"S007" in key)  # noqa: SIM118 -- Redis' command
    online.delete(key)
    assert all("S007" in problem for problem in problems(stack))


def test_values_that_are_older_than_the_database_are_told(stack, tmp_path):
    bars = tmp_path / "late.csv"
    bars.write_text(f"Symbol,Date,Open,High,Low,Close,Volume\nS003,{TODAY},10,12,9,11,100\n")
    load(stack.load_url, [bars])
    compute(stack.pipeline_url, Formulas(REPOSITORY))
    assert any("an older row than the database (S003)" in problem for problem in problems(stack))
    materialize(stack)
    assert problems(stack) == []


def found(credentials, name):
    return [fact for fact in status(credentials, max_age_hours=26).facts if fact.name == name]


def test_keys_that_redis_evicts_are_counted_from_the_last_materialization_on(stack, online):
    (evicted,) = found(stack, "redis_evicted_keys")
    assert (evicted.state, evicted.value) == (State.OK, 0)
    before = online.info("stats")["evicted_keys"]
    online.config_set("maxmemory-policy", "allkeys-lru")
    online.config_set("maxmemory", online.info("memory")["used_memory"] + 1_000_000)
    try:
        while online.info("stats")["evicted_keys"] < before + 10:
            online.set(os.urandom(8), bytes(50_000))
    finally:
        online.config_set("maxmemory", 0)
    (evicted,) = found(stack, "redis_evicted_keys")
    assert evicted.state == State.WARNING
    assert evicted.value == online.info("stats")["evicted_keys"] - before
    assert "its memory is full" in evicted.sentence
    materialize(stack, since=datetime.now(UTC) - timedelta(days=100))
    (evicted,) = found(stack, "redis_evicted_keys")
    assert (evicted.state, evicted.value) == (State.OK, 0)


def test_a_redis_that_is_away_is_told_beside_all_else(stack):
    config = yaml.safe_load(stack.feature_store.read_text())
    config["online_store"]["connection_string"] = "127.0.0.1:1"
    stack.feature_store.write_text(yaml.safe_dump(config))
    told = status(stack, max_age_hours=26)  # which waits for a Redis that may come back
    (problem,) = told.problems
    assert problem.startswith("The online store cannot be read: ConnectionError")
    assert [fact.state for fact in told.facts if fact.name == "redis_evicted_keys"] == [State.UNKNOWN]
    assert len([fact for fact in told.facts if fact.name == "feature_age_seconds"]) == 6


def test_a_feed_that_is_dead_is_told_although_every_run_succeeds(stack):
    with psycopg.connect(stack.pipeline_url, autocommit=True) as connection:
        for table in ("market_data.ohlcv_daily", *(f"features.{view}" for view in VIEWS)):
            connection.execute(f"DELETE FROM {table} WHERE event_timestamp > now() - interval '7 days'")
    stale = [fact for fact in found(stack, "feature_age_seconds") if fact.state == State.FAILED]
    assert [fact.of for fact in stale] == sorted(VIEWS)
    assert [problem for problem in problems(stack) if "came at most 1 days after a" in problem]


def test_a_night_that_brought_half_of_the_bars_is_a_warning(stack, tmp_path):
    (full,) = found(stack, "newest_day_symbols_ratio")
    assert (full.state, full.value) == (State.OK, 1)
    bars = tmp_path / "half.csv"
    rows = "\n".join(f"{symbol},{TODAY},10,12,9,11,100" for symbol in SYMBOLS[:15])
    bars.write_text(f"Symbol,Date,Open,High,Low,Close,Volume\n{rows}\n")
    load(stack.load_url, [bars])
    (half,) = found(stack, "newest_day_symbols_ratio")
    assert (half.state, half.value) == (State.WARNING, 0.5)
    assert half.sentence == f"Symbols with a bar of {TODAY}: 15; a day usually has 30."


def test_a_standby_that_is_not_connected_is_told(stack):
    with psycopg.connect(stack.pipeline_url, autocommit=True) as connection:
        connection.execute("SELECT pg_create_physical_replication_slot('larder_database2', true)")
        try:
            (standby,) = found(stack, "standby_behind_bytes")
            assert (standby.of, standby.state) == ("larder_database2", State.FAILED)
            assert standby.value >= 0
        finally:
            connection.execute("SELECT pg_drop_replication_slot('larder_database2')")
    assert found(stack, "standby_behind_bytes") == []


def samples(directory):
    """The samples of status.prom by name, fact and view."""
    families = text_string_to_metric_families((directory / metrics.FACTS_NAME).read_text())
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_each_run_writes_the_facts_as_metrics(stack, online, tmp_path):
    pipeline.run(stack, ["materialize"], [], REPOSITORY, metrics_dir=tmp_path)
    written = samples(tmp_path)
    assert written["larder_status_healthy",] == 1
    assert time.time() - written["larder_status_timestamp_seconds",] < 60
    for view in VIEWS:
        assert written["larder_status_online_complete_ratio", view] == 1
        assert 0 < written["larder_status_feature_age_seconds", view] < 3 * 86_400
    assert written["larder_status_state", "last_run_age_seconds", ""] == 0
    assert {state for (name, *_), state in written.items() if name == "larder_status_state"} <= {0, 3}
    assert [path.name for path in tmp_path.glob("status*")] == ["status.prom"]
    assert (tmp_path / "status.prom").stat().st_mode & 0o777 == 0o644
    key = next(key for key in online.keys() if b"S007" in key)  # noqa: SIM118 -- Redis' command
    online.delete(key)
    options = ["--credentials", str(stack.directory), "status", "--metrics-dir", str(tmp_path)]
    assert CliRunner().invoke(main, options).exit_code == 5
    written = samples(tmp_path)
    assert written["larder_status_healthy",] == 0
    assert written["larder_status_online_complete_ratio", "price_action"] == pytest.approx(29 / 30)
    assert written["larder_status_state", "online_complete_ratio", "price_action"] == 2


def test_a_run_that_failed_writes_that_it_did(stack, tmp_path):
    with psycopg.connect(stack.pipeline_url, autocommit=True) as connection:
        connection.execute("ALTER TABLE features.pending_materialize RENAME COLUMN since TO other")
    with pytest.raises(LarderError):
        pipeline.run(stack, ["materialize"], [], REPOSITORY, metrics_dir=tmp_path)
    written = samples(tmp_path)
    assert written["larder_status_state", "last_run_age_seconds", ""] == 2
    assert written["larder_status_healthy",] == 0


def test_facts_that_cannot_be_found_fail_no_run(stack, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(operation, "survey", lambda *_, **__: 1 / 0)
    pipeline.run(stack, ["materialize"], [], REPOSITORY, metrics_dir=tmp_path)
    assert 'status is unknown reason="ZeroDivisionError: division by zero"' in caplog.text
    assert not (tmp_path / "status.prom").exists()
    assert metrics.read(tmp_path, "larder_pipeline_success") == 1
