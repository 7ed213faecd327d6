"""One database host becomes two, the primary is lost and comes back: steps of one story, in order."""

from __future__ import annotations

import os

import playbooks
import pytest

SOAK = pytest.mark.skipif("LARDER_SOAK" not in os.environ, reason="takes too long for every day")
STREAMS = "SELECT count(*) FROM pg_stat_wal_receiver WHERE status = 'streaming'"
READ_ONLY = "cannot execute INSERT in a read-only transaction"


def words(result):
    return " ".join(result.stdout.split())


def passed(result):
    assert result.returncode == 0, result.stdout
    return playbooks.changed(result.stdout)


def unchanged(result):
    assert set(passed(result).values()) == {0}, playbooks.tasks_that_changed(result.stdout)


@pytest.fixture
def follows(database, eventually):
    """Wait until a standby has every row of the primary."""

    def wait(standby, primary, symbol):
        rows = database.rows(primary, symbol)
        eventually(lambda: database.rows(standby, symbol) == rows)
        return rows

    return wait


def test_a_standby_joins_while_the_primary_serves_on(database, playbook, follows):
    started = database.started("failover1")
    with database.writer(database.conninfo("failover1"), "GROWN") as written:
        passed(playbook("converge.yml"))
        report = written()
    assert report.failures == []
    assert len(report.acknowledged) > 100
    assert database.started("failover1") == started
    assert set(report.acknowledged) <= follows("failover2", "failover1", "GROWN")


@SOAK
def test_a_second_run_changes_nothing(database, playbook):
    started = [database.started(host) for host in ("failover1", "failover2")]
    unchanged(playbook("converge.yml"))
    assert [database.started(host) for host in ("failover1", "failover2")] == started


def test_a_standby_takes_reads_and_no_writes(database):
    assert database.answer("failover2", "SELECT pg_is_in_recovery()") == "t"
    assert (
        int(database.answer("failover2", "SELECT count(*) FROM market_data.ohlcv_daily WHERE symbol = 'GROWN'")) > 100
    )
    assert READ_ONLY in database.insert("failover2", "STANDBY").stderr


def test_a_standby_refuses_a_wrong_password_and_clear_text(database):
    wrong = database.query("failover2", "SELECT 1", password="wrong" * 5)
    assert "password authentication failed" in wrong.stderr
    plain = database.query("failover2", "SELECT 1", sslmode="disable")
    assert "pg_hba.conf rejects connection" in plain.stderr
    assert "no encryption" in plain.stderr


def test_a_standby_is_known_by_the_name_that_all_database_hosts_share(database, inventory):
    for host in ("failover1", "failover2"):
        shared = {"host": "timescaledb.larder", "hostaddr": inventory.address(host)}
        assert database.answer(host, "SELECT 1", **shared) == "1"
    other = database.query("failover1", "SELECT 1", host="other.larder", hostaddr=inventory.address("failover1"))
    assert "does not match host name" in other.stderr


def test_only_the_replication_login_may_replicate(database):
    for purpose in ("load", "monitor"):
        refused = database.query("failover1", "IDENTIFY_SYSTEM", purpose, replication="true")
        assert "no pg_hba.conf entry for replication connection" in refused.stderr, refused
    stranger = database.query("failover1", "IDENTIFY_SYSTEM", "replicate", replication="true")
    assert "no pg_hba.conf entry for replication connection" in stranger.stderr, stranger


def test_the_password_of_the_standby_is_hidden_on_its_host(database, inventory):
    password = database.passwords["replicate"]
    (path,) = database.holding("failover2", password)
    assert path == "/etc/postgresql/17/main/larder.pgpass"
    file = inventory.host("failover2").file(path)
    assert (file.user, file.mode) == ("postgres", 0o600)
    assert password not in database.superuser("failover2", "SELECT string_agg(setting, ' ') FROM pg_settings")


@SOAK
def test_the_standbys_password_rotates_without_a_restart(database, playbook, follows, eventually):
    started = [database.started(host) for host in ("failover1", "failover2")]
    new = {"replicate": r"a new : password with \ and 'quotes'"}
    ready = {"larder_ready_groups": ["pipeline"]}
    passed(playbook("rotate.yml", timescaledb_replication_passwords=new, **ready))
    logins = "SELECT count(*) FROM pg_roles WHERE rolname ^@ 'feast_replicate_g'"
    assert database.superuser("failover1", logins) == "1"
    eventually(lambda: database.superuser("failover2", STREAMS) == "1")
    passed(playbook("rotate.yml", **ready))
    eventually(lambda: database.superuser("failover2", STREAMS) == "1")
    assert [database.started(host) for host in ("failover1", "failover2")] == started
    assert database.insert("failover1", "ROTATED").rc == 0
    follows("failover2", "failover1", "ROTATED")


