"""Who gets in, and what each purpose may do, asked from other hosts."""

from __future__ import annotations

import time

import pytest

PURPOSES = ["load", "pipeline", "registry", "serve", "push"]


@pytest.mark.parametrize("purpose", PURPOSES)
def test_every_purpose_of_the_inventory_logs_in_with_its_password(query, purpose):
    assert query(purpose, "SELECT current_user").stdout.strip() == f"feast_{purpose}"


@pytest.mark.parametrize("purpose", PURPOSES)
def test_a_wrong_password_is_refused(query, purpose, passwords, login):
    user = login(purpose, passwords[purpose])
    assert "password authentication failed" in query(purpose, "SELECT 1", user=user, password="wrong").stderr


def test_another_purposes_password_is_refused(query, passwords, login):
    user = login("pipeline", passwords["pipeline"])
    result = query("pipeline", "SELECT 1", user=user, password=passwords["load"])
    assert "password authentication failed" in result.stderr


def test_a_purposes_role_cannot_log_in(query):
    assert "password authentication failed" in query("serve", "SELECT 1", user="feast_serve").stderr


def test_the_connection_is_encrypted_by_tls_1_3(query):
    version = "SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
    assert query("serve", f"SET ROLE NONE; {version}").stdout.strip() == "TLSv1.3"


NO_CERTIFICATE = {"sslcert": None, "sslkey": None}


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"sslmode": "disable"}, "pg_hba.conf rejects connection"),
        ({"ssl_max_protocol_version": "TLSv1.2"}, "protocol version"),
        (NO_CERTIFICATE, "connection requires a valid client certificate"),
        ({"host": "elsewhere"}, 'does not match host name "elsewhere"'),
    ],
)
def test_a_client_without_proper_tls_is_refused(query, store, options, refusal):
    address = store.ansible.get_variables()["ansible_host"]
    assert refusal in query("serve", "SELECT 1", hostaddr=address, **options).stderr


def test_a_clients_certificate_of_another_ca_is_refused(query, foreign_certificate):
    options = {name: foreign_certificate[name] for name in ("sslcert", "sslkey")}
    result = query("serve", "SELECT 1", **options)
    assert "unknown ca" in result.stderr


def test_a_client_refuses_a_server_of_another_ca(query, foreign_certificate):
    result = query("serve", "SELECT 1", sslrootcert=foreign_certificate["sslrootcert"])
    assert "certificate verify failed" in result.stderr


def test_a_host_outside_the_inventory_groups_is_refused(query):
    assert "no pg_hba.conf entry" in query("serve", "SELECT 1", on="stranger").stderr


def test_a_purpose_is_refused_from_a_host_that_does_not_need_it(query):
    assert "no pg_hba.conf entry" in query("monitor", "SELECT 1").stderr
    assert "no pg_hba.conf entry" in query("train", "SELECT 1").stderr


@pytest.mark.parametrize("user", ["postgres", "feast_owner"])
def test_neither_superuser_nor_owner_logs_in_remotely(query, user):
    assert "no pg_hba.conf entry" in query("serve", "SELECT 1", user=user).stderr


def test_other_databases_are_closed(query):
    assert "no pg_hba.conf entry" in query("serve", "SELECT 1", dbname="postgres").stderr


def test_the_server_listens_on_named_addresses_only(store):
    listening = {socket for socket in store.socket.get_listening_sockets() if socket.endswith(":5432")}
    address = store.ansible.get_variables()["ansible_host"]
    assert listening == {"tcp://127.0.0.1:5432", f"tcp://{address}:5432"}


def test_a_local_user_is_refused(store):
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
def test_a_purpose_has_no_right_of_another(query, purpose, statement):
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


def test_a_copy_into_a_hypertable_does_not_crash_the_server(store, superuser):
    """With pgaudit, the COPY crashes the server: timescale/timescaledb#7667."""
    columns = "symbol, event_timestamp, open, high, low, close, adjusted_close, volume"
    bars = f"COPY market_data.ohlcv_daily ({columns}) FROM STDIN (FORMAT csv);\nCOPIED,2020-01-02,1,2,1,2,2,10\n\\.\n"
    store.check_output("printf %%s %s | sudo -u postgres psql --set=ON_ERROR_STOP=1 feast", bars)
    assert superuser("DELETE FROM market_data.ohlcv_daily WHERE symbol = 'COPIED' RETURNING symbol") == "COPIED"


def test_servers_can_read_tables_that_feast_creates_in_its_registry(query):
    assert query("registry", "CREATE TABLE IF NOT EXISTS feast_registry.probe (n int)").rc == 0
    for purpose in ("serve", "push"):
        assert query(purpose, "SELECT count(*) FROM feast_registry.probe").rc == 0
        assert "permission denied" in query(purpose, "INSERT INTO feast_registry.probe VALUES (1)").stderr


