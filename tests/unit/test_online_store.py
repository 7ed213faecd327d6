"""The online store that follows the primary: TLS and login everywhere, three Sentinels, servers that die or hang."""

import asyncio
import gc
import hashlib
import shutil
import signal
import socket
import subprocess
import threading
import time
import weakref
from contextlib import ExitStack, contextmanager, suppress

import pytest
from ports import free_ports
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import AuthenticationError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from larder.plugins.online_store import (
    Answer,
    Primary,
    RedisPrimaryOnlineStore,
    RedisPrimaryOnlineStoreConfig,
    agreed,
    alone,
    newest,
    watch,
)
from larder.serving.redis_line import Line

PASSWORD, KEY = "correct horse", "key"
A, B = ("192.0.2.1", 6379), ("192.0.2.2", 6379)
# An attempt that waits for a server that does not answer takes longer than this, with redis-py's own client.
HANGS = 6
HMGET = b"*3\r\n$5\r\nHMGET\r\n$3\r\nkey\r\n$1\r\nf\r\n"


def test_an_address_that_more_than_half_name_is_taken():
    assert agreed([Answer(A), Answer(A)], 3) == A
    assert agreed([Answer(A)], 3) is None
    assert agreed([Answer(A), Answer(B)], 3) is None
    assert agreed([Answer(B, 9), Answer(A, 1), Answer(A, 1)], 3) == A


def test_without_a_majority_the_newest_failover_counts():
    assert newest([Answer(A, 3), Answer(B, 4)]) == B
    assert newest([]) is None


def test_one_server_alone_may_say_that_it_is_the_primary():
    assert alone([Answer(None), Answer(B)]) == B
    assert alone([Answer(None)]) is None
    with pytest.raises(RedisConnectionError, match="each say that they are the primary"):
        alone([Answer(A), Answer(B)])


def test_sentinels_that_keep_silent_are_late_and_who_asks_a_moment_later_is_refused_at_once():
    with ExitStack() as opened:
        # The kernel takes the connection, and nobody answers.
        ports = [opened.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(3)]
        text = ",".join([*(f"127.0.0.1:{port}" for port in ports), "password=x", "socket_timeout=2"])
        config = RedisPrimaryOnlineStoreConfig(
            redis_type="redis_sentinel", sentinel_master="larder", connection_string=text
        )
        line = Line(asyncio.run(RedisPrimaryOnlineStore()._get_client_async(config)))
        with pytest.raises(RedisTimeoutError, match="no node says"):
            asyncio.run(line.ask(HMGET, 1))
        started = time.monotonic()
        # Another instance may reach them: the gateway asks it after a lost connection, not after a time limit.
        with pytest.raises(RedisConnectionError, match="a moment ago"):
            asyncio.run(line.ask(HMGET, 1))
        assert time.monotonic() - started < 0.3


def test_sentinels_that_refuse_connections_are_away_and_not_late():
    nodes = ",".join(f"127.0.0.1:{port}" for port in free_ports(3))
    config = RedisPrimaryOnlineStoreConfig(
        redis_type="redis_sentinel", sentinel_master="larder", connection_string=f"{nodes},password=x,socket_timeout=2"
    )
    line = Line(asyncio.run(RedisPrimaryOnlineStore()._get_client_async(config)))
    with pytest.raises(RedisConnectionError, match="no node says"):
        asyncio.run(line.ask(HMGET, 1))


