"""Online features: the hot path of the feature server, an ASGI application in front of Feast's own.

A request is a query (see query), whose plan (see plan) is made once; then it is one round trip to Redis (see hashes)
and an answer put together from bytes (see answer). What a plan cannot do Feast's own store answers, in a thread. The
header `Larder-Answer` says which of the two answered. Where Feast has to ask for permissions or to count reads, its own
endpoint answers everything.

No request holds up the others: how many values one may ask for is bounded, a value that Feast itself has to work out
counting tenfold; what is more than a small read waits for its turn (see turns) and is read and written a piece at a
time, with the event loop free in between.

Feast has no notion of age on reads: whatever its view's TTL, an old value is `PRESENT`. A client may ask for more:

- `include_age`: each column has `ages_s`, the seconds since each value's event time; null where there is none.
- `max_age_s`: a value that is older, or from the future, is null, with the status `OUTSIDE_MAX_AGE`; one without an
  event time, `NOT_FOUND`.

`GET /features/{entity}` asks the same of one entity, with the fields of the request as parameters of the URL.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import orjson
from fastapi import FastAPI, Request
from feast import FeatureStore, ValueType
from feast.feature_server_utils import convert_response_to_dict
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from larder.serving import metrics
from larder.serving.answer import Answer
from larder.serving.explain import PATH, explain_entities, explain_features
from larder.serving.failures import is_outage
from larder.serving.hashes import Hashes
from larder.serving.plan import DeclinedError, Plan, Planner, declined, left
from larder.serving.query import JSON, Query, RefusedError, body_of
from larder.serving.served import Served
from larder.serving.turns import Pieces, Turns, Unsent, max_values

log = logging.getLogger("uvicorn.error")

Failed = Callable[[Request, Exception], Awaitable[Response]]

TYPED = "/features/"
# Who asks, as the gateway says.
CLIENT = b"larder-client"
# Clients choose what is planned: no more of it than this is kept.
MAX_PLANS = 200
# A body and a read below these need no turn.
SMALL_BODY, SMALL_READ = 16_384, 1000
# Larger requests that are in memory at a time, and of one client: so that some work while Redis works for the others.
TURNS, TURNS_OF_A_CLIENT = 4, 2
# Larger answers are sent in pieces of this size, as their client reads them, and not for longer than this. Those that
# are on their way have so much room.
PIECE_BYTES, SEND_SECONDS, UNSENT_BYTES = 262_144, 30, 268_435_456


class GoneError(Exception):
    """The client has not waited for its answer."""


class Online:
    """An ASGI application for what reads features, in front of Feast's own."""

    def __init__(self, store: FeatureStore, feast: FastAPI, failed: Failed, served: Served | None = None) -> None:
        """Serve from a store whose application is `feast`; `failed` makes the answer to a request that raised.

        `served` keeps a sample of what clients are answered.
        """
        self.store, self.feast, self.failed, self.served = store, feast, failed, served
        self.most = max_values()
        self.plans: dict[tuple[tuple[str, ...], str, bool], Plan] = {}
        self.planner = Planner(store)
        self.left, self.declined = left(store), declined(store)
        self.hashes = Hashes(store)
        self.turns, self.feasts = Turns(TURNS, TURNS_OF_A_CLIENT), Turns(1)
        self.pieces, self.unsent = Pieces(self.turns, self.feasts), Unsent(UNSENT_BYTES)
        # One thread each: more would only take the interpreter from one another, and from the event loop.
        self.asker, self.worker = ThreadPoolExecutor(1, "plan"), ThreadPoolExecutor(1, "feast")

    @staticmethod
    def answers(scope: Scope) -> bool:
        """Return whether a request is one of these endpoints'."""
        path: str = scope["path"]
        return path == PATH if scope["method"] == "POST" else scope["method"] == "GET" and path.startswith(TYPED)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            if scope["method"] == "GET":
                body = await self.one_entity(request)
                written, content_type = json.dumps(body).encode(), JSON
            else:
                written, content_type = await whole(receive), dict(scope["headers"]).get(b"content-type", b"")
            if self.left:
                query = Query.read(written, content_type)
                query.refuse_age(self.left)
                query.limit(self.most)
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
                    query = Query.read(written, content_type)
            else:
                query = Query.read(written, content_type)
            query.limit(self.most)
            plan = await self.plan(query)
            if query.rows * plan.width <= SMALL_READ:
                self.pieces.small()
            elif not turn:
                turn = await self.begin(self.turns, client, request)
            try:
                return await self.read(query, plan, client, self.served), b"larder"
            except DeclinedError as declined:
                why = str(declined)
        finally:
            if turn:
                self.turns.give(client)
        query.refuse_age(why)
        query.limit(self.most, plan.width, why)
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
        return orjson.dumps(answer)

    async def send(self, parts: list[bytes], who: bytes, send: Send, client: bytes) -> None:
        size = sum(map(len, parts))
        headers = [(b"content-length", b"%d" % size), (b"content-type", JSON), (metrics.ANSWER, who)]
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
                message["headers"] = [*message["headers"], (metrics.ANSWER, b"feast")]
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

    async def one_entity(self, request: Request) -> dict[str, Any]:
        """Return the body that asks the same by POST: the entity's key is in the path, the rest in the query string."""
        body = body_of(request.query_params)
        query = Query.of(body)
        query.limit(self.most)
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
        key, plans, planner = (query.features, query.service, query.full_names), self.plans, self.planner
        plan = plans.pop(key, None)
        if plan is None and (plan := planner.at_once(*key)):
            metrics.MADE.inc()
        if plan is None:
            metrics.ASKED.inc()
            plan = await asyncio.get_running_loop().run_in_executor(self.asker, planner.ask, *key)
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
        plans, planner = {}, Planner(self.store)
        for key, plan in list(self.plans.items()):
            if plan.asked:
                with suppress(Exception):  # the next client who asks for it is told
                    plans[key] = planner.at_once(*key) or planner.ask(*key)
        self.plans, self.planner = plans, planner

    async def read(self, query: Query, plan: Plan, client: bytes = b"", served: Served | None = None) -> list[bytes]:
        """Return the answer in parts; DeclinedError where Feast has to answer."""
        if self.declined:
            raise DeclinedError(self.declined)
        plan.check(query)
        if query.service:
            query.limit(self.most, plan.width)
        answer, entities, rows = Answer(plan, query), query.entities, query.rows
        metrics.ROWS.inc(rows)
        sampled = served.pick(rows) if served else -1
        if rows * plan.width <= SMALL_READ:
            replies, now = await self.hashes.read(plan, entities), time.time()
            answer.add(entities, replies, now)
            if served and sampled >= 0:
                served.note(query, plan, entities, replies, sampled, now)
            return answer.parts()
        step = rows if rows <= plan.whole else plan.step
        for start in range(0, rows, step):
            if rows > step:
                entities = {name: values[start : start + step] for name, values in query.entities.items()}
            async with self.pieces.piece(client):
                replies, now = await self.hashes.read(plan, entities), time.time()
                answer.add(entities, replies, now)
                if served and 0 <= sampled - start < len(replies[0]):
                    served.note(query, plan, entities, replies, sampled - start, now)
                if rows <= step:
                    return answer.parts()
        async with self.pieces.piece(client):
            return answer.parts()

    def close(self) -> None:
        self.asker.shutdown(wait=False)
        self.worker.shutdown(wait=False)
        self.hashes.close()


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
