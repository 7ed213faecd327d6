"""Ways to do the same, each in a process of its own, measured in turn.

A way is a function that prepares and returns what is to be timed. Its process stays for all rounds, so that imports and
caches are warm and its peak memory is its own; in every round the ways run one after the other, so that what else the
machine does meets them all.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psycopg

TERMINATE = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s"

Way = Callable[[Path], Callable[[], Any]]  # takes a directory for itself; what it returns is called for each round


@dataclass
class Measured:
    """One way's results."""

    rounds: int
    process: Any
    pipe: Connection
    seconds: list[float] = field(default_factory=list)
    idle_mb: float = 0
    peak_mb: float = 0
    gave_up_after: float | None = None

    def report(self) -> dict[str, Any]:
        """Seconds as median, least and most, and the peak memory of the process in MB, before and after."""
        if not self.seconds:
            return {"gave_up_after": self.gave_up_after}
        return {
            "median": statistics.median(self.seconds),
            "least": min(self.seconds),
            "most": max(self.seconds),
            "runs": len(self.seconds),
            "idle_mb": round(self.idle_mb),
            "peak_mb": round(self.peak_mb),
        }


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _serve(way: Way, name: str, directory: Path, pipe: Connection) -> None:
    os.environ["PGAPPNAME"] = f"bench {name}"
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        run = way(directory)
        pipe.send(_peak_mb())
        while pipe.recv():
            started = time.perf_counter()
            result = run()
            seconds = time.perf_counter() - started
            pipe.send((seconds, _peak_mb()))
            if callable(result):  # leaves its answer, untimed
                result()
            pipe.send(None)


def measure(
    ways: Mapping[str, tuple[Way, int]], directory: Path, *, limit: float, conninfo: str
) -> dict[str, Measured]:
    """Run each way as many rounds as it says (0: leave it out); after `limit` seconds one is given up."""
    context = multiprocessing.get_context("spawn")
    measured: dict[str, Measured] = {}
    for name, (way, rounds) in ways.items():
        if not rounds:
            continue
        pipe, theirs = context.Pipe()
        (directory / name).mkdir()
        process = context.Process(target=_serve, args=(way, name, directory / name, theirs), daemon=True)
        process.start()
        theirs.close()
        measured[name] = Measured(rounds, process, pipe, idle_mb=pipe.recv())
    for number in range(max(one.rounds for one in measured.values())):
        for name, one in measured.items():
            if number >= one.rounds or one.gave_up_after:
                continue
            one.pipe.send(True)
            if not one.pipe.poll(limit):
                one.gave_up_after = limit
                one.process.kill()
                with psycopg.connect(conninfo) as connection:  # the server would go on
                    connection.execute(TERMINATE, [f"bench {name}"])
                continue
            seconds, one.peak_mb = one.pipe.recv()
            one.seconds.append(seconds)
            one.pipe.recv()
            print(f"{name}: {seconds:.2f} s", file=sys.stderr)
    for one in measured.values():
        if one.process.is_alive():
            one.pipe.send(False)
            one.process.join()
    return measured


def report(sizes: Mapping[str, Any], measured: Mapping[str, Measured], floor: str) -> str:
    """One JSON document: each way, how often it is slower than the floor, and how often Larder is quicker than it."""
    document: dict[str, Any] = {**sizes, "ways": {name: one.report() for name, one in measured.items()}}
    medians = {name: way.get("median") for name, way in document["ways"].items()}
    for name, way in document["ways"].items():
        if medians[name]:
            way["of_floor"] = round(medians[name] / medians[floor], 2)
            way["of_larder"] = round(medians[name] / medians["larder"], 2)
        else:
            way["of_larder_at_least"] = round(way["gave_up_after"] / medians["larder"], 2)
    return json.dumps(document, indent=2)
