#!/usr/bin/env python3
"""Larder's load and compute against what they cannot do without: TA-Lib in memory and COPY.

    python bench/compute.py postgresql://postgres@192.0.2.15/postgres > compute.json

The user has to be allowed to create databases; TimescaleDB has to be there. Each run has a new database with the tables
of feature_repo/tables.yml. Measured in turn, each in a process of its own:

- ``larder``: ``larder load`` of a directory with one CSV file per symbol, then ``larder compute``;
- ``floor``: the same bars, as arrays in memory, through TA-Lib (the 42 features are written here a second time) and by
  binary COPY into the same seven tables, with the same indexes, all in one transaction.

Then what is in the seven tables of one is compared with the other. Afterwards comes a day: one new bar for each of many
symbols that have a history, ``day`` in the result; then a full recompute has to give the same. The result is one JSON
document, times in seconds. The bars are made from real ones (bench/data.py).
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psycopg
import pyarrow as pa
import talib
import yaml
from psycopg import sql
from psycopg.conninfo import make_conninfo

import data
from data import FORMULAS, INTEGERS, VIEWS
from larder.bars.load import load
from larder.features.compute import compute
from larder.features.definitions import LOAD, RUN
from larder.postgres import session, tables

ROOT = Path(__file__).resolve().parent.parent
SYMBOLS_AT_ONCE = 20
COMPARED = 100  # symbols whose every value is
HEADER = ("Date", "Open", "High", "Low", "Close", "Volume")
BARS = "market_data.ohlcv_daily"
TABLES = (BARS, *(f"features.{view}" for view in VIEWS))
DEVIATIONS = {"bb_upper", "bb_lower", "bb_width", "std_20", "hist_volatility_20"}
Arrays = dict[str, npt.NDArray[np.float64]]


def features(bars: Arrays) -> Arrays:
    """All 42, by TA-Lib where it has them."""
    o, h, l, c, v = (bars[name] for name in ("open", "high", "low", "close", "volume"))  # noqa: E741 # their names
    typical = (h + l + c) / 3
    before = np.concatenate(([np.nan], c[:-1]))
    log_return = np.log(c / before)
    upper, middle, lower = talib.BBANDS(c, 20, 2, 2, 0)
    macd, signal, histogram = talib.MACD(c, 12, 26, 9)
    k, d = talib.STOCH(h, l, c, 14, 3, 0, 3, 0)
    mean_volume = talib.SMA(v, 20)
    volatility = np.full(len(c), np.nan)
    volatility[1:] = talib.STDDEV(log_return[1:], 20) * np.sqrt(252 * 20 / 19)
    engulfing = np.sign(talib.CDLENGULFING(o, h, l, c)) * 100.0
    engulfing[:2] = np.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        volume_ratio = np.where(mean_volume == 0, np.nan, v / mean_volume)
        traded = talib.SUM(v, 20)
        vwap = np.where(traded == 0, np.nan, talib.SUM(typical * v, 20) / traded)
    found = {
        **bars,
        "typical_price": typical,
        **{f"sma_{n}": talib.SMA(c, n) for n in (5, 10, 20, 50, 200)},
        **{f"ema_{n}": talib.EMA(c, n) for n in (12, 26, 50)},
        "rsi_14": talib.RSI(c, 14),
        "macd": macd,
        "macd_signal": signal,
        "macd_histogram": histogram,
        "stoch_k": k,
        "stoch_d": d,
        "roc_10": talib.ROC(c, 10),
        "atr_14": talib.ATR(h, l, c, 14),
        "bb_upper": upper,
        "bb_middle": middle,
        "bb_lower": lower,
        "bb_width": (upper - lower) / middle,
        "std_20": talib.STDDEV(c, 20),
        "hist_volatility_20": volatility,
        "volume_sma_20": mean_volume,
        "volume_ratio": volume_ratio,
        "obv": talib.OBV(c, v),
        "vwap": vwap,
        "mfi_14": talib.MFI(h, l, c, v, 14),
        "daily_return": c / before - 1,
        "log_return": log_return,
        "price_range": h - l,
        "body_size": np.abs(c - o),
        "upper_shadow": h - np.maximum(o, c),
        "lower_shadow": np.minimum(o, c) - l,
        "is_green_candle": (c > o).astype(float),
        "cdl_engulfing": engulfing,
    }
    return {name: values for names in VIEWS.values() for name, values in found.items() if name in names}


# --- the systems, each in a process of its own ---


def floor(url: str, symbols: list[str], days: npt.NDArray[np.datetime64], bars: list[Arrays]) -> dict[str, float]:
    started = time.perf_counter()
    times = pa.array(days).cast(pa.timestamp("us", "UTC"))
    one_of_all = pa.array(np.ones(len(days), np.int32))
    with session.connect(url, "floor") as connection, connection.transaction():
        for first in range(0, len(symbols), SYMBOLS_AT_ONCE):
            parts: dict[str, list[pa.Table]] = {table: [] for table in TABLES}
            for symbol, one in list(zip(symbols, bars, strict=True))[first : first + SYMBOLS_AT_ONCE]:
                key = {"symbol": pa.array([symbol] * len(days)), "event_timestamp": times}
                found = features(one)
                for table, names in zip(TABLES, (list(one), *VIEWS.values()), strict=True):
                    values = {name: _column(name, found[name]) for name in names}
                    values[LOAD if table == BARS else RUN] = one_of_all
                    parts[table].append(pa.table(key | values))
            for table, held in parts.items():
                tables.copy_in(connection, table, pa.concat_tables(held))
    return {"seconds": time.perf_counter() - started}


def _column(name: str, values: npt.NDArray[np.float64]) -> pa.Array:
    column = pa.array(values, from_pandas=True)
    return column.cast(pa.int64()) if name in INTEGERS else column


def larder(url: str, directory: Path) -> dict[str, float]:
    started = time.perf_counter()
    loaded = load(url, [directory])
    between = time.perf_counter()
    rows = compute(url, FORMULAS)
    ended = time.perf_counter()
    if loaded.rejected or loaded.refused or rows != loaded.changed * len(VIEWS):
        raise SystemExit(f"{loaded} gave {rows} rows")
    return {"seconds": ended - started, "load_seconds": between - started, "compute_seconds": ended - between}


def _call(pipe: Any, function: Callable[..., dict[str, float]], arguments: tuple[Any, ...]) -> None:
    before = time.process_time()
    figures = function(*arguments)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    pipe.send(figures | {"client_cpu_seconds": time.process_time() - before, "peak_mb": peak / 1024})


def apart(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """Call it in a new process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_call, args=(there, function, arguments))
    process.start()
    there.close()
    try:
        figures: dict[str, float] = here.recv()
    except EOFError:
        raise SystemExit(f"{function.__name__} failed") from None
    finally:
        process.join()
    print(f"{function.__name__}: {figures}", file=sys.stderr)
    return figures