@SOAK
def test_no_standby_is_promoted_beside_a_primary(database, playbook, docker):
    said = words(playbook("promote_standby.yml", host="failover2"))
    assert "failover1 runs as the primary: two primaries would take writes." in said, said
    docker("exec", "failover1", "sh", "-c", "systemctl stop ssh.socket ssh.service; pkill sshd; true")
    try:
        said = words(playbook("promote_standby.yml", host="failover2"))
        assert "failover1 answers failover2 as the primary, and Ansible cannot reach it to stop it" in said, said
    finally:
        docker("exec", "failover1", "systemctl", "start", "ssh.service")
    assert database.answer("failover2", "SELECT pg_is_in_recovery()") == "t"


@SOAK
def test_a_standby_is_promoted_when_the_primary_is_lost(database, playbook, docker, follows):
    with database.writer(database.conninfo("failover1"), "LOST") as written:
        follows("failover2", "failover1", "GROWN")
        docker("kill", "failover1")
        written()
    said = words(playbook("converge.yml", "--limit=failover2"))
    assert "no database host is the primary: failover1 cannot be reached, and failover2 wait" in said, said
    said = words(result := playbook("promote_standby.yml", host="failover2"))
    assert result.returncode == 0, said
    assert "failover2 is the primary. Now run site.yml --limit" in said
    assert "all:!failover1" in said
    passed(playbook("converge.yml", "--limit=failover2"))
    assert database.insert("failover2", "PROMOTED").rc == 0


@SOAK
def test_a_former_primary_that_boots_takes_no_writes(database, docker, eventually):
    docker("start", "failover1")
    eventually(lambda: database.query("failover1", "SELECT 1").rc == 0)
    assert READ_ONLY in database.insert("failover1", "SPLIT").stderr


@SOAK
def test_the_former_primary_becomes_a_standby(database, playbook, follows):
    started = database.started("failover2")
    passed(playbook("converge.yml"))
    follows("failover1", "failover2", "PROMOTED")
    assert database.rows("failover1", "LOST") == database.rows("failover2", "LOST")
    unchanged(playbook("converge.yml"))
    assert database.started("failover2") == started


@SOAK
def test_rows_that_only_a_lost_primary_had_are_undone(database, playbook, docker, inventory, follows, eventually):
    receiver = "pkill -%s -f 'postgres: .*[w]alreceiver'"  # not the shell that runs pkill
    standby = inventory.host("failover1")
    standby.check_output(receiver, "STOP")
    assert database.insert("failover2", "ALONE").rc == 0
    docker("kill", "failover2")
    standby.check_output(receiver, "CONT")
    eventually(lambda: database.superuser("failover1", STREAMS) == "0")
    said = words(result := playbook("promote_standby.yml", host="failover1"))
    assert result.returncode == 0, said
    assert database.insert("failover1", "AFTER").rc == 0
    docker("start", "failover2")
    eventually(lambda: database.query("failover2", "SELECT 1").rc == 0)
    assert database.answer("failover2", "SELECT count(*) FROM market_data.ohlcv_daily WHERE symbol = 'ALONE'") == "1"
    result = playbook("converge.yml")
    passed(result)
    assert "data directory a standby's: rewind" in words(result)
    follows("failover2", "failover1", "AFTER")
    assert database.answer("failover2", "SELECT count(*) FROM market_data.ohlcv_daily WHERE symbol = 'ALONE'") == "0"


@SOAK
def test_a_primary_that_runs_is_replaced_without_losing_a_row(database, playbook, follows):
    with database.writer(database.conninfo("failover1"), "SWITCH") as written:
        follows("failover2", "failover1", "AFTER")
        said = words(result := playbook("promote_standby.yml", host="failover2", stop_primary=True))
        report = written()
    assert result.returncode == 0, said
    assert len(report.acknowledged) > 20
    assert set(report.acknowledged) <= database.rows("failover2", "SWITCH")
    passed(playbook("converge.yml"))
    assert READ_ONLY in database.insert("failover1", "SPLIT").stderr
    follows("failover1", "failover2", "SWITCH")
    unchanged(playbook("converge.yml"))


@SOAK
def test_a_standby_that_lost_its_data_gets_a_copy(playbook, inventory, follows):
    host = inventory.host("failover1")
    host.check_output("systemctl stop postgresql@17-main; rm -r /var/lib/postgresql/17/main")
    said = words(playbook("converge.yml"))
    assert "data directory /var/lib/postgresql/17/main does not exist: mount its volume" in said, said
    passed(playbook("converge.yml", "--limit=failover1", timescaledb_recreate_lost_cluster=True))
    follows("failover1", "failover2", "SWITCH")
