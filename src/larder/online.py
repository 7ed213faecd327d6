"""Online features from a plan: the hot path of the feature server.

Feast works out what a request means on every request. Here that is done once per feature list and registry, by Feast's
own code, and kept as a plan: which fields of which Redis hashes, in which order, under which names. A request is then
one pipelined round trip, one HMGET per entity (for all of its views), and a body put together from bytes. The values
are those that Feast's server would have sent, in the order in which the features were asked for; Feast's own order is
that of a set, another in every process.

What a plan cannot do Feast's own store answers, in a thread: on-demand views, aliased join keys, other stores than
Redis, values that need converting. The header `Larder-Answer` says which of the two answered. Where Feast has to ask
for permissions or to count reads, its own endpoint answers everything.

No request holds up the others: how many values one may ask for is bounded, a value that Feast itself has to work out
counting tenfold; what is more than a small read waits for its turn (see larder.turns) and is read and written a piece
at a time, with the event loop free in between.

Feast has no notion of age on reads: whatever its view's TTL, an old value is `PRESENT`. A client may ask for more:

- `include_age`: each column has `ages_s`, the seconds since each value's event time; null where there is none.
- `max_age_s`: a value that is older, or from the future, is null, with the status `OUTSIDE_MAX_AGE`; one without an
  event time, `NOT_FOUND`.

`GET /features/{entity}` asks the same of one entity, with the fields of the request as parameters of the URL.
"""

import asyncio
import json
import logging
import math
import os
import struct
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from itertools import chain, compress
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from feast import FeatureStore, ValueType, metrics, utils
from feast.feature_server import GetOnlineFeaturesRequest
from feast.feature_server_utils import _timestamp_to_str, _value_to_native, convert_response_to_dict
from feast.infra.key_encoding_utils import serialize_entity_key_prefix
from feast.infra.online_stores.helpers import _mmh3
from feast.infra.online_stores.redis import RedisOnlineStore, RedisType
from feast.protos.feast.types.Value_pb2 import NULL, Value
from feast.types import Float64
from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import ValidationError
from pydantic_core import to_json
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from larder.failures import is_outage, sentence, wrong_content_type
from larder.reads import explain_entities, explain_features
from larder.redis_line import Line
from larder.turns import Pieces, Turns, Unsent

log = logging.getLogger("uvicorn.error")

PATH = "/get-online-features"
TYPED = "/features/"
JSON = b"application/json"
ANSWER = b"larder-answer"
# Who asks, as the gateway says.
CLIENT = b"larder-client"
# Clients choose what is planned: no more of it than this is kept.
MAX_PLANS = 200
# Features times rows in one request: some 9 MB of JSON where every value has an event time of its own, and an age.
MAX_VALUES = 100_000
# A value that Feast works out takes about ten times as long.
FEAST_WEIGHT = 10
# A body and a read below these need no turn. A larger one is read whole up to a size that takes some milliseconds, and
# else in pieces of about two.
SMALL_BODY, SMALL_READ, WHOLE_VALUES, PIECE_VALUES = 16_384, 1000, 5000, 2000
# A row costs about as much as this many values.
ROW_WEIGHT = 6
# Larger requests that are in memory at a time, and of one client.
TURNS, TURNS_OF_A_CLIENT = 4, 2
# Larger answers are sent in pieces of this size, as their client reads them, and not for longer than this. Those that
# are on their way have so much room.
PIECE_BYTES, SEND_SECONDS, UNSENT_BYTES = 262_144, 30, 268_435_456
PRESENT, NOT_FOUND, OUTSIDE_MAX_AGE = "PRESENT", "NOT_FOUND", "OUTSIDE_MAX_AGE"
# A serialized Value of a double: this tag and eight bytes.
TAG = b")"
DOUBLE = np.dtype([("tag", "S1"), ("value", "<f8")])
NAN = TAG + struct.pack("<d", math.nan)
# What is not stored, and what is stored as null.
NULLS = (None, b"", Value(null_val=NULL).SerializeToString())


