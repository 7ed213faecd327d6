#!/usr/bin/env python3
"""Daily bars of many symbols, made from real ones, and the 42 features of each in tables of a schema of their own.

    python bench/data.py feature_store.yaml --bars .larder/trial/bars --symbols 500 --days 1000

A symbol's history is a block bootstrap: blocks of 20 consecutive days, each drawn with the same probability from the
real series, every day as ratios to the close before it; the first close is log-normal. So jumps, fat tails and
clusters of volatility are the real ones, while symbols are independent of each other. The days are the business days
before 2025. A symbol's bars follow from (seed, number of the symbol, days) alone.

The tables are those of feature_repo/tables.yml, in the schema `bench_<symbols>x<days>` of the offline store's database:
its user has to be allowed to create that. What is there already is kept.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg
import pyarrow as pa
import yaml
from psycopg import sql

from larder.features.formulas import Formulas
from larder.postgres import tables

ROOT = Path(__file__).resolve().parent.parent
FORMULAS = Formulas(ROOT / "feature_repo")
SOURCE = FORMULAS.definitions.sources["market_data.ohlcv_daily"]
VIEWS = {view.name: [feature.name for feature in view.features] for view in FORMULAS.definitions.views}
INTEGERS = {f.name for view in FORMULAS.definitions.views for f in view.features if f.type == "Int64"}
BLOCK = 20
LAST_DAY = "2024-12-31"
SYMBOLS_AT_ONCE = 100
TTL = timedelta(days=730)  # that of feature_repo's views
Ratios = dict[str, npt.NDArray[np.float64]]


def real_ratios(directory: Path) -> list[Ratios]:
    """Every series of a directory of CSV files: each day's prices over the close before, its volume over the mean."""
    series = []
    for path in sorted(directory.glob("*.csv")):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        bars = {name: np.array([float(row[name]) for row in rows]) for name in ("Open", "High", "Low", "Close")}
        volume = np.array([float(row["Volume"]) for row in rows])
        before = bars["Close"][:-1]
        ratios = {name: values[1:] / before for name, values in bars.items()}
        ratios["Volume"] = volume[1:] / volume.mean() if volume.any() else np.ones(len(before))
        series.append(ratios)
    if not series:
        raise SystemExit(f"{directory} has no CSV files; `./larder up` leaves some in .larder/trial/bars")
    return series


def walk(directory: Path) -> Path:
    """A random walk as such a directory, for where no `./larder up` has left real bars; return the directory."""
    random = np.random.default_rng(1)
    close = 100 * np.exp(np.cumsum(random.normal(0, 0.02, 2000)))
    directory.mkdir(exist_ok=True)
    with (directory / "WALK.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Date", "Open", "High", "Low", "Close", "Volume"])
        for price in close.tolist():
            writer.writerow(["", price * 0.99, price * 1.02, price * 0.98, price, 1e6])
    return directory


