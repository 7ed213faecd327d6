"""Who is the primary, as larder-redis concludes it; two servers without Sentinels change places."""

import importlib.util
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from ports import free_ports
from redis import Redis
from redis.exceptions import RedisError

from larder.plugins.online_store import RedisPrimaryOnlineStore, RedisPrimaryOnlineStoreConfig

ROOT = Path(__file__).parents[2]

spec = importlib.util.spec_from_file_location("larder_redis", ROOT / "roles/redis/files/larder_redis.py")
assert spec
assert spec.loader
larder_redis = importlib.util.module_from_spec(spec)
sys.modules["larder_redis"] = larder_redis
spec.loader.exec_module(larder_redis)

Sentinel, Server = larder_redis.Sentinel, larder_redis.Server
A, B, C = "192.0.2.1", "192.0.2.2", "192.0.2.3"


def test_more_than_half_of_the_sentinels_decide():
    answers = [Sentinel(A, 1), Sentinel(B, 2), Sentinel(B, 2)]
    assert larder_redis.by_sentinels(answers, 3, majority=True) == B


def test_fewer_sentinels_do_not_decide_before_the_time_is_over():
    """The one of a host that was away during a failover answers first: its own."""
    assert larder_redis.by_sentinels([Sentinel(A, 1)], 3, majority=True) == ""
    assert larder_redis.by_sentinels([Sentinel(A, 1)], 3, majority=False) == A
    assert larder_redis.by_sentinels([Sentinel(A, 1), Sentinel(B, 2)], 5, majority=False) == B
    assert larder_redis.by_sentinels([], 3, majority=False) == ""


def test_a_server_that_others_follow_comes_before_one_that_stands_alone():
    assert larder_redis.by_servers([Server(A, A, 0, 900), Server(B, B, 1, 5)]) == B
    assert larder_redis.by_servers([Server(A, A, 0, 5), Server(B, B, 0, 900)]) == B


def test_where_the_primary_does_not_answer_its_replicas_name_it():
    assert larder_redis.by_servers([Server(A, C, 0, 5), Server(B, C, 0, 7)]) == C
    assert larder_redis.by_servers([]) == ""


def test_the_answer_to_role_is_understood():
    assert larder_redis.server(A, ["master", 70, [[B, "6379", "70"]]]) == Server(A, A, 1, 70)
    assert larder_redis.server(B, ["slave", A, 6379, "connected", 70]) == Server(B, A, 0, 70)


def test_what_sentinel_has_written_is_read(tmp_path, monkeypatch):
    path = tmp_path / "state.conf"
    path.write_text(
        "port 0\nsentinel monitor larder 192.0.2.1 6379 2\n"
        'sentinel auth-user larder "s_g1"\nsentinel sentinel-user s_g1\n'
    )
    monkeypatch.setattr(larder_redis, "SENTINEL_STATE", path)
    held = larder_redis.state()
    assert held["auth-user larder"] == held["sentinel-user"] == "s_g1"


class Pair:
    """Two servers on loopback, the first one the primary, and a client that follows it."""

    def __init__(self, directory, ports):
        self.ports, self.processes = ports, []
        self.host = larder_redis.Host("127.0.0.1", ports[1], [], 0, 0, 1, "", {})
        binary = shutil.which("redis-server") or shutil.which("redis-check-rdb")
        assert binary, "these tests need Debian's package redis-tools"
        for port in ports:
            follow = ["--replicaof", "127.0.0.1", str(ports[0])] if port != ports[0] else []
            # Without pings, a server that is stopped has all that the primary wrote, and may take over.
            options = ["--save", "", "--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "3600"]
            where = ["--bind", "127.0.0.1", "--port", str(port), "--unixsocket", f"{directory}/{port}.sock"]
            command = [
                "redis-server",
                *where,
                *options,
                "--dir",
                directory,
                "--logfile",
                f"{directory}/{port}.log",
                *follow,
            ]
            self.processes.append(subprocess.Popen(command, executable=binary))
        self.until(lambda: self.client(1).info("replication")["master_link_status"] == "up")
        self.until(lambda: self.client(0).info("replication")["slave0"]["lag"] >= 0)
        self.first = larder_redis.Redis.local(f"{directory}/{ports[0]}.sock")

    def client(self, number):
        return Redis(host="127.0.0.1", port=self.ports[number], decode_responses=True)

    def follower(self):
        nodes = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        config = RedisPrimaryOnlineStoreConfig(redis_type="redis", connection_string=nodes)
        return RedisPrimaryOnlineStore()._get_client(config)

    def replica_is(self, what):
        self.processes[1].send_signal({"stopped": signal.SIGSTOP, "awake": signal.SIGCONT}[what])

    @staticmethod
    def until(condition, seconds=30):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with suppress(RedisError, OSError, KeyError):
                if condition():
                    return
            time.sleep(0.05)
        pytest.fail("the servers are not there")


@pytest.fixture
def pair(tmp_path):
    found = Pair(tmp_path, free_ports(2))
    yield found
    for process in found.processes:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait()


def hand_over(pair):
    return larder_redis.by_handover(pair.host, pair.first, "127.0.0.1")


def test_a_switch_cuts_no_client_before_the_other_server_is_the_primary(pair):
    """The replica takes its time: meanwhile the primary says that it is a replica, and serves on."""
    client, done = pair.follower(), []
    client.hset("key", "f", 0)

    def read():
        while not done:
            assert client.hget("key", "f") is not None
            time.sleep(0.01)

    pair.until(lambda: pair.client(0).info("replication")["slave0"]["offset"] == offset(pair.client(0)))
    pair.replica_is("stopped")
    with ThreadPoolExecutor(2) as pool:
        switched, reading = pool.submit(hand_over, pair), pool.submit(read)
        pair.until(lambda: pair.client(0).role()[0] == "slave")
        time.sleep(0.5)
        early = switched.done()
        pair.replica_is("awake")
        assert switched.result(timeout=30) == "127.0.0.1"
        time.sleep(0.2)
        done.append(True)
        reading.result(timeout=30)
    assert not early
    assert pair.client(1).role()[0] == "master"
    client.hset("key", "f", 1)
    assert pair.client(1).hget("key", "f") == "1"


def test_a_client_that_comes_while_two_servers_change_places_waits_for_the_primary(pair):
    pair.client(0).replicaof("127.0.0.1", pair.ports[1])
    assert {pair.client(number).role()[0] for number in (0, 1)} == {"slave"}
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(pair.follower().hset, "key", "f", 2)
        time.sleep(0.3)
        assert not written.done()
        pair.client(1).replicaof("NO", "ONE")
        written.result(timeout=30)
    assert pair.client(1).hget("key", "f") == "2"


def offset(client):
    return client.info("replication")["master_repl_offset"]


def test_a_server_that_does_not_take_over_is_told_and_the_former_primary_can_be_one_again(pair, monkeypatch):
    monkeypatch.setattr(larder_redis, "SWITCH_SECONDS", 1)
    pair.until(lambda: pair.client(0).info("replication")["slave0"]["offset"] == offset(pair.client(0)))
    pair.replica_is("stopped")
    with pytest.raises(larder_redis.RedisError, match=r"does not answer.*primary_is_lost=true"):
        hand_over(pair)
    monkeypatch.setattr(larder_redis.Host, "read", lambda: pair.host)
    monkeypatch.setattr(larder_redis, "local", lambda: pair.first)
    monkeypatch.setattr(larder_redis, "remember", lambda _: None)
    larder_redis.promote()
    assert pair.client(0).role()[0] == "master"
    pair.client(0).set("k", "v")
