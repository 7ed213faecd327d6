"""Redis grows from one host to three, changes its primary and loses it, while clients push and read.

The tests build on each other. LARDER_SOAK repeats what breaks.
"""

import json
import os
import time
from pathlib import Path

import playbooks
import pytest

testinfra_hosts = ["ansible://client1"]

CACHES = ("cache1", "cache2", "cache3")
TIMES = 10 if "LARDER_SOAK" in os.environ else 1
ASK = (Path(__file__).parent.parent.parent / "redis/clients/ask.py").read_text()
WRONG = ["AuthenticationError: invalid username-password pair or user is disabled."]


@pytest.fixture(scope="module")
def running(load):
    """The load of the three hosts' clients, from growth to the end."""
    return load("three")


def began(on, host, unit="redis-server"):
    return on(host).check_output(f"systemctl show {unit} -p ActiveEnterTimestampMonotonic -p MainPID")


def changes(done):
    return {host: count for host, count in playbooks.changed(done.stdout).items() if host in CACHES}


def test_growing_fails_no_request_and_restarts_nothing(on, load, play, settled):
    alone, before = load("one"), began(on, "cache3")
    play()
    settled(30)
    said = alone.end()
    assert (said["gaps"], said["open"], said["wrong"], said["lost"]) == ([], {}, [], [])
    assert said["acknowledged"] > 500
    assert began(on, "cache3") == before


def test_the_host_that_has_the_data_is_the_primary(primary):
    assert primary() == "cache3"


def test_another_run_changes_nothing(on, play):
    before = [began(on, host, unit) for host in CACHES for unit in ("redis-server", "redis-sentinel")]
    assert changes(play()) == dict.fromkeys(CACHES, 0)
    assert [began(on, host, unit) for host in CACHES for unit in ("redis-server", "redis-sentinel")] == before


def test_clients_follow_the_sentinels(on, running):
    config = on("client1").check_output("cat /run/larder-test/serve.yaml")
    assert "redis_type: redis_sentinel" in config
    assert running.now()["wrong"] == []


@pytest.fixture(scope="module")
def ask(inventory):
    """Send commands to a host's Sentinel from another host; return the answers, or the errors."""
    tls = inventory.run("client1", "sudo ls -d /etc/larder/tls/feast/current", "").strip()

    def ask(*commands, **login):
        connection = {
            "host": inventory.address("cache1"),
            "port": 26379,
            "ssl": True,
            "ssl_ca_certs": f"{tls}/ca.crt",
            "ssl_certfile": f"{tls}/tls.crt",
            "ssl_keyfile": f"{tls}/tls.key",
        }
        request = json.dumps({"connection": connection | login, "commands": commands})
        inventory.run("client1", "sudo tee /run/larder-test/ask.py", ASK)
        return json.loads(
            inventory.run("client1", "sudo /opt/feast/current/bin/python /run/larder-test/ask.py", request)
        )

    return ask


def test_a_sentinel_refuses_who_has_no_password(ask):
    assert ask(["PING"]) == ["AuthenticationError: Authentication required."]
    assert ask(["PING"], username="default", password="wrong") == WRONG
    assert ask(["PING"], username="maintenance", password="wrong") == WRONG
    assert ask(["PING"], ssl=False)[0].startswith("ConnectionError")


def test_a_client_may_ask_a_sentinel_and_change_nothing(ask, on):
    user, password = login(on, "serve")
    refused = (
        ["SENTINEL", "FAILOVER", "larder"],
        ["SENTINEL", "SET", "larder", "quorum", "1"],
        ["SENTINEL", "REMOVE", "larder"],
        ["SENTINEL", "RESET", "*"],
        ["SENTINEL", "CONFIG", "GET", "*"],
        ["ACL", "LIST"],
        ["SHUTDOWN"],
    )
    allowed, *answers = ask(["SENTINEL", "MASTER", "larder"], *refused, username=user, password=password)
    assert "config-epoch" in allowed
    assert [answer.partition(":")[0] for answer in answers] == ["NoPermissionError"] * len(refused)


def login(on, purpose):
    """Return the user and password of a configuration, by Feast's own reading of it."""
    read = (
        "import json; from pathlib import Path; from feast.repo_config import load_repo_config; "
        "from feast.infra.online_stores.redis import RedisOnlineStore as R; "
        f"c = load_repo_config(Path('/'), Path('/run/larder-test/{purpose}.yaml')); "
        "p = R._parse_connection_string(c.online_store.connection_string)[1]; "
        "print(json.dumps([p['username'], p['password']]))"
    )
    return json.loads(on("client1").check_output(f'/opt/feast/current/bin/python -O -c "{read}"').splitlines()[-1])


def test_passwords_in_clear_are_the_users_alone(on):
    for path in ("/run/redis/replication.conf", "/var/lib/redis-sentinel/state.conf"):
        for host in ("cache1", "cache2"):
            assert on(host).check_output(f"stat -c '%U %a' {path}") == "redis 600"
    assert on("cache1").check_output("stat -f -c %T /run/redis") == "tmpfs"


def slow(gaps, seconds):
    return [gap for gap in gaps if gap["seconds"] > seconds]


