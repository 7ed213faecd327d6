"""What an instance counts for Prometheus: requests, rows, plans, round trips to Redis, and how old what it serves is.

The check port serves it (see checks). A request only adds to numbers in its worker's memory. Where an instance has
several workers, each writes its numbers to a file of its own, when they have changed, ten times a second at most;
whichever of them is asked adds its own, as they are now, to those of the files.
"""

import asyncio
import json
import os
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from itertools import accumulate
from pathlib import Path
from statistics import median
from time import perf_counter

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Who answered a read.
ANSWER = b"larder-answer"
ENDPOINTS = {"/get-online-features": "read", "/push": "push", "/write-to-online-store": "push"}
HOUR, DAY = 3600, 86_400
SHARE_SECONDS = 0.1

Labels = tuple[str, ...]
# By metric, by labels: the sum, and the observations in each bucket.
Numbers = dict[str, dict[Labels, list[float]]]


class Series:
    """The numbers of one metric with one set of labels."""

    __slots__ = ("bounds", "numbers")

    def __init__(self, bounds: Sequence[float]) -> None:
        """Count up; with the upper bounds of buckets, also how many observations are in each, and above the last."""
        self.bounds = bounds
        self.numbers = [0.0] * (len(bounds) + 2 if bounds else 1)

    def inc(self, amount: float = 1) -> None:
        self.numbers[0] += amount

    def observe(self, amount: float) -> None:
        numbers = self.numbers
        numbers[0] += amount
        numbers[bisect_left(self.bounds, amount) + 1] += 1


class Metric:
    """A counter, or with buckets a histogram."""

    def __init__(self, name: str, text: str, labels: Sequence[str] = (), buckets: Sequence[float] = ()) -> None:
        self.name, self.text, self.label_names, self.bounds = name, text, labels, buckets
        self.series: dict[Labels, Series] = {}
        METRICS.append(self)

    def labels(self, *labels: str) -> Series:
        return self.series.setdefault(labels, Series(self.bounds))

    def family(self, series: dict[Labels, list[float]]) -> CounterMetricFamily | HistogramMetricFamily:
        """Return the metric with these numbers as prometheus_client has it."""
        if not self.bounds:
            counter = CounterMetricFamily(self.name, self.text, labels=self.label_names)
            for labels, (total,) in series.items():
                counter.add_metric(labels, total)
            return counter
        histogram = HistogramMetricFamily(self.name, self.text, labels=self.label_names)
        names = [*map(str, map(float, self.bounds)), "+Inf"]
        for labels, (total, *counts) in series.items():
            histogram.add_metric(labels, list(zip(names, accumulate(counts), strict=True)), total)
        return histogram


METRICS: list[Metric] = []
SECONDS = Metric(
    "larder_request_seconds",
    "Requests, from their arrival to the end of their answer; a client that did not wait has the status `gone`.",
    ["endpoint", "status", "answer"],
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
ROWS = Metric("larder_rows", "Entities whose features were read, without Feast.").labels()
PLANS = Metric(
    "larder_plans",
    "Plans of feature lists that were not in the cache, made of known features or by Feast.",
    ["source"],
)
REDIS = Metric(
    "larder_redis_seconds",
    "Round trips to Redis, with their retries.",
    buckets=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5),
).labels()
AGE = Metric(
    "larder_served_age_seconds",
    "Median age of the values of a view in an answer; at most one answer a second of each feature list counts.",
    ["view"],
    buckets=(60, HOUR, 6 * HOUR, *(days * DAY for days in (1, 1.5, 2, 3, 4, 5, 7, 14, 30, 365))),
)
SAMPLES = Metric(
    "larder_served_samples",
    "Answers that were chosen for the comparison with the history: kept, or dropped.",
    ["result"],
)
MADE, ASKED = (PLANS.labels(source) for source in ("features", "feast"))


@cache
def _seconds(path: str, status: int, answer: bytes) -> Series:
    return SECONDS.labels(ENDPOINTS.get(path, path), str(status or "gone"), answer.decode())


def aged(view: str, ages: Sequence[float | None]) -> None:
    """Note how old the values of a view in an answer are, in seconds; None is a value that is not there."""
    if known := [age for age in ages if age is not None]:
        AGE.labels(view).observe(median(known))


async def counted(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Let an application answer a request, and count it."""
    begun, status, answer = perf_counter(), 0, b""

    async def noting(message: Message) -> None:
        nonlocal status, answer
        if message["type"] == "http.response.start":
            status, answer = message["status"], dict(message["headers"]).get(ANSWER, b"")
        await send(message)

    try:
        await app(scope, receive, noting)
    finally:
        path: str = scope["path"]
        if path not in ENDPOINTS:  # which clients choose
            path = "read" if path.startswith("/features/") else "other"
        _seconds(path, status, answer).observe(perf_counter() - begun)


def numbers() -> Numbers:
    """Return what this worker has counted."""
    return {
        metric.name: {labels: list(series.numbers) for labels, series in list(metric.series.items())}
        for metric in METRICS
    }


class Shared:
    """The files in which an instance's workers show each other what they have counted."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        # A worker that ends leaves its file: a counter must not fall.
        self.own = directory / f"metrics-{time.time_ns()}-{os.getpid()}.json"
        self.written = ""

    def write(self) -> None:
        """Write what this worker has counted, if that has changed."""
        counted = {name: [*map(list, of.items())] for name, of in numbers().items()}
        if (text := json.dumps(counted)) != self.written:
            new = self.own.with_suffix(".new")
            new.write_text(text)
            new.replace(self.own)
            self.written = text

    def others(self) -> Iterator[Numbers]:
        for path in self.directory.glob("metrics-*.json"):
            if path != self.own:
                read = json.loads(path.read_text())
                yield {name: {tuple(labels): counted for labels, counted in of} for name, of in read.items()}

    async def keep(self) -> None:
        """Write again and again. What cannot be written now may be later; no request waits for it or fails of it."""
        while True:
            await asyncio.sleep(SHARE_SECONDS)
            with suppress(OSError):
                self.write()


class Together:
    """Collects the sum of the numbers of several workers."""

    def __init__(self, parts: Iterable[Numbers]) -> None:
        self.sums = numbers()
        for part in parts:
            for name, of in part.items():
                for labels, counted in of.items():
                    known = self.sums[name].get(labels)
                    self.sums[name][labels] = [*map(sum, zip(known, counted, strict=True))] if known else counted

    def collect(self) -> Iterator[CounterMetricFamily | HistogramMetricFamily]:
        for metric in METRICS:
            yield metric.family(self.sums[metric.name])


def exposition(shared: Shared | None = None) -> bytes:
    """Return all metrics in Prometheus' text format: those of this worker and of the others that share theirs."""
    registry = CollectorRegistry()
    registry.register(Together(shared.others() if shared else ()))
    return generate_latest(registry)
