"""The feature server around a real store (SQLite), spoken to as a server speaks to it."""

import asyncio
import errno
import importlib
import json
import logging
import re
import socket
import sqlite3
import threading
import time
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pandas as pd
import psycopg
import pytest
import uvicorn
import yaml
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, PushSource, ValueType
from feast.errors import FeastInvalidAuthConfigClass
from feast.types import Float64
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse

from larder.serving import application, drain

SECRET = "s3cret-in-the-file"
CONFIG = """
project: trading
provider: local
registry: {{registry_type: sql, path: "sqlite:///{directory}/registry.db", cache_ttl_seconds: 1, schema_mode: {mode}}}
offline_store: {{type: dask}}
online_store: {{type: sqlite, path: "{directory}/online.db"}}
entity_key_serialization_version: 3
"""
READ = {"entities": {"symbol": ["A"]}, "features": ["prices:close"]}


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("LARDER_REVISION", "abc")
    (tmp_path / "feature_store.yaml").write_text(CONFIG.format(directory=tmp_path, mode="verify"))
    return tmp_path


def apply(directory, *names):
    """`feast apply` of a view, or more, with one row of the first one online."""
    config = directory / "apply.yaml"
    config.write_text(CONFIG.format(directory=directory, mode="auto"))
    symbol = Entity(name="symbol", join_keys=["symbol"], value_type=ValueType.STRING)
    file = FileSource(name="file", path=str(directory / "x.parquet"), timestamp_field="event_timestamp")
    source = PushSource(name="push", batch_source=file)
    schema = [Field(name="close", dtype=Float64)]
    views = [FeatureView(name=name, entities=[symbol], source=source, schema=schema) for name in names or ["prices"]]
    store = FeatureStore(fs_yaml_file=config)
    store.apply([symbol, source, *views])
    row = {"symbol": ["A"], "close": [1.5], "event_timestamp": [pd.Timestamp("2026-01-01", tz="UTC")]}
    store.write_to_online_store("prices", pd.DataFrame(row))


async def ask(app, method, path, body=None, client="198.51.100.1"):
    """Return status and decoded body of one request."""
    sent = []
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers}
    scope["client"] = (client, 1)

    async def receive():
        return {"type": "http.request", "body": b"" if body is None else json.dumps(body).encode()}

    async def send(message):
        sent.append(message)

    try:
        await app(scope, receive, send)
    except Exception as error:
        # Starlette answers an unexpected error and raises it again; uvicorn logs it so.
        assert sent
        logging.getLogger("uvicorn.error").error("Exception in ASGI application", exc_info=error)
    return sent[0]["status"], json.loads(b"".join(m.get("body", b"") for m in sent[1:]) or "null")


def not_ready(why):
    return {"detail": why, "status": why, "revision": "abc"}


@asynccontextmanager
async def running():
    app = application.create_app()
    async with app.router.lifespan_context(app):
        yield app


def run(scenario):
    async def main():
        async with running() as app:
            await scenario(app)

    asyncio.run(main())


def test_an_instance_with_features_is_ready(directory):
    apply(directory)

    async def scenario(app):
        assert await ask(app, "GET", "/ready") == (200, {"status": "ready", "revision": "abc", "unaware": []})
        assert (await ask(app, "POST", "/get-online-features", READ))[1]["results"][1]["values"] == [1.5]

    run(scenario)


