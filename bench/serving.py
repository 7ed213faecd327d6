#!/usr/bin/env python3
"""Online reads by Larder's feature server, by Feast's own, and the least that they can cost: the same data and answers.

    python bench/serving.py > serving.json

Measured, each with its own processes over one Redis without persistence:

- ``larder``: gunicorn as the role feature_server runs it;
- ``feast``: ``feast serve``, nothing but the number of workers said;
- ``feast_tuned``: the same with PYTHONOPTIMIZE=1, no access log and workers that are not recycled;
- ``floor``: one HMGET per symbol, pipelined, and each value decoded, in C++ (floor.cpp): no HTTP, no JSON, no client.
  As many threads as there are workers, as many requests on their way as there are connections;
- ``floor_json``: the same, with the answer's JSON.

The data are the daily views of feature_repo (42 features): the last day of bars that walk at random. A fifth of the
symbols is young, and has no value where a feature looks back further. wrk asks for 1, 10 or 100 symbols at a time over
``--connections`` kept connections, by plain HTTP on loopback: TLS is off for all (gateway.py measures it). Every answer
is compared with what Redis has and with what the other servers say; one that differs ends the run. The systems take
turns in every run. The result is one JSON document, times in milliseconds; ``client_cores`` is what wrk took of a core.

It needs the hosts' packages (.larder/test-venv), a redis-server (Debian: redis-tools), wrk and g++.
"""

import argparse
import json
import os
import platform
import random
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from redis import Redis

from wrk import Answers, Columns, Load, http_request

ROOT = Path(__file__).resolve().parent.parent
# Different requests of each size, asked in turn.
REQUESTS = 20
SYSTEMS = ("larder", "feast", "feast_tuned")
FEATURE_STORE = """
project: trading
provider: local
registry: {{path: {directory}/registry.db, cache_ttl_seconds: 60}}
offline_store: {{type: dask}}
online_store: {{type: redis, connection_string: "127.0.0.1:{port},socket_timeout=2,socket_connect_timeout=2"}}
entity_key_serialization_version: 3
"""
Views = dict[str, list[str]]


# --- what Redis has, and the floor ---


class Stored:
    """What Redis has, read as plainly as can be."""

    def __init__(self, port: int, views: Views) -> None:
        from feast.infra.online_stores.helpers import _mmh3
        from feast.protos.feast.types.Value_pb2 import Value

        self.redis, self.value = Redis(port=port), Value.FromString
        self.names = [f"{view}__{name}" for view, names in views.items() for name in names]
        self.fields = [_mmh3(f"{view}:{name}") for view, names in views.items() for name in names]
        self.view_of = [number for number, names in enumerate(views.values()) for _ in names]
        self.times = [f"_ts:{view}".encode() for view in views]

    def read(self, symbols: Sequence[str]) -> Columns:
        rows = [self.redis.execute_command("HMGET", key(symbol), *self.fields) for symbol in symbols]  # type: ignore[no-untyped-call]
        values = [[self.value(raw or b"") for raw in row] for row in rows]
        plain = [[getattr(value, value.WhichOneof("val") or "", None) for value in row] for row in values]
        return dict(zip(self.names, map(list, zip(*plain, strict=True)), strict=True))

    def asked(self, batches: Sequence[Sequence[str]]) -> str:
        """Return the input of floor.cpp."""
        lines: list[Iterable[str]] = [
            self.names,
            map(str, self.view_of),
            map(bytes.hex, self.fields),
            map(bytes.hex, self.times),
        ]
        pairs = [chain.from_iterable((symbol, key(symbol).hex()) for symbol in batch) for batch in batches]
        return "".join(" ".join(words) + "\n" for words in [*lines, *pairs])


def key(symbol: str) -> bytes:
    """The Redis key of a symbol, as Feast serializes an entity with one string key."""
    name, value = b"symbol", symbol.encode()
    return struct.pack("<III", 1, 2, len(name)) + name + struct.pack("<II", 2, len(value)) + value + b"trading"


