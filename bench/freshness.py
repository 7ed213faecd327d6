#!/usr/bin/env python3
"""How soon a deployed stack serves what is new, asked through its gateway: pushed quotes, and bars that land as a file.

    python bench/freshness.py pushes --gateway https://192.0.2.15:8443 --ca ca.crt --tokens tokens.json > pushes.json
    sudo python bench/freshness.py bars --gateway … --symbols 5000 --days 300 --runs 3 > bars.json

``pushes``: wrk pushes so many times a second, 1, 100 or 1,000 rows each (1,000 rows ten times a second are 10,000 rows:
a push may hold 100,000 values). Beside it a client pushes a quote of its own 20 times a second and reads it when the
push is accepted: `accepted_ms` is how long that took, `readable_ms` how long from there until the value was read, which
has to be the one pushed. CPU is counted by systemd unit for each row, without what is used when nothing is pushed.

``bars``, on the pipeline's host, as root: a file with a new day of each symbol is put where the pipeline looks, the
pipeline is started at once, as cron does, and every symbol is read until it has the new day. The stages are what the
pipeline says of itself: `check` comes when all is served. The symbols and their history are loaded first.
"""

from __future__ import annotations

import argparse
import csv
import json
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

import data
from gateway import IDLE_SECONDS, since, used
from load import Client, Watched
from serving import machine

INCOMING, METRICS = Path("/var/lib/larder/incoming"), Path("/var/lib/larder/metrics/pipeline.prom")
UNITS = {
    "push servers": [f"push-server@{number}" for number in range(1, 9)],
    "postgresql": ["postgresql@17-main"],
    "redis": ["redis-server"],
    "haproxy": ["haproxy"],
}
COLUMNS = {
    "Open": "open",
    "High": "high",
    "Low": "low",
    "Close": "close",
    "Adj Close": "adjusted_close",
    "Volume": "volume",
}
CONNECTIONS = 32
PROBES_PER_SECOND = 20


def client(chosen: argparse.Namespace) -> Client:
    trusted = Watched(None, Path, ssl.create_default_context(cafile=str(chosen.ca)))
    tokens = Watched(None, Path, json.loads(chosen.tokens.read_text()))
    return Client(chosen.gateway, trusted, tokens, 60)


def percentile(values: Sequence[float], part: float) -> float:
    return round(sorted(values)[min(len(values) - 1, int(len(values) * part))], 3)


# --- pushes ---


def quote(turn: int) -> dict[str, Any]:
    now = datetime.now(UTC).isoformat()
    row: dict[str, Any] = dict.fromkeys(("open", "high", "low", "bid", "ask", "spread", "volume"), 1.25)
    row |= {"symbol": "PUSH-PROBE", "event_timestamp": now, "created": now, "close": float(turn)}
    return {"push_source_name": "market_data_push_source", "df": {name: [value] for name, value in row.items()}}


def probe(asks: Client, end: float) -> tuple[list[float], list[float]]:
    """Push and read back until the end; return the milliseconds of both."""
    accepted, readable = [], []
    body = {"features": ["market_features:close"], "entities": {"symbol": ["PUSH-PROBE"]}}
    turn = 0
    while (begun := time.perf_counter()) < end:
        turn += 1
        pushed = quote(turn)
        sent = time.perf_counter()
        asks.post("/push", pushed, "writer")
        took = time.perf_counter()
        read = asks.post("/get-online-features", body)["results"][1]["values"]
        readable.append((time.perf_counter() - took) * 1000)
        accepted.append((took - sent) * 1000)
        if read != [turn]:
            raise SystemExit(f"close of PUSH-PROBE is {read}, and {turn} was pushed and accepted")
        time.sleep(max(0.0, 1 / PROBES_PER_SECOND - (time.perf_counter() - begun)))
    return accepted, readable


