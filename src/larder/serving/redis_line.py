"""Redis for a worker's reads: one connection, on which each request's commands follow the last one's.

redis-py makes the connection (TLS, login, time limits) from the store's own client; it then belongs to a protocol that
hands a request all its replies at once. Taking a connection from redis-py's pool and awaiting each reply costs several
times what parsing them does.
"""

import asyncio
from collections import deque
from time import perf_counter
from typing import Any, cast

import hiredis
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from larder.serving.metrics import REDIS


class Line:
    """The connection to one Redis, made when it is needed."""

    def __init__(self, client: Redis) -> None:
        """Take the connections that a client would make.

        Those of Larder's online store follow a primary: they have `lost` and `moved`. Another primary takes seconds to
        be there, and a request then waits no longer than for a reply, whatever it waits for.
        """
        self.client = client
        self.follows = hasattr(client.connection_pool.connection_class, "moved")
        self.lock = asyncio.Lock()
        self.replies: Replies | None = None

    async def ask(self, commands: bytes, count: int) -> list[Any]:
        """Send commands in Redis' protocol and return their replies.

        A lost connection is replaced as often as the client's retry policy says. Raises redis-py's errors, also for a
        reply that is one.
        """

        async def once() -> list[Any]:
            return await (await self.connected()).of(commands, count)

        async def nothing(_: Exception) -> None:
            pass

        begun = perf_counter()
        retry = self.client.get_retry()
        assert retry
        most = self.client.get_connection_kwargs()["socket_timeout"] if self.follows else None  # type: ignore[no-untyped-call]
        try:
            async with asyncio.timeout(most):
                replies: list[Any] = await retry.call_with_retry(once, nothing)
        except TimeoutError:
            # The reply may be what did not come in time, and the server the one that hangs.
            self.close()
            raise RedisTimeoutError("Redis is not reached") from None
        REDIS.observe(perf_counter() - begun)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    async def connected(self) -> "Replies":
        if self.replies is None or self.replies.closed or self.moved():
            async with self.lock:
                if self.replies is None or self.replies.closed or self.moved():
                    self.close()
                    connection = self.client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
                    await connection.connect()
                    self.replies = Replies(connection)
        return self.replies

    def moved(self) -> bool:
        """Return whether another server is the primary by now: the former one may go on to answer."""
        return self.follows and self.replies is not None and self.replies.connection.moved()  # type: ignore[attr-defined]

    def close(self) -> None:
        if self.replies:
            self.replies.close()


class Replies(asyncio.Protocol):
    """Gives each request its replies, in the order in which they were asked for."""

    def __init__(self, connection: AbstractConnection) -> None:
        # Keep a reference: redis-py closes the connection when the object is collected.
        self.connection = connection
        self.waiting: deque[tuple[asyncio.Future[list[Any]], list[Any], int]] = deque()
        self.reader = hiredis.Reader(protocolError=InvalidResponse, replyError=ResponseError)
        self.closed = False
        assert connection._writer
        self.transport = cast(asyncio.Transport, connection._writer.transport)
        self.transport.set_protocol(self)

    async def of(self, commands: bytes, count: int) -> list[Any]:
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self.waiting.append((future, [], count))
        self.transport.write(commands)
        try:
            async with asyncio.timeout(self.connection.socket_timeout):
                return await future
        except TimeoutError:
            # What is answered later would be taken for the answer to another request.
            self.close()
            raise RedisTimeoutError("Redis does not answer") from None

    def data_received(self, data: bytes) -> None:
        try:
            self.reader.feed(data)
            while (reply := self.reader.gets()) is not False:
                future, replies, count = self.waiting[0]
                replies.append(reply)
                if len(replies) == count:
                    self.waiting.popleft()
                    if not future.done():
                        future.set_result(replies)
        except Exception:  # what comes after it cannot be understood either
            self.close()
            raise

    def connection_lost(self, _: Exception | None) -> None:
        self.close()

    def close(self) -> None:
        self.closed = True
        if lost := getattr(self.connection, "lost", None):
            lost()
        self.transport.abort()
        while self.waiting:
            future = self.waiting.popleft()[0]
            if not future.done():
                future.set_exception(RedisConnectionError("the connection to Redis is lost"))
