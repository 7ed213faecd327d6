"""All is watched by the monitoring host, and by nobody else; each fault is told as what it is, and nothing else is.

Times are those of the scenario's variables: everything is asked every 5 s, and an alert waits 20 s at most.
"""

from __future__ import annotations

import time

import pytest

PORTS = {
    "store1": (9100, 9121, 9187),
    "app1": (9100, 8405, 6586, 6587, 6596, 6597),
    "monitor1": (9100, 9090, 9093, 9115),
}
JOBS = {
    ("node_exporter", "store1"): 1,
    ("postgres_exporter", "store1"): 1,
    ("redis_exporter", "store1"): 1,
    ("node_exporter", "app1"): 1,
    ("gateway_metrics", "app1"): 1,
    ("feature_server_check", "app1"): 2,
    ("push_server_check", "app1"): 2,
    ("read", "app1"): 1,
    ("node_exporter", "monitor1"): 1,
    ("prometheus", "monitor1"): 1,
    ("alertmanager", "monitor1"): 1,
}
KEY = "a-secret-of-the-receiver"
# From the fault to the alert: two questions, the time that an alert waits, an evaluation; and a busy machine.
SOON, LATER = 60, 90


def test_every_service_of_the_inventory_is_a_target_and_answers(monitoring):
    targets = monitoring.targets()
    found: dict[tuple[str, str], int] = {}
    for job, host, _ in targets:
        found[job, host] = found.get((job, host), 0) + 1
    assert found == JOBS
    assert {target: error for target, error in targets.items() if error} == {}


def test_nothing_fires_on_the_healthy_stack(monitoring):
    # The first facts of larder status come within a minute of the first start.
    monitoring.quiet(seconds=150)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        assert monitoring.firing() == set()
        time.sleep(5)


def test_what_is_asked_is_what_the_hosts_have(monitoring):
    assert monitoring.value("redis_up") == 1
    assert monitoring.value("pg_up") == 1
    # The trial's bars are of four symbols, each a key of Redis.
    assert monitoring.value("redis_db_keys{db='db0'}") == 4
    assert monitoring.value("count(larder_certificate_not_after_timestamp_seconds) > bool 0") == 1
    assert monitoring.value("larder_status_healthy") == 1
    assert monitoring.value("probe_success") == 1
    assert monitoring.value("min(node_systemd_unit_state{name='redis-server.service', state='active'})") == 1


@pytest.mark.parametrize(("host", "port"), [(host, port) for host, ports in PORTS.items() for port in ports])
def test_a_host_outside_the_stack_gets_no_answer(inventory, knock, host, port):
    answer = knock("stranger", f"https://{inventory.address(host)}:{port}/metrics")
    # Alertmanager and the blackbox exporter listen at 127.0.0.1.
    assert answer == (
        "refused: <urlopen error [Errno 111] Connection refused>" if port in (9093, 9115) else "no answer"
    )


def test_a_host_of_the_stack_gets_no_answer_of_an_exporter_either(inventory, knock):
    certificate = "/etc/larder/tls/feast/current"
    assert knock("app1", f"https://{inventory.address('store1')}:9100/metrics", certificate) == "no answer"


@pytest.mark.parametrize("port", [9090, 9093, 9100, 9115])
def test_a_local_user_without_a_certificate_is_refused(inventory, knock, port):
    address = "127.0.0.1" if port in (9093, 9115) else inventory.address("monitor1")
    assert knock("monitor1", f"https://{address}:{port}/metrics").startswith("refused:")
    assert knock("monitor1", f"https://{address}:{port}/metrics", "/etc/larder/tls/monitoring/current") == "200"


def test_exporters_of_the_stores_refuse_who_shows_no_certificate(inventory, knock):
    for port in (9100, 9121, 9187):
        url = f"https://{inventory.address('store1')}:{port}/metrics"
        assert knock("store1", url).startswith("refused:")
    # The certificate of another host of the stack is not that of the monitoring host.
    assert knock(
        "store1", f"https://{inventory.address('store1')}:9100/metrics", "/etc/larder/tls/redis/current"
    ).startswith("refused:")