class Floor:
    """floor.cpp for the requests of one size."""

    def __init__(self, binary: Path, port: int, asked: str, chosen: argparse.Namespace, what: str) -> None:
        self.command, self.port, self.asked = [str(binary)], str(port), asked
        self.how = [str(chosen.workers), str(max(1, chosen.connections // chosen.workers))]
        self.what = what

    def run(self, seconds: float) -> dict[str, float]:
        said = self.said("run", *self.how, str(seconds), self.what)
        figures: dict[str, float] = json.loads(said)
        return figures | {"resets": 0}

    def check(self, answers: Answers) -> None:
        for line in self.said("answers").splitlines():
            answers.check(line.encode())

    def said(self, what: str, *more: str) -> str:
        command = [*self.command, what, self.port, *more]
        return subprocess.run(command, input=self.asked, check=True, stdout=subprocess.PIPE, text=True).stdout


def compiled(directory: Path) -> Path:
    """Return the program of floor.cpp, compiled."""
    compiler = shutil.which("g++") or sys.exit("serving.py needs g++ (Debian: g++)")
    binary, source = directory / "floor", Path(__file__).with_name("floor.cpp")
    subprocess.run([compiler, "-std=c++17", "-O2", "-march=native", "-pthread", "-o", binary, source], check=True)
    return binary


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
    """Apply the daily views and write the last day of each symbol; return the views' features."""
    import pandas as pd
    from feast import FeatureStore, FeatureView

    import data

    sys.path.insert(0, str(ROOT / "feature_repo"))
    import entities
    import feature_views

    views = [view for view in vars(feature_views).values() if isinstance(view, FeatureView)]
    views = [view for view in views if view.stream_source is None]
    store = FeatureStore(fs_yaml_file=directory / "feature_store.yaml")
    store.apply([entities.symbol, *views])
    series = data.real_ratios(data.walk(directory / "walk"))
    columns: dict[str, dict[str, list[Any]]] = {}
    for number, _ in enumerate(symbols):
        days = 5 + number % 50 if number % 5 == 0 else 250
        bars = data.FORMULAS.of(data.SOURCE, data.bars_of(number, days, series, seed))
        for view in data.FORMULAS.definitions.views:
            for name, values in bars.features(view).items():
                last = int(values[-1]) if name in data.INTEGERS else float(values[-1])
                columns.setdefault(view.name, {}).setdefault(name, []).append(last)
    for view in views:
        frame: dict[str, Any] = {"symbol": symbols, "event_timestamp": datetime(2026, 1, 2, tzinfo=UTC)}
        store.write_to_online_store(view.name, pd.DataFrame(frame | columns[view.name]))
    return {view.name: [field.name for field in view.features] for view in views}


@contextmanager
def servers(
    directory: Path,
    workers: int,
    names: Sequence[str] = SYSTEMS,
    source: Path = ROOT / "src",
) -> Iterator[dict[str, tuple[str, subprocess.Popen[bytes]]]]:
    """Start each server; return its address and its main process by name. Larder's code is in `source`."""
    binaries = Path(sys.executable).parent
    (directory / "plain.py").write_text(
        "from larder.serving.gunicorn import *\n# Without TLS, which the other servers do not have either.\n"
        'certfile = keyfile = ca_certs = None\nworker_class = "uvicorn_worker.UvicornWorker"\n'
    )
    ports = {name: free_port() for name in SYSTEMS}
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
        floor = compiled(directory)
        port = stack.enter_context(redis_server(directory))
        (directory / "feature_store.yaml").write_text(FEATURE_STORE.format(directory=directory, port=port))
        views = fill(directory, symbols, chosen.seed)
        features = [f"{view}:{name}" for view, names in views.items() for name in names]
        stored = Stored(port, views)
        started = stack.enter_context(servers(directory, chosen.workers, chosen.systems))
        loads: dict[tuple[int, str], Load | Floor] = {}
        for size in chosen.sizes:
            asked = batches(symbols, size, chosen.seed)
            answers = Answers({tuple(batch): stored.read(batch) for batch in asked})
            for name, (url, _) in started.items():
                requests = [http_request(url, batch, features) for batch in asked]
                loads[size, name] = load = Load(url, requests, answers, chosen.connections)
                load.warm()
            for name, what in (("floor", "values"), ("floor_json", "json")):
                loads[size, name] = lowest = Floor(floor, port, stored.asked(asked), chosen, what)
                lowest.check(answers)
        names = [*started, "floor", "floor_json"]
        runs: dict[tuple[int, str], list[dict[str, float]]] = {(n, name): [] for n in chosen.sizes for name in names}
        for number in range(chosen.runs):
            # Nobody is always first.
            for size in chosen.sizes:
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    figure = loads[size, name].run(chosen.seconds)
                    runs[size, name].append(figure)
                    print(f"run {number + 1}, {size} x {len(features)}, {name}: {figure}", file=sys.stderr)
        memory = {name: round(peak_megabytes(main.pid), 1) for name, (_, main) in started.items()}
    results = []
    for size in chosen.sizes:
        of = {name: runs[size, name] for name in names}
        # Each run's own ratio: what the machine does meanwhile, it does to all of them.
        ratios = [
            {name: run["requests_per_s"] / of[name][n]["requests_per_s"] for name in names if name != "larder"}
            | ({"p99_over_feast_p50": run["p99_ms"] / of["feast"][n]["p50_ms"]} if "feast" in of else {})
            for n, run in enumerate(of["larder"])
        ]
        result = {"symbols": size, "features": len(features)} | {name: summary(of[name]) for name in names}
        results.append(result | {"larder_over": summary(ratios)})
    return {"results": results, "peak_memory_mb": memory, "answers": "equal", "tls": False, "universe": chosen.universe}


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure online reads.")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5, help="of each run of each system and size")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 10, 100], help="symbols in a request")
    parser.add_argument("--connections", type=int, default=8, help="requests on their way at any moment")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--systems", nargs="+", default=SYSTEMS, choices=SYSTEMS, help="with larder, beside the floors")
    parser.add_argument("--universe", type=int, default=500, help="symbols in Redis")
    parser.add_argument("--seed", type=int, default=20260101)
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
    json.dump(document | compare(chosen), sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
