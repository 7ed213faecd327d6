#!/usr/bin/env python3
"""Reads through the gateway beside the same reads from a bare instance, on one host, in turns.

    python bench/gateway.py --gateway https://192.0.2.15:8443 --bare http://192.0.2.15:7001 \
        --bare-tls https://192.0.2.15:7002 --tokens tokens.json --symbols 500 > gateway.json

- ``gateway``: as clients read: TLS, a token, HAProxy, and TLS with certificates on both sides to the instances;
- ``bare_tls``: one instance with as many workers as the gateway has instances, by TLS, without a client's certificate;
- ``bare``: the same by plain HTTP.

wrk asks for 1, 10 or 100 symbols x 42 features, on 8 and on 64 connections, which are kept or ``fresh``, a new one for
each request. Every answer has to be the same from all three. CPU time is counted by systemd unit, so that the figures
also say where it goes, however busy the machine is: `cpu_us` is microseconds of CPU for each request, and
`share` the CPU of a bare read beside that of one through the gateway, wrk left out of both. On cores that have nothing
else to do, that is the share of the bare instance's rate that is left.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import data
from serving import batches, machine, summary
from wrk import Answers, Load, http_request

IDLE_SECONDS = 5
TICK = os.sysconf("SC_CLK_TCK")
FEATURES = [f"{view}:{name}" for view, names in data.VIEWS.items() for name in names]


def used() -> dict[str, float]:
    """Return the CPU seconds of all processes, by the systemd unit that they belong to."""
    seconds: dict[str, float] = defaultdict(float)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            unit = (stat.parent / "cgroup").read_text().strip().rpartition("/")[2]
        except OSError:  # it has ended
            continue
        seconds[unit.removesuffix(".service")] += (int(fields[11]) + int(fields[12])) / TICK
    return seconds


def since(before: Mapping[str, float], units: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return the CPU seconds of each part, which has so many units, since they were `before`."""
    now = used()
    return {part: sum(now.get(unit, 0) - before.get(unit, 0) for unit in of) for part, of in units.items()}


def measured(load: Load, seconds: int, units: Mapping[str, Sequence[str]], idle: Mapping[str, float]) -> dict[str, Any]:
    """Run a load; return its figures, and the CPU of each part for a request, in microseconds, without the idle one."""
    before, began = used(), time.monotonic()
    figures = load.run(seconds)
    cpu, passed = since(before, units), time.monotonic() - began
    count = figures["requests_per_s"] * seconds
    of_each = {part: (took - idle[part] * passed) / count * 1e6 for part, took in cpu.items()}
    of_each["client"] = figures["client_cores"] * passed / count * 1e6
    return figures | {f"{part}_cpu_us": round(took, 1) for part, took in of_each.items()}


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gateway", required=True)
    parser.add_argument("--bare", required=True)
    parser.add_argument("--bare-tls", required=True)
    parser.add_argument("--tokens", type=Path, required=True, help="JSON: reader, writer")
    parser.add_argument("--symbols", type=int, default=500, help="that are served, by the names of data.py")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 10, 100], help="symbols in a request")
    parser.add_argument("--connections", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--kinds", nargs="+", default=["kept", "fresh"], choices=["kept", "fresh"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args(arguments)


def main() -> None:
    chosen = options(sys.argv[1:])
    token = json.loads(chosen.tokens.read_text())["reader"]
    token = token if isinstance(token, str) else token[0]
    symbols = [data.symbol(number) for number in range(chosen.symbols)]
    targets = {"gateway": chosen.gateway, "bare_tls": chosen.bare_tls, "bare": chosen.bare}
    redis = ["redis-server"]
    instances = [f"feature-server@{number}" for number in range(1, 9)]
    units = {
        "gateway": {"haproxy": ["haproxy"], "instances": instances, "redis": redis},
        "bare_tls": {"instances": ["bench-bare-tls"], "redis": redis},
        "bare": {"instances": ["bench-bare"], "redis": redis},
    }
    before = used()
    time.sleep(IDLE_SECONDS)
    idle = {
        name: {part: seconds / IDLE_SECONDS for part, seconds in since(before, of).items()}
        for name, of in units.items()
    }
    answers, results = Answers(), []
    for size in chosen.sizes:
        asked = batches(symbols, size, chosen.seed)
        for connections in chosen.connections:
            for kind in chosen.kinds:
                loads = {}
                for name, url in targets.items():
                    requests = [http_request(url, batch, FEATURES, token, fresh=kind == "fresh") for batch in asked]
                    loads[name] = Load(url, requests, answers, connections)
                    loads[name].warm()
                runs: dict[str, list[dict[str, float]]] = {name: [] for name in loads}
                for number in range(chosen.runs):
                    order = [*loads][number % len(loads) :] + [*loads][: number % len(loads)]
                    for name in order:
                        runs[name].append(measured(loads[name], chosen.seconds, units[name], idle[name]))
                        print(size, connections, kind, name, runs[name][-1], file=sys.stderr)
                result = {"symbols": size, "features": len(FEATURES), "connections": connections, "kind": kind}
                results.append(result | {name: summary(found) for name, found in runs.items()} | shares(runs))
    document = {"benchmark": "gateway", "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine()}
    settings = {name: getattr(chosen, name) for name in ("runs", "seconds", "symbols", "seed")}
    idle_ms = {part: round(cores * 1000, 1) for part, cores in idle["gateway"].items()}
    json.dump(document | {"settings": settings, "idle_ms_per_s": idle_ms, "results": results}, sys.stdout, indent=2)
    print()


def shares(runs: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Return the share of each bare instance's rate that is left: by CPU, and by the rates themselves."""

    def work(run: dict[str, float]) -> float:
        return sum(took for part, took in run.items() if part.endswith("_cpu_us") and part != "client_cpu_us")

    found = {}
    for bare in ("bare", "bare_tls"):
        pairs = list(zip(runs[bare], runs["gateway"], strict=True))
        found[f"share_of_{bare}"] = statistics.median(work(theirs) / work(ours) for theirs, ours in pairs)
        rates = [ours["requests_per_s"] / theirs["requests_per_s"] for theirs, ours in pairs]
        found[f"rate_of_{bare}"] = statistics.median(rates)
    return {name: round(value, 3) for name, value in found.items()}


if __name__ == "__main__":
    main()
