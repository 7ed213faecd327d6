"""A run with other values: what it changes, and what it refuses."""

from __future__ import annotations

import playbooks
import pytest

DECLARED = {
    "name": "lab.samples",
    "columns": [
        {"name": "symbol", "type": "text", "nullable": False},
        {"name": "event_timestamp", "type": "timestamptz", "nullable": False},
        {"name": "value", "type": "float8", "default": "0"},
        {"name": "source", "type": "text"},
        {"name": "checked", "type": "boolean", "nullable": False, "default": "false"},
    ],
    "primary_key": ["symbol", "event_timestamp"],
    "hypertable": {"time_column": "event_timestamp", "chunk_interval": "7 days"},
}


def started(superuser):
    return superuser("SELECT pg_postmaster_start_time()")


def tables(*declared):
    return {"timescaledb_schemas": ["lab"], "timescaledb_tables": list(declared)}


@pytest.fixture(scope="module")
def samples(query):
    """Old rows, so that a change has something to lose."""
    assert (
        query(
            "pipeline",
            "INSERT INTO lab.samples VALUES ('A', '2024-01-01', 1.5), ('B', '2024-01-01', NULL) ON CONFLICT DO NOTHING",
            password="another password",
        ).rc
        == 0
    )


def test_another_run_changes_nothing(playbook):
    result = playbook("side_effect.yml")
    assert result.returncode == 0, result.stdout
    assert playbooks.changed(result.stdout)["store1"] == 0


def test_a_new_memory_value_is_in_force(superuser):
    assert superuser("SHOW shared_buffers").strip() == "192MB"
    assert superuser("SELECT name FROM pg_settings WHERE pending_restart") == ""


def test_new_columns_defaults_indexes_and_rights_are_there(superuser):
    columns = superuser(
        "SELECT attname, format_type(atttypid, atttypmod), attnotnull, pg_get_expr(adbin, adrelid) FROM pg_attribute"
        " LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum"
        " WHERE attrelid = 'lab.samples'::regclass AND attnum > 2"
    )
    assert columns.splitlines() == ["value|double precision|f|0", "source|text|f|", "checked|boolean|t|false"]
    assert "samples_event_timestamp_idx" in superuser("SELECT indexname FROM pg_indexes WHERE tablename = 'samples'")
    assert superuser("SELECT has_table_privilege('feast_push', 'lab.samples', 'insert')").strip() == "t"


def test_a_right_that_is_no_longer_declared_is_revoked(superuser):
    assert superuser("SELECT has_table_privilege('feast_train', 'lab.samples', 'select')").strip() == "f"


def test_a_setting_that_can_be_reloaded_does_not_restart_the_server(playbook, superuser):
    before = started(superuser)
    assert playbook("part.yml", parts=["configure"], timescaledb_settings={"work_mem": "20MB"}).returncode == 0
    assert superuser("SHOW work_mem").strip() == "20MB"
    assert started(superuser) == before


def test_a_setting_that_needs_a_restart_restarts_the_server_once(playbook, superuser):
    before = started(superuser)
    assert (
        playbook("part.yml", parts=["configure"], timescaledb_settings={"max_locks_per_transaction": 192}).returncode
        == 0
    )
    assert superuser("SHOW max_locks_per_transaction").strip() == "192"
    assert started(superuser) != before


def test_more_sessions_than_the_server_has_room_for_are_refused(playbook):
    result = playbook("part.yml", parts=["preflight"], timescaledb_max_connections=40)
    assert result.returncode != 0
    assert "timescaledb_max_connections is 40; the `connections` of timescaledb_roles" in " ".join(
        result.stdout.split()
    )


def test_a_wrong_setting_is_refused_and_the_server_stays(playbook, superuser):
    before = started(superuser)
    result = playbook("part.yml", parts=["configure"], timescaledb_settings={"work_mem": "a lot"})
    assert result.returncode != 0
    assert 'invalid value for parameter "work_mem": "a lot"' in result.stdout
    assert started(superuser) == before


def test_settings_that_a_killed_run_left_unloaded_are_loaded_by_the_next(playbook, store, superuser):
    """The file is as the role writes it, the server has not read it: as after a run that ended before its handlers."""
    assert playbook("part.yml", parts=["configure"], timescaledb_settings={"work_mem": "12MB"}).returncode == 0
    path = "/etc/postgresql/17/main/conf.d/larder.conf"
    store.check_output("sudo sed -i \"s/^work_mem = .*/work_mem = '24MB'/\" %s", path)
    assert superuser("SHOW work_mem").strip() == "12MB"
    assert playbook("part.yml", parts=["configure"], timescaledb_settings={"work_mem": "24MB"}).returncode == 0
    assert superuser("SHOW work_mem").strip() == "24MB"


