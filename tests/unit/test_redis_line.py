"""The line to Redis as it is deployed: TLS with certificates on both sides, a login, and uvloop."""

import asyncio
import hashlib
import shutil
import socket
import subprocess
import time

import pytest
import uvloop
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from larder.serving.redis_line import Line

PASSWORD = "correct horse"


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Start a Redis that speaks TLS only; return what a client of it says."""
    directory = tmp_path_factory.mktemp("redis")
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *subject]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    binary = shutil.which("redis-server") or shutil.which("redis-check-rdb")
    assert binary, "these tests need Debian's package redis-tools"
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    config = directory / "redis.conf"
    config.write_text(
        f'bind 127.0.0.1\nport 0\ntls-port {port}\nsave ""\ndir {directory}\n'
        f"tls-cert-file {certificate}\ntls-key-file {key}\ntls-ca-cert-file {certificate}\n"
        f'user default off\nuser reader on "#{sha256(PASSWORD)}" ~* +@all\n'
    )
    with subprocess.Popen(["redis-server", config], executable=binary, stdout=subprocess.DEVNULL) as process:
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.05)
        files = {"ssl_ca_certs": certificate, "ssl_certfile": certificate, "ssl_keyfile": key}
        yield {
            **{name: str(path) for name, path in files.items()},
            "host": "127.0.0.1",
            "port": port,
            "ssl": True,
            "username": "reader",
            "password": PASSWORD,
            "socket_timeout": 2,
            "socket_connect_timeout": 2,
            "retry": Retry(NoBackoff(), 1, (RedisConnectionError,)),  # as application.fail_fast sets it
        }
        process.terminate()


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def echo(text):
    return b"*2\r\n$4\r\nECHO\r\n$%d\r\n%b\r\n" % (len(text), text)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_everyone_gets_their_own_replies(options, run):
    async def main():
        client = Redis(**options)
        line = Line(client)
        texts = [[b"%d-%d" % (n, part) * (1 + n * 1000) for part in range(5)] for n in range(50)]
        commands = [b"".join(map(echo, parts)) for parts in texts]
        assert await asyncio.gather(*(line.ask(each, 5) for each in commands)) == texts
        assert len(await client.client_list()) == 2  # the line, and this client's own
        with pytest.raises(ResponseError):
            await line.ask(b"*1\r\n$3\r\nGET\r\n" + echo(b"next"), 2)
        await client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        assert await line.ask(echo(b"again"), 1) == [b"again"]
        line.close()
        await client.aclose()

    run(main())


@pytest.mark.parametrize("late", [True, False], ids=["the reply comes late", "the reply never comes"])
def test_a_late_reply_reaches_no_other_request(options, late):
    """The connection is given up: the next request neither waits behind the last one nor gets its reply."""

    async def main():
        client = Redis(**options)
        line = Line(Redis(**options | {"socket_timeout": 0.3}))
        assert await line.ask(echo(b"first"), 1) == [b"first"]
        lost = line.replies
        with pytest.raises(RedisTimeoutError):
            await line.ask(b"*3\r\n$5\r\nBLPOP\r\n$4\r\nlist\r\n$1\r\n0\r\n", 1)
        if late:
            await client.rpush("list", "of the one before")
        assert await line.ask(echo(b"mine"), 1) == [b"mine"]
        assert lost.closed
        assert line.replies is not lost
        await client.delete("list")
        line.close()
        await client.aclose()

    asyncio.run(main())


def test_a_wrong_password_is_refused(options):
    async def main():
        with pytest.raises(RedisConnectionError):
            await Line(Redis(**options | {"password": "wrong"})).ask(echo(b""), 1)

    asyncio.run(main())