Failed = Callable[[Request, Exception], Awaitable[Response]]


class DeclinedError(Exception):
    """Feast's own endpoint has to answer; the text says why."""


class RefusedError(Exception):
    """The client's error; the text is for the client."""

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


class GoneError(Exception):
    """The client has not waited for its answer."""


@dataclass(frozen=True)
class Query:
    """What a client asks: which features of which entities, and how old they may be; `versions` is for Feast alone."""

    entities: dict[str, list[Any]]
    features: tuple[str, ...]
    service: str
    full_names: bool
    include_age: bool
    max_age_s: float | None
    versions: bool = False

    @property
    def rows(self) -> int:
        return max(map(len, self.entities.values()), default=0)

    @classmethod
    def of(cls, body: Any) -> "Query":
        """Return the query in a decoded request body; RefusedError where it is none."""
        if type(body) is not dict:
            raise RefusedError("the body must be a JSON object", 422)
        max_age_s, include_age = body.get("max_age_s"), body.get("include_age", False)
        if max_age_s is not None and (type(max_age_s) not in (int, float) or not 0 < max_age_s < math.inf):
            raise RefusedError("max_age_s must be a number of seconds greater than 0")
        if type(include_age) is not bool:
            raise RefusedError("include_age must be true or false")
        entities, features, service = body.get("entities"), body.get("features", []), body.get("feature_service")
        full_names = body.get("full_feature_names", False)
        if (
            type(entities) is not dict
            or not all(type(values) is list for values in entities.values())
            or type(features) is not list
            or not all(type(feature) is str for feature in features)
            or not (service is None or type(service) is str)
            or type(full_names) is not bool
            or body.get("include_feature_view_version_metadata", False) is not False
        ):
            # Feast converts what can be converted.
            try:
                asked = GetOnlineFeaturesRequest.model_validate(body)
            except ValidationError as error:
                raise RefusedError(sentence(error.errors(include_url=False, include_context=False)), 422) from None
            entities, features, service = asked.entities, asked.features, asked.feature_service
            full_names, versions = asked.full_feature_names, asked.include_feature_view_version_metadata
            return cls(entities, tuple(features), service or "", full_names, include_age, max_age_s, versions)
        return cls(entities, tuple(features), service or "", full_names, include_age, max_age_s)


@dataclass(frozen=True)
class View:
    """Where the values of a feature view are in a reply: the reply's group, the values' places and the event time's."""

    group: int
    first: int
    last: int


@dataclass
class Group:
    """The views that share their join keys, and with them the hash of an entity: one HMGET reads them all."""

    join_keys: tuple[str, ...]
    prefix: bytes
    encoders: tuple[Callable[[Any], bytes], ...]
    fields: list[bytes] = field(default_factory=list)

    def keys(self, entities: Mapping[str, Sequence[Any]], project: bytes) -> list[bytes]:
        """Return the Redis key of each row."""
        columns = [map(encode, entities[name]) for name, encode in zip(self.join_keys, self.encoders, strict=True)]
        return [b"".join((self.prefix, *values, project)) for values in zip(*columns, strict=True)]


def _string(value: Any) -> bytes:
    try:
        data: bytes = value.encode()
    except (AttributeError, UnicodeEncodeError):
        raise DeclinedError("an entity's key is not a string") from None
    return struct.pack("<II", ValueType.STRING.value, len(data)) + data


