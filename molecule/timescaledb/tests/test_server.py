"""The server itself: what protects the data, and what brings it back."""

from __future__ import annotations

import time

import pytest


def settings(superuser, *names):
    values = superuser("SELECT " + ", ".join(f"current_setting('{name}')" for name in names))
    return dict(zip(names, values.strip().split("|"), strict=True))


def test_the_cluster_has_checksums_and_a_stable_sort_order(superuser):
    assert settings(superuser, "data_checksums", "server_encoding", "fsync", "full_page_writes") == {
        "data_checksums": "on",
        "server_encoding": "UTF8",
        "fsync": "on",
        "full_page_writes": "on",
    }
    assert superuser("SELECT datlocprovider, datlocale FROM pg_database WHERE datname = 'feast'").strip() == "b|C.UTF-8"


def test_memory_follows_timescaledb_tune(superuser):
    """timescaledb-tune 0.18 --memory=1GB gives these, whatever the number of processors."""
    names = ("shared_buffers", "effective_cache_size", "maintenance_work_mem", "wal_buffers")
    assert list(settings(superuser, *names).values()) == ["256MB", "768MB", "128MB", "7864kB"]


def test_every_login_finds_room_during_a_rotation(superuser):
    limits = "SELECT sum(rolconnlimit) * 2 <= current_setting('max_connections')::int - 3 FROM pg_roles"
    assert superuser(f"{limits} WHERE rolcanlogin AND rolname <> 'postgres'").strip() == "t"
    assert superuser("SELECT count(*) FROM pg_roles WHERE rolconnlimit < 0 AND rolcanlogin").strip() == "1"


def test_timescaledb_is_the_apache_edition_and_sends_no_telemetry(superuser):
    assert settings(superuser, "timescaledb.license", "timescaledb.telemetry_level") == {
        "timescaledb.license": "apache",
        "timescaledb.telemetry_level": "off",
    }


def test_no_setting_waits_for_a_restart(superuser):
    assert superuser("SELECT name FROM pg_settings WHERE pending_restart") == ""


def test_tables_indexes_and_hypertables_are_declared_ones(superuser):
    assert superuser(
        "SELECT hypertable_schema || '.' || hypertable_name, column_name, time_interval"
        " FROM timescaledb_information.dimensions WHERE hypertable_name IN ('ohlcv_daily', 'quotes') ORDER BY 1"
    ).splitlines() == ["market_data.ohlcv_daily|event_timestamp|365 days", "market_data.quotes|event_timestamp|7 days"]
    assert superuser('SELECT "Note; no. 1" FROM lab."Notes ""quoted"""') == ""


def test_retention_drops_old_chunks_and_keeps_new_ones(store, query):
    days = (400, 200, 120, 60, 1)
    values = ", ".join(f"('OLD', now() - interval '{day} days')" for day in days)
    assert query("push", f"INSERT INTO market_data.quotes (symbol, event_timestamp) VALUES {values}").rc == 0
    store.check_output("sudo systemctl start larder-retention.service")
    kept = query("pipeline", "SELECT count(*) FROM market_data.quotes WHERE symbol = 'OLD'").stdout.strip()
    assert kept == "2"


def test_retention_is_scheduled(store):
    assert store.service("larder-retention.timer").is_running
    assert store.service("larder-retention.timer").is_enabled


def test_the_server_comes_back_by_itself_after_a_kill(store, query, superuser):
    store.check_output("sudo sh -c 'kill -9 $(head -n 1 /var/lib/postgresql/17/main/postmaster.pid)'")
    deadline = time.monotonic() + 60
    while query("serve", "SELECT 1").rc != 0:
        assert time.monotonic() < deadline
        time.sleep(1)
    assert superuser("SELECT count(*) FROM pg_class") != "0"


@pytest.mark.parametrize("unit", ["postgresql@17-main.service", "larder-retention.service"])
def test_the_unit_is_sandboxed(store, unit):
    assert store.run("systemd-analyze security --threshold=15 %s", unit).rc == 0


def test_the_server_runs_without_privileges_and_leaves_no_core(store):
    pid = store.check_output("sudo head -n 1 /var/lib/postgresql/17/main/postmaster.pid")
    status = dict(
        line.split(":\t", 1)
        for line in store.check_output("sudo cat /proc/%s/status", pid).splitlines()
        if ":\t" in line
    )
    assert (status["CapEff"], status["NoNewPrivs"], status["Seccomp"]) == ("0" * 16, "1", "2")
    inside = f"sudo nsenter --target={pid} --mount"
    assert store.run(f"{inside} touch /usr/local/mine").rc != 0
    assert store.run(f"{inside} ls /root").stdout == ""
    limits = store.check_output("sudo grep 'core file' /proc/%s/limits", pid)
    assert limits.split()[4:6] == ["0", "0"]


@pytest.mark.parametrize(
    "path",
    ["/var/lib/postgresql/17/main", "/etc/postgresql/17/main/pg_hba.conf", "/etc/larder/tls/timescaledb/*/tls.key"],
)
def test_a_local_user_cannot_read_the_servers_files(store, path):
    assert "Permission denied" in store.run(f"sudo -u nobody sh -c 'cat {path}/* {path}'").stderr


def test_a_restart_does_not_wait_for_clients(store):
    """The unit's stop ends sessions; without it systemd asks for a smart shutdown, which any client can hold up."""
    store.check_output("sudo systemd-run --quiet --collect --uid=postgres psql -c 'SELECT pg_sleep(300)'")
    sleeps = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'"
    store.check_output(f'until [ "$(sudo -u postgres psql -Atc "{sleeps}")" = 1 ]; do sleep 0.1; done')
    store.check_output("sudo timeout 30 systemctl restart postgresql@17-main")
    assert "received fast shutdown request" in store.check_output("sudo cat /var/log/postgresql/postgresql-17-main.log")


def test_postgresql_is_one_service_for_operators(store):
    """Debian's postgresql.service stands for its clusters: stopped, it refuses to reload them."""
    loaded = "sudo -u postgres psql -Atc 'SELECT pg_conf_load_time()'"
    before = store.check_output(loaded)
    store.check_output("sudo systemctl reload postgresql")
    store.check_output(f'until [ "$({loaded})" != "{before}" ]; do sleep 0.1; done')


def test_parallel_and_compiled_queries_work_in_the_sandbox(superuser):
    settings = "SET jit = on; SET jit_above_cost = 0; SET debug_parallel_query = on; SET parallel_setup_cost = 0"
    assert superuser(f"{settings}; SELECT sum(n) FROM generate_series(1, 100000) AS n").strip() == "5000050000"


def test_former_settings_are_kept_and_not_applied(store, superuser):
    directory = "/etc/postgresql/17/main"
    assert "shop" in store.check_output(f"sudo cat {directory}/pg_hba.conf.before-larder")
    assert "listen" in store.check_output(f"sudo cat {directory}/conf.d/shop.conf.before-larder")
    assert superuser("SELECT count(*) FROM pg_hba_file_rules WHERE 'shop' = ANY (database)").strip() == "0"
    assert "*" not in superuser("SHOW listen_addresses")
