#!/usr/bin/env python3
"""How Larder grows with symbols and with years of history: measured at some sizes, with a formula for the others.

    PYTHONOPTIMIZE=1 python bench/scale.py postgresql:///postgres --bars .larder/trial/bars > scale.json

- ``memory``: Redis with so many symbols, as Feast writes them: bytes more than it has when it is empty;
- ``materialize``: the six views of so many symbols into Redis, by Larder;
- ``day``: a file with one new bar of each symbol, loaded and computed, with ``--history`` days before it;
- ``history``: ``--history-symbols`` symbols with so many years of 252 days, loaded and computed, and the bytes that
  PostgreSQL has more then.

Each has its formula, ``fixed`` + ``each`` x size, by least squares of the relative errors, and ``error``, by how much
of the measured value the formula misses the worst of them. Seconds are the least of ``--runs``, since what else the
machine does only adds. It needs the hosts' packages, a redis-server, and a PostgreSQL with TimescaleDB whose user may
create databases.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import yaml
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from redis import Redis

import compute
import data
import materialize
from serving import key, machine, redis_server

YEAR = 252
AT_ONCE = 1000
Points = list[tuple[int, float]]


def formula(points: Points) -> dict[str, Any]:
    """Return the points, and fixed and each of fixed + each x size."""
    sizes, values = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    terms = np.column_stack([1 / values, sizes / values])
    fixed, each = np.linalg.lstsq(terms, np.ones(len(points)), rcond=None)[0]
    if fixed < 0:  # no size costs less than nothing
        fixed, each = 0.0, float(np.mean(values / sizes))
    error = float(np.max(np.abs(terms @ [fixed, each] - 1)))
    return {"points": points, "fixed": float(fixed), "each": float(each), "error": round(error, 3)}


def values_of(series: Sequence[data.Ratios], symbols: int) -> Iterator[dict[str, dict[str, float | None]]]:
    """Return by view and feature the last day's values of some symbols, of which every fifth is young."""
    for number in range(symbols):
        days = 5 + number % 50 if number % 5 == 0 else 250
        bars = data.FORMULAS.of(data.SOURCE, data.bars_of(number, days, series, 1))
        yield {
            view.name: {name: float(values[-1]) for name, values in bars.features(view).items()}
            for view in data.FORMULAS.definitions.views
        }


def memory(chosen: argparse.Namespace, series: Sequence[data.Ratios]) -> Points:
    from feast.infra.online_stores.helpers import _mmh3
    from feast.protos.feast.types.Value_pb2 import Value
    from google.protobuf.timestamp_pb2 import Timestamp

    at = Timestamp(seconds=1_767_312_000).SerializeToString()

    def stored(views: dict[str, dict[str, float | None]]) -> dict[bytes, bytes]:
        fields = {f"_ts:{view}".encode(): at for view in views}
        for view, features in views.items():
            for name, number in features.items():
                value = Value() if number is None or number != number else Value(double_val=number)
                fields[_mmh3(f"{view}:{name}")] = value.SerializeToString()
        return fields

    hashes = [stored(views) for views in values_of(series, min(AT_ONCE, max(chosen.memory_symbols)))]
    points: Points = []
    with tempfile.TemporaryDirectory() as directory, redis_server(Path(directory)) as port:
        client = Redis(port=port)

        def used() -> int:
            return int(client.info("memory")["used_memory"])  # type: ignore[index] # the synchronous one

        empty, done = used(), 0
        for size in sorted(chosen.memory_symbols):
            while done < size:
                with client.pipeline(transaction=False) as pipe:
                    for number in range(done, min(done + AT_ONCE, size)):
                        pipe.hset(key(data.symbol(number)), mapping=hashes[number % len(hashes)])  # type: ignore[arg-type]
                    pipe.execute()
                done = min(done + AT_ONCE, size)
            points.append((size, used() - empty))
    return points


@contextmanager
def filled(chosen: argparse.Namespace, symbols: int) -> Iterator[tuple[str, str]]:
    """A database with the views' tables of so many symbols, and the name of their schema."""
    with compute.database(chosen.url, "larder_bench_scale") as url:
        yield url, data.fill(url, symbols, chosen.days, chosen.bars)


