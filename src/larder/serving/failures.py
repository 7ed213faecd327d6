"""Whose fault an error is, and the one shape in which a client is told: {"detail": "one sentence"}.

A client's mistake is found by validation and raised as an HTTPException (4xx). A store that is away or too busy, as its
driver tells it, is a 503 without the driver's words, which may name hosts and users; a store that gave no answer in
time is a 504. The gateway tries a 503 at another instance. It does not try a 504 again: the client has waited for a
time limit, and would wait for one more at each instance. Everything else is a bug of the server's: a 500 that says
nothing, with the traceback in the journal.
"""

import errno
import json
import logging
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

import psycopg
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from feast.errors import FeastError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from sqlalchemy.exc import DBAPIError, DisconnectionError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("uvicorn.error")

Handler = Callable[[Request, Any], Awaitable[Response]]

LATE = (TimeoutError, RedisTimeoutError, PoolTimeoutError, psycopg.errors.ConnectionTimeout)
LOST = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError, RedisConnectionError, RedisTimeoutError)
NETWORK = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN, errno.ETIMEDOUT}
# What Redis says when it would answer at another time: it starts, fails over, has no memory, disk or replica for it.
LATER = {"LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "MISCONF", "NOREPLICAS", "OOM", "BUSY"}
# PostgreSQL: a limit of the program was exceeded. psycopg counts that, too, among the errors of operation.
PROGRAM_LIMIT = "54"


def is_outage(error: BaseException | None) -> bool:
    """Return whether an error says that a store is away, fails over, or is too busy."""
    if isinstance(error, DBAPIError):
        return error.connection_invalidated or is_outage(error.orig)
    if isinstance(error, ResponseError):
        # redis-py keeps the code apart for the errors that it knows, and cites an error of a pipeline.
        said = str(error).rpartition("caused error: ")[2].lstrip("('\"").partition(" ")[0]
        return said in LATER or error.status_code in LATER
    if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return not (error.sqlstate or "").startswith(PROGRAM_LIMIT)
    # A read-only transaction: a standby answers that was the primary a moment ago.
    later = (*LOST, psycopg.errors.ReadOnlySqlTransaction, PoolTimeoutError, DisconnectionError)
    return isinstance(error, later) or (isinstance(error, OSError) and error.errno in NETWORK)


def is_late(error: BaseException | None) -> bool:
    """Return whether an outage was noticed by a time limit."""
    return isinstance(error, LATE) or (isinstance(error, DBAPIError) and is_late(error.orig))


def answer(status: int, detail: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return an error in its one shape; what is no Unicode, such as half a character that a client sent, is escaped."""
    return JSONResponse({"detail": detail.encode("utf-8", "backslashreplace").decode()}, status, headers)


def shown(value: object) -> str:
    """Return a value that a client sent as it may stand in a sentence: as ASCII, and not at length."""
    try:
        text = json.dumps(value, default=str)
    except RecursionError:
        return "nested too deeply"
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"


async def refuse(_: Request, error: HTTPException) -> Response:
    return answer(error.status_code, str(error.detail), error.headers)


async def refuse_fields(request: Request, error: RequestValidationError) -> Response:
    """Answer what FastAPI found wrong with a body."""
    content_type = request.headers.get("content-type", "")
    if not is_json(content_type):
        return answer(415, wrong_content_type(content_type))
    errors = error.errors()
    if errors[0]["type"] == "json_invalid":
        return answer(400, f"the body is no JSON: {errors[0]['ctx']['error']}, at character {errors[0]['loc'][-1]}")
    return answer(422, sentence(errors))


def is_json(content_type: str) -> bool:
    """Return whether FastAPI takes a body of this type for JSON."""
    return re.match(r"application/([^;\s]+\+)?json\s*(;|$)", content_type.strip(), re.IGNORECASE) is not None


def wrong_content_type(content_type: str) -> str:
    held = f"is {shown(content_type)}" if content_type else "is missing"
    return f"Content-Type {held}: send JSON, with Content-Type: application/json"


def sentence(errors: Sequence[Any]) -> str:
    """Return the first of pydantic's errors as a sentence."""
    first, more = errors[0], len(errors) - 1
    place = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
    held = "" if first["type"] == "missing" else f" is {shown(first['input'])}"
    return f"{place}{held}: {first['msg']}{f' (and {more} more)' if more else ''}"


async def fail_in_store(request: Request, error: Exception) -> Response:
    if not is_outage(error):
        return await fail(request, error)
    log.error("%s failed: %s: %s", request.url.path, type(error).__name__, error)
    return answer(504, "a store did not answer in time") if is_late(error) else answer(503, "a store is not available")


async def fail_in_feast(request: Request, error: FeastError) -> Response:
    """Answer with Feast's words where it says that the client is wrong."""
    status = error.http_status_code()
    return answer(status, str(error)) if status < 500 else await fail(request, error)


async def not_implemented(_: Request, __: Exception) -> Response:
    """Feast's PostgreSQL offline store cannot be written to: a push may go `to` online only."""
    return answer(501, "the store does not implement this")


async def fail(request: Request, error: Exception) -> Response:
    log.error("%s failed", request.url.path, exc_info=error)
    return await say_nothing(request, error)


async def say_nothing(_: Request, __: Exception) -> Response:
    """Answer for an error that is logged elsewhere: Starlette raises it again, for the server."""
    return answer(500, "internal error")


HANDLERS: dict[type[Exception], Handler] = {
    HTTPException: refuse,
    RequestValidationError: refuse_fields,
    NotImplementedError: not_implemented,
    FeastError: fail_in_feast,
    **dict.fromkeys((RedisError, SQLAlchemyError, psycopg.Error, OSError), fail_in_store),
    Exception: say_nothing,
}


async def failed(request: Request, error: Exception) -> Response:
    """Answer a request that failed outside of an application with these handlers as one inside it."""
    handler = next(HANDLERS[kind] for kind in type(error).__mro__ if kind in HANDLERS)
    return await (fail if handler is say_nothing else handler)(request, error)


class OneShape:
    """Gives an application's errors their shape where it answers without raising: empty, as text, as it likes."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message | None = None
        body = b""

        async def shape(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start" and message["status"] >= 400:
                start = message
            elif start is None:
                await send(message)
            else:
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    shaped = answer(start["status"], detail(body) or HTTPStatus(start["status"]).phrase)
                    kept = [h for h in start["headers"] if h[0].lower() not in (b"content-length", b"content-type")]
                    shaped.raw_headers += kept
                    await shaped(scope, receive, send)

        await self.app(scope, receive, shape)


def detail(body: bytes) -> str:
    """Return what an error's body says in words; empty if nothing."""
    text = body.decode(errors="replace")
    try:
        said = json.loads(text)
    except ValueError:
        return text
    while isinstance(said, dict):
        said = next((said[key] for key in ("detail", "error", "message") if key in said), "")
    return said if isinstance(said, str) else json.dumps(said)
