"""Tables of a former release, in which volume was a bigint and never null, under the present declaration."""

from __future__ import annotations

import json

import playbooks
import pytest

TABLES = ("market_data.ohlcv_daily", "market_data.quotes", "features.ohlcv_features")
PARTS = {"parts": ["tables", "widen"]}
TYPES = (
    "SELECT string_agg(format_type(atttypid, NULL), ',' ORDER BY attrelid::regclass::text) FROM pg_attribute"
    " WHERE attname = 'volume' AND attrelid IN ({})"
).format(", ".join(f"'{table}'::regclass" for table in TABLES))
NOT_NULL = (
    "SELECT attnotnull FROM pg_attribute WHERE attname = 'volume' AND attrelid = 'market_data.ohlcv_daily'::regclass"
)
BARS = "SELECT event_timestamp::date, volume::bigint FROM market_data.ohlcv_daily WHERE symbol = 'FORMER' ORDER BY 1"
# A session of a pipeline, for some seconds.
SESSION = (
    "sudo -u postgres env PGAPPNAME='larder load' sh -c"
    " \"nohup psql --no-psqlrc feast --command='SELECT pg_sleep(%s)' > /dev/null 2>&1 &\""
)


def types(superuser):
    """Return the types of volume in features.ohlcv_features, market_data.ohlcv_daily and market_data.quotes."""
    return superuser(TYPES).strip().split(",")


@pytest.fixture
def former(superuser):
    """Bring the tables to what they were, with bars of twelve years and as many chunks."""
    for table in TABLES:
        superuser(
            f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS volume_is_no_bigint;"
            f" ALTER TABLE {table} ALTER COLUMN volume TYPE bigint USING volume::bigint"
        )
    superuser(
        "DELETE FROM market_data.ohlcv_daily; DELETE FROM market_data.quotes;"
        " ALTER TABLE market_data.ohlcv_daily ALTER COLUMN volume SET NOT NULL;"
        " INSERT INTO market_data.ohlcv_daily SELECT 'FORMER', '2010-01-01Z'::timestamptz + n * interval '1 year',"
        " 1, 2, 1, 2, 2, CASE n WHEN 0 THEN 0 WHEN 11 THEN 9007199254740992 ELSE 10 ^ n + 1 END"
        " FROM generate_series(0, 11) AS n;"
        " INSERT INTO market_data.quotes (symbol, event_timestamp, volume) VALUES ('FORMER', now(), 3000000001),"
        " ('NONE', now(), NULL)"
    )
    assert types(superuser) == ["bigint"] * 3
    return superuser(BARS)


def test_check_mode_names_what_would_be_widened(playbook, former, superuser):
    result = playbook("part.yml", "--check", "--diff", **PARTS)
    assert result.returncode == 0, result.stdout
    for table in TABLES:
        assert f"(item={table}.volume: bigint to double precision)" in result.stdout
        schema, name = table.split(".")
        assert f'ALTER TABLE "{schema}"."{name}" ALTER COLUMN "volume" TYPE double precision USING' in result.stdout
    assert types(superuser) == ["bigint"] * 3
    assert superuser(BARS) == former


def test_a_value_that_would_change_is_named_and_nothing_is_changed(playbook, former, superuser):  # noqa: ARG001
    superuser("UPDATE market_data.ohlcv_daily SET volume = 9007199254740993 WHERE event_timestamp = '2021-01-01Z'")
    result = playbook("part.yml", **PARTS)
    message = " ".join(result.stdout.split())
    assert result.returncode != 0
    assert (
        "market_data.ohlcv_daily has the column volume as bigint, and double precision is asked for: of symbol FORMER, "
        "event_timestamp 2021-01-01T00:00:00+00:00, volume 9007199254740993 it would make another number."
    ) in message
    assert "add market_data.ohlcv_daily.volume to timescaledb_allow_lossy. Nothing has been changed." in message
    assert types(superuser) == ["bigint"] * 3
    assert superuser(NOT_NULL).strip() == "t"


def test_a_former_pipeline_that_still_runs_is_named_and_nothing_is_widened(playbook, former, superuser, store):  # noqa: ARG001
    store.check_output(SESSION % 60)
    result = playbook("part.yml", **PARTS, larder_drain_seconds=2)
    superuser("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'larder load'")
    assert result.returncode != 0
    message = " ".join(result.stdout.split())
    assert (
        "cannot get a wider type yet: after 2 seconds (larder_drain_seconds) there is still larder load from" in message
    )
    assert types(superuser) == ["bigint"] * 3


def test_columns_are_widened_after_readers_and_pipelines_are_done_and_every_value_stays(
    playbook, former, superuser, store
):
    """The rest of a run that ended after one column; then there is nothing left to do."""
    superuser(f"ALTER TABLE {TABLES[1]} ALTER COLUMN volume TYPE double precision")
    store.check_output(SESSION % 8)
    store.check_output(
        "sudo -u postgres sh -c \"nohup psql --no-psqlrc feast --command='BEGIN; SELECT max(volume) FROM"
        " market_data.ohlcv_daily; SELECT pg_sleep(20); COMMIT' > /dev/null 2>&1 &\""
    )
    result = playbook("part.yml", **PARTS)
    assert result.returncode == 0, result.stdout
    assert f"changed: [store1] => (item={TABLES[0]}.volume: bigint to double precision)" in result.stdout
    assert f"{TABLES[1]}.volume" not in result.stdout
    assert types(superuser) == ["double precision"] * 3
    assert superuser(BARS) == former
    assert superuser("SELECT volume FROM market_data.quotes WHERE symbol = 'FORMER'").strip() == "3000000001"
    result = playbook("part.yml", **PARTS)
    assert playbooks.changed(result.stdout)["store1"] == 0


def test_a_widened_column_takes_whole_numbers_fractions_and_none_but_no_bytes_of_a_bigint(superuser, store):
    superuser(
        "DELETE FROM market_data.ohlcv_daily WHERE symbol = 'WIDENED';"
        " INSERT INTO market_data.ohlcv_daily SELECT 'WIDENED', '2026-01-01Z'::timestamptz + n * interval '1 day',"
        " 1, 2, 1, 2, 2, v FROM (VALUES (0, 7::bigint::double precision), (1, 0.2), (2, NULL)) AS given (n, v)"
    )
    kept = superuser(
        "SELECT json_agg(volume ORDER BY event_timestamp) FROM market_data.ohlcv_daily WHERE symbol = 'WIDENED'"
    )
    assert json.loads(kept) == [7, 0.2, None]
    # A pipeline of the former release writes so: eight bytes of a bigint.
    row = "'BYTES', '2026-01-01Z'::timestamptz, 1::float8, 2::float8, 1::float8, 2::float8, 2::float8, 1000::bigint"
    copied = store.run(
        "sudo -u postgres psql --no-psqlrc feast --command=%s --command=%s",
        f"\\copy (SELECT {row}) TO '/tmp/bars' (FORMAT binary)",
        "\\copy market_data.ohlcv_daily (symbol, event_timestamp, open, high, low, close, adjusted_close, volume)"
        " FROM '/tmp/bars' (FORMAT binary)",
    )
    assert 'violates check constraint "volume_is_no_bigint"' in copied.stderr
