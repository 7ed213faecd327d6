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
import re
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from itertools import chain
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
from feast.protos.feast.types.Value_pb2 import Value
from google.protobuf.timestamp_pb2 import Timestamp  # type: ignore[import-untyped]
from pydantic_core import to_json
from redis.exceptions import RedisError
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

log = logging.getLogger("uvicorn.error")

PATH = "/get-online-features"
ANSWER = "Larder-Answer"
# Clients choose what is planned: no more of it than this is kept.
MAX_PLANS = 1000
PRESENT, NOT_FOUND, OUTSIDE_MAX_AGE = "PRESENT", "NOT_FOUND", "OUTSIDE_MAX_AGE"
# A serialized Value of a double: this tag and eight bytes.
TAG = b")"
DOUBLE = np.dtype([("tag", "S1"), ("value", "<f8")])
# What pydantic's JSON writes unlike Python's: numbers below 1e-4, and those that are none.
UNLIKE = re.compile(rb"0\.0000|e-|[NI]")


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
    names: tuple[str, ...]


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

    Raises Feast's own errors for what the registry does not have.
    """

    def __init__(self, store: FeatureStore, features: tuple[str, ...], service: str, full_names: bool) -> None:
        wanted = store.get_feature_service(service, allow_cache=True) if service else list(features)
        (_, on_demand, join_key_of, types, _, grouped, names, _, entityless) = utils._get_online_request_context(
            store.registry, store.project, wanted, full_names
        )
        self.asked = False
        self.project = store.project.encode()
        self.declined = ""
        self.key_types: dict[str, ValueType] = types
        self.groups: list[Group] = []
        self.views: list[View] = []
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
                self._add(view, feature_names, join_keys, full_names, names)
        self.tails = [b"".join(b"$%d\r\n%b\r\n" % (len(name), name) for name in group.fields) for group in self.groups]
        self.keys = dict.fromkeys(chain.from_iterable(group.join_keys for group in self.groups))

    def _add(
        self, view: Any, feature_names: list[str], join_keys: tuple[str, ...], full_names: bool, wanted: set[str]
    ) -> None:
        number = next((n for n, group in enumerate(self.groups) if group.join_keys == join_keys), len(self.groups))
        if number == len(self.groups):
            encoders = tuple(ENCODERS[self.key_types[name]] for name in join_keys)
            self.groups.append(Group(join_keys, serialize_entity_key_prefix(list(join_keys), 3), encoders))
        prefix = f"{view.projection.name_to_use()}__" if full_names else ""
        fields = self.groups[number].fields
        # Feast drops a column that has not been asked for by its name in the response.
        shown = [name for name in feature_names if prefix + name in wanted]
        first = len(fields)
        fields += [_mmh3(f"{view.name}:{name}") for name in shown]
        fields.append(f"_ts:{view.name}".encode())
        self.views.append(View(number, first, len(fields) - 1, tuple(prefix + name for name in shown)))

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
        present, epoch = repeated(b'"PRESENT"', rows), repeated(b'"1970-01-01T00:00:00Z"', rows)
        names = list(query.entities)
        results = [
            result(text(values), present, epoch, [None] * rows if query.include_age else None)
            for values in query.entities.values()
        ]
        fields = [list(zip(*reply, strict=True)) for reply in replies]
        for view in self.views:
            columns = fields[view.group][view.first : view.last]
            moments = [moment(raw) for raw in fields[view.group][view.last]]
            ages = [None if at is None else now - at for _, at in moments]
            statuses = present
            if query.max_age_s is not None:
                states = [status(age, query.max_age_s) for age in ages]
                statuses = text(states)
                columns = [
                    tuple(raw if state == PRESENT else None for raw, state in zip(column, states, strict=True))
                    for column in columns
                ]
            timestamps = b'["%b"]' % '","'.join([shown for shown, _ in moments]).encode()
            names += view.names
            results += [
                result(values, statuses, timestamps, ages if query.include_age else None) for values in texts(columns)
            ]
        return b'{"results":[%b],"metadata":{"feature_names":%b}}' % (b",".join(results), text(names))


def status(age: float | None, max_age_s: float) -> str:
    if age is None:
        return NOT_FOUND
    return PRESENT if age <= max_age_s else OUTSIDE_MAX_AGE


def result(values: bytes, statuses: bytes, timestamps: bytes, ages: list[float | None] | None) -> bytes:
    """Return one entry of `results`; each argument but the ages is JSON already."""
    more = b"" if ages is None else b',"ages_s":%b' % text([None if age is None else round(age, 3) for age in ages])
    return b'{"values":%b,"statuses":%b,"event_timestamps":%b%b}' % (values, statuses, timestamps, more)


def text(values: Sequence[Any]) -> bytes:
    """Return JSON as Starlette writes it for Feast, byte for byte, and mostly ten times as fast."""
    written = to_json(values)
    if UNLIKE.search(written):
        written = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    return written


def texts(columns: Sequence[Sequence[bytes | None]]) -> list[bytes]:
    """Return the JSON of each column of serialized values."""
    values = list(chain.from_iterable(columns))
    # Doubles only: every value begins with the tag where the one before, of nine bytes, has ended.
    joined = b"" if None in values else b"".join(values)  # type: ignore[arg-type]
    if values and len(joined) == DOUBLE.itemsize * len(values) and joined[:: DOUBLE.itemsize] == TAG * len(values):
        numbers = np.frombuffer(joined, DOUBLE)["value"].reshape(len(columns), -1)
        written = to_json(numbers.tolist())
        if not UNLIKE.search(written):
            return [b"[%b]" % column for column in written[2:-2].split(b"],[")]
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
    """The endpoints that read, in front of Feast's own, and their plans."""

    def __init__(self, store: FeatureStore, feast: FastAPI) -> None:
        self.store = store
        self.plans: dict[tuple[tuple[str, ...], str, bool], Plan] = {}
        self.declined = declined(store)
        self.feast = next(r for r in feast.routes if isinstance(r, APIRoute) and r.path == PATH)
        feast.router.routes[:0] = [
            Route(PATH, self.post, methods=["POST"]),
            Route("/features/{entity:path}", self.get, methods=["GET"]),
        ]

    async def post(self, request: Request) -> Response:
        written = await request.body()
        try:
            body = json.loads(written)  # as FastAPI does
        except (ValueError, RecursionError):
            return Feast(self.feast, written)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return Feast(self.feast, written)
        return await self.answer(body, written)

    async def get(self, request: Request) -> Response:
        try:
            body = await self.typed(request)
        except RefusedError as refused:
            return JSONResponse({"detail": str(refused)}, 400)
        return await self.answer(body, json.dumps(body).encode())

    async def answer(self, body: Any, written: bytes) -> Response:
        try:
            return Response(await self.read(Query.of(body)), media_type="application/json", headers={ANSWER: "larder"})
        except RefusedError as refused:
            return JSONResponse({"detail": str(refused)}, 400)
        except DeclinedError as why:
            if type(body) is dict and {"include_age", "max_age_s"} & body.keys():
                return JSONResponse({"detail": f"include_age and max_age_s cannot be answered here: {why}"}, 400)
            return Feast(self.feast, written)

    async def probe(self, body: dict[str, Any]) -> None:
        """Read what the body asks for as a client's request would; raise what it would fail of."""
        try:
            await self.read(Query.of(body))
        except DeclinedError:
            await self.feast.endpoint(GetOnlineFeaturesRequest(**body))

    async def typed(self, request: Request) -> dict[str, Any]:
        """Return the body of a GET for one entity, whose key is in the path and everything else in the query string."""
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
        entity: Any = request.path_params["entity"]
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
        """Send commands and return their replies, over a connection of the store's own pool, with its retries."""
        client = await self.store._get_provider().online_store._get_client_async(self.store.config.online_store)
        connection = await client.connection_pool.get_connection()

        async def once() -> list[Any]:
            try:
                await connection.send_packed_command([commands])
                return [await connection.read_response(disable_decoding=True) for _ in range(count)]
            except RedisError:
                # The other replies are still on their way.
                await connection.disconnect()
                raise

        try:
            replies: list[Any] = await connection.retry.call_with_retry(once, lambda _: connection.disconnect())
            return replies
        finally:
            await client.connection_pool.release(connection)


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


class Feast(Response):
    """Feast's own answer to a body."""

    def __init__(self, route: APIRoute, body: bytes) -> None:
        super().__init__()
        self.route, self.written = route, body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = iter([{"type": "http.request", "body": self.written, "more_body": False}])

        async def replay() -> Message:
            return next(body, None) or await receive()

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (ANSWER.lower().encode(), b"feast")]
            await send(message)

        if scope["method"] != "POST":
            headers = [*scope["headers"], (b"content-type", b"application/json")]
            scope = {**scope, "method": "POST", "headers": headers}
        await self.route.handle(scope, replay, marked)