def materialized(chosen: argparse.Namespace) -> Points:
    points: Points = []
    for symbols in chosen.symbols:
        with filled(chosen, symbols) as (url, schema), tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary)
            with redis_server(directory) as port:
                with psycopg.connect(url) as connection:
                    server = connection.info
                    offline = {"host": server.host, "port": server.port, "database": server.dbname, "user": server.user}
                    password = server.password or "none"
                offline |= {"password": password, "sslmode": conninfo_to_dict(url).get("sslmode", "prefer")}
                settings = {
                    "project": "bench",
                    "provider": "local",
                    "registry": str(directory / "registry.db"),
                    "offline_store": {"type": "postgres", **offline},
                    "online_store": {"type": "redis", "connection_string": f"127.0.0.1:{port}"},
                    "entity_key_serialization_version": 3,
                }
                given = directory / "feature_store.yaml"
                given.write_text(yaml.safe_dump(settings))
                (directory / "larder").mkdir()
                run = materialize.feast(directory / "larder", given=given, schema=schema, changes=materialize.LARDER)
                took = []
                for _ in range(chosen.runs):
                    begun = time.perf_counter()
                    leave = run()
                    took.append(time.perf_counter() - begun)
                    leave()
                points.append((symbols, min(took)))
                print(f"materialize {points[-1]}", file=sys.stderr)
    return points


def days(chosen: argparse.Namespace) -> Points:
    points: Points = []
    for symbols in chosen.symbols:
        asked = argparse.Namespace(
            url=chosen.url,
            bars=chosen.bars,
            runs=chosen.runs,
            seed=1,
            day_symbols=symbols,
            day_history=chosen.history,
            day_check=False,
        )
        points.append((symbols, compute.day(asked)["ways"]["larder"]["least"]))
        print(f"day {points[-1]}", file=sys.stderr)
    return points


def history(chosen: argparse.Namespace, series: Sequence[data.Ratios]) -> tuple[Points, Points]:
    took: Points = []
    stored: Points = []
    symbols = [data.symbol(number) for number in range(chosen.history_symbols)]
    for years in chosen.years:
        count = years * YEAR
        drawn = [data.bars_of(number, count, series, 1) for number in range(len(symbols))]
        with tempfile.TemporaryDirectory() as directory:
            compute.write_files(Path(directory), symbols, data.days_before(count), drawn)
            runs = []
            for _ in range(chosen.runs):
                with compute.database(chosen.url, "larder_bench_scale") as url:
                    empty = size(chosen.url)
                    runs.append(compute.apart(compute.larder, url, Path(directory))["seconds"])
                    grown = size(chosen.url) - empty
        took.append((years, min(runs)))
        stored.append((years, grown))
    return took, stored


def size(url: str) -> int:
    with psycopg.connect(make_conninfo(url), autocommit=True) as connection:
        return int(connection.execute("SELECT pg_database_size('larder_bench_scale')").fetchall()[0][0])


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of PostgreSQL, of a user who may create databases")
    parser.add_argument("--bars", type=Path, help="directory of real bars; a random walk by default")
    parser.add_argument("--memory-symbols", type=int, nargs="*", default=[500, 5000, 20_000, 100_000])
    parser.add_argument("--symbols", type=int, nargs="*", default=[500, 2000, 5000, 10_000])
    parser.add_argument("--days", type=int, default=30, help="that each symbol has when it is materialized")
    parser.add_argument("--history", type=int, default=YEAR, help="days that each symbol has before a new one")
    parser.add_argument("--years", type=int, nargs="*", default=[1, 5, 10, 30])
    parser.add_argument("--history-symbols", type=int, default=50)
    parser.add_argument("--runs", type=int, default=3)
    return parser.parse_args(arguments)


def main() -> None:
    chosen = options(sys.argv[1:])
    with tempfile.TemporaryDirectory() as walk:
        chosen.bars = chosen.bars or data.walk(Path(walk))
        series = data.real_ratios(chosen.bars)
        curves = {}
        if chosen.memory_symbols:
            curves["memory"] = formula(memory(chosen, series))
            print(curves, file=sys.stderr)
        if chosen.symbols:
            curves["materialize"] = formula(materialized(chosen))
            curves["day"] = formula(days(chosen))
        if chosen.years:
            took, stored = history(chosen, series)
            curves["history"], curves["stored"] = formula(took), formula(stored)
    head = {"benchmark": "scale", "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine()}
    names = ("days", "history", "history_symbols", "runs")
    settings = {name: getattr(chosen, name) for name in names} | {"features": sum(map(len, data.VIEWS.values()))}
    json.dump(head | {"settings": settings, "curves": curves}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
