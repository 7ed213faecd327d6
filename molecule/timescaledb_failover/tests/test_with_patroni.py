"""The database hosts get a group etcd, lose a standby that leaves, and their primary: steps of one story, in order.

Before them come the steps of test_standby.py. A client knows one name, which leads to the primary.
"""

from __future__ import annotations

import os
import time

import playbooks
import pytest

SOAK = pytest.mark.skipif("LARDER_SOAK" not in os.environ, reason="takes too long for every day")
AUTOMATIC = {"inventories": ("grown", "automatic")}
JOINED = {"inventories": ("grown", "automatic", "joined")}
HOSTS = ("failover1", "failover2")
STREAMS = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'"
# The longest time for which no row is acknowledged.
GAP = 30


def words(result):
    return " ".join(result.stdout.split())


def passed(result):
    assert result.returncode == 0, result.stdout
    return playbooks.changed(result.stdout)


def unchanged(result):
    assert set(passed(result).values()) == {0}, playbooks.tasks_that_changed(result.stdout)


@pytest.fixture(scope="module")
def proxy(database):
    """Return how the client's host reaches the primary, as the stack's clients do."""
    return database.conninfo("failover1", host="timescaledb.larder", hostaddr="127.0.0.1", port="5433")


@pytest.fixture(scope="module")
def primary(database):
    """Return the host that takes writes, and the other one."""

    def hosts():
        by_answer = {database.query(host, "SELECT pg_is_in_recovery()").stdout.strip(): host for host in HOSTS}
        return by_answer.get("f"), by_answer.get("t")

    return hosts


@pytest.fixture(scope="module")
def rest(inventory):
    """Return the status of an answer of Patroni's API on a host."""

    def ask(host, path, *, certificate=True):
        tls = "/etc/larder/tls/feast/current"
        own = f"--cert {tls}/tls.crt --key {tls}/tls.key" if certificate else ""
        curl = f"curl --silent --max-time 3 --output /dev/null --write-out '%{{http_code}}' --cacert {tls}/ca.crt {own}"
        return inventory.host("failover3").run(f"{curl} https://{inventory.address(host)}:8008/{path}").stdout.strip()

    return ask


@pytest.fixture
def loses(database, proxy, primary, eventually):
    """Lose the primary in some way under a writer; nothing acknowledged is lost, and the writer goes on soon."""

    def lose(symbol, harm, heal):
        former, standby = primary()
        with database.writer(proxy, symbol) as written:
            time.sleep(5)
            harm(former)
            eventually(lambda: database.rows(standby, symbol) and primary()[0] == standby, GAP + 30)
            time.sleep(5)
            report = written()
        assert report.gap < GAP, report.gap
        assert len(report.acknowledged) > 50
        assert set(report.acknowledged) <= database.rows(standby, symbol)
        heal(former)
        eventually(lambda: database.query(former, "SELECT pg_is_in_recovery()").stdout.strip() == "t", 120)
        eventually(lambda: set(report.acknowledged) <= database.rows(former, symbol), 120)
        print(f"{symbol}: {report.gap:.1f} s without an acknowledged row, {len(report.acknowledged)} rows, 0 lost")
        return report

    return lose


def test_failover_becomes_automatic_without_a_restart_or_a_failed_insert(
    database, playbook, proxy, primary, eventually
):
    former, standby = primary()
    started = database.started(former)
    with database.writer(database.conninfo(former), "ADOPTED") as written:
        passed(playbook("converge.yml", **JOINED))
        report = written()
    assert report.failures == []
    assert len(report.acknowledged) > 100
    assert database.started(former) == started
    assert primary() == (former, standby)
    eventually(lambda: set(report.acknowledged) <= database.rows(standby, "ADOPTED"))
    sync = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"
    eventually(lambda: database.superuser(former, sync) == "1")
    with database.writer(proxy, "PROXY") as written:
        time.sleep(2)
        assert len(written().acknowledged) > 10
        assert written().failures == []


def refused(result):
    assert result.returncode != 0, result.stdout
    assert set(playbooks.changed(result.stdout).values()) == {0}
    return words(result)


def test_a_primary_and_the_last_that_are_needed_may_not_leave(playbook, primary):
    former, standby = primary()
    said = refused(playbook("remove.yml", host=former, **JOINED))
    assert f"{former} is the primary of PostgreSQL. Nothing was changed." in said, said
    assert "ansible/promote_standby.yml -e host=" in said, said
    said = refused(playbook("remove.yml", host=standby, **AUTOMATIC))
    assert f"{standby} is a member of etcd, and three have to be left" in said, said


