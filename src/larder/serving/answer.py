"""The answer to a query, as JSON, put together from the bytes that Redis holds.

The values are those that Feast's server would have sent, in the order in which the features were asked for; Feast's own
order is that of a set, another in every process.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from itertools import chain, compress
from typing import Any

import numpy as np
import orjson
from feast.feature_server_utils import _timestamp_to_str, _value_to_native
from feast.protos.feast.types.Value_pb2 import Value
from google.protobuf.timestamp_pb2 import Timestamp

from larder.serving import metrics
from larder.serving.plan import Plan
from larder.serving.query import Query

PRESENT, NOT_FOUND, OUTSIDE_MAX_AGE = "PRESENT", "NOT_FOUND", "OUTSIDE_MAX_AGE"
# A serialized Value of a double: this tag and eight bytes.
TAG = b")"
DOUBLE = np.dtype([("tag", "S1"), ("value", "<f8")])
NAN = TAG + struct.pack("<d", math.nan)


class Column:
    """What the columns of one view have in common, as JSON: statuses, event times and ages, a piece for some rows."""

    def __init__(self) -> None:
        self.statuses: list[bytes] = []
        self.timestamps: list[bytes] = []
        self.ages: list[bytes] = []

    def closing(self) -> bytes:
        """Return what follows the values in an entry of `results`."""
        more = b'],"ages_s":[%b' % b",".join(self.ages) if self.ages else b""
        statuses, timestamps = b",".join(self.statuses), b",".join(self.timestamps)
        return b'%b],"statuses":[%b],"event_timestamps":[%b]}' % (more, statuses, timestamps)


class Answer:
    """The response to a query, put together from the replies for some of its rows at a time."""

    def __init__(self, plan: Plan, query: Query) -> None:
        self.plan, self.query = plan, query
        # JSON, a piece for some rows: the entities' columns, then the plan's.
        self.keys: list[list[bytes]] = [[] for _ in query.entities]
        self.values: list[list[bytes]] = [[] for _ in plan.refs]
        self.entity, self.views = Column(), [Column() for _ in plan.views]

    def add(
        self, entities: Mapping[str, Sequence[Any]], replies: Sequence[Sequence[Sequence[bytes | None]]], now: float
    ) -> None:
        """Add rows.

        Args:
            entities: the rows' keys.
            replies: for each group, for each row, the values of the group's fields.
            now: the time, in seconds since 1970.
        """
        plan, query, rows = self.plan, self.query, len(replies[0])
        present = repeated(b'"PRESENT"', rows)
        for pieces, values in zip(self.keys, entities.values(), strict=True):
            pieces.append(items(values))
        self.entity.statuses.append(present)
        self.entity.timestamps.append(repeated(b'"1970-01-01T00:00:00Z"', rows))
        if query.include_age:
            self.entity.ages.append(repeated(b"null", rows))
        fields = [list(zip(*reply, strict=True)) for reply in replies]
        columns: list[Sequence[bytes | None]] = []
        if sample := now >= plan.sampled + 1:
            plan.sampled = now
        for view, column in zip(plan.views, self.views, strict=True):
            shown = fields[view.group][view.first : view.last]
            moments = [moment(raw) for raw in fields[view.group][view.last]]
            ages = [None if at is None else now - at for _, at in moments]
            if sample:
                metrics.aged(view.name, ages)
            statuses = present
            if query.max_age_s is not None:
                states = [status(age, query.max_age_s) for age in ages]
                statuses = items(states)
                shown = [
                    tuple(raw if state == PRESENT else None for raw, state in zip(values, states, strict=True))
                    for values in shown
                ]
            columns += shown
            column.statuses.append(statuses)
            column.timestamps.append(b'"%b"' % '","'.join([written for written, _ in moments]).encode())
            if query.include_age:
                column.ages.append(items([None if age is None else round(age, 3) for age in ages]))
        doubles = iter(numbers(list(compress(columns, plan.doubles))))
        for pieces, column_values, is_double in zip(self.values, columns, plan.doubles, strict=True):
            pieces.append(next(doubles) if is_double else others(column_values))

    def parts(self) -> list[bytes]:
        """Return the response in parts, those that its columns share but once in memory."""
        plan, ends, entity = self.plan, [view.closing() for view in self.views], self.entity.closing()
        columns = [(pieces, entity) for pieces in self.keys]
        columns += [(self.values[number], ends[plan.view_of[number]]) for number in plan.order]
        names = b'],"metadata":{"feature_names":[%b]}}' % items([*self.query.entities, *plan.names])
        if len(columns[0][0]) == 1:
            results = b",".join([b'{"values":[%b%b' % (values, end) for (values,), end in columns])
            return [b'{"results":[%b%b' % (results, names)]
        parts = []
        for pieces, end in columns:
            parts += [b',{"values":[', b",".join(pieces), end]
        parts[0] = b'{"results":[{"values":['
        return [*parts, names]


def status(age: float | None, max_age_s: float) -> str:
    if age is None:
        return NOT_FOUND
    return PRESENT if 0 <= age <= max_age_s else OUTSIDE_MAX_AGE


def items(values: Any) -> bytes:
    """Return the items of a JSON array; what is no number is null."""
    return orjson.dumps(values)[1:-1]


def numbers(columns: Sequence[Sequence[bytes | None]]) -> list[bytes]:
    """Return the JSON items of each column of serialized doubles, all at once where they are finite or not stored."""
    values = list(chain.from_iterable(columns))
    joined = b"".join([raw or NAN for raw in values])
    # Doubles only: every value begins with the tag where the one before, of nine bytes, has ended.
    if values and len(joined) == DOUBLE.itemsize * len(values) and joined[:: DOUBLE.itemsize] == TAG * len(values):
        doubles = np.frombuffer(joined, DOUBLE)["value"].astype(np.float64).reshape(len(columns), -1)
        nulls = len(values) - np.count_nonzero(np.isfinite(doubles))
        # A NaN that is stored is no null: Feast has a word for it.
        if not nulls or nulls == values.count(None) + values.count(b""):
            return orjson.dumps(doubles, option=orjson.OPT_SERIALIZE_NUMPY)[2:-2].split(b"],[")
    return [others(column) for column in columns]


def others(column: Sequence[bytes | None]) -> bytes:
    """Return the JSON items of a column of serialized values of any type, as Feast's server has them."""
    return items([_value_to_native(Value.FromString(raw or b"")) for raw in column])


def repeated(value: bytes, rows: int) -> bytes:
    """Return the JSON items of a column that has one value in all its rows, one at least."""
    return value + (b"," + value) * (rows - 1)


@lru_cache(maxsize=10_000)
def moment(raw: bytes | None) -> tuple[str, float | None]:
    """Return an event time as Feast writes it, which rounds it to microseconds, and in seconds (None if it is none)."""
    if not raw:
        return "1970-01-01T00:00:00Z", None
    stored, shown = Timestamp.FromString(raw), Timestamp()
    seconds = stored.seconds + stored.nanos / 1_000_000_000.0
    shown.FromDatetime(datetime.fromtimestamp(seconds, tz=UTC))
    return _timestamp_to_str(shown), seconds