# --- the data ---


@contextmanager
def database(admin_url: str, name: str) -> Iterator[str]:
    """A new database with the tables of the feature repository; its URL."""
    named = sql.Identifier(name)
    with psycopg.connect(admin_url, autocommit=True) as admin:
        admin.execute(sql.SQL("DROP DATABASE IF EXISTS {}").format(named))
        admin.execute(sql.SQL("CREATE DATABASE {}").format(named))
        # As in Larder's own: with pgaudit a COPY into a hypertable ends the server (timescale/timescaledb#7667).
        admin.execute(sql.SQL("ALTER DATABASE {} SET pgaudit.log = 'none'").format(named))
        url = make_conninfo(admin_url, dbname=name)
        try:
            with psycopg.connect(url, autocommit=True) as connection:
                create(connection)
            admin.execute("CHECKPOINT")
            yield url
        finally:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(named))


def create(connection: psycopg.Connection) -> None:
    declared = yaml.safe_load((ROOT / "feature_repo/tables.yml").read_text())
    connection.execute("CREATE EXTENSION IF NOT EXISTS timescaledb")
    for schema in (*declared["schemas"], "features"):
        connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
    for table in (*declared["tables"], *FORMULAS.definitions.tables()):
        columns = [
            f"{column['name']} {column['type']}"
            + ("" if column.get("nullable", True) else " NOT NULL")
            + (f" DEFAULT {column['default']}" if "default" in column else "")
            for column in table["columns"]
        ]
        keys = [f"PRIMARY KEY ({', '.join(table['primary_key'])})"] if "primary_key" in table else []
        connection.execute(f"CREATE TABLE {table['name']} ({', '.join(columns + keys)})")
        if hypertable := table.get("hypertable"):
            connection.execute(
                "SELECT create_hypertable(%s, by_range(%s, %s::interval), create_default_indexes => false)",
                [table["name"], hypertable["time_column"], hypertable["chunk_interval"]],
            )
        for index in table.get("indexes", []):
            connection.execute(f"CREATE INDEX ON {table['name']} ({', '.join(index['columns'])})")