def test_an_online_store_that_says_nothing_is_not_ready_within_the_time_of_a_check(directory, monkeypatch):
    """It takes connections, and has no time limit of its own."""
    apply(directory)
    monkeypatch.setattr(application, "READY_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        config = yaml.safe_load(CONFIG.format(directory=directory, mode="verify"))
        config["online_store"] = {"type": "redis", "connection_string": f"127.0.0.1:{silent.getsockname()[1]}"}
        (directory / "feature_store.yaml").write_text(yaml.safe_dump(config))

        async def scenario(app):
            async with asyncio.timeout(60):  # for ever, without a limit
                status, answer = await ask(app, "GET", "/ready")
            assert (status, answer["status"]) == (503, "no online store")

        run(scenario)


def test_a_check_of_readiness_ends_before_the_gateway_gives_it_up():
    template = (Path(__file__).parents[2] / "roles/gateway/templates/haproxy.cfg.j2").read_text()
    assert int(re.search(r"timeout check (\d+)s", template)[1]) > application.READY_SECONDS


def test_an_instance_that_drains_is_not_found_but_serves(directory):
    apply(directory)
    (directory / "draining").touch()

    async def scenario(app):
        assert (await ask(app, "GET", "/ready"))[0] == 404
        assert (await ask(app, "POST", "/get-online-features", READ))[0] == 200

    run(scenario)


def list_gateways(directory, monkeypatch, *names):
    file = directory / "gateways"
    file.write_text("".join(f"{name}\n" for name in names))
    monkeypatch.setenv("LARDER_GATEWAYS", str(file))


def test_a_gateway_is_aware_when_it_was_told_often_enough(directory, monkeypatch):
    list_gateways(directory, monkeypatch, "192.0.2.1", "192.0.2.2")
    apply(directory)

    async def unaware(app, client):
        return (await ask(app, "GET", "/ready", client=client))[1]["unaware"]

    async def scenario(app):
        assert await unaware(app, "198.51.100.1") == ["192.0.2.1", "192.0.2.2"]
        assert await unaware(app, "192.0.2.1") == ["192.0.2.1", "192.0.2.2"]
        assert await unaware(app, "192.0.2.1") == ["192.0.2.2"]
        (directory / "draining").touch()
        assert await unaware(app, "192.0.2.2") == ["192.0.2.1"]
        # One gateway leaves and another joins while the instance serves.
        list_gateways(directory, monkeypatch, "192.0.2.2", "192.0.2.3")
        assert await unaware(app, "192.0.2.3") == []
        (directory / "gateways").unlink()
        assert await unaware(app, "192.0.2.1") == []

    run(scenario)


@pytest.mark.parametrize(
    ("gateways", "main_process", "tell", "seconds"),
    [
        (["192.0.2.1"], "1", True, (1, 5)),
        (["192.0.2.1"], "1", False, (6, 60)),
        ([], "1", False, (0, 5)),
        (["192.0.2.1"], "", False, (0, 5)),
    ],
    ids=["told", "a gateway that does not ask", "no gateway", "after a crash"],
)
def test_an_instance_stops_when_the_gateways_know(directory, monkeypatch, gateways, main_process, tell, seconds):
    list_gateways(directory, monkeypatch, *gateways)
    monkeypatch.setenv("MAINPID", main_process)

    def asks():
        time.sleep(0.5)
        assert (directory / "draining").exists()
        drain.Gateways(directory, drain.listed()).note("192.0.2.1", "draining")

    if tell:
        threading.Thread(target=asks).start()
    started = time.monotonic()
    drain.main(5)
    assert seconds[0] <= time.monotonic() - started <= seconds[1]


def test_an_instance_waits_for_the_first_apply(directory):
    async def scenario(app):
        assert await ask(app, "GET", "/ready") == (503, not_ready("no registry"))
        await asyncio.to_thread(apply, directory)
        end = time.monotonic() + 60
        while (await ask(app, "GET", "/ready"))[0] != 200:
            assert time.monotonic() < end
            await asyncio.sleep(0.2)

    run(scenario)


def forget(directory, condition):
    """Take feature views out of the registry, as one that is being applied again does not have them yet."""
    with closing(sqlite3.connect(directory / "registry.db")) as registry, registry:
        for table in ("feature_views", "feature_view_version_history"):
            assert registry.execute(f"DELETE FROM {table} WHERE {condition}").rowcount > 0


def test_an_emptied_registry_takes_no_feature_away(directory):
    """A database that was lost is made again before `feast apply`: what the online store has is served meanwhile."""
    apply(directory)

    async def scenario(app):
        app.registry_ttl = 3600
        assert app.pause == 3600
        forget(directory, "true")
        await app.refresh(None)
        assert app.pause == application.SOON_SECONDS
        assert (await ask(app, "GET", "/ready"))[0] == 200
        assert (await ask(app, "POST", "/get-online-features", READ))[1]["results"][1]["values"] == [1.5]
        await asyncio.to_thread(apply, directory)
        await app.refresh(None)
        assert app.pause == 3600

    run(scenario)


def test_a_registry_that_lacks_a_view_is_read_again_soon(directory):
    apply(directory, "prices", "more_prices")

    async def scenario(app):
        app.registry_ttl = 3600
        forget(directory, "feature_view_name = 'more_prices'")
        await app.refresh(None)
        assert app.pause == application.SOON_SECONDS
        await app.refresh(None)  # the view was removed by intention
        assert app.pause == 3600

    run(scenario)


def test_an_applied_project_without_views_has_nothing_to_read(directory):
    (directory / "feature_store.yaml").write_text(CONFIG.format(directory=directory, mode="auto"))

    async def scenario(app):
        assert (await ask(app, "GET", "/ready")) == (503, not_ready("no feature view"))

    run(scenario)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RedisConnectionError(SECRET), 503),
        (ConnectionResetError(SECRET), 503),
        (OperationalError("SELECT", {}, psycopg.OperationalError(SECRET)), 503),
        (RedisTimeoutError(SECRET), 504),
        (TimeoutError(errno.ETIMEDOUT, SECRET), 504),
        (PoolTimeoutError(SECRET), 504),
        (OperationalError("SELECT", {}, psycopg.errors.ConnectionTimeout(SECRET)), 504),
        (psycopg.errors.ReadOnlySqlTransaction(SECRET), 503),
        (ResponseError(f"LOADING {SECRET}"), 503),
        (OutOfMemoryError(SECRET, status_code="OOM"), 503),
        (ResponseError(f"Command # 1 (HSET k) of pipeline caused error: ('MISCONF {SECRET}',)"), 503),
        (ResponseError(f"WRONGTYPE {SECRET}"), 500),
        (psycopg.errors.DatatypeMismatch(SECRET), 500),
        (psycopg.errors.ProgramLimitExceeded(SECRET), 500),
        (FileNotFoundError(SECRET), 500),
        (FeastInvalidAuthConfigClass(SECRET), 500),
        (ValueError(SECRET), 500),
        (KeyError(SECRET), 500),
        (RuntimeError(SECRET), 500),
    ],
    ids=lambda value: getattr(type(value), "__name__", str(value)) if isinstance(value, Exception) else str(value),
)
def test_an_error_behind_the_server_keeps_its_words_to_itself(directory, monkeypatch, caplog, error, status):
    apply(directory)

    def fail(*_, **__):
        raise error

    async def scenario(app):
        monkeypatch.setattr(FeatureStore, "get_online_features", fail)
        answer = await ask(app, "POST", "/get-online-features", READ)
        details = {503: "a store is not available", 504: "a store did not answer in time", 500: "internal error"}
        assert answer == (status, {"detail": details[status]})
        logged = [record for record in caplog.records if record.levelname == "ERROR"]
        assert [bool(record.exc_info) for record in logged] == [status == 500]
        assert await ask(app, "GET", "/ready") == (503, not_ready("no online store"))

    run(scenario)


