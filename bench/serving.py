#!/usr/bin/env python3
"""Online reads by Larder's feature server, by Feast's own and by Redis alone: the same data, answers and machine.

    python bench/serving.py > serving.json
    python bench/serving.py --target https://192.0.2.15:8443 --ca ca.crt --token token.txt --symbols GOOG.US EURUSD

Measured, each with its own processes over one Redis without persistence:

- ``larder``: gunicorn as the role feature_server runs it;
- ``feast``: ``feast serve``, nothing but the number of workers said;
- ``feast_tuned``: the same with PYTHONOPTIMIZE=1, no access log and workers that are not recycled;
- ``floor``: the unavoidable, in as many processes as there are workers: one pipeline of one HMGET per symbol (redis-py
  with hiredis), each value parsed by protobuf, no HTTP and no JSON.

The data are the daily views of feature_repo (42 features) with random values, written by Feast. A closed loop of
``--connections`` kept connections, in this one process, asks for 1, 10 or 100 symbols at a time, by plain HTTP on
loopback: TLS is off for all. Every answer is compared with what Redis has and with what the other servers say; one that
differs ends the run. The systems take turns in every run. The result is one JSON document, times in milliseconds.

With ``--target`` a deployed instance is measured instead, and its answers are compared with one another only.

It needs the hosts' packages (.larder/test-venv) and a redis-server (Debian: redis-tools).
"""

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import platform
import random
import shutil
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import uvloop
from redis import Redis

ROOT = Path(__file__).resolve().parent.parent
PATH = "/get-online-features"
# Different requests of each size, asked in turn.
REQUESTS = 20
WARM_SECONDS = 1.0
FEATURE_STORE = """
project: trading
provider: local
registry: {{path: {directory}/registry.db, cache_ttl_seconds: 60}}
offline_store: {{type: dask}}
online_store: {{type: redis, connection_string: "127.0.0.1:{port},socket_timeout=2,socket_connect_timeout=2"}}
entity_key_serialization_version: 3
"""
Views = dict[str, list[str]]


class Different(Exception):  # noqa: N818 # not an error of the program
    """An answer that is not what it should be."""


class Answers:
    """What is known of the right answers to some requests."""

    def __init__(self, values: Sequence[dict[str, list[Any]]] | None = None) -> None:
        self.values = values
        self.known: dict[int, str] = {}
        self.seen: dict[int, set[bytes]] = {}

    def check(self, request: int, body: bytes) -> None:
        """Compare an answer with the values in Redis and with the other servers' answers, columns sorted by name."""
        if body in self.seen.setdefault(request, set()):
            return
        answer = json.loads(body)
        columns = dict(zip(answer["metadata"]["feature_names"], answer["results"], strict=True))
        if self.values is not None:
            served = {name: column["values"] for name, column in columns.items()}
            if served != self.values[request]:
                raise Different(f"not what Redis has: {body[:200]!r}")
        normal = json.dumps(columns, sort_keys=True)
        if self.known.setdefault(request, normal) != normal:
            raise Different(f"not what was answered before: {body[:200]!r}")
        self.seen[request].add(body)


class Client(asyncio.Protocol):
    """One connection of a closed loop: the next request when the last is answered."""

    def __init__(self, load: "Load") -> None:
        self.load = load
        self.received = b""
        self.waiting = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        self.ask()

    def ask(self) -> None:
        self.waiting = time.perf_counter() < self.load.end
        if not self.waiting:
            self.transport.close()
            return
        self.request = self.load.turn()
        self.sent = time.perf_counter()
        self.transport.write(self.load.requests[self.request])

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, separator, body = self.received.partition(b"\r\n\r\n")
        if not separator:
            return
        lines = head.lower().split(b"\r\n")
        length = next(int(line[15:]) for line in lines if line.startswith(b"content-length:"))
        if len(body) < length:
            return
        self.load.milliseconds.append((time.perf_counter() - self.sent) * 1000)
        self.received = b""
        try:
            if lines[0].split()[1] != b"200":
                raise Different(body[:200].decode(errors="replace"))
            self.load.answers.check(self.request, body)
        except Exception as error:
            self.load.stop(error)
        if b"connection: close" in lines:
            self.waiting = False
            self.transport.close()
        else:
            self.ask()

    def connection_lost(self, _: Exception | None) -> None:
        # Feast recycles its workers, and resets their connections.
        self.load.resets += self.waiting
        self.load.lost()


