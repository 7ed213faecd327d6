"""Online features from a plan: the hot path of the feature server.

Feast works out what a request means on every request. Here that is done once per feature list and registry, by Feast's
own code, and kept as a plan: which fields of which Redis hashes, in which order, under which names. A request is then
one pipelined round trip, one HMGET per entity (for all of its views), and a body put together from bytes. The body is
the one that Feast's server would have sent, byte for byte.

What a plan cannot do is Feast's to answer, by its own endpoint: on-demand views, aliased join keys, other stores than
Redis, permissions, metrics, values that need converting. The header `Larder-Answer` says which of the two answered.

Feast has no notion of age on reads: whatever its view's TTL, an old value is `PRESENT`. A client may ask for more:

- `include_age`: each column has `ages_s`, the seconds since each value's event time; null where there is none.
- `max_age_s`: a value that is older is null, with the status `OUTSIDE_MAX_AGE`; one without an event time, `NOT_FOUND`.

`GET /features/{entity}` asks the same of one entity, with the fields of the request as parameters of the URL.
"""

import json
import logging
import math
import struct
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from itertools import chain, compress
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute
from feast import FeatureStore, ValueType, metrics, utils
from feast.feature_server import GetOnlineFeaturesRequest
from feast.feature_server_utils import _timestamp_to_str, _value_to_native
from feast.infra.key_encoding_utils import serialize_entity_key_prefix
from feast.infra.online_stores.helpers import _mmh3
from feast.infra.online_stores.redis import RedisOnlineStore, RedisType
from feast.protos.feast.types.Value_pb2 import NULL, Value
from feast.types import Float64
from google.protobuf.timestamp_pb2 import Timestamp
from pydantic_core import to_json
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from larder.failures import is_outage
from larder.reads import explain_features
from larder.redis_line import Line

log = logging.getLogger("uvicorn.error")

PATH = "/get-online-features"
TYPED = "/features/"
JSON = b"application/json"
ANSWER = b"larder-answer"
# Clients choose what is planned: no more of it than this is kept.
MAX_PLANS = 1000
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