def test_a_gateway_may_ask_prometheus_and_shows_its_certificate(inventory, knock):
    url = f"https://{inventory.address('monitor1')}:9090/api/v1/targets"
    assert knock("app1", url, "/etc/larder/tls/gateway/current") == "200"
    assert knock("app1", url).startswith("refused:")
    assert knock("store1", url, "/etc/larder/tls/redis/current") == "no answer"


def test_no_file_on_the_monitoring_host_holds_a_secret_of_the_receiver(on):
    assert on("monitor1", f"grep -rlE '{KEY}|a-token-of-the-receiver' /etc /var/lib/prometheus || true") == ""
    assert on("monitor1", "ps -eo args").count(KEY) == 0


def test_a_lost_redis_is_told_to_the_receiver_and_its_return_too(monitoring, on, told):
    on("store1", "systemctl stop redis-server")
    try:
        monitoring.wait("RedisDown", "NoInstance", "ReadProbeFails", "ReadErrors", seconds=LATER)
    finally:
        on("store1", "systemctl start redis-server")
    monitoring.quiet()
    time.sleep(15)  # a group is told anew every 10 s
    said = [line for line in told() if line["alertname"] == "RedisDown"]
    assert [line["status"] for line in said][:1] == ["firing"]
    assert said[-1]["status"] == "resolved"
    assert {line["host"] for line in said} == {"store1"}
    assert {line["path"] for line in said} == {f"/alerts?key={KEY}"}
    assert {line["login"] for line in said} == {"Bearer a-token-of-the-receiver"}
    assert {line["runbook"] for line in said} == {"docs/alerts.md#redisdown"}


@pytest.mark.parametrize("unit", ["redis-server", "postgresql@17-main"])
def test_a_service_that_is_killed_and_comes_back_by_itself_is_told(monitoring, on, unit):
    on("store1", f"systemctl kill --signal=KILL --kill-whom=main {unit}")
    monitoring.wait("ServiceCrashed", seconds=SOON)
    monitoring.quiet()


def test_a_lost_postgresql_is_told_and_reads_go_on(monitoring, on):
    on("store1", "systemctl stop postgresql@17-main")
    try:
        monitoring.wait("PostgresDown", seconds=SOON)
        assert monitoring.value("probe_success") == 1
        # Without a database, larder status finds nothing out.
        monitoring.wait("StatusOld", "UnitFailed", seconds=240)
    finally:
        on("store1", "systemctl start postgresql@17-main")
        on("app1", "systemctl start larder-status.service")
    monitoring.quiet()


def test_a_dead_instance_is_told_while_the_other_one_serves(monitoring, on):
    on("app1", "systemctl stop feature-server@1")
    try:
        monitoring.wait("InstanceDown", "TargetDown", seconds=LATER)
        assert "ReadProbeFails" not in monitoring.firing()
    finally:
        on("app1", "systemctl start feature-server@1")
    monitoring.quiet()


def test_a_host_that_is_cut_off_is_told_once(monitoring, on, told):
    on(
        "store1",
        "nft add table inet cut; nft add chain inet cut input '{ type filter hook input priority -5; }'; "
        "nft add rule inet cut input tcp dport '{ 9100, 9121, 9187 }' drop",
    )
    try:
        monitoring.wait("HostDown", seconds=LATER)
        time.sleep(15)
        new = {line["alertname"] for line in told()[-3:] if line["status"] == "firing"}
        assert "HostDown" in new
    finally:
        on("store1", "nft delete table inet cut")
    monitoring.quiet()


def test_a_disk_that_fills_is_told_before_it_is_full(monitoring, on):
    on(
        "store1",
        "mkdir -p /srv/small && mount -t tmpfs -o size=20m none /srv/small && head -c 19m /dev/zero > /srv/small/file",
    )
    try:
        monitoring.wait("DiskFull", seconds=SOON)
    finally:
        on("store1", "umount /srv/small && rmdir /srv/small")
    monitoring.quiet()


REDIS = (
    "redis-cli -s /run/redis/redis.sock --user maintenance --no-auth-warning -a $(systemd-creds decrypt "
    "--name=redis.maintenance /etc/credstore.encrypted/redis.maintenance -) "
)