@pytest.mark.parametrize("_", range(TIMES))
def test_a_planned_switch_loses_no_acknowledged_write(running, play, primary, settled, _):
    before, since = primary(), time.time()
    to = next(host for host in CACHES if host != before)
    play("-e", f"to={to}", name="ansible/switch_redis.yml")
    running.recovered()
    gaps = running.gaps(since)
    print("switch:", json.dumps(gaps))
    assert primary() == to
    assert not slow(gaps, 5)
    settled(30)


def test_a_run_after_a_switch_changes_nothing(on, play, primary):
    before, there = [began(on, host) for host in CACHES], primary()
    assert changes(play()) == dict.fromkeys(CACHES, 0)
    assert primary() == there
    assert [began(on, host) for host in CACHES] == before


def lose(running, primary, settled, take_away):
    """Take the primary's host away while all others are there; return it and what requests saw."""
    settled(120)
    host, since = primary(), time.time()
    take_away(host)
    time.sleep(3)
    running.recovered()
    gaps = running.gaps(since)
    print(f"{take_away.__name__}:", json.dumps(gaps))
    return host, gaps


@pytest.mark.parametrize("_", range(TIMES))
def test_a_killed_host_of_the_primary_fails_requests_for_ten_seconds_at_most(
    running, machines, primary, settled, on, _
):
    host, gaps = lose(running, primary, settled, machines.kill)
    since = time.time()
    machines.start(host)
    assert not slow(gaps, 10)
    assert all(gap["longest"] < 4 for gap in gaps)
    assert primary(host) != host
    settled(120)
    journal = on(host).check_output(f"journalctl --no-pager -u redis-server --since=@{int(since)}")
    assert "Connecting to MASTER" in journal
    assert "MASTER MODE enabled" not in journal


@pytest.mark.parametrize("_", range(TIMES))
def test_a_frozen_host_of_the_primary_fails_requests_for_ten_seconds_at_most(running, machines, primary, settled, _):
    host, gaps = lose(running, primary, settled, machines.freeze)
    since = time.time()
    machines.thaw(host)
    assert not slow(gaps, 10)
    assert all(gap["longest"] < 4 for gap in gaps)
    settled(120)
    assert primary() != host
    assert running.gaps(since) == []


def test_the_passwords_of_replicas_and_sentinels_change_under_load(running, play, settled, on):
    since, before = time.time(), [began(on, host) for host in CACHES]
    users = (
        on("cache1").check_output("grep -oE '(replica|sentinel)_g[0-9a-f]{8}' /etc/redis/users.acl | sort -u").split()
    )
    play("-e", "secrets=redis_replication_passwords", name="ansible/new_secrets.yml")
    play()
    settled(30)
    assert running.gaps(since) == []
    assert [began(on, host) for host in CACHES] == before
    for host in CACHES:
        acl = on(host).check_output(
            "cat /etc/redis/users.acl /etc/redis/sentinel.acl /var/lib/redis-sentinel/state.conf"
        )
        assert not [user for user in users if user in acl], host
    assert changes(play()) == dict.fromkeys(CACHES, 0)


def test_no_value_was_wrong_and_no_write_that_was_acknowledged_is_lost(running):
    said = running.end()
    print("all:", json.dumps({name: said[name] for name in ("done", "acknowledged", "lost", "wrong")}))
    assert said["wrong"] == []
    assert said["lost"] == []


def test_a_former_password_is_refused_by_the_sentinels(play, ask, on):
    user, password = login(on, "serve")
    play("-e", "secrets=redis_passwords", name="ansible/new_secrets.yml")
    play()
    assert ask(["PING"], username=user, password=password) == WRONG
    user, password = login(on, "serve")
    assert ask(["PING"], username=user, password=password) == [True]


def test_nobody_is_promoted_by_hand_beside_the_sentinels(on):
    said = on("cache1").run("/usr/local/sbin/larder-redis promote")
    assert said.rc != 0
    assert "the Sentinels choose the primary here" in said.stderr


def test_the_primary_may_not_leave(play, primary):
    there = primary()
    done = play("-e", f"host={there}", name="remove.yml", fails=True)
    said = " ".join((done.stdout + done.stderr).split())
    assert f"{there} is the primary of Redis. Nothing was changed." in said
    assert "ansible/switch_redis.yml -e to=cache" in said
    assert changes(done) == {host: 0 for host in CACHES if host != there}


def test_a_replica_leaves_and_the_sentinels_go_with_the_third_host(play, primary, status, on, tmp_path):
    there = primary()
    leaving = next(host for host in ("cache1", "cache2") if host != there)
    staying = [host for host in CACHES if host != leaving]
    before = [began(on, host) for host in staying]
    play("-e", f"host={leaving}", name="remove.yml")
    left = {"redis": {"hosts": dict.fromkeys(host for host in staying if host != "cache3")}}
    (tmp_path / "hosts.yml").write_text(json.dumps(left))
    # The client is configured anew, and nothing else has changed.
    assert changes(play(grown=tmp_path)) == dict.fromkeys(staying, 0)
    assert [began(on, host) for host in staying] == before
    said = status(there)
    assert (said["role"], len(said["replicas"]), "sentinels" in said) == ("primary", 1, False)
    host = on(leaving)
    assert host.run("ss -Hltn | grep -E ':(6379|26379)'").stdout == ""
    kept = host.run("ls /etc/redis/users.acl /etc/credstore.encrypted/redis* /var/lib/redis-sentinel/state.conf")
    assert kept.stdout == ""
    assert host.file("/var/lib/redis/appendonlydir").exists