def _integer(value_type: ValueType, layout: str, bits: int) -> Callable[[Any], bytes]:
    def encode(value: Any) -> bytes:
        if type(value) is not int or not -(1 << bits - 1) <= value < 1 << bits - 1:
            raise DeclinedError(f"an entity's key is not an integer of {bits} bits")
        return struct.pack(layout, value_type.value, bits // 8, value)

    return encode


# As feast.infra.key_encoding_utils does it.
ENCODERS: dict[ValueType, Callable[[Any], bytes]] = {
    ValueType.STRING: _string,
    ValueType.INT32: _integer(ValueType.INT32, "<IIi", 32),
    ValueType.INT64: _integer(ValueType.INT64, "<IIq", 64),
}


class Plan:
    """What one feature list (or service) means in one registry; `declined` says why Feast has to answer instead.

    Raises an HTTPException for what the registry does not have.
    """

    def __init__(self, store: FeatureStore, features: tuple[str, ...], service: str, full_names: bool) -> None:
        try:
            wanted = store.get_feature_service(service, allow_cache=True) if service else list(features)
            (refs, on_demand, join_key_of, types, _, grouped, _, _, entityless) = utils._get_online_request_context(
                store.registry, store.project, wanted, full_names
            )
        except Exception as error:
            if not is_outage(error):
                explain_features(store, features, service, full_names=full_names)
            raise
        self.asked = False
        self.project = store.project.encode()
        self.declined = ""
        self.key_types: dict[str, ValueType] = types
        self.groups: list[Group] = []
        self.views: list[View] = []
        # By the number of the column: what it is called in a request, whether its values are doubles, and its view.
        self.refs: list[str] = []
        self.doubles: list[bool] = []
        self.view_of: list[int] = []
        # The names in the response, in the order asked, and how many values a row takes to answer.
        self.names = [ref.replace(":", "__", 1) if full_names else ref.partition(":")[2] for ref in refs]
        self.width = len(refs) + (sum(len(names) for _, names in grouped) if on_demand else 0)
        if on_demand:
            self.declined = f"{on_demand[0].name} is computed on demand"
        elif getattr(wanted, "precompute_online", False):
            self.declined = f"the vectors of {service} are precomputed"
        elif entityless or any(view.projection.join_key_map for view, _ in grouped):
            self.declined = "a view has no entity, or an alias for its join key"
        elif not all(types.get(join_key_of[name]) in ENCODERS for view, _ in grouped for name in view.entities):
            self.declined = "an entity's key is neither a string nor an integer"
        else:
            for view, feature_names in grouped:
                join_keys = tuple(sorted(join_key_of[name] for name in view.entities))
                self._add(view, sorted(feature_names), join_keys)
            if sorted(refs) != sorted(self.refs):
                self.declined = "a feature's name is not the registry's"
        self.order = [] if self.declined else [self.refs.index(ref) for ref in refs]
        weight = self.width + ROW_WEIGHT
        self.whole, self.step = WHOLE_VALUES // weight, max(1, PIECE_VALUES // weight)
        self.tails = [b"".join(b"$%d\r\n%b\r\n" % (len(name), name) for name in group.fields) for group in self.groups]
        self.keys = dict.fromkeys(chain.from_iterable(group.join_keys for group in self.groups))

    def _add(self, view: Any, feature_names: list[str], join_keys: tuple[str, ...]) -> None:
        number = next((n for n, group in enumerate(self.groups) if group.join_keys == join_keys), len(self.groups))
        if number == len(self.groups):
            encoders = tuple(ENCODERS[self.key_types[name]] for name in join_keys)
            self.groups.append(Group(join_keys, serialize_entity_key_prefix(list(join_keys), 3), encoders))
        fields = self.groups[number].fields
        first = len(fields)
        fields += [_mmh3(f"{view.name}:{name}") for name in feature_names]
        fields.append(f"_ts:{view.name}".encode())
        self.views.append(View(number, first, len(fields) - 1))
        types = {feature.name: feature.dtype for feature in view.features}
        self.refs += [f"{view.projection.name_to_use()}:{name}" for name in feature_names]
        self.doubles += [types.get(name) == Float64 for name in feature_names]
        self.view_of += [len(self.views) - 1] * len(feature_names)

    def check(self, query: Query) -> None:
        """Raise DeclinedError where Feast has to answer the query."""
        entities = query.entities
        if self.declined:
            raise DeclinedError(self.declined)
        if query.versions:
            raise DeclinedError("the versions of views are asked for")
        if entities.keys() != self.keys.keys():
            raise DeclinedError("the entities are not the join keys of the views")
        if len({len(values) for values in entities.values()}) != 1 or not next(iter(entities.values())):
            raise DeclinedError("the entities have no rows, or not as many each")

    def commands(self, entities: Mapping[str, Sequence[Any]]) -> list[tuple[list[bytes], bytes]]:
        """Return, for each group, the key of each row, and the commands that read each key once."""
        commands = []
        for group, tail in zip(self.groups, self.tails, strict=True):
            keys = group.keys(entities, self.project)
            head = b"*%d\r\n$5\r\nHMGET\r\n" % (len(group.fields) + 2)
            commands.append(
                (keys, b"".join(b"%b$%d\r\n%b\r\n%b" % (head, len(k), k, tail) for k in dict.fromkeys(keys)))
            )
        return commands


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
            pieces.append(text(values))
        self.entity.statuses.append(present)
        self.entity.timestamps.append(repeated(b'"1970-01-01T00:00:00Z"', rows))
        if query.include_age:
            self.entity.ages.append(repeated(b"null", rows))
        fields = [list(zip(*reply, strict=True)) for reply in replies]
        columns: list[Sequence[bytes | None]] = []
        for view, column in zip(plan.views, self.views, strict=True):
            shown = fields[view.group][view.first : view.last]
            moments = [moment(raw) for raw in fields[view.group][view.last]]
            ages = [None if at is None else now - at for _, at in moments]
            statuses = present
            if query.max_age_s is not None:
                states = [status(age, query.max_age_s) for age in ages]
                statuses = text(states)
                shown = [
                    tuple(raw if state == PRESENT else None for raw, state in zip(values, states, strict=True))
                    for values in shown
                ]
            columns += shown
            column.statuses.append(statuses)
            column.timestamps.append(b'"%b"' % '","'.join([written for written, _ in moments]).encode())
            if query.include_age:
                column.ages.append(text([None if age is None else round(age, 3) for age in ages]))
        doubles = iter(numbers(list(compress(columns, plan.doubles))))
        for pieces, column_values, is_double in zip(self.values, columns, plan.doubles, strict=True):
            pieces.append(next(doubles) if is_double else text([decoded(raw) for raw in column_values]))

    def parts(self) -> list[bytes]:
        """Return the response in parts, those that its columns share but once in memory."""
        plan, ends, entity = self.plan, [view.closing() for view in self.views], self.entity.closing()
        columns = [(pieces, entity) for pieces in self.keys]
        columns += [(self.values[number], ends[plan.view_of[number]]) for number in plan.order]
        names = b'],"metadata":{"feature_names":[%b]}}' % text([*self.query.entities, *plan.names])
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


def unlike(written: bytes) -> bool:
    """Return whether pydantic's JSON may not be Python's: it has its own way with numbers below 1e-4, and with none."""
    return b"0.0000" in written or b"e-" in written or b"N" in written or b"I" in written


def dumped(values: Sequence[Any]) -> bytes:
    """Return the items of a JSON array as Starlette writes it for Feast."""
    return json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))[1:-1].encode()