def test_lossy_changes_are_refused_by_name_and_nothing_is_changed(playbook, samples, superuser):  # noqa: ARG001
    symbol, time, _value, source, _checked = DECLARED["columns"]
    asked = DECLARED | {
        "columns": [
            symbol,
            time,
            {"name": "value", "type": "numeric", "nullable": False},
            source,
            {"name": "weight", "type": "int", "nullable": False},
            {"name": "fine", "type": "int"},
        ],
        "primary_key": ["event_timestamp", "symbol"],
        "hypertable": {"time_column": "event_timestamp", "chunk_interval": "30 days"},
    }
    result = playbook("part.yml", parts=["tables"], **tables(asked))
    message = " ".join(result.stdout.split())
    assert result.returncode != 0
    for sentence in (
        "lab.samples has the primary key (symbol, event_timestamp), and (event_timestamp, symbol) is asked for:",
        "rows may collide. If that is meant, add lab.samples.primary_key to timescaledb_allow_lossy.",
        "lab.samples has the column checked (boolean), which is no longer declared: its data would be lost.",
        "If that is meant, add lab.samples.checked to timescaledb_allow_lossy.",
        "lab.samples has the column value as double precision, and numeric is asked for: values would be converted.",
        "lab.samples has rows in which value is null, and NOT NULL is asked for: fill them first.",
        "lab.samples has rows, and its new column weight (integer) is NOT NULL without a default",
        "lab.samples has chunks of 7 days, and 30 days is asked for: only new chunks would get it.",
        "If that is meant, add lab.samples.chunk_interval to timescaledb_allow_lossy.",
        'lab.Notes "quoted" exists but is no longer declared: its data would be lost.',
        "market_data.ohlcv_daily exists but is no longer declared",
        "Nothing has been changed.",
    ):
        assert sentence in message, sentence
    assert (
        superuser(
            "SELECT count(*) FROM pg_attribute WHERE attrelid = 'lab.samples'::regclass AND attname = 'fine'"
        ).strip()
        == "0"
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"columns": [*DECLARED["columns"], {"name": "a", "type": "flaot"}]},
            "lab.samples declares column a as flaot, which is no type of PostgreSQL.",
        ),
        ({"retention": "a while"}, "lab.samples has the retention 'a while', which is no interval such as 90 days."),
        (
            {"columns": [*DECLARED["columns"], {"name": "a", "type": "int", "default": "'x'"}]},
            'lab.samples cannot be declared so: invalid input syntax for type integer: "x".',
        ),
    ],
)
def test_check_mode_refuses_what_only_the_server_can_judge(playbook, change, sentence):
    result = playbook("part.yml", "--check", parts=["tables"], **tables(DECLARED | change))
    assert result.returncode != 0
    assert sentence in " ".join(result.stdout.split())


def test_check_mode_reports_the_sql_and_runs_none(playbook, superuser):
    columns = [*DECLARED["columns"], {"name": "extra", "type": "real"}]
    declared = {"lab_samples": DECLARED | {"columns": columns, "indexes": [{"columns": ["symbol", "value DESC"]}]}}
    result = playbook("part.yml", "--check", "--diff", parts=["tables"], **declared)
    assert result.returncode == 0, result.stdout
    assert 'ALTER TABLE "lab"."samples" ADD COLUMN "extra" real;' in result.stdout
    assert 'CREATE INDEX ON "lab"."samples" ("symbol", "value" DESC);' in result.stdout
    assert superuser("SELECT count(*) FROM pg_attribute WHERE attname = 'extra'").strip() == "0"


def test_a_lossy_change_that_is_allowed_by_name_is_made(playbook, samples, superuser):  # noqa: ARG001
    symbol, time, _value, source, _checked = DECLARED["columns"]
    declared = DECLARED | {
        "columns": [symbol, time, {"name": "value", "type": "numeric(10,2)"}, source],
        "hypertable": {"time_column": "event_timestamp", "chunk_interval": "30 days"},
    }
    allowed = ["lab.samples.value", "lab.samples.checked", "lab.samples.chunk_interval"]
    for changed in (1, 0):
        result = playbook("part.yml", parts=["tables"], lab_samples=declared, timescaledb_allow_lossy=allowed)
        assert result.returncode == 0, result.stdout
        assert playbooks.changed(result.stdout)["store1"] == changed
    assert superuser("SELECT value FROM lab.samples WHERE symbol = 'A'").strip() == "1.50"
    assert (
        superuser(
            "SELECT time_interval FROM timescaledb_information.dimensions WHERE hypertable_name = 'samples'"
        ).strip()
        == "30 days"
    )