class Load:
    """A closed loop of `connections` over `requests`, for some seconds."""

    def __init__(
        self, url: str, requests: list[bytes], answers: Answers, connections: int, tls: ssl.SSLContext | None
    ) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "", parts.port or (443 if tls else 80)
        self.requests, self.answers, self.connections, self.tls = requests, answers, connections, tls
        self.turns = 0
        self.error: Exception | None = None

    def turn(self) -> int:
        self.turns += 1
        return self.turns % len(self.requests)

    def stop(self, error: Exception) -> None:
        self.error, self.end = error, 0.0

    def lost(self) -> None:
        if time.perf_counter() < self.end:
            self.tasks.append(asyncio.ensure_future(self.connect()))
        else:
            self.open -= 1
            if not self.open:
                self.done.set()

    async def connect(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                await loop.create_connection(lambda: Client(self), self.host, self.port, ssl=self.tls)
                return
            except OSError as error:
                if time.perf_counter() >= self.end:
                    self.stop(error)
                    self.lost()
                    return
                await asyncio.sleep(0.05)

    async def run(self, seconds: float) -> dict[str, float]:
        """Return requests per second, and percentiles of the time that an answer took."""
        self.milliseconds: list[float] = []
        self.resets, self.open = 0, self.connections
        self.error = None
        self.tasks: list[asyncio.Future[None]] = []
        self.done = asyncio.Event()
        started = time.perf_counter()
        self.end = started + seconds
        for _ in range(self.connections):
            await self.connect()
        await asyncio.wait_for(self.done.wait(), seconds + 30)
        if self.error:
            raise self.error
        return figures(self.milliseconds, time.perf_counter() - started) | {"resets": self.resets}


def figures(milliseconds: list[float], seconds: float) -> dict[str, float]:
    ordered = sorted(milliseconds)
    return {
        "requests_per_s": len(ordered) / seconds,
        "p50_ms": ordered[len(ordered) // 2],
        "p99_ms": ordered[min(len(ordered) - 1, math.ceil(len(ordered) * 0.99))],
    }


def http_request(url: str, symbols: list[str], features: list[str], token: str) -> bytes:
    body = json.dumps({"features": features, "entities": {"symbol": symbols}, "full_feature_names": True}).encode()
    head = [f"POST {PATH} HTTP/1.1", f"Host: {urlsplit(url).netloc}", "Content-Type: application/json"]
    head += [f"Content-Length: {len(body)}", *([f"Authorization: Bearer {token}"] if token else []), "", ""]
    return "\r\n".join(head).encode() + body


# --- the floor ---


class Floor:
    """HMGET and protobuf, and nothing else."""

    def __init__(self, port: int, views: Views) -> None:
        from feast.infra.online_stores.helpers import _mmh3
        from feast.protos.feast.types.Value_pb2 import Value
        from google.protobuf.timestamp_pb2 import Timestamp

        self.redis = Redis(port=port)
        self.value, self.timestamp = Value.FromString, Timestamp.FromString
        self.names = [f"{view}__{name}" for view, names in views.items() for name in names]
        self.fields = [_mmh3(f"{view}:{name}") for view, names in views.items() for name in names]
        self.times = [f"_ts:{view}".encode() for view in views]

    def read(self, keys: Sequence[bytes]) -> dict[str, list[Any]]:
        with self.redis.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.execute_command("HMGET", key, *self.fields, *self.times)  # type: ignore[no-untyped-call]
            rows = pipe.execute()
        columns: dict[str, list[Any]] = {name: [] for name in self.names}
        for row in rows:
            for name, raw in zip(self.names, row, strict=False):
                value = self.value(raw)
                columns[name].append(getattr(value, value.WhichOneof("val")))
            for raw in row[len(self.names) :]:
                self.timestamp(raw)
        return columns


def key(symbol: str) -> bytes:
    """The Redis key of a symbol, as Feast serializes an entity with one string key."""
    name, value = b"symbol", symbol.encode()
    return struct.pack("<III", 1, 2, len(name)) + name + struct.pack("<II", 2, len(value)) + value + b"trading"


def floor_worker(pipe: Connection, port: int, views: Views) -> None:
    floor = Floor(port, views)
    pipe.send(None)
    while (task := pipe.recv()) is not None:
        seconds, requests = task
        milliseconds: list[float] = []
        started = time.perf_counter()
        while (sent := time.perf_counter()) < started + seconds:
            floor.read(requests[len(milliseconds) % len(requests)])
            milliseconds.append((time.perf_counter() - sent) * 1000)
        pipe.send(milliseconds)


class Floors:
    """As many processes as a server has workers."""

    def __init__(self, workers: int, port: int, views: Views) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        for _ in range(workers):
            here, there = context.Pipe()
            context.Process(target=floor_worker, args=(there, port, views), daemon=True).start()
            here.recv()
            self.pipes.append(here)

    def run(self, requests: list[list[bytes]], seconds: float) -> dict[str, float]:
        for pipe in self.pipes:
            pipe.send((seconds, requests))
        milliseconds = [took for pipe in self.pipes for took in pipe.recv()]
        return figures(milliseconds, seconds)

    def close(self) -> None:
        for pipe in self.pipes:
            with suppress(OSError):
                pipe.send(None)


# --- the servers ---


@contextmanager
def process(command: Sequence[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command, env=os.environ | environment, stdout=output, stderr=output, cwd=log.parent
        ) as started,
    ):
        try:
            yield started
        finally:
            started.terminate()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@contextmanager
def redis_server(directory: Path) -> Iterator[int]:
    binary = shutil.which("redis-server") or shutil.which("redis-check-rdb")
    if not binary:
        sys.exit("serving.py needs a redis-server (Debian: redis-tools)")
    port = free_port()
    # redis-check-rdb is the server under another name.
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(directory)]
    with subprocess.Popen(command, executable=binary, stdout=subprocess.DEVNULL) as started:
        try:
            for _ in range(100):
                with suppress(Exception):
                    Redis(port=port).ping()
                    break
                time.sleep(0.1)
            yield port
        finally:
            started.terminate()


def fill(directory: Path, symbols: list[str], seed: int) -> Views:
    """Apply the daily views and write a row of random values for each symbol; return the views' features."""
    import pandas as pd
    from feast import FeatureStore, FeatureView
    from feast.types import Int64

    sys.path.insert(0, str(ROOT / "feature_repo"))
    import entities
    import feature_views

    views = [view for view in vars(feature_views).values() if isinstance(view, FeatureView)]
    views = [view for view in views if view.stream_source is None]
    store = FeatureStore(fs_yaml_file=directory / "feature_store.yaml")
    store.apply([entities.symbol, *views])
    chance = random.Random(seed)  # noqa: S311 # not for secrets
    for view in views:
        frame: dict[str, Any] = {"symbol": symbols, "event_timestamp": datetime(2026, 1, 2, tzinfo=UTC)}
        for field in view.features:
            whole = field.dtype == Int64
            frame[field.name] = [
                chance.randrange(10**7) if whole else chance.gauss(100, 30) * 10 ** chance.randint(-2, 0)
                for _ in symbols
            ]
        store.write_to_online_store(view.name, pd.DataFrame(frame))
    return {view.name: [field.name for field in view.features] for view in views}


@contextmanager
def servers(
    directory: Path,
    workers: int,
    names: Sequence[str] = ("larder", "feast", "feast_tuned"),
    source: Path = ROOT / "src",
) -> Iterator[dict[str, tuple[str, subprocess.Popen[bytes]]]]:
    """Start each server; return its address and its main process by name. Larder's code is in `source`."""
    binaries = Path(sys.executable).parent
    (directory / "plain.py").write_text(
        "from larder.serving.gunicorn import *\n# Without TLS, which the other servers do not have either.\n"
        'certfile = keyfile = ca_certs = None\nworker_class = "uvicorn_worker.UvicornWorker"\n'
    )
    ports = {name: free_port() for name in ("larder", "feast", "feast_tuned")}
    larder = {
        "CREDENTIALS_DIRECTORY": str(directory),
        "RUNTIME_DIRECTORY": str(directory),
        "LARDER_ADDRESS": "127.0.0.1",
        "LARDER_PORT": str(ports["larder"]),
        "LARDER_INSTANCE": "1",
        "LARDER_WORKERS": str(workers),
        "LARDER_CERTIFICATE": str(directory),
        "PYTHONOPTIMIZE": "1",
        "PYTHONPATH": str(source),
    }
    feast = [str(binaries / "feast"), "-f", str(directory / "feature_store.yaml"), "serve", "--workers", str(workers)]
    tuned = ["--no-access-log", "--max-requests", "0", "--keep-alive-timeout", "75"]
    commands = {
        "larder": ([str(binaries / "gunicorn"), "--config", str(directory / "plain.py")], larder),
        "feast": ([*feast, "--port", str(ports["feast"])], {}),
        "feast_tuned": ([*feast, "--port", str(ports["feast_tuned"]), *tuned], {"PYTHONOPTIMIZE": "1"}),
    }
    with ExitStack() as stack:
        started = {
            name: (
                f"http://127.0.0.1:{ports[name]}",
                stack.enter_context(
                    process(command, environment | {"FEAST_USAGE": "False"}, directory / f"{name}.log")
                ),
            )
            for name, (command, environment) in commands.items()
            if name in names
        }
        for name, (url, _) in started.items():
            wait(f"{url}/health", directory / f"{name}.log")
        yield started


def wait(url: str, log: Path) -> None:
    for _ in range(200):
        with suppress(OSError), urllib.request.urlopen(url, timeout=1):  # noqa: S310 # http, on loopback
            return
        time.sleep(0.3)
    sys.exit(f"{url} does not answer: {log.read_text()[-2000:]}")


def peak_megabytes(main: int) -> float:
    """Return the sum of the peak memory of a process and its children."""
    children = Path(f"/proc/{main}/task/{main}/children").read_text().split()
    status = "".join(Path(f"/proc/{pid}/status").read_text() for pid in [str(main), *children])
    return sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


# --- the runs ---


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Return median, least and greatest of each figure."""
    return {
        name: {
            "median": round(statistics.median(run[name] for run in runs), 3),
            "min": round(min(run[name] for run in runs), 3),
            "max": round(max(run[name] for run in runs), 3),
        }
        for name in runs[0]
    }


def machine() -> dict[str, Any]:
    cpus = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return {"cpu": next(iter(cpus), platform.machine()), "cores": os.cpu_count(), "kernel": platform.release()}


def batches(symbols: list[str], size: int, seed: int) -> list[list[str]]:
    chance = random.Random(seed + size)  # noqa: S311 # not for secrets
    return [chance.sample(symbols, min(size, len(symbols))) for _ in range(REQUESTS)]


def compare(chosen: argparse.Namespace) -> dict[str, Any]:
    """Measure all systems side by side."""
    symbols = [f"S{n:04d}.US" for n in range(chosen.universe)]
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        port = stack.enter_context(redis_server(directory))
        (directory / "feature_store.yaml").write_text(FEATURE_STORE.format(directory=directory, port=port))
        views = fill(directory, symbols, chosen.seed)
        features = [f"{view}:{name}" for view, names in views.items() for name in names]
        floor = Floor(port, views)
        floors = Floors(chosen.workers, port, views)
        stack.callback(floors.close)
        started = stack.enter_context(servers(directory, chosen.workers))
        names = [*started, "floor"]
        runs: dict[tuple[int, str], list[dict[str, float]]] = {(n, name): [] for n in chosen.sizes for name in names}
        loads: dict[tuple[int, str], Load] = {}
        keys: dict[int, list[list[bytes]]] = {}
        for size in chosen.sizes:
            asked = batches(symbols, size, chosen.seed)
            keys[size] = [[key(symbol) for symbol in batch] for batch in asked]
            answers = Answers([floor.read(k) | {"symbol": batch} for k, batch in zip(keys[size], asked, strict=True)])
            for name, (url, _) in started.items():
                requests = [http_request(url, batch, features, "") for batch in asked]
                loads[size, name] = Load(url, requests, answers, chosen.connections, None)
                uvloop.run(loads[size, name].run(WARM_SECONDS))
        for number in range(chosen.runs):
            # Nobody is always first.
            for size in chosen.sizes:
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    if name == "floor":
                        figure = floors.run(keys[size], chosen.seconds) | {"resets": 0}
                    else:
                        figure = uvloop.run(loads[size, name].run(chosen.seconds))
                    runs[size, name].append(figure)
                    print(f"run {number + 1}, {size} x {len(features)}, {name}: {figure}", file=sys.stderr)
        memory = {name: round(peak_megabytes(main.pid), 1) for name, (_, main) in started.items()}
    results = []
    for size in chosen.sizes:
        of = {name: runs[size, name] for name in names}
        # Each run's own ratio: what the machine does meanwhile, it does to all of them.
        ratios = [
            {name: run["requests_per_s"] / of[name][n]["requests_per_s"] for name in names if name != "larder"}
            | {"p99_over_feast_p50": run["p99_ms"] / of["feast"][n]["p50_ms"]}
            for n, run in enumerate(of["larder"])
        ]
        result = {"symbols": size, "features": len(features)} | {name: summary(of[name]) for name in names}
        results.append(result | {"larder_over": summary(ratios)})
    return {"results": results, "peak_memory_mb": memory, "answers": "equal", "tls": False, "universe": chosen.universe}


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """Measure a deployed instance."""
    token = chosen.token.read_text().strip() if chosen.token else ""
    tls = ssl.create_default_context(cafile=chosen.ca) if chosen.target.startswith("https:") else None
    if tls and chosen.certificate:
        tls.load_cert_chain(*chosen.certificate)
    results = []
    for size in chosen.sizes:
        requests = [
            http_request(chosen.target, batch, chosen.features, token)
            for batch in batches(chosen.symbols, size, chosen.seed)
        ]
        load = Load(chosen.target, requests, Answers(), chosen.connections, tls)
        uvloop.run(load.run(WARM_SECONDS))
        runs = [uvloop.run(load.run(chosen.seconds)) for _ in range(chosen.runs)]
        asked = min(size, len(chosen.symbols))
        results.append({"symbols": asked, "features": len(chosen.features), "target": summary(runs)})
    return {"results": results, "tls": tls is not None}


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure online reads.")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5, help="of each run of each system and size")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 10, 100], help="symbols in a request")
    parser.add_argument("--connections", type=int, default=8, help="requests on their way at any moment")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--universe", type=int, default=500, help="symbols in Redis")
    parser.add_argument("--seed", type=int, default=20260101)
    parser.add_argument("--target", help="measure what serves at https://host:port instead")
    parser.add_argument("--ca", type=Path, help="PEM file of the target's authority")
    parser.add_argument("--certificate", type=Path, nargs=2, help="PEM files of the client's certificate and its key")
    parser.add_argument("--token", type=Path, help="file with the bearer token for the target")
    parser.add_argument("--symbols", nargs="+", default=["GOOG.US", "EURUSD", "SP500", "NASDAQ"], help="of the target")
    parser.add_argument("--features", nargs="+", default=["ohlcv_features:close"], help="of the target, view:feature")
    return parser.parse_args(arguments)


def main() -> None:
    chosen = options(sys.argv[1:])
    settings = {name: getattr(chosen, name) for name in ("runs", "seconds", "connections", "workers", "seed")}
    packages = ("feast", "redis", "hiredis", "protobuf", "uvicorn", "uvloop", "httptools", "gunicorn")
    document = {
        "benchmark": "serving",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "settings": settings,
    }
    json.dump(document | (measure(chosen) if chosen.target else compare(chosen)), sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