def bars_of(number: int, days: int, series: Sequence[Ratios], seed: int) -> dict[str, npt.NDArray[np.float64]]:
    """The bars of one symbol, oldest first."""
    random = np.random.default_rng([seed, number, days])
    blocks = []
    for _ in range(-(-days // BLOCK)):
        ratios = series[int(random.integers(len(series)))]
        start = random.integers(len(ratios["Close"]) - BLOCK + 1)
        blocks.append({name: values[start : start + BLOCK] for name, values in ratios.items()})
    drawn = {name: np.concatenate([block[name] for block in blocks])[:days] for name in blocks[0]}
    close = random.lognormal(4, 1) * np.cumprod(drawn["Close"])
    before = close / drawn["Close"]
    volume = np.round(drawn["Volume"] * random.lognormal(14, 1))
    prices = {name: before * drawn[name.capitalize()] for name in ("open", "high", "low")}
    return {**prices, "close": close, "adjusted_close": close, "volume": volume}


def days_before(days: int) -> npt.NDArray[np.datetime64]:
    """The newest business days up to the last day of 2024."""
    return np.busday_offset(LAST_DAY, np.arange(1 - days, 1), roll="backward").astype("datetime64[us]")


def symbol(number: int) -> str:
    return f"S{number:05}"


def schema_of(symbols: int, days: int) -> str:
    return f"bench_{symbols}x{days}"


def feature_views(schema: str, ttl: timedelta = TTL) -> list[Any]:
    """Feast's objects: the entity, and a view for each table, as feature_repo has them."""
    from feast import Entity, FeatureView, Field, ValueType
    from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import PostgreSQLSource
    from feast.types import Float64, Int64

    entity = Entity(name="symbol", join_keys=["symbol"], value_type=ValueType.STRING)
    views = [
        FeatureView(
            name=view,
            entities=[entity],
            ttl=ttl,
            schema=[Field(name=name, dtype=Int64 if name in INTEGERS else Float64) for name in names],
            source=PostgreSQLSource(name=f"{view}_source", table=f"{schema}.{view}", timestamp_field="event_timestamp"),
        )
        for view, names in VIEWS.items()
    ]
    return [entity, *views]


def create(connection: psycopg.Connection, schema: str, chunk_interval: str | None = None) -> None:
    """The hypertables of the six views; plain tables where the interval is empty."""
    connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
    for table in FORMULAS.definitions.tables():
        view = table["name"].removeprefix("features.")
        if view not in VIEWS:
            continue
        name = sql.Identifier(schema, view)
        columns = sql.SQL(", ").join(
            sql.SQL("{} " + column["type"]).format(sql.Identifier(column["name"])) for column in table["columns"]
        )
        connection.execute(sql.SQL("CREATE TABLE {} ({}, PRIMARY KEY (symbol, event_timestamp))").format(name, columns))
        connection.execute(sql.SQL("CREATE INDEX ON {} (event_timestamp DESC)").format(name))
        interval = table["hypertable"]["chunk_interval"] if chunk_interval is None else chunk_interval
        if interval:
            connection.execute(
                "SELECT create_hypertable(%s, by_range('event_timestamp', %s::interval), "
                "create_default_indexes => false)",
                [name.as_string(), interval],
            )


def features(symbols: int, days: int, series: Sequence[Ratios], seed: int) -> Iterator[tuple[str, pa.Table]]:
    """(view, rows) of every view, for some symbols at a time."""
    times = pa.array(days_before(days)).cast(pa.timestamp("us", "UTC"))
    for first in range(0, symbols, SYMBOLS_AT_ONCE):
        parts: dict[str, list[pa.Table]] = {view: [] for view in VIEWS}
        for number in range(first, min(first + SYMBOLS_AT_ONCE, symbols)):
            bars = FORMULAS.of(SOURCE, bars_of(number, days, series, seed))
            for view in FORMULAS.definitions.views:
                columns = {}
                for name, values in bars.features(view).items():
                    column = pa.array(values, from_pandas=True)
                    columns[name] = column.cast(pa.int64()) if name in INTEGERS else column
                keys = {"symbol": pa.array([symbol(number)] * days), "event_timestamp": times}
                parts[view.name].append(pa.table({**keys, **columns}))
        for name, found in parts.items():
            yield name, pa.concat_tables(found)


def fill(
    conninfo: str, symbols: int, days: int, bars: Path, *, seed: int = 1, chunk_interval: str | None = None
) -> str:
    """Create and fill the schema for these sizes unless it is there; return its name."""
    schema = schema_of(symbols, days)
    with psycopg.connect(conninfo) as connection:  # all or nothing
        found = connection.execute("SELECT to_regnamespace(%s)", [schema]).fetchall()
        if found == [(None,)]:
            create(connection, schema, chunk_interval)
            connection.execute(sql.SQL("SET LOCAL search_path = {}, public").format(sql.Identifier(schema)))
            for view, rows in features(symbols, days, real_ratios(bars), seed):
                tables.copy_in(connection, view, rows)
            for view in VIEWS:
                connection.execute(sql.SQL("ANALYZE {}").format(sql.Identifier(view)))
    return schema


def project(directory: Path) -> str:
    return f"bench_{directory.name}"


def feature_store(given: Path, directory: Path, schema: str, ttl: timedelta = TTL, **changes: dict[str, Any]) -> Any:
    """A store of its own in a directory, with the views on a schema, connected as the given feature_store.yaml says."""
    from feast import FeatureStore

    settings = yaml.safe_load(os.path.expandvars(given.read_text()))
    for section, key in (("materialization", None), ("batch_engine", None), ("online_store", "skip_dedup")):
        (settings.get(section, {}) if key else settings).pop(key or section, None)
    settings |= {"project": project(directory), "registry": str(directory / "registry.db")}
    for section, values in changes.items():
        settings[section] = settings.get(section, {}) | values
    path = directory / "feature_store.yaml"
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(settings))
    store = FeatureStore(fs_yaml_file=path)
    store.apply(feature_views(schema, ttl))
    return store


def conninfo(feature_store: Path) -> str:
    """The offline store's connection, from a feature_store.yaml."""
    from feast.infra.utils.postgres.connection_utils import _get_conn_kwargs, _get_conninfo
    from feast.repo_config import load_repo_config

    store = load_repo_config(feature_store.parent, feature_store).offline_store
    settings = {key: value for key, value in _get_conn_kwargs(store).items() if value is not None}
    return psycopg.conninfo.make_conninfo(_get_conninfo(store), **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("feature_store", type=Path)
    parser.add_argument("--bars", type=Path, default=ROOT / ".larder/trial/bars")
    parser.add_argument("--symbols", type=int, default=500)
    parser.add_argument("--days", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--chunk-interval", help="as 7 days; empty for plain tables; default: that of feature_repo")
    options = parser.parse_args()
    print(
        fill(
            conninfo(options.feature_store),
            options.symbols,
            options.days,
            options.bars,
            seed=options.seed,
            chunk_interval=options.chunk_interval,
        )
    )


if __name__ == "__main__":
    main()