def flood(chosen: argparse.Namespace, rows: int, rate: float, said: dict[str, Any]) -> None:
    """Push so many rows so many times a second with wrk; leave what it says in `said`."""
    url, token = urlsplit(chosen.gateway), json.loads(chosen.tokens.read_text())["writer"]
    token = token if isinstance(token, str) else token[0]
    lines = ["POST /push HTTP/1.1", f"Host: {url.netloc}", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Authorization: Bearer {token}", ""])
    connections = max(1, min(CONNECTIONS, round(rate)))
    with tempfile.NamedTemporaryFile("w", newline="") as file:  # only its owner may read it
        file.write(head)
        file.flush()
        script = ["--script", str(Path(__file__).with_name("pushes.lua")), chosen.gateway, "--"]
        wrk = ["wrk", "--threads=1", f"--connections={connections}", f"--duration={chosen.seconds}s", "--timeout=30s"]
        pause = max(1, round(connections / rate * 1000) - 3)
        arguments = [file.name, str(rows), str(pause), str(int(time.time()) - 5)]
        ended = subprocess.run([*wrk, *script, *arguments], capture_output=True, text=True, check=True)
    said |= json.loads(ended.stdout.splitlines()[-1])


def pushes(chosen: argparse.Namespace) -> dict[str, Any]:
    asks = client(chosen)
    probe(asks, time.perf_counter() + 2)
    before = used()
    time.sleep(IDLE_SECONDS)
    idle = {part: seconds / IDLE_SECONDS for part, seconds in since(before, UNITS).items()}
    results = []
    for rows, rate in ((1, 1), (1, 100), (1, 1000), (100, 1), (100, 10), (1000, 10)):
        said: dict[str, Any] = {}
        flooding = threading.Thread(target=flood, args=(chosen, rows, rate, said))
        before, began = used(), time.monotonic()
        flooding.start()
        accepted, readable = probe(asks, time.perf_counter() + chosen.seconds - 1)
        flooding.join()
        passed = time.monotonic() - began
        if not said or said["failed"] or said["refused"]:
            raise SystemExit(f"pushes of {rows} rows, {rate} a second: {said}")
        count = said["requests"] * rows + len(accepted)
        cpu = {part: (took - idle[part] * passed) / count * 1e6 for part, took in since(before, UNITS).items()}
        result = {
            "rows": rows,
            "asked_per_s": rate,
            "pushes_per_s": round(said["requests"] / said["seconds"], 1),
            "rows_per_s": round(said["requests"] * rows / said["seconds"], 1),
            "push_ms": {"p50": round(said["p50_ms"], 3), "p99": round(said["p99_ms"], 3)},
            "accepted_ms": {"p50": percentile(accepted, 0.5), "p99": percentile(accepted, 0.99)},
            "readable_ms": {"p50": percentile(readable, 0.5), "p99": percentile(readable, 0.99)},
            "cpu_us_per_row": {part: round(took, 1) for part, took in cpu.items()},
        }
        print(result, file=sys.stderr)
        results.append(result)
    return {"idle_ms_per_s": {part: round(cores * 1000, 1) for part, cores in idle.items()}, "results": results}


# --- bars ---


def write(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    """Put a file where the pipeline looks for it, in one step."""
    new = path.with_name(f".{path.name}.new")
    with new.open("w", newline="") as file:
        csv.writer(file).writerows([["Symbol", "Date", *COLUMNS], *rows])
    new.chmod(0o644)
    new.replace(path)


def run_pipeline() -> None:
    subprocess.run(["/usr/bin/systemctl", "start", "feature-pipeline.service"], check=True)


def stages() -> dict[str, float]:
    """Return the seconds of each stage of the last run."""
    found = {}
    for line in METRICS.read_text().splitlines():
        if line.startswith("larder_pipeline_stage_duration_seconds{"):
            found[line.partition('"')[2].partition('"')[0]] = round(float(line.rpartition(" ")[2]), 3)
    return found


def newest(asks: Client, symbols: Sequence[str]) -> str:
    """Return the oldest of the event times that these symbols are served with, as a date."""
    body = {"features": ["ohlcv_features:close"], "entities": {"symbol": list(symbols)}}
    answered = asks.post("/get-online-features", body)["results"][1]["event_timestamps"]
    return str(min(answered))[:10]


def bars(chosen: argparse.Namespace) -> dict[str, Any]:
    asks = client(chosen)
    symbols = [data.symbol(number) for number in range(chosen.symbols)]
    last = np.datetime64(datetime.now(UTC).date(), "D") - np.timedelta64(1, "D")
    days = np.busday_offset(last, np.arange(1 - chosen.days - chosen.runs, 1), roll="backward").astype(str)
    series = data.real_ratios(data.walk(Path(tempfile.mkdtemp()) / "walk"))
    new: list[list[list[Any]]] = [[] for _ in range(chosen.runs)]
    history: list[list[Any]] = []
    for number, symbol in enumerate(symbols):
        drawn = data.bars_of(number, len(days), series, chosen.seed)
        columns = [drawn[name].tolist() for name in COLUMNS.values()]
        rows = [[symbol, *row] for row in zip(days.tolist(), *columns, strict=True)]
        history += rows[: chosen.days]
        for run in range(chosen.runs):
            new[run].append(rows[chosen.days + run])
        if len(history) > 500_000 or number == len(symbols) - 1:
            write(INCOMING / f"bench-{number}.csv", history)
            history = []
    begun = time.perf_counter()
    run_pipeline()
    asks.close()  # the gateway has closed the connection, which was idle for too long
    print(f"history: {time.perf_counter() - begun:.1f} s, {stages()}", file=sys.stderr)
    runs = []
    for run in range(chosen.runs):
        day = str(days[chosen.days + run])
        if newest(asks, symbols[-1:]) >= day:
            raise SystemExit(
                f"{symbols[-1]} is served with {day} already: measure on a host that has not been measured"
            )
        write(INCOMING / f"bench-day-{run}.csv", new[run])
        landed = time.perf_counter()
        pipeline = threading.Thread(target=run_pipeline)
        pipeline.start()
        for first in range(0, len(symbols), 100):
            while newest(asks, symbols[first : first + 100]) < day:
                if not pipeline.is_alive() and newest(asks, symbols[first : first + 100]) < day:
                    raise SystemExit(f"the pipeline has run, and {symbols[first]} or one after it is not of {day}")
                time.sleep(0.1)
        served = time.perf_counter() - landed
        pipeline.join()
        asks.close()
        runs.append({"served": served, **stages()})
        print(runs[-1], file=sys.stderr)
    medians = {part: round(statistics.median(run[part] for run in runs), 2) for part in runs[0]}
    spread = {
        "least": round(min(run["served"] for run in runs), 2),
        "most": round(max(run["served"] for run in runs), 2),
    }
    return {"symbols": chosen.symbols, "history_days": chosen.days, "runs": len(runs), "seconds": medians | spread}


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["pushes", "bars"])
    parser.add_argument("--gateway", required=True)
    parser.add_argument("--ca", type=Path, required=True)
    parser.add_argument("--tokens", type=Path, required=True, help="JSON: reader, writer")
    parser.add_argument("--seconds", type=int, default=10, help="of pushes of each size and rate")
    parser.add_argument("--symbols", type=int, default=5000)
    parser.add_argument("--days", type=int, default=300, help="of bars that each symbol has before")
    parser.add_argument("--runs", type=int, default=3, help="new days")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(arguments)


def main() -> None:
    chosen = options(sys.argv[1:])
    found = pushes(chosen) if chosen.what == "pushes" else bars(chosen)
    head = {"benchmark": chosen.what, "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine()}
    json.dump(head | found, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