def text(values: Sequence[Any]) -> bytes:
    """Return the same bytes as `dumped`, mostly ten times as fast."""
    written = to_json(values)
    return dumped(values) if unlike(written) else written[1:-1]


def numbers(columns: Sequence[Sequence[bytes | None]]) -> list[bytes]:
    """Return the JSON items of each column of serialized doubles, all at once where they are doubles or nulls."""
    values = list(chain.from_iterable(columns))
    nulls = 0
    try:
        joined = b"".join(values)  # type: ignore[arg-type]
    except TypeError:
        joined = b""
    if len(joined) != DOUBLE.itemsize * len(values):
        nulls = sum(values.count(null) for null in NULLS)
        joined = b"".join([NAN if raw in NULLS else raw for raw in values])
    # Doubles only: every value begins with the tag where the one before, of nine bytes, has ended.
    if values and len(joined) == DOUBLE.itemsize * len(values) and joined[:: DOUBLE.itemsize] == TAG * len(values):
        lists = np.frombuffer(joined, DOUBLE)["value"].reshape(len(columns), -1).tolist()
        written = to_json(lists)
        # As many as there are nulls: none of them was a number's.
        if nulls and written.count(b"NaN") == nulls:
            written = written.replace(b"NaN", b"null")
        if not (b"N" in written or b"I" in written):
            texts = written[2:-2].split(b"],[")
            if not unlike(written):
                return texts
            return [
                dumped([None if number != number else number for number in column]) if unlike(known) else known
                for column, known in zip(lists, texts, strict=True)
            ]
    return [text([decoded(raw) for raw in column]) for column in columns]