def test_a_query_that_runs_too_long_is_cancelled(query):
    slow = "SET statement_timeout = '100ms'; SELECT pg_sleep(5)"
    assert "statement timeout" in query("serve", slow).stderr
    assert query("serve", "SHOW statement_timeout").stdout.strip() == "30s"


def test_sessions_of_a_purpose_are_limited(query, superuser):
    for _ in range(3):
        query("load", "SELECT pg_sleep(60)", background=True)
    sessions = "FROM pg_stat_activity WHERE usename ^@ 'feast_load'"
    try:
        deadline = time.monotonic() + 30
        while superuser(f"SELECT count(*) {sessions}").strip() != "3":
            assert time.monotonic() < deadline
        assert "too many connections for role" in query("load", "SELECT 1").stderr
        assert query("serve", "SELECT 1").rc == 0
    finally:
        superuser(f"SELECT pg_terminate_backend(pid, 5000) {sessions}")


def test_objects_that_a_login_makes_belong_to_its_purpose(query, superuser):
    assert query("registry", "CREATE TABLE IF NOT EXISTS feast_registry.probe (n int)").rc == 0
    owner = superuser("SELECT tableowner FROM pg_tables WHERE schemaname = 'feast_registry' AND tablename = 'probe'")
    assert owner.strip() == "feast_registry"
    depends = "SELECT count(*) FROM pg_shdepend JOIN pg_roles ON pg_roles.oid = refobjid WHERE rolcanlogin"
    assert superuser(f"{depends} AND rolname <> 'postgres'").strip() == "0"


def test_nobody_may_use_a_database_or_create_in_public_unless_granted(superuser):
    rights = "CROSS JOIN aclexplode({}) WHERE grantee = 0"
    databases = rights.format("coalesce(datacl, acldefault('d', datdba))")
    assert superuser(f"SELECT datname FROM pg_database {databases} AND datallowconn") == ""
    schemas = rights.format("nspacl")
    assert superuser(f"SELECT nspname FROM pg_namespace {schemas} AND privilege_type = 'CREATE'") == ""


def test_only_postgres_has_administrative_privileges(superuser):
    able = "rolsuper OR rolcreaterole OR rolcreatedb OR rolreplication OR rolbypassrls"
    assert superuser(f"SELECT rolname FROM pg_roles WHERE {able}").split() == ["postgres"]


def test_passwords_are_stored_as_scram_verifiers_of_4096_rounds(superuser):
    stored = superuser("SELECT rolpassword FROM pg_authid WHERE rolcanlogin AND rolname <> 'postgres'").split()
    assert len(stored) == 7
    assert all(verifier.startswith("SCRAM-SHA-256$4096:") for verifier in stored)


def test_the_log_tells_who_did_what_from_where(store, query, passwords, login, client_address):
    user, client = login("registry", passwords["registry"]), client_address
    query("registry", "SELECT 1", user=user, password="a guess that is wrong")
    query("registry", "CREATE TABLE feast_registry.audited (); DROP TABLE feast_registry.audited")
    # The password is no argument: sudo logs its commands in the journal.
    typed = "CREATE ROLE audited PASSWORD 'typed in by somebody'; DROP ROLE audited"
    for database in ("postgres", "feast"):
        store.check_output(f"echo %s | sudo -u postgres psql {database}", typed)
    lines = store.check_output("sudo cat /var/log/postgresql/postgresql-17-main.log").splitlines()

    def logged(*parts):
        return any(all(part in line for part in parts) for line in lines)

    assert logged(f"{user}@feast/", f"/{client} FATAL:", "password authentication failed")
    assert logged(f"{user}@feast/[unknown]/{client} LOG:", "connection authorized")
    assert logged(f"{user}@feast/psql/{client} LOG:", "AUDIT: CREATE TABLE table feast_registry.audited")
    assert logged(f"{user}@feast/psql/{client} LOG:", "AUDIT: DROP TABLE table feast_registry.audited")
    assert logged("postgres@feast/timescaledb_roles/[local] LOG:", "AUDIT: SESSION", "CREATE ROLE", user)
    assert logged("postgres@postgres/psql/[local] LOG:", "AUDIT: SESSION", "CREATE ROLE audited PASSWORD <REDACTED>")


def test_neither_log_nor_journal_holds_password_or_verifier(store, passwords):
    log = store.check_output("sudo cat /var/log/postgresql/postgresql-17-main.log; sudo journalctl --no-pager")
    assert "SCRAM-SHA-256$4096" not in log
    assert "typed in by somebody" not in log
    assert "a guess that is wrong" not in log
    assert not [purpose for purpose in ("load", "pipeline", "push", "train") if passwords[purpose] in log]
