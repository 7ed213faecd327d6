"""Who gets in, and what each purpose may do, asked from other hosts."""

from __future__ import annotations

import pytest

PURPOSES = ["load", "pipeline", "registry", "serve", "push"]


@pytest.mark.parametrize("purpose", PURPOSES)
def test_every_purpose_of_the_inventory_logs_in_with_its_password(query, purpose):
    assert query(purpose, "SELECT current_user").stdout.strip() == f"feast_{purpose}"


@pytest.mark.parametrize("purpose", PURPOSES)
def test_a_wrong_password_is_refused(query, purpose):
    assert "password authentication failed" in query(purpose, "SELECT 1", password="wrong").stderr


def test_the_connection_is_encrypted_by_tls_1_3(query):
    assert query("serve", "SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()").stdout.strip() == "TLSv1.3"


@pytest.mark.parametrize("options", ["sslmode=disable", "sslmode=require ssl_max_protocol_version=TLSv1.2"])
def test_a_client_without_proper_tls_is_refused(query, options):
    assert query("serve", "SELECT 1", options=options).rc != 0


def test_a_host_outside_the_inventory_groups_is_refused(query):
    assert "no pg_hba.conf entry" in query("serve", "SELECT 1", host="stranger").stderr


def test_a_purpose_is_refused_from_a_host_that_does_not_need_it(query):
    assert "no pg_hba.conf entry" in query("monitor", "SELECT 1").stderr
    assert "no pg_hba.conf entry" in query("train", "SELECT 1").stderr


@pytest.mark.parametrize("user", ["postgres", "feast_owner"])
def test_neither_superuser_nor_owner_logs_in_remotely(query, user):
    assert "no pg_hba.conf entry" in query("serve", "SELECT 1", user=user).stderr


def test_other_databases_are_closed(query):
    assert "no pg_hba.conf entry" in query("serve", "SELECT 1", options="sslmode=require dbname=postgres").stderr


def test_the_server_listens_on_named_addresses_only(store):
    listening = {socket for socket in store.socket.get_listening_sockets() if socket.endswith(":5432")}
    address = store.ansible.get_variables()["ansible_host"]
    assert listening == {"tcp://127.0.0.1:5432", f"tcp://{address}:5432"}


def test_another_user_of_the_host_is_refused(store):
    assert store.run("sudo -u nobody psql --username=postgres feast --command='SELECT 1'").rc != 0


@pytest.mark.parametrize(
    ("purpose", "statement"),
    [
        ("serve", "SELECT * FROM features.price_action"),
        ("serve", "INSERT INTO features.price_action (symbol, event_timestamp) VALUES ('X', now())"),
        ("serve", "SELECT * FROM market_data.ohlcv_daily"),
        ("serve", "CREATE TABLE feast_registry.mine ()"),
        ("serve", "CREATE TABLE scratch.mine ()"),
        ("serve", "CREATE TEMPORARY TABLE mine ()"),
        ("serve", "COPY (SELECT 1) TO PROGRAM 'id'"),
        ("serve", "SELECT pg_read_file('/etc/passwd')"),
        ("serve", "ALTER SYSTEM SET fsync = off"),
        ("push", "DELETE FROM market_data.quotes"),
        ("push", "SELECT * FROM features.price_action"),
        ("load", "DELETE FROM market_data.ohlcv_daily"),
        ("load", "INSERT INTO features.price_action (symbol, event_timestamp) VALUES ('X', now())"),
        ("pipeline", "CREATE TABLE market_data.mine ()"),
        ("pipeline", "CREATE TABLE features.mine ()"),
        ("pipeline", "INSERT INTO market_data.ohlcv_daily (symbol, event_timestamp) VALUES ('X', now())"),
        ("pipeline", "CREATE TABLE public.mine ()"),
        ("pipeline", "CREATE SCHEMA mine"),
        ("pipeline", "SELECT drop_chunks('market_data.quotes', older_than => now())"),
        ("registry", "SELECT * FROM features.price_action"),
        ("registry", "SET ROLE feast_owner"),
    ],
)
def test_a_purpose_may_not_do_what_another_is_for(query, purpose, statement):
    error = query(purpose, statement).stderr
    assert "permission denied" in error or "must be owner" in error


def test_load_upserts_bars_through_a_temporary_table(query):
    columns = "symbol, event_timestamp, open, high, low, close, adjusted_close, volume"
    upload = f"""
        CREATE TEMPORARY TABLE upload (LIKE market_data.ohlcv_daily);
        INSERT INTO upload ({columns}) VALUES ('TEST', '2020-01-02', 1, 2, 1, 2, 2, 10);
        INSERT INTO market_data.ohlcv_daily SELECT * FROM upload
        ON CONFLICT (symbol, event_timestamp) DO UPDATE SET close = excluded.close"""
    assert query("load", upload).rc == 0
    assert query("pipeline", "SELECT close FROM market_data.ohlcv_daily WHERE symbol = 'TEST'").stdout.strip() == "2"


def test_what_feast_creates_in_its_registry_can_be_read_by_servers(query):
    assert query("registry", "CREATE TABLE IF NOT EXISTS feast_registry.probe (n int)").rc == 0
    for purpose in ("serve", "push"):
        assert query(purpose, "SELECT count(*) FROM feast_registry.probe").rc == 0
        assert "permission denied" in query(purpose, "INSERT INTO feast_registry.probe VALUES (1)").stderr


def test_a_query_that_runs_too_long_is_cancelled(query):
    slow = "SET statement_timeout = '100ms'; SELECT pg_sleep(5)"
    assert "statement timeout" in query("serve", slow).stderr
    assert query("serve", "SHOW statement_timeout").stdout.strip() == "30s"


def test_passwords_are_stored_as_scram_verifiers_of_4096_rounds(superuser):
    stored = superuser("SELECT rolpassword FROM pg_authid WHERE rolcanlogin AND rolname <> 'postgres'").split()
    assert len(stored) == 7
    assert all(verifier.startswith("SCRAM-SHA-256$4096:") for verifier in stored)


def test_the_log_holds_neither_password_nor_verifier(store, passwords):
    log = store.check_output("sudo cat /var/log/postgresql/postgresql-17-main.log")
    assert "CREATE TABLE" in log, "DDL is logged"
    assert "SCRAM-SHA-256$4096" not in log
    assert not [purpose for purpose in ("load", "pipeline", "push", "train") if passwords[purpose] in log]
