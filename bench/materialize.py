#!/usr/bin/env python3
"""Materialization of six views: Larder, Feast with its defaults and at its best, and the least that can be done.

    python bench/materialize.py feature_store.yaml --symbols 500 --days 1000

feature_store.yaml names an offline store whose user may create a schema (see bench/data.py), and a Redis whose user may
also SCAN and DEL: every run starts from nothing. The ways:

- `larder`: its offline store and compute engine, skip_dedup, newest rows pulled;
- `stock`: Feast's own classes and defaults;
- `stock_best`: with pull_latest_features, skip_dedup and batches of 10,000;
- `floor`: the newest row per key by SQL and fetchall, and pipelined HSET of values that are serialized beforehand.

`floor` is what the others are compared with. Prints one JSON document; progress is on standard error.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import redis

import data
from data import VIEWS
from measure import measure, report

START, END = datetime(1970, 1, 1, tzinfo=UTC), datetime(2025, 1, 1, tzinfo=UTC)
NEWEST = """
WITH RECURSIVE keys AS (
    (SELECT symbol FROM {table} ORDER BY symbol LIMIT 1)
    UNION ALL
    SELECT (SELECT symbol FROM {table} WHERE symbol > keys.symbol ORDER BY symbol LIMIT 1) FROM keys
    WHERE keys.symbol IS NOT NULL
)
SELECT newest.* FROM keys CROSS JOIN LATERAL (
    SELECT symbol, event_timestamp, {names} FROM {table} AS source
    WHERE source.symbol = keys.symbol ORDER BY event_timestamp DESC LIMIT 1
) AS newest
"""
STOCK: dict[str, dict[str, Any]] = {"offline_store": {"type": "postgres"}}
BEST: dict[str, dict[str, Any]] = {
    "materialization": {"pull_latest_features": True, "online_write_batch_size": 10_000},
    "online_store": {"skip_dedup": True},
}
LARDER = BEST | {
    "offline_store": {"type": "larder.plugins.offline_store.TimescaleOfflineStore"},
    "batch_engine": {"type": "larder.plugins.compute_engine.DirectComputeEngine"},
}


def client_of(given: Path) -> redis.Redis:
    from feast.infra.online_stores.redis import RedisOnlineStore
    from feast.repo_config import load_repo_config

    client: redis.Redis = RedisOnlineStore()._get_client(load_repo_config(given.parent, given).online_store)
    return client


def keys(client: redis.Redis, project: str) -> Iterator[bytes]:
    """Those of a project, whose name is the end of each."""
    for key in client.scan_iter(match=f"*{project}", count=10_000):
        if key.endswith(project.encode()):
            yield key


def hashes(client: redis.Redis, project: str) -> dict[bytes, dict[bytes, bytes]]:
    found: dict[bytes, Any] = {key: client.hgetall(key) for key in keys(client, project)}  # type: ignore[arg-type]
    return {key.removesuffix(project.encode()): values for key, values in found.items()}


def delete(client: redis.Redis, project: str) -> None:
    for key in [*keys(client, project)]:
        client.delete(key)


def feast(directory: Path, *, given: Path, schema: str, changes: dict[str, Any]) -> Callable[[], Any]:
    store = data.feature_store(given, directory, schema, data.TTL, **STOCK | changes)
    client = client_of(given)
    delete(client, data.project(directory))

    def run() -> Callable[[], None]:
        store.materialize(START, END)
        return partial(leave, client, directory)

    return run


def leave(client: redis.Redis, directory: Path) -> None:
    """Write the hashes to a file, and nothing but that stays."""
    (directory / "answer").write_text(
        repr(sorted((k, sorted(v.items())) for k, v in hashes(client, directory.name).items()))
    )
    delete(client, directory.name)


def floor(directory: Path, *, given: Path, conninfo: str, schema: str) -> Callable[[], Any]:
    """Writes, per view and key, the values that Feast wrote for it before."""
    with tempfile.TemporaryDirectory(dir=directory) as place:
        store = data.feature_store(given, Path(place), schema, data.TTL, **LARDER)
        client = client_of(given)
        by_view: dict[str, list[tuple[bytes, dict[bytes, bytes]]]] = {}
        for view in VIEWS:
            store.materialize(START, END, [view])
            found = hashes(client, store.project)
            by_view[view] = [(key + data.project(directory).encode(), values) for key, values in found.items()]
            delete(client, store.project)

    def run() -> Callable[[], None]:
        with psycopg.connect(conninfo) as connection:
            for view, names in VIEWS.items():
                query = NEWEST.format(table=f"{schema}.{view}", names=", ".join(names))
                rows = connection.execute(query).fetchall()
                with client.pipeline(transaction=False) as pipe:
                    for (key, values), _ in zip(by_view[view], rows, strict=True):
                        pipe.hset(key, mapping=values)  # type: ignore[arg-type] # bytes are fine
                    pipe.execute()
        return partial(leave, client, directory)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("feature_store", type=Path)
    parser.add_argument("--bars", type=Path, default=data.ROOT / ".larder/trial/bars")
    parser.add_argument("--symbols", type=int, default=500)
    parser.add_argument("--days", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--stock-runs", type=int, default=5)
    parser.add_argument("--limit", type=float, default=1800, help="seconds after which a run is given up")
    options = parser.parse_args()
    conninfo = data.conninfo(options.feature_store)
    schema = data.fill(conninfo, options.symbols, options.days, options.bars)
    way = partial(feast, given=options.feature_store, schema=schema)
    ways = {
        "larder": (partial(way, changes=LARDER), options.runs),
        "floor": (partial(floor, given=options.feature_store, conninfo=conninfo, schema=schema), options.runs),
        "stock_best": (partial(way, changes=BEST), options.runs),
        "stock": (partial(way, changes={}), options.stock_runs),
    }
    with tempfile.TemporaryDirectory() as directory:
        measured = measure(ways, Path(directory), limit=options.limit, conninfo=conninfo)
        expected = Path(directory, "stock_best", "answer").read_text()
        assert expected.count("_ts:") == options.symbols * len(VIEWS)
        for name, one in measured.items():
            if one.seconds:
                assert Path(directory, name, "answer").read_text() == expected, f"{name} answers something else"
    print(report({"symbols": options.symbols, "days": options.days, "views": len(VIEWS)}, measured, "floor"))


if __name__ == "__main__":
    main()