def decoded(raw: bytes | None) -> Any:
    """Return a serialized value as what Feast's server puts into JSON."""
    if not raw:
        return None
    if len(raw) == DOUBLE.itemsize and raw.startswith(TAG):
        number: float = struct.unpack("<xd", raw)[0]
        if math.isfinite(number):
            return number
    return _value_to_native(Value.FromString(raw))


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


class Online:
    """An ASGI application for what reads features, in front of Feast's own."""

    def __init__(self, store: FeatureStore, feast: FastAPI, failed: Failed) -> None:
        """Serve from a store whose application is `feast`; `failed` makes the answer to a request that raised."""
        self.store, self.feast, self.failed = store, feast, failed
        self.most = int(os.environ.get("LARDER_MAX_VALUES", MAX_VALUES))
        self.plans: dict[tuple[tuple[str, ...], str, bool], Plan] = {}
        self.left, self.declined = left(store), declined(store)
        self.line: Line | None = None
        self.turns, self.feasts = Turns(TURNS, TURNS_OF_A_CLIENT), Turns(1)
        self.pieces, self.unsent = Pieces(self.turns, self.feasts), Unsent(UNSENT_BYTES)
        # One thread each: more would only take the interpreter from one another, and from the event loop.
        self.planner, self.worker = ThreadPoolExecutor(1, "plan"), ThreadPoolExecutor(1, "feast")

    @staticmethod
    def answers(scope: Scope) -> bool:
        """Return whether a request is one of these endpoints'."""
        path: str = scope["path"]
        return path == PATH if scope["method"] == "POST" else scope["method"] == "GET" and path.startswith(TYPED)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            if scope["method"] == "GET":
                body = await self.body_of(request)
                written, content_type = json.dumps(body).encode(), JSON
            else:
                written, content_type = await whole(receive), dict(scope["headers"]).get(b"content-type", b"")
            if self.left:
                self.bounded(refuse_age(Query.of(decoded_body(written, content_type)), self.left), None)
                await self.pass_on(written, scope, receive, send)
                return
            client = dict(scope["headers"]).get(CLIENT, b"")
            parts, who = await self.answer(written, content_type, request, client)
        except GoneError:
            return
        except RefusedError as refused:
            await JSONResponse({"detail": str(refused)}, refused.status)(scope, receive, send)
        except Exception as error:  # Feast's own, the store's, or one of ours
            await (await self.failed(request, error))(scope, receive, send)
        else:
            await self.send(parts, who, send, client)

    async def answer(
        self, written: bytes, content_type: bytes, request: Request, client: bytes
    ) -> tuple[list[bytes], bytes]:
        """Return the parts of the answer to a body, and who has made it."""
        turn = False
        try:
            if len(written) > SMALL_BODY:
                turn = await self.begin(self.turns, client, request)
                async with self.pieces.piece(client):
                    query = Query.of(decoded_body(written, content_type))
            else:
                query = Query.of(decoded_body(written, content_type))
            self.bounded(query, None)
            plan = await self.plan(query)
            if query.rows * plan.width <= SMALL_READ:
                self.pieces.small()
            elif not turn:
                turn = await self.begin(self.turns, client, request)
            try:
                return await self.read(query, plan, client), b"larder"
            except DeclinedError as declined:
                why = str(declined)
        finally:
            if turn:
                self.turns.give(client)
        self.bounded(refuse_age(query, why), plan, why)
        await self.begin(self.feasts, client, request)
        begun, loop = time.perf_counter(), asyncio.get_running_loop()
        try:
            return [await loop.run_in_executor(self.worker, self.feasts_answer, query, plan.names)], b"feast"
        finally:
            loop.call_later(self.pieces.rest(time.perf_counter() - begun), self.feasts.give, client)

    async def begin(self, turns: Turns, client: bytes, request: Request) -> bool:
        """Take a turn; raise GoneError where the client has not waited for it."""
        if await turns.take(client) and await request.is_disconnected():
            turns.give(client)
            raise GoneError
        return True

    def bounded(self, query: Query, plan: Plan | None, why: str = "") -> None:
        """Refuse what asks for too much; `why` is why Feast has to answer."""
        width = max(len(query.features), plan.width if plan else 0)
        values = query.rows * width * (FEAST_WEIGHT if why else 1)
        if values > self.most:
            asked = f"{query.rows} rows x {width} features"
            if why:
                asked = f"{asked} it takes x {FEAST_WEIGHT}, because {why},"
            raise RefusedError(f"{asked} are {values} values, and a request may ask for {self.most}: ask in parts", 413)

    def feasts_answer(self, query: Query, names: list[str]) -> bytes:
        """Return the body with which Feast's own endpoint would answer, in the order asked; runs in a thread."""
        service = self.store.get_feature_service(query.service, allow_cache=True) if query.service else None
        wanted = service or list(query.features)
        try:
            response = self.store.get_online_features(
                features=wanted,
                entity_rows=query.entities,
                full_feature_names=query.full_names,
                include_feature_view_version_metadata=query.versions,
            )
        except Exception as error:
            if not is_outage(error):
                explain_features(self.store, query.features, query.service, full_names=query.full_names)
                explain_entities(self.store, wanted, query.entities, full_names=query.full_names)
            raise
        answer = convert_response_to_dict(response.proto)
        known = answer["metadata"]["feature_names"]
        place = {name: number for number, name in enumerate(names)}
        order = sorted(range(len(known)), key=lambda column: place.get(known[column], -1))
        answer["results"] = [answer["results"][column] for column in order]
        answer["metadata"]["feature_names"] = [known[column] for column in order]
        return bytes(JSONResponse(answer).body)

    async def send(self, parts: list[bytes], who: bytes, send: Send, client: bytes) -> None:
        size = sum(map(len, parts))
        headers = [(b"content-length", b"%d" % size), (b"content-type", JSON), (ANSWER, who)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if size <= PIECE_BYTES:
            await send({"type": "http.response.body", "body": b"".join(parts)})
            return
        try:
            with self.unsent.hold(size):
                async with asyncio.timeout(SEND_SECONDS):
                    rest = pieces(parts)
                    while True:
                        # Nothing is sent, but its end waits for the client: not while it holds back other pieces.
                        await send({"type": "http.response.body", "body": b"", "more_body": True})
                        async with self.pieces.piece(client):
                            if (piece := next(rest, None)) is None:
                                break
                            await send({"type": "http.response.body", "body": piece, "more_body": True})
                            await asyncio.sleep(0)  # now it is encrypted
                    await send({"type": "http.response.body", "body": b""})
        except TimeoutError:
            log.warning("An answer of %d bytes was given up: its client reads too slowly.", size)

    async def pass_on(self, written: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """Let Feast's own endpoint answer a body."""
        body = iter([{"type": "http.request", "body": written, "more_body": False}])

        async def replay() -> Message:
            return next(body, None) or await receive()

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (ANSWER, b"feast")]
            await send(message)

        if scope["method"] == "GET":
            headers = [*scope["headers"], (b"content-type", JSON)]
            scope = {**scope, "method": "POST", "path": PATH, "raw_path": PATH.encode(), "headers": headers}
        await self.feast(scope, replay, marked)

    async def probe(self, body: dict[str, Any]) -> None:
        """Read what the body asks for as a client's request would; raise what it would fail of."""
        query = Query.of(body)
        try:
            plan = await self.plan(query)
            await self.read(query, plan)
        except DeclinedError:
            await asyncio.get_running_loop().run_in_executor(self.worker, self.feasts_answer, query, plan.names)

    async def body_of(self, request: Request) -> dict[str, Any]:
        """Return the body that asks the same by POST: the entity's key is in the path, the rest in the query string."""
        parameters = request.query_params
        known = {"features", "feature_service", "full_feature_names", "include_age", "max_age_s"}
        if unknown := sorted(parameters.keys() - known):
            raise RefusedError(f"{unknown[0]} is no parameter; there are {', '.join(sorted(known))}")
        listed = chain.from_iterable(part.split(",") for part in parameters.getlist("features"))
        body: dict[str, Any] = {"features": [name.strip() for name in listed if name.strip()]}
        if "feature_service" in parameters:
            body["feature_service"] = parameters["feature_service"]
        for name in ("full_feature_names", "include_age"):
            if name in parameters:
                if parameters[name].lower() not in ("true", "false"):
                    raise RefusedError(f"{name} must be true or false")
                body[name] = parameters[name].lower() == "true"
        if "max_age_s" in parameters:
            try:
                body["max_age_s"] = float(parameters["max_age_s"])
            except ValueError:
                body["max_age_s"] = parameters["max_age_s"]
        if not (body["features"] or body.get("feature_service")):
            raise RefusedError("features=view:feature,… or feature_service=… says what to read")
        query = Query.of(body | {"entities": {}})
        self.bounded(query, None)
        types = (await self.plan(query)).key_types
        if len(types) != 1:
            raise RefusedError(f"one entity has the keys {', '.join(sorted(types))} here: POST them to {PATH}")
        [(name, value_type)] = types.items()
        entity: Any = request.scope["path"].removeprefix(TYPED)
        if value_type in (ValueType.INT32, ValueType.INT64):
            try:
                entity = int(entity)
            except ValueError:
                raise RefusedError(f"{name} must be an integer") from None
        return body | {"entities": {name: [entity]}}

    async def plan(self, query: Query) -> Plan:
        key, plans = (query.features, query.service, query.full_names), self.plans
        plan = plans.pop(key, None)
        if plan is None:
            plan = await asyncio.get_running_loop().run_in_executor(self.planner, Plan, self.store, *key)
            if plan.declined:
                log.info("%s: Feast itself answers, as %s.", query.service or ", ".join(query.features), plan.declined)
            if len(plans) >= MAX_PLANS:
                del plans[next(iter(plans))]
        plan.asked = True
        # The last one asked for is the last one to go. Not self.plans: what was planned before a refresh goes with it.
        plans[key] = plan
        return plan

    def refresh(self) -> None:
        """Plan again, with the registry as it is now, what was asked for since the last time."""
        plans = {}
        for key, plan in list(self.plans.items()):
            if plan.asked:
                with suppress(Exception):  # the next client who asks for it is told
                    plans[key] = Plan(self.store, *key)
        self.plans = plans

    async def read(self, query: Query, plan: Plan, client: bytes = b"") -> list[bytes]:
        """Return the answer in parts; DeclinedError where Feast has to answer."""
        if self.declined:
            raise DeclinedError(self.declined)
        plan.check(query)
        if query.service:
            self.bounded(query, plan)
        answer, entities, rows = Answer(plan, query), query.entities, query.rows
        if rows * plan.width <= SMALL_READ:
            answer.add(entities, await self.replies(plan, entities), time.time())
            return answer.parts()
        step = rows if rows <= plan.whole else plan.step
        for start in range(0, rows, step):
            if rows > step:
                entities = {name: values[start : start + step] for name, values in query.entities.items()}
            async with self.pieces.piece(client):
                answer.add(entities, await self.replies(plan, entities), time.time())
                if rows <= step:
                    return answer.parts()
        async with self.pieces.piece(client):
            return answer.parts()

    async def replies(self, plan: Plan, entities: Mapping[str, Sequence[Any]]) -> list[list[Any]]:
        """Return, for each group, for each row, the values of the group's fields."""
        groups = plan.commands(entities)
        replies = iter(await self.ask(b"".join(c for _, c in groups), sum(len(set(keys)) for keys, _ in groups)))
        found = []
        for keys, _ in groups:
            by_key = {key: next(replies) for key in dict.fromkeys(keys)}
            found.append([by_key[key] for key in keys])
        return found

    async def ask(self, commands: bytes, count: int) -> list[Any]:
        if self.line is None:
            online = self.store._get_provider().online_store
            self.line = Line(await online._get_client_async(self.store.config.online_store))
        return await self.line.ask(commands, count)

    def close(self) -> None:
        self.planner.shutdown(wait=False)
        self.worker.shutdown(wait=False)
        if self.line:
            self.line.close()


async def whole(receive: Receive) -> bytes:
    """Return a request's body; raise GoneError where its client does not send all of it."""
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise GoneError
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def decoded_body(written: bytes, content_type: bytes) -> Any:
    """Return what a request's body holds, as FastAPI decodes it."""
    if content_type.partition(b";")[0].strip().lower() != JSON:
        raise RefusedError(wrong_content_type(content_type.decode("latin-1")), 415)
    try:
        return json.loads(written)
    except json.JSONDecodeError as error:
        raise RefusedError(f"the body is no JSON: {error}") from None
    except (ValueError, RecursionError):
        raise RefusedError("the body is no JSON") from None


def refuse_age(query: Query, why: str) -> Query:
    """Return a query that Feast can answer."""
    if query.include_age or query.max_age_s is not None:
        raise RefusedError(f"include_age and max_age_s cannot be answered here: {why}")
    return query


def pieces(parts: Sequence[bytes]) -> Iterator[bytes]:
    """Return the parts in pieces that are neither small nor much larger than a piece may be."""
    held: list[bytes] = []
    size = 0
    for part in parts:
        for start in range(0, len(part), PIECE_BYTES):
            held.append(part[start : start + PIECE_BYTES])
            size += len(held[-1])
            if size >= PIECE_BYTES:
                yield b"".join(held)
                held, size = [], 0
    yield b"".join(held)


def left(store: FeatureStore) -> str:
    """Return why Feast's own endpoint has to answer every request of this store; empty where it need not."""
    server = store.config.feature_server
    if store.config.auth_config.type != "no_auth":
        return "Feast asks for permissions"
    if metrics._config.enabled or getattr(getattr(server, "audit_logging", None), "enabled", False) or store.mlflow:
        return "Feast counts or logs reads"
    return ""


def declined(store: FeatureStore) -> str:
    """Return why no request of this store can be planned; empty where they can."""
    config, online = store.config, store._get_provider().online_store
    reads_as_redis = RedisOnlineStore._read_features_per_fv_async
    if getattr(type(online), "_read_features_per_fv_async", None) is not reads_as_redis:
        return "the online store is not Redis"
    if config.online_store.redis_type == RedisType.redis_cluster:
        return "the online store is a Redis cluster"
    if config.entity_key_serialization_version != 3 or config.registry.enable_online_feature_view_versioning:
        return "the store has keys of another version, or views in versions"
    return ""