class Nodes:
    """A primary, a replica and three Sentinels on loopback; each speaks TLS alone and has a user, no default user."""

    def __init__(self, directory):
        self.directory = directory
        subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *subject]
        self.key, self.certificate = directory / "key.pem", directory / "certificate.pem"
        subprocess.run([*command, "-keyout", self.key, "-out", self.certificate], check=True, capture_output=True)
        self.binary = shutil.which("redis-server") or shutil.which("redis-check-rdb")
        assert self.binary, "these tests need Debian's package redis-tools"
        first, second, *self.sentinels = free_ports(5)
        self.servers = [first, second]
        self.processes = {}
        for port in self.servers:
            self.server(port, [] if port == first else [f"replicaof 127.0.0.1 {first}"])
        self.until(lambda: self.client(second).info("replication")["master_link_status"] == "up")
        for port in self.sentinels:
            self.sentinel(port, first)
        self.until(lambda: all(self.known(port) == (1, 2) for port in self.sentinels))

    def common(self, port):
        digest = hashlib.sha256(PASSWORD.encode()).hexdigest()
        return [
            "bind 127.0.0.1",
            "port 0",
            f"tls-port {port}",
            f"tls-cert-file {self.certificate}",
            f"tls-key-file {self.key}",
            f"tls-ca-cert-file {self.certificate}",
            "tls-replication yes",
            f"dir {self.directory}",
            "user default off",
            f'user reader on "#{digest}" ~* &* +@all',
        ]

    def server(self, port, more):
        login = [f'masterauth "{PASSWORD}"', "masteruser reader", "repl-diskless-sync-delay 0"]
        self.start(port, "redis-server", [*self.common(port), 'save ""', *login, *more])

    def sentinel(self, port, primary):
        self.start(
            port,
            "redis-sentinel",
            [
                *self.common(port),
                f"sentinel monitor larder 127.0.0.1 {primary} 2",
                # Nobody is taken for lost because the machine is busy; `watched` is for the tests that lose a server.
                "sentinel down-after-milliseconds larder 600000",
                "sentinel failover-timeout larder 6000",
                "sentinel auth-user larder reader",
                f'sentinel auth-pass larder "{PASSWORD}"',
                "sentinel sentinel-user reader",
                f'sentinel sentinel-pass "{PASSWORD}"',
            ],
        )

    def start(self, port, name, lines):
        config = self.directory / f"{port}.conf"
        config.write_text("\n".join(lines))
        options = ["--sentinel"] if name == "redis-sentinel" else []
        with (self.directory / f"{port}.log").open("w") as log:
            self.processes[port] = subprocess.Popen([name, config, *options], executable=self.binary, stdout=log)
        self.until(lambda: socket.create_connection(("127.0.0.1", port), 1).close() is None)

    def client(self, port):
        login = {"username": "reader", "password": PASSWORD, "decode_responses": True}
        return Redis(**self.options(), port=port, host="127.0.0.1", ssl=True, **login)

    def options(self):
        files = {"ssl_ca_certs": self.certificate, "ssl_certfile": self.certificate, "ssl_keyfile": self.key}
        return {name: str(path) for name, path in files.items()}

    def known(self, port):
        said = self.client(port).execute_command("SENTINEL", "MASTER", "larder")
        said = dict(zip(said[::2], said[1::2], strict=True))
        return int(said["num-slaves"]), int(said["num-other-sentinels"])

    def primary(self):
        """Return the primary's port, as all Sentinels say it."""
        said = {
            int(self.client(port).execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "larder")[1])
            for port in self.sentinels
        }
        return said.pop() if len(said) == 1 else None

    def replica(self):
        return next(port for port in self.servers if port != self.primary())

    @staticmethod
    def until(condition, seconds=60):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with suppress(RedisError, OSError, KeyError):
                if condition():
                    return
            time.sleep(0.1)
        pytest.fail("the servers are not there")

    def signal(self, port, number):
        self.processes[port].send_signal(number)

    @contextmanager
    def watched(self):
        """Let the Sentinels take a server for lost after a second."""

        def after(milliseconds):
            for port in self.sentinels:
                said = ("SENTINEL", "SET", "larder", "down-after-milliseconds", milliseconds)
                self.client(port).execute_command(*said)

        after(1000)
        try:
            yield
        finally:
            after(600000)

    def settled(self):
        """Wait until the primary has its replica again."""
        self.until(lambda: self.client(self.primary()).info("replication")["slave0"]["state"] == "online")
        self.until(lambda: all(self.known(port) == (1, 2) for port in self.sentinels))

    def config(self, ports=None, sentinel=True, **other):
        options = self.options() | {"username": "reader", "password": PASSWORD, "ssl": "true", "db": 0} | other
        nodes = [f"127.0.0.1:{port}" for port in ports or (self.sentinels if sentinel else self.servers)]
        return RedisPrimaryOnlineStoreConfig(
            redis_type="redis_sentinel" if sentinel else "redis",
            sentinel_master="larder",
            connection_string=",".join([*nodes, *(f"{name}={value}" for name, value in options.items())]),
        )


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    found = Nodes(tmp_path_factory.mktemp("redis"))
    yield found
    for process in found.processes.values():
        process.send_signal(signal.SIGCONT)
        process.terminate()


@pytest.fixture
def writer(nodes):
    client = RedisPrimaryOnlineStore()._get_client(nodes.config())
    yield client
    client.close()


def port_of(client):
    """Return the port of the server that a client talks to."""
    return int(client.config_get("tls-port")["tls-port"])


def attempts(call, seconds=60):
    """Call until it succeeds; return what it returned, and how long the longest failure took."""
    begun, longest = time.monotonic(), 0.0
    while True:
        at = time.monotonic()
        try:
            return call(), longest
        except RedisError:
            longest = max(longest, time.monotonic() - at)
            assert time.monotonic() - begun < seconds
            time.sleep(0.05)


