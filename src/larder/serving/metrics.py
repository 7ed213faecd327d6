"""What an instance counts for Prometheus: requests, rows, plans, round trips to Redis, and how old what it serves is.

The check port serves it (see checks). Where an instance has several workers, gunicorn.py names a directory in which
prometheus_client adds them up.
"""

from collections.abc import Sequence
from functools import cache
from statistics import median
from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest, values
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Who answered a read.
ANSWER = b"larder-answer"
ENDPOINTS = {"/get-online-features": "read", "/push": "push", "/write-to-online-store": "push"}
HOUR, DAY = 3600, 86_400

# Not the default registry: Feast has metrics of its own there.
REGISTRY = CollectorRegistry()
SECONDS = Histogram(
    "larder_request_seconds",
    "Requests, from their arrival to the end of their answer; a client that did not wait has the status `gone`.",
    ["endpoint", "status", "answer"],
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
    registry=REGISTRY,
)
ROWS = Counter("larder_rows", "Entities whose features were read, without Feast.", registry=REGISTRY)
PLANS = Counter(
    "larder_plans",
    "Plans of feature lists that were not in the cache, made of known features or by Feast.",
    ["source"],
    registry=REGISTRY,
)
REDIS = Histogram(
    "larder_redis_seconds",
    "Round trips to Redis, with their retries.",
    buckets=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5),
    registry=REGISTRY,
)
AGE = Histogram(
    "larder_served_age_seconds",
    "Median age of the values of a view in an answer; at most one answer a second of each feature list counts.",
    ["view"],
    buckets=(60, HOUR, 6 * HOUR, *(days * DAY for days in (1, 1.5, 2, 3, 4, 5, 7, 14, 30, 365))),
    registry=REGISTRY,
)
MADE, ASKED = (PLANS.labels(source) for source in ("features", "feast"))


@cache
def _seconds(endpoint: str, status: int, answer: bytes) -> Histogram:
    return SECONDS.labels(endpoint, status or "gone", answer.decode())


@cache
def _age(view: str) -> Histogram:
    return AGE.labels(view)


def aged(view: str, ages: Sequence[float | None]) -> None:
    """Note how old the values of a view in an answer are, in seconds; None is a value that is not there."""
    if known := [age for age in ages if age is not None]:
        _age(view).observe(median(known))


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
        endpoint = ENDPOINTS.get(path) or ("read" if path.startswith("/features/") else "other")
        _seconds(endpoint, status, answer).observe(perf_counter() - begun)


def exposition() -> bytes:
    """Return all metrics in Prometheus' text format."""
    if values.ValueClass is values.MutexValue:
        return generate_latest(REGISTRY)
    together = CollectorRegistry()
    MultiProcessCollector(together)  # type: ignore[no-untyped-call]
    return generate_latest(together)
