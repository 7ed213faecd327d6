"""A sample of what clients are answered, for the comparison with a point-in-time join: training-serving skew.

A share of the reads that need no Feast is chosen, and of each one entity. The hot path only appends what Redis has
answered to a list of bounded length. A thread writes it, as JSON lines, to a file of bounded size, which the workers of
an instance share; the file before it is kept, so that samples span a day and more. `GET /served` tells both files.

    {"served_at": "2026-11-30T10:00:00.25+00:00", "entity": {"symbol": "A"}, "views": {"prices":
     {"event_timestamp": "2026-11-27T00:00:00+00:00", "values": {"close": 1.5}}}}

`event_timestamp` is null where the online store has no row. Values are those of the store: what is too old for the
request's `max_age_s` is left out, since the client has got nothing.
"""

import asyncio
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from random import random, randrange
from time import monotonic
from typing import Any, NamedTuple

from feast.protos.feast.types.Value_pb2 import Value
from google.protobuf.timestamp_pb2 import Timestamp

from larder.serving import metrics
from larder.serving.plan import Plan
from larder.serving.query import Query

# Of a worker: with 42 features a sample has about a kilobyte, so a file spans a day at least.
SECONDS_APART = 10.0
WRITE_SECONDS = 1.0
MOST_HELD = 100
FILE_BYTES = 8 << 20
JSON_LINES = "application/jsonl"
KEPT, DROPPED = (metrics.SAMPLES.labels(result) for result in ("kept", "dropped"))
# Other types are not compared.
COMPARED = {"double_val", "float_val", "int32_val", "int64_val", "string_val", "bool_val"}


class Sample(NamedTuple):
    """A row as it was read: its entity, and for each group of the plan the values of the group's fields."""

    plan: Plan
    max_age_s: float | None
    entity: dict[str, Any]
    replies: list[Sequence[bytes | None]]
    now: float


class Served:
    """The sample of an instance; each worker adds to it."""

    def __init__(self, ratio: float, directory: Path) -> None:
        self.ratio = ratio
        self.path, self.former = directory / "served.jsonl", directory / "served.1.jsonl"
        self.lock = directory / "lock"
        self.held: list[Sample] = []
        self.next = 0.0

    @classmethod
    def configured(cls) -> "Served | None":
        """Return the sample that the instance's unit asks for; None where it asks for none."""
        ratio = float(os.environ.get("LARDER_SKEW_SAMPLE_RATIO", "0"))
        return cls(ratio, Path(os.environ["STATE_DIRECTORY"])) if ratio > 0 else None

    def pick(self, rows: int) -> int:
        """Return the number of the row to note of a read of so many; -1 for none."""
        if random() >= self.ratio:  # noqa: S311 # no secret
            return -1
        if monotonic() < self.next or len(self.held) >= MOST_HELD:
            DROPPED.inc()
            return -1
        self.next = monotonic() + SECONDS_APART
        return randrange(rows)  # noqa: S311 # no secret

    def note(
        self,
        query: Query,
        plan: Plan,
        entities: Mapping[str, Sequence[Any]],
        replies: Sequence[Sequence[Sequence[bytes | None]]],
        row: int,
        now: float,
    ) -> None:
        """Hold a row of an answer until it is written."""
        entity = {name: values[row] for name, values in entities.items()}
        self.held.append(Sample(plan, query.max_age_s, entity, [reply[row] for reply in replies], now))

    async def keep(self) -> None:
        """Write again and again what is held."""
        while True:
            await asyncio.sleep(WRITE_SECONDS)
            if self.held:
                held, self.held = self.held, []
                await asyncio.to_thread(self.write, held)

    def write(self, samples: Sequence[Sample]) -> None:
        """Append samples to the file; what cannot be written is dropped, and counted."""
        try:
            lines = "".join(json.dumps(as_dict(sample)) + "\n" for sample in samples).encode()
            with self.alone():
                if self.path.exists() and self.path.stat().st_size + len(lines) > FILE_BYTES:
                    self.path.replace(self.former)
                with self.path.open("ab") as file:
                    file.write(lines)
        except Exception:  # a full disk, or bytes that are no value: reads go on
            DROPPED.inc(len(samples))
        else:
            KEPT.inc(len(samples))

    def told(self, _client: str) -> tuple[int, str, bytes]:
        """Return the answer to `GET /served`."""
        with self.alone():
            return 200, JSON_LINES, b"".join(p.read_bytes() for p in (self.former, self.path) if p.exists())

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep out the other workers of the instance."""
        with self.lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def as_dict(sample: Sample) -> dict[str, Any]:
    """Return a sample as its line has it."""
    plan = sample.plan
    names = iter(plan.refs)
    views = {}
    for view in plan.views:
        reply = sample.replies[view.group]
        raw = {next(names).partition(":")[2]: value for value in reply[view.first : view.last]}
        stamp = Timestamp.FromString(reply[view.last] or b"")
        seconds = stamp.seconds + stamp.nanos / 1e9
        there = bool(reply[view.last])
        if there and sample.max_age_s is not None and not 0 <= sample.now - seconds <= sample.max_age_s:
            continue
        views[view.name] = {
            "event_timestamp": stamp.ToDatetime(tzinfo=UTC).isoformat() if there else None,
            "values": dict(found for name, value in raw.items() for found in compared(name, value if there else None)),
        }
    at = datetime.fromtimestamp(sample.now, UTC).isoformat()
    return {"served_at": at, "entity": sample.entity, "views": views}


def compared(name: str, raw: bytes | None) -> Iterator[tuple[str, Any]]:
    """Yield a feature with its value, if it has a type that is compared."""
    value = Value.FromString(raw or b"")
    kind = value.WhichOneof("val")
    if kind is None or kind == "null_val":
        yield name, None
    elif kind in COMPARED:
        yield name, getattr(value, kind)