def write_files(directory: Path, symbols: Sequence[str], days: npt.NDArray[np.datetime64], bars: list[Arrays]) -> None:
    dates = days.astype("datetime64[D]").astype(str)
    for symbol, one in zip(symbols, bars, strict=True):
        with (directory / f"{symbol}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(HEADER)
            columns = [one[name.lower()] for name in HEADER[1:]]
            writer.writerows(zip(dates, *(column.tolist() for column in columns), strict=True))


Stored = dict[str, tuple[list[str], dict[str, npt.NDArray[np.float64]]]]


def stored(url: str, symbols: Sequence[str]) -> Stored:
    """All values of these symbols in all tables: by table the names, and by symbol the (row, name) values."""
    found: Stored = {}
    with psycopg.connect(url) as connection:
        for table in TABLES:
            cursor = connection.execute(sql.SQL("SELECT * FROM {} LIMIT 0").format(session.identifier(table)))
            no_values = {*tables.KEY, LOAD, RUN}  # of which row, and who wrote it
            names = [column.name for column in cursor.description or [] if column.name not in no_values]
            statement = sql.SQL(
                "SELECT symbol, array_agg(array[{}]::float8[] ORDER BY event_timestamp) FROM {} "
                "WHERE symbol = ANY(%s) GROUP BY symbol"
            ).format(
                sql.SQL(", ").join([sql.SQL("extract(epoch FROM event_timestamp)"), *map(sql.Identifier, names)]),
                session.identifier(table),
            )
            rows = connection.cursor(binary=True).execute(statement, [list(symbols)])
            found[table] = (["event_timestamp", *names], {symbol: np.array(v, dtype=float) for symbol, v in rows})
    return found


def undecided(names: Sequence[str], bars: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Rows whose mfi_14 follows from how a sum was rounded: a typical price of its 14 steps is that of the day before.

    TA-Lib is compiled to add in any order, so a change of 1e-16 is a rise for one and a fall for the other.
    """
    typical = sum(bars[:, list(names).index(name)] for name in ("high", "low", "close")) / 3
    equal = np.abs(np.diff(typical, prepend=np.nan)) < 1e-12 * typical
    return np.convolve(equal, np.ones(14))[: len(equal)] > 0


def compare(first: Stored, second: Stored) -> None:
    """All values, as FEATURES.md has it: 1e-9, and 1e-7 where a standard deviation is in it."""
    bars_names, bars = first[BARS]
    for table in TABLES:
        names, (a, b) = first[table][0], (found[table][1] for found in (first, second))
        if a.keys() != b.keys():
            raise SystemExit(f"{table}: not the same keys")
        for symbol in a:
            for name, x, y in zip(names, a[symbol].T, b[symbol].T, strict=True):
                scale = np.nanmax(np.abs(a[symbol]), initial=0) if name in DEVIATIONS else 0
                tolerance = 1e-7 if name in DEVIATIONS else 1e-9
                near = np.isclose(x, y, rtol=tolerance, atol=1e-9 * max(scale, 1), equal_nan=True)
                if name == "mfi_14":
                    near |= undecided(bars_names, bars[symbol])
                if not near.all():
                    at = int(np.argmin(near))
                    raise SystemExit(f"{table}.{name} of {symbol}, row {at}: {x[at]!r} and {y[at]!r}")


# --- the runs ---


def report(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Seconds as median, least and most; of the parts and of the client's CPU the median; the peak memory in MB."""
    seconds = [run["seconds"] for run in runs]
    parts = runs[0].keys() - {"seconds", "peak_mb"}
    return {
        "median": round(statistics.median(seconds), 3),
        "least": round(min(seconds), 3),
        "most": round(max(seconds), 3),
        "runs": len(runs),
        **{part: round(statistics.median(run[part] for run in runs), 3) for part in sorted(parts)},
        "peak_mb": round(max(run["peak_mb"] for run in runs)),
    }


def whole(chosen: argparse.Namespace) -> dict[str, Any]:
    series = data.real_ratios(chosen.bars)
    symbols = [data.symbol(number) for number in range(chosen.symbols)]
    days = data.days_before(chosen.days)
    bars = [data.bars_of(number, chosen.days, series, chosen.seed) for number in range(chosen.symbols)]
    runs: dict[str, list[dict[str, float]]] = {"larder": [], "floor": []}
    with tempfile.TemporaryDirectory() as directory:
        write_files(Path(directory), symbols, days, bars)
        for number in range(chosen.runs):
            with (
                database(chosen.url, "larder_bench_larder") as ours,
                database(chosen.url, "larder_bench_floor") as theirs,
            ):
                turns: list[tuple[str, Callable[..., dict[str, float]], tuple[Any, ...]]] = [
                    ("larder", larder, (ours, Path(directory))),
                    ("floor", floor, (theirs, symbols, days, bars)),
                ]
                for name, function, arguments in turns[:: -1 if number % 2 else 1]:  # nobody is always first
                    runs[name].append(apart(function, *arguments))
                if number == 0:
                    compare(stored(ours, symbols[:COMPARED]), stored(theirs, symbols[:COMPARED]))
    ways = {name: report(figures) for name, figures in runs.items()}
    ways["larder"]["of_floor"] = round(ways["larder"]["median"] / ways["floor"]["median"], 2)
    return {
        "symbols": chosen.symbols,
        "days": chosen.days,
        "features": sum(map(len, VIEWS.values())),
        "ways": ways,
        "answers": "equal",
    }


def day(chosen: argparse.Namespace) -> dict[str, Any]:
    """One new bar for every symbol, again and again; each day is one file of all symbols."""
    series = data.real_ratios(chosen.bars)
    history = chosen.day_history
    days = data.days_before(history + chosen.runs)
    runs = []
    with database(chosen.url, "larder_bench_day") as url, tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        newest: list[list[list[Any]]] = [[] for _ in range(chosen.runs)]
        for first in range(0, chosen.day_symbols, 500):
            numbers = range(first, min(first + 500, chosen.day_symbols))
            bars = [data.bars_of(number, len(days), series, chosen.seed) for number in numbers]
            for number, one in zip(numbers, bars, strict=True):
                for run in range(chosen.runs):
                    at = history + run
                    values = (one[name.lower()][at].item() for name in HEADER[1:])
                    newest[run].append([data.symbol(number), days[at].astype("datetime64[D]"), *values])
            cut = [{name: values[:history] for name, values in one.items()} for one in bars]
            part = directory / str(first)
            part.mkdir()
            write_files(part, [data.symbol(number) for number in numbers], days[:history], cut)
            load(url, [part])
        compute(url, FORMULAS)
        with psycopg.connect(url, autocommit=True) as connection:
            for table in TABLES:
                connection.execute(sql.SQL("VACUUM ANALYZE {}").format(session.identifier(table)))
            connection.execute("CHECKPOINT")
        for run, rows in enumerate(newest):
            incoming = directory / f"day-{run}"
            incoming.mkdir()
            with (incoming / "all.csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerows([("Symbol", *HEADER), *rows])
            runs.append(apart(larder, url, incoming))
        if chosen.day_check:
            some = [data.symbol(number) for number in range(min(COMPARED, chosen.day_symbols))]
            by_day = stored(url, some)
            compute(url, FORMULAS, full=True)
            compare(by_day, stored(url, some))
    return {
        "symbols": chosen.day_symbols,
        "history_days": history,
        "ways": {"larder": report(runs)},
        "equal_to_a_full_recompute": True if chosen.day_check else "not asked",
    }


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpus = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return {"cpu": next(iter(cpus), platform.machine()), "cores": os.cpu_count(), "kernel": platform.release()}


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure load and compute.")
    parser.add_argument("url", help="of PostgreSQL, of a user who may create databases")
    parser.add_argument("--bars", type=Path, default=ROOT / ".larder/trial/bars", help="directory of real bars")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--symbols", type=int, default=500)
    parser.add_argument("--days", type=int, default=5000)
    parser.add_argument("--day-symbols", type=int, default=5000, help="0: leave the incremental day out")
    parser.add_argument("--day-history", type=int, default=1500, help="days that are there before")
    parser.add_argument("--day-check", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=20260101)
    return parser.parse_args(arguments)


def main() -> None:
    chosen = options(sys.argv[1:])
    with psycopg.connect(chosen.url) as connection:
        servers = connection.execute(
            "SELECT current_setting('server_version'),"
            " (SELECT default_version FROM pg_available_extensions WHERE name = 'timescaledb')"
        ).fetchall()[0]
    versions = {"python": platform.python_version(), "postgresql": servers[0], "timescaledb": servers[1]}
    document = {
        "benchmark": "compute",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions | {name: version(name) for name in ("psycopg", "pyarrow", "numpy", "ta-lib")},
        "settings": {"seed": chosen.seed},
        **(whole(chosen) if chosen.symbols else {}),
        **({"day": day(chosen)} if chosen.day_symbols else {}),
    }
    json.dump(document, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