def test_a_redis_that_evicts_is_told_with_what_clients_lack(monitoring, on):
    on("store1", REDIS + "config set maxmemory 600kb")
    try:
        monitoring.wait("RedisEvicts", "RedisMemoryFull", seconds=LATER)
        monitoring.wait("OnlineIncomplete", seconds=120)
    finally:
        on("store1", REDIS + "config set maxmemory 128mb")
        on("app1", "larder materialize --since 2000-01-01 > /dev/null; systemctl start larder-status.service")
    monitoring.quiet()


def test_a_run_that_is_killed_and_a_file_that_is_refused_are_told(monitoring, on):
    on(
        "app1",
        "printf 'this is\\nno file of bars\\n' > /var/lib/larder/incoming/nonsense.csv; "
        "systemctl start --no-block feature-pipeline; sleep 4; systemctl kill --signal=KILL feature-pipeline; sleep 1; "
        "systemctl start larder-status.service",
    )
    try:
        monitoring.wait("PipelineFailed", "UnitFailed", seconds=SOON)
        on("app1", "systemctl start feature-pipeline || true")
        monitoring.wait("FilesRefused", seconds=SOON)
    finally:
        on("app1", "rm /var/lib/larder/incoming/nonsense.csv; systemctl start feature-pipeline")
    monitoring.quiet()


FROZEN = """
CREATE TABLE frozen AS
SELECT * FROM features.technical_indicators_ma WHERE event_timestamp > now() - interval '30 days';
DELETE FROM features.technical_indicators_ma WHERE event_timestamp > now() - interval '30 days';
"""
THAWED = "INSERT INTO features.technical_indicators_ma SELECT * FROM frozen; DROP TABLE frozen;"


def test_a_feed_that_is_frozen_is_told_by_the_view_s_own_calendar(monitoring, inventory, on):
    psql = "sudo -u postgres psql --quiet --set=ON_ERROR_STOP=1 feast"
    inventory.run("store1", psql, FROZEN)
    try:
        on("app1", "systemctl start larder-status.service")
        monitoring.wait("FeaturesStale", seconds=SOON)
    finally:
        inventory.run("store1", psql, THAWED)
        on("app1", "systemctl start larder-status.service")
    monitoring.quiet()


def test_a_status_that_is_no_longer_written_is_told(monitoring, on):
    on("app1", "systemctl stop larder-status.timer")
    try:
        monitoring.wait("StatusOld", seconds=200)
    finally:
        on("app1", "systemctl start larder-status.timer larder-status.service")
    monitoring.quiet()


def test_a_certificate_near_its_end_is_told_by_what_the_gateway_shows(monitoring, play):
    play("site.yml", "--tags=gateway", "--limit=app1", "-e", "certificate_days=20", "-e", "certificate_renew_days=1")
    try:
        monitoring.wait("CertificateEnds", seconds=SOON)
        ends = monitoring.value("min(probe_ssl_earliest_cert_expiry) - time()")
        assert 18 * 86400 < ends < 20 * 86400
    finally:
        play("site.yml", "--tags=gateway", "--limit=app1")
    monitoring.quiet()


def test_a_second_run_of_the_exporters_and_the_monitoring_changes_nothing(play):
    assert play("site.yml", "--tags=monitoring") == {}


def test_the_monitoring_follows_a_rotation_of_its_secrets_without_an_alert(monitoring, play, on):
    secrets = "timescaledb_passwords.monitor,redis_passwords.monitor,monitoring_tokens.monitor"
    former = on("store1", "systemctl cat prometheus-redis-exporter | grep -o 'monitor_g[0-9a-f]*'")
    play("ansible/new_secrets.yml", "-e", f"secrets={secrets}")
    play("ansible/rotate_secrets.yml", "--tags=timescaledb,redis,gateway,monitoring", "-e", "larder_drain_seconds=120")
    assert on("store1", "systemctl cat prometheus-redis-exporter | grep -o 'monitor_g[0-9a-f]*'") != former
    monitoring.quiet()
    assert {target: error for target, error in monitoring.targets().items() if error} == {}
    assert [monitoring.value(up) for up in ("redis_up", "pg_up", "probe_success")] == [1, 1, 1]