def test_a_file_that_cannot_be_used_is_not_quoted(directory):
    (directory / "feature_store.yaml").write_text(
        f"project: trading\nprovider: local\nonline_store: {{type: redis, pass: {SECRET}}}\n"
    )
    with pytest.raises(SystemExit) as raised:
        application.create_app()
    assert SECRET not in str(raised.value)
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__


def test_systemd_is_told_once_the_instance_serves(directory, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(directory / "notify"))
        systemd.setblocking(False)
        monkeypatch.setenv("LARDER_NOTIFY_SOCKET", str(directory / "notify"))

        async def scenario(_):
            assert systemd.recv(100) == b"READY=1"

        run(scenario)


@pytest.fixture
def exchange(monkeypatch):
    """Give an application's answer to what is written, and in how many pieces it was sent."""
    for name, value in {
        "WORKERS": "1",
        "ADDRESS": "127.0.0.1",
        "PORT": "1",
        "INSTANCE": "1",
        "CERTIFICATE": "/",
    }.items():
        monkeypatch.setenv(f"LARDER_{name}", value)
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/")
    protocol = importlib.import_module("larder.serving.gunicorn").Protocol

    async def main(app, written):
        sent = []

        class Watched(protocol):
            def connection_made(self, transport):
                write = transport.write
                transport.write = lambda data: (sent.append(data), write(data))
                super().connection_made(transport)

        config = uvicorn.Config(app, http=Watched, log_config=None)
        config.load()
        state = uvicorn.server.ServerState()
        server = await asyncio.get_running_loop().create_server(
            lambda: Watched(config=config, server_state=state, app_state={}), "127.0.0.1", 0
        )
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(written)
        answer = await asyncio.wait_for(reader.read(), 5)
        server.close()
        return answer, len(sent)

    return lambda app, written: asyncio.run(main(app, written))


@pytest.mark.parametrize(
    "written",
    [
        b"nonsense\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /ready HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"\x16\x03\x01\x02",
    ],
)
def test_what_is_no_http_is_told_so_in_the_shape_of_every_error(exchange, written):
    answer, _ = exchange(Starlette(), written)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n")
    assert b"content-length: %d\r\n" % len(body) in head + b"\r\n"
    assert json.loads(body) == {"detail": "Invalid HTTP request received."}


def test_an_answer_is_sent_in_one_piece_so_that_a_killed_instance_has_sent_none_or_all_of_it(exchange):
    request = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    answer, pieces = exchange(PlainTextResponse("x" * 10_000), request)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"x" * 10_000)
    assert pieces == 1