@dataclass(frozen=True)
class Query:
    """What a client asks: which features of which entities, and how old they may be."""

    entities: dict[str, list[Any]]
    features: tuple[str, ...]
    service: str
    full_names: bool
    include_age: bool
    max_age_s: float | None

    @classmethod
    def of(cls, body: Any) -> "Query":
        """Return the query in a decoded request body; DeclinedError where Feast has to say whether it is one."""
        if type(body) is not dict:
            raise DeclinedError("the body is no object")
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
            raise DeclinedError("the request has fields that Feast checks, converts or answers itself")
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
            (_, on_demand, join_key_of, types, _, grouped, _, _, entityless) = utils._get_online_request_context(
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
        # By the number of the column: its name in the response, and whether its values are doubles.
        self.names: list[str] = []
        self.doubles: list[bool] = []
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
                self._add(view, feature_names, join_keys, full_names)
        self.tails = [b"".join(b"$%d\r\n%b\r\n" % (len(name), name) for name in group.fields) for group in self.groups]
        self.keys = dict.fromkeys(chain.from_iterable(group.join_keys for group in self.groups))

    def _add(self, view: Any, feature_names: list[str], join_keys: tuple[str, ...], full_names: bool) -> None:
        number = next((n for n, group in enumerate(self.groups) if group.join_keys == join_keys), len(self.groups))
        if number == len(self.groups):
            encoders = tuple(ENCODERS[self.key_types[name]] for name in join_keys)
            self.groups.append(Group(join_keys, serialize_entity_key_prefix(list(join_keys), 3), encoders))
        prefix = f"{view.projection.name_to_use()}__" if full_names else ""
        fields = self.groups[number].fields
        first = len(fields)
        fields += [_mmh3(f"{view.name}:{name}") for name in feature_names]
        fields.append(f"_ts:{view.name}".encode())
        self.views.append(View(number, first, len(fields) - 1))
        types = {feature.name: feature.dtype for feature in view.features}
        self.names += [prefix + name for name in feature_names]
        self.doubles += [types.get(name) == Float64 for name in feature_names]

    def commands(self, entities: Mapping[str, Sequence[Any]]) -> list[tuple[list[bytes], bytes]]:
        """Return, for each group, the key of each row, and the commands that read each key once."""
        if self.declined:
            raise DeclinedError(self.declined)
        if entities.keys() != self.keys.keys():
            raise DeclinedError("the entities are not the join keys of the views")
        if len({len(values) for values in entities.values()}) != 1 or not next(iter(entities.values())):
            raise DeclinedError("the entities have no rows, or not as many each")
        commands = []
        for group, tail in zip(self.groups, self.tails, strict=True):
            keys = group.keys(entities, self.project)
            head = b"*%d\r\n$5\r\nHMGET\r\n" % (len(group.fields) + 2)
            commands.append(
                (keys, b"".join(b"%b$%d\r\n%b\r\n%b" % (head, len(k), k, tail) for k in dict.fromkeys(keys)))
            )
        return commands

    def body(self, query: Query, replies: Sequence[Sequence[Sequence[bytes | None]]], now: float) -> bytes:
        """Return the response.

        Args:
            query: what was asked.
            replies: for each group, for each row, the values of the group's fields.
            now: the time, in seconds since 1970.
        """
        rows = len(replies[0])
        present = repeated(b'"PRESENT"', rows)
        end = closing(present, repeated(b'"1970-01-01T00:00:00Z"', rows), [None] * rows if query.include_age else None)
        results = [b'{"values":%b%b' % (text(values), end) for values in query.entities.values()]
        fields = [list(zip(*reply, strict=True)) for reply in replies]
        columns: list[Sequence[bytes | None]] = []
        ends: list[bytes] = []
        for view in self.views:
            shown = fields[view.group][view.first : view.last]
            moments = [moment(raw) for raw in fields[view.group][view.last]]
            ages = [None if at is None else now - at for _, at in moments]
            statuses = present
            if query.max_age_s is not None:
                states = [status(age, query.max_age_s) for age in ages]
                statuses = text(states)
                shown = [
                    tuple(raw if state == PRESENT else None for raw, state in zip(column, states, strict=True))
                    for column in shown
                ]
            timestamps = b'["%b"]' % '","'.join([written for written, _ in moments]).encode()
            columns += shown
            ends += [closing(statuses, timestamps, ages if query.include_age else None)] * len(shown)
        doubles = iter(numbers(list(compress(columns, self.doubles))))
        for column, is_double, end in zip(columns, self.doubles, ends, strict=True):
            written = next(doubles) if is_double else text([decoded(raw) for raw in column])
            results.append(b'{"values":%b%b' % (written, end))
        names = text([*query.entities, *self.names])
        return b'{"results":[%b],"metadata":{"feature_names":%b}}' % (b",".join(results), names)


def status(age: float | None, max_age_s: float) -> str:
    if age is None:
        return NOT_FOUND
    return PRESENT if age <= max_age_s else OUTSIDE_MAX_AGE


def closing(statuses: bytes, timestamps: bytes, ages: list[float | None] | None) -> bytes:
    """Return what follows the values in an entry of `results`."""
    more = b"" if ages is None else b',"ages_s":%b' % text([None if age is None else round(age, 3) for age in ages])
    return b',"statuses":%b,"event_timestamps":%b%b}' % (statuses, timestamps, more)


def unlike(written: bytes) -> bool:
    """Return whether pydantic's JSON may not be Python's: it has its own way with numbers below 1e-4, and with none."""
    return b"0.0000" in written or b"e-" in written or b"N" in written or b"I" in written


def dumped(values: Sequence[Any]) -> bytes:
    """Return JSON as Starlette writes it for Feast."""
    return json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def text(values: Sequence[Any]) -> bytes:
    """Return the same bytes as `dumped`, mostly ten times as fast."""
    written = to_json(values)
    return dumped(values) if unlike(written) else written


def numbers(columns: Sequence[Sequence[bytes | None]]) -> list[bytes]:
    """Return the JSON of each column of serialized doubles, all of them at once where they are doubles or nulls."""
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
            texts = [b"[%b]" % column for column in written[2:-2].split(b"],[")]
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
    """Return the JSON of a column that has one value in all its rows, one at least."""
    return b"[" + value + (b"," + value) * (rows - 1) + b"]"


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
        self.plans: dict[tuple[tuple[str, ...], str, bool], Plan] = {}
        self.declined = declined(store)
        self.line: Line | None = None

    @staticmethod
    def answers(scope: Scope) -> bool:
        """Return whether a request is one of these endpoints'."""
        path: str = scope["path"]
        return path == PATH if scope["method"] == "POST" else scope["method"] == "GET" and path.startswith(TYPED)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "GET":
            await self.typed(scope, receive, send)
            return
        written, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            written += message.get("body", b"")
            more = message.get("more_body", False)
        content_type = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
        try:
            # As FastAPI does.
            body = json.loads(written) if content_type.partition(b";")[0].strip().lower() == JSON else None
        except (ValueError, RecursionError):
            body = None
        await self.answer(body, written, scope, receive, send)

    async def answer(self, body: Any, written: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a decoded body; `written` is what Feast gets where it has to answer."""
        try:
            answer = await self.read(Query.of(body))
        except DeclinedError as why:
            if type(body) is dict and {"include_age", "max_age_s"} & body.keys():
                refusal = JSONResponse({"detail": f"include_age and max_age_s cannot be answered here: {why}"}, 400)
                await refusal(scope, receive, send)
            else:
                await self.pass_on(written, scope, receive, send)
        except RefusedError as refused:
            await JSONResponse({"detail": str(refused)}, 400)(scope, receive, send)
        except Exception as error:  # Feast's own, the store's, or one of ours
            await (await self.failed(Request(scope, receive), error))(scope, receive, send)
        else:
            headers = [(b"content-length", b"%d" % len(answer)), (b"content-type", JSON), (ANSWER, b"larder")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": answer})

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
        try:
            await self.read(Query.of(body))
        except DeclinedError:
            endpoint = next(r.endpoint for r in self.feast.routes if isinstance(r, APIRoute) and r.path == PATH)
            await endpoint(GetOnlineFeaturesRequest(**body))

    async def typed(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a GET for one entity."""
        request = Request(scope, receive)
        try:
            body = await self.body_of(request)
        except RefusedError as refused:
            await JSONResponse({"detail": str(refused)}, 400)(scope, receive, send)
        except Exception as error:  # Feast's own, for what the registry does not have
            await (await self.failed(request, error))(scope, receive, send)
        else:
            await self.answer(body, json.dumps(body).encode(), scope, receive, send)

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
        types = (await self.plan(Query.of(body | {"entities": {}}))).key_types
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
        plan = plans.get(key)
        if plan is None:
            plan = await run_in_threadpool(Plan, self.store, *key)
            if plan.declined:
                log.info("%s: Feast itself answers, as %s.", query.service or ", ".join(query.features), plan.declined)
            if len(plans) >= MAX_PLANS:
                plans.clear()
            # Not self.plans: what was planned before a refresh goes with it.
            plans[key] = plan
        plan.asked = True
        return plan

    def refresh(self) -> None:
        """Plan again, with the registry as it is now, what was asked for since the last time."""
        plans = {}
        for key, plan in list(self.plans.items()):
            if plan.asked:
                with suppress(Exception):  # the next client who asks for it is told
                    plans[key] = Plan(self.store, *key)
        self.plans = plans

    async def read(self, query: Query) -> bytes:
        if self.declined:
            raise DeclinedError(self.declined)
        plan = await self.plan(query)
        groups = plan.commands(query.entities)
        replies = iter(await self.ask(b"".join(c for _, c in groups), sum(len(set(keys)) for keys, _ in groups)))
        rows = []
        for keys, _ in groups:
            by_key = {key: next(replies) for key in dict.fromkeys(keys)}
            rows.append([by_key[key] for key in keys])
        return plan.body(query, rows, time.time())

    async def ask(self, commands: bytes, count: int) -> list[Any]:
        if self.line is None:
            online = self.store._get_provider().online_store
            self.line = Line(await online._get_client_async(self.store.config.online_store))
        return await self.line.ask(commands, count)

    def close(self) -> None:
        if self.line:
            self.line.close()


def declined(store: FeatureStore) -> str:
    """Return why no request of this store can be planned; empty where they can."""
    config, online = store.config, store._get_provider().online_store
    server = config.feature_server
    reads_as_redis = RedisOnlineStore._read_features_per_fv_async
    if getattr(type(online), "_read_features_per_fv_async", None) is not reads_as_redis:
        return "the online store is not Redis"
    if config.online_store.redis_type == RedisType.redis_cluster:
        return "the online store is a Redis cluster"
    if config.auth_config.type != "no_auth":
        return "Feast asks for permissions"
    if metrics._config.enabled or getattr(getattr(server, "audit_logging", None), "enabled", False) or store.mlflow:
        return "Feast counts or logs reads"
    if config.entity_key_serialization_version != 3 or config.registry.enable_online_feature_view_versioning:
        return "the store has keys of another version, or views in versions"
    return ""