def test_values_are_written_to_the_primary_and_read_in_both_ways(nodes, writer):
    async def read():
        client = await RedisPrimaryOnlineStore()._get_client_async(nodes.config())
        line = Line(client)
        found = await client.hmget(KEY, ["f"]), await line.ask(HMGET, 1)
        line.close()
        await client.aclose()
        return found

    writer.hset(KEY, "f", "v")
    assert port_of(writer) == nodes.servers[0]
    assert asyncio.run(read()) == ([b"v"], [[b"v"]])


@pytest.mark.parametrize("how", ["gone", "hung"])
@pytest.mark.parametrize("place", [0, 2])
def test_a_sentinel_that_does_not_answer_costs_nothing(nodes, how, place):
    """With redis-py's own Sentinel client the first of these takes 8 s, and the second 16 s."""
    ports = [*nodes.sentinels]
    port = ports[place]
    if how == "gone":
        ports[place] = free_ports(1)[0]
    else:
        nodes.signal(port, signal.SIGSTOP)
    try:
        begun = time.monotonic()
        assert RedisPrimaryOnlineStore()._get_client(nodes.config(ports)).ping()
        assert time.monotonic() - begun < HANGS
    finally:
        nodes.signal(port, signal.SIGCONT)


def test_a_wrong_password_is_refused_at_once(nodes):
    with pytest.raises(AuthenticationError):
        RedisPrimaryOnlineStore()._get_client(nodes.config(sentinel_password="wrong")).ping()
    with pytest.raises(AuthenticationError):
        RedisPrimaryOnlineStore()._get_client(nodes.config(password="wrong", sentinel_password=PASSWORD)).ping()


def test_a_server_that_is_no_primary_is_not_used(nodes):
    """Sentinels that have slept name a former primary."""
    store, config = RedisPrimaryOnlineStore(), nodes.config()
    client = store._get_client(config)
    store._primary.address = ("127.0.0.1", nodes.replica())
    assert port_of(client) == nodes.primary()


def test_reads_leave_a_former_primary_that_goes_on_to_answer(nodes):
    """Another connection of the process has found the new one."""

    async def main():
        store = RedisPrimaryOnlineStore()
        line = Line(await store._get_client_async(nodes.config()))
        await line.ask(HMGET, 1)
        first, before = line.replies, line.replies.connection.made_to
        store._primary.address = ("127.0.0.1", nodes.replica())
        with suppress(RedisError):  # that one is a replica: the nodes are asked again
            await line.ask(HMGET, 1)
        assert await line.ask(HMGET, 1)
        assert line.replies is not first
        after = line.replies.connection.made_to
        line.close()
        return before, after

    before, after = asyncio.run(main())
    assert before == after == ("127.0.0.1", nodes.primary())


def test_reads_leave_a_former_primary_that_wakes_up_and_answers(nodes):
    """Nothing was lost: no request met the primary while it hung."""

    async def main():
        store = RedisPrimaryOnlineStore()
        line = Line(await store._get_client_async(nodes.config()))
        nodes.client(old).hset(KEY, "f", "of before")
        assert await line.ask(HMGET, 1) == [[b"of before"]]
        nodes.signal(old, signal.SIGSTOP)
        try:
            with nodes.watched():
                await asyncio.to_thread(nodes.until, lambda: nodes.primary() != old)
            nodes.client(nodes.primary()).hset(KEY, "f", "of now")
            await asyncio.to_thread(nodes.until, lambda: store._primary.address[1] == nodes.primary())
        finally:
            nodes.signal(old, signal.SIGCONT)
        assert nodes.client(old).hget(KEY, "f") == "of before"
        assert await line.ask(HMGET, 1) == [[b"of now"]]
        line.close()

    old = nodes.primary()
    asyncio.run(main())
    nodes.settled()


def test_a_watch_goes_on_after_what_it_does_not_understand(monkeypatch):
    """A Sentinel that says something else, once, is asked again."""
    asked = []

    async def ask(*_):
        asked.append(0)
        if len(asked) == 1:
            raise KeyError("ip")
        return Answer(B, 1)

    async def main(primary):
        watching = asyncio.create_task(watch(weakref.ref(primary)))
        while primary.address is None:
            await asyncio.sleep(0.01)
        watching.cancel()

    monkeypatch.setattr(Primary, "ask_sentinel", ask)
    monkeypatch.setattr("larder.plugins.online_store.WATCH_SECONDS", 0.01)
    primary = Primary([A], "larder", AsyncRedis())
    asyncio.run(asyncio.wait_for(main(primary), 10))
    assert primary.address == B