def test_a_standby_and_member_of_etcd_leaves_under_a_writer(database, playbook, proxy, primary, inventory, eventually):
    before, started = primary(), [database.started(host) for host in HOSTS]
    with database.writer(proxy, "LEFT") as written:
        passed(playbook("remove.yml", host="failover4", **JOINED))
        report = written()
    print(f"LEFT: {report.gap:.1f} s without an acknowledged row")
    assert report.failures == []
    assert report.gap < 15, report.gap
    assert primary() == before
    assert [database.started(host) for host in HOSTS] == started
    assert set(report.acknowledged) <= database.rows(before[0], "LEFT")
    eventually(lambda: set(report.acknowledged) <= database.rows(before[1], "LEFT"))
    tls = "/etc/larder/tls/etcd/current"
    members = inventory.host("failover1").check_output(
        f"etcdctl --endpoints=https://127.0.0.1:2379 --cacert={tls}/ca.crt --cert={tls}/tls.crt --key={tls}/tls.key"
        " member list"
    )
    assert "failover3" in members
    assert "failover4" not in members
    for host in HOSTS:
        known = inventory.host(host).check_output(
            "cd /etc; patronictl -c patroni/config.yml list; cat postgresql/17/main/pg_hba.conf patroni/config.yml"
        )
        assert "failover4" not in known
        assert inventory.address("failover4") not in known
    assert database.query("failover4", "SELECT 1").rc != 0
    assert database.holding("failover4", database.passwords["replicate"]) == set()
    assert not inventory.host("failover4").file("/var/lib/postgresql/17/main").exists


@SOAK
def test_a_second_run_changes_nothing(database, playbook):
    started = [database.started(host) for host in HOSTS]
    unchanged(playbook("converge.yml", **AUTOMATIC))
    assert [database.started(host) for host in HOSTS] == started


def test_only_hosts_of_the_stack_ask_etcd_and_patroni(rest, inventory):
    host = inventory.host("failover3")
    assert rest("failover1", "patroni") == "200"
    assert rest("failover1", "patroni", certificate=False) == "000"
    ca = "--cacert /etc/larder/tls/etcd/current/ca.crt"
    own = "--cert /etc/larder/tls/etcd/current/tls.crt --key /etc/larder/tls/etcd/current/tls.key"
    url = f"https://{inventory.address('failover1')}:2379/health"
    assert "true" in host.run(f"curl --silent {ca} {own} {url}").stdout
    assert host.run(f"curl --silent {ca} {url}").rc != 0


def test_the_password_of_the_standbys_is_hidden(database, inventory):
    password = database.passwords["replicate"]
    for name in HOSTS:
        found = database.holding(name, password)
        assert found <= {
            "/etc/postgresql/17/main/larder.pgpass",
            "/etc/patroni/config.yml",
            "/run/postgresql/patroni.pgpass",
        }
        assert {inventory.host(name).file(path).mode for path in found} == {0o600}


@SOAK
def test_the_standbys_password_rotates_without_a_restart(database, playbook, primary, eventually):
    started = [database.started(host) for host in HOSTS]
    new = {"replicate": r"a new : password with \ and 'quotes'"}
    ready = {"larder_ready_groups": ["pipeline"]}
    for passwords in (new, {"replicate": database.passwords["replicate"]}):
        passed(playbook("rotate.yml", timescaledb_replication_passwords=passwords, **ready, **AUTOMATIC))
        eventually(lambda: database.superuser(primary()[0], STREAMS) == "1")
    assert [database.started(host) for host in HOSTS] == started


@SOAK
def test_an_upgrade_restarts_the_standby_first_and_loses_no_row(database, playbook, proxy, primary, eventually):
    former, standby = primary()
    with database.writer(proxy, "UPGRADED") as written:
        passed(playbook("upgraded.yml", order=f"failover3,{standby},{former}", **AUTOMATIC))
        report = written()
    print(f"UPGRADED: {report.gap:.1f} s without an acknowledged row")
    assert primary() == (standby, former)
    assert report.gap < GAP, report.gap
    assert set(report.acknowledged) <= database.rows(standby, "UPGRADED")
    eventually(lambda: set(report.acknowledged) <= database.rows(former, "UPGRADED"))


@SOAK
def test_the_primary_moves_when_told(database, playbook, proxy, primary, eventually):
    former, standby = primary()
    with database.writer(proxy, "MOVED") as written:
        passed(playbook("promote_standby.yml", host=standby, **AUTOMATIC))
        eventually(lambda: primary() == (standby, former))
        time.sleep(5)
        report = written()
    assert set(report.acknowledged) <= database.rows(standby, "MOVED")
    assert report.gap < GAP, report.gap
    print(f"MOVED: {report.gap:.1f} s without an acknowledged row")


@SOAK
def test_a_killed_postmaster_loses_no_row(database, proxy, primary, inventory):
    former, _standby = primary()
    with database.writer(proxy, "KILLED") as written:
        time.sleep(3)
        inventory.host(former).check_output("kill -9 $(head -1 /var/lib/postgresql/17/main/postmaster.pid)")
        time.sleep(GAP)
        report = written()
    assert report.gap < GAP, report.gap
    assert set(report.acknowledged) <= database.rows(primary()[0], "KILLED")
    print(f"KILLED: {report.gap:.1f} s without an acknowledged row, {len(report.acknowledged)} rows, 0 lost")


def test_a_host_that_dies_loses_no_row(loses, docker):
    loses("DIED", lambda host: docker("kill", host), lambda host: docker("start", host))


@SOAK
def test_a_host_that_hangs_loses_no_row(loses, docker):
    loses("HUNG", lambda host: docker("pause", host), lambda host: docker("unpause", host))


def test_a_run_after_the_failovers_changes_nothing(database, playbook, primary):
    before, started = primary(), [database.started(host) for host in HOSTS]
    unchanged(playbook("converge.yml", **AUTOMATIC))
    assert primary() == before
    assert [database.started(host) for host in HOSTS] == started