def test_a_watch_ends_with_the_store(nodes):
    def watching():
        return [thread for thread in threading.enumerate() if thread.name == "redis-sentinels"]

    before = watching()
    store = RedisPrimaryOnlineStore()
    client = store._get_client(nodes.config())
    client.ping()
    [thread] = [thread for thread in watching() if thread not in before]
    client.connection_pool.disconnect()
    del store, client
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_a_connection_to_a_former_primary_is_given_up(nodes, writer):
    """Nothing cuts it: the former primary goes on to answer reads, and refuses writes."""
    old, new = nodes.primary(), nodes.replica()
    writer.hset(KEY, "f", 1)
    nodes.client(nodes.sentinels[0]).execute_command("SENTINEL", "FAILOVER", "larder")
    nodes.until(lambda: nodes.primary() == new)
    nodes.client(old).replicaof("127.0.0.1", new)
    writer.hset(KEY, "f", 2)
    assert port_of(writer) == new
    assert nodes.client(new).hget(KEY, "f") == "2"
    nodes.settled()


def test_a_primary_without_replicas_is_asked_for_again(nodes, writer):
    writer.ping()
    before = port_of(writer)
    primary = nodes.client(before)
    primary.config_set("min-replicas-to-write", 5)
    with pytest.raises(RedisConnectionError, match="NOREPLICAS"):
        writer.hset(KEY, "f", 3)
    primary.config_set("min-replicas-to-write", 0)
    writer.hset(KEY, "f", 3)
    assert writer.hget(KEY, "f") == b"3"


def write(client):
    with client.pipeline(transaction=False) as pipe:
        pipe.hset(KEY, "f", 6)
        pipe.expire(KEY, 1000)
        return pipe.execute()


def test_a_write_is_done_when_a_replica_has_it(nodes):
    async def both():
        config = nodes.config()
        config.wait_replicas = 1
        store = RedisPrimaryOnlineStore()
        client = await store._get_client_async(config)

        async def write_async():
            async with client.pipeline(transaction=False) as pipe:
                return await pipe.hset(KEY, "f", 6).execute()

        assert write(store._get_client(config)) == [0, True]
        assert await write_async() == [0]
        replica = nodes.replica()
        nodes.signal(replica, signal.SIGSTOP)
        try:
            with pytest.raises(RedisConnectionError, match="NOREPLICAS 0 of 1 replicas"):
                write(store._get_client(config))
            with pytest.raises(RedisConnectionError, match="NOREPLICAS 0 of 1 replicas"):
                await write_async()
            assert store._get_client(config).hget(KEY, "f") == b"6"
            assert write(RedisPrimaryOnlineStore()._get_client(nodes.config())) == [0, True]
        finally:
            nodes.signal(replica, signal.SIGCONT)
        nodes.settled()
        assert write(store._get_client(config)) == [0, True]
        await client.aclose()

    nodes.client(nodes.primary()).hset(KEY, "f", 0)
    asyncio.run(both())


@pytest.mark.parametrize("how", ["killed", "hung"])
def test_clients_follow_a_failover_in_seconds_and_no_attempt_hangs(nodes, writer, how):
    async def read(line, call):
        begun, longest = time.monotonic(), 0.0
        while True:
            at = time.monotonic()
            try:
                await line.ask(HMGET, 1)
            except RedisError:
                longest = max(longest, time.monotonic() - at)
                assert time.monotonic() - begun < 60
                await asyncio.sleep(0.05)
            else:
                if call.done() or longest:
                    return longest

    async def both():
        line = Line(await RedisPrimaryOnlineStore()._get_client_async(nodes.config()))
        await line.ask(HMGET, 1)
        nodes.signal(old, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        call = asyncio.create_task(asyncio.to_thread(attempts, lambda: writer.hset(KEY, "f", 4)))
        reading = await read(line, call)
        line.close()
        return reading, (await call)[1]

    old = nodes.primary()
    writer.hset(KEY, "f", 0)
    try:
        with nodes.watched():
            longest_read, longest_write = asyncio.run(both())
    finally:
        nodes.signal(old, signal.SIGCONT)
        if how == "killed":
            nodes.processes[old].wait()
            nodes.server(old, [f"replicaof 127.0.0.1 {next(port for port in nodes.servers if port != old)}"])
    # The scenario redis_failover measures: these share the machine with other tests.
    assert longest_read < HANGS
    assert longest_write < HANGS
    nodes.until(lambda: nodes.primary() != old)
    nodes.settled()


def test_without_sentinels_the_servers_are_asked_themselves(nodes):
    client = RedisPrimaryOnlineStore()._get_client(nodes.config(sentinel=False))
    assert port_of(client) == nodes.primary()


def test_a_patient_client_waits_for_a_primary(nodes):
    config = nodes.config()
    config.retry_seconds = 60
    client = RedisPrimaryOnlineStore()._get_client(config)
    old = nodes.primary()
    client.ping()
    nodes.signal(old, signal.SIGSTOP)
    try:
        with nodes.watched():
            client.hset(KEY, "f", 5)
        assert port_of(client) != old
    finally:
        nodes.signal(old, signal.SIGCONT)
    nodes.settled()
