"""Feast's Redis online store for a primary with replicas: reads and writes follow the primary.

In feature_store.yaml, with Redis Sentinel:

    online_store:
      type: larder.plugins.online_store.RedisPrimaryOnlineStore
      redis_type: redis_sentinel
      sentinel_master: larder
      connection_string: 10.0.0.1:26379,10.0.0.2:26379,10.0.0.3:26379,username=…,password=…,ssl=true,ssl_ca_certs=…

All other keys are as for `type: redis`. With `redis_type: redis` the connection string names the Redis servers
themselves, and the one that says that it is the primary is used.

What differs from `type: redis`:

- TLS and login are used at the Sentinels, too. A parameter `sentinel_x` of the connection string is `x` for the
  Sentinels alone, such as `sentinel_username`; with `sentinel_password=""` there is no login at them.
- All nodes are asked at the same time, none twice. An address that more than half of them name is taken at once; else,
  after LOOK_SECONDS, the one of the newest failover. So a dead Sentinel costs nothing, and one that has slept does not
  mislead.
- A connection is used only if its server says that it is the primary. READONLY, NOREPLICAS, a timeout and a lost
  connection drop the connection, and the nodes are asked again. So do connections to a former primary, once a new one
  is known.
- While the primary is away, an attempt ends within the time limits of the connection string, and others that come just
  after it fail at once. `retry_seconds` lets the synchronous client, which materializes, try again for so long.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal

from feast.infra.online_stores.redis import RedisOnlineStore, RedisOnlineStoreConfig, RedisType
from redis import Connection, ConnectionPool, Redis, SSLConnection
from redis import asyncio as redis_asyncio
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ConstantBackoff, NoBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.retry import Retry

# How long the nodes have for their answers: on a network of hosts they take milliseconds.
LOOK_SECONDS = 1.0
# After an attempt that did not reach the primary, others fail at once for so long, instead of hanging one by one.
AWAY_SECONDS = 0.5
# A server that answers so is not the primary any more, or has lost its replicas: another may have taken its place.
NOT_PRIMARY = ("READONLY", "NOREPLICAS", "MASTERDOWN")

Address = tuple[str, int]


class RedisPrimaryOnlineStoreConfig(RedisOnlineStoreConfig):  # type: ignore[misc] # Feast is untyped
    """As `type: redis`, with this class as the type."""

    type: Literal["larder.plugins.online_store.RedisPrimaryOnlineStore"] = (
        "larder.plugins.online_store.RedisPrimaryOnlineStore"
    )

    retry_seconds: int = 0
    """For how many seconds a command of the synchronous client is tried again while there is no primary."""


class RedisPrimaryOnlineStore(RedisOnlineStore):  # type: ignore[misc] # Feast is untyped
    """See the module."""

    _client: Redis | None = None
    _client_async: redis_asyncio.Redis | None = None
    _primary: "Primary | None" = None

    def _get_client(self, online_store_config: RedisPrimaryOnlineStoreConfig) -> Redis:
        if not self._client:
            seconds = online_store_config.retry_seconds
            retry = Retry(ConstantBackoff(1), seconds) if seconds else Retry(NoBackoff(), 1, (RedisConnectionError,))
            options = self._options(online_store_config) | {"retry": retry}
            # redis-py makes of the options what its connections take.
            made = Redis(**options).connection_pool.connection_kwargs
            kind = PrimarySSLConnection if options.get("ssl") else PrimaryConnection
            pool = ConnectionPool(kind, primary=self._primary_of(online_store_config), **made)
            self._client = Redis.from_pool(pool)
        return self._client

    async def _get_client_async(self, online_store_config: RedisPrimaryOnlineStoreConfig) -> redis_asyncio.Redis:
        if not self._client_async:
            retry = AsyncRetry(NoBackoff(), 1, (RedisConnectionError,))
            options = self._options(online_store_config) | {"retry": retry}
            made = redis_asyncio.Redis(**options).connection_pool.connection_kwargs
            kind = AsyncPrimarySSLConnection if options.get("ssl") else AsyncPrimaryConnection
            pool = redis_asyncio.ConnectionPool(kind, primary=self._primary_of(online_store_config), **made)
            self._client_async = redis_asyncio.Redis.from_pool(pool)
        return self._client_async

    def _options(self, config: RedisPrimaryOnlineStoreConfig) -> dict[str, Any]:
        _, options = self._parse_connection_string(config.connection_string)
        options.setdefault("socket_timeout", 2)
        options.setdefault("socket_connect_timeout", 2)
        return {name: value for name, value in options.items() if not name.startswith("sentinel_")}

    def _primary_of(self, config: RedisPrimaryOnlineStoreConfig) -> "Primary":
        if self._primary is None:
            if config.redis_type not in (RedisType.redis, RedisType.redis_sentinel) or config.client != "redis":
                raise ValueError("RedisPrimaryOnlineStore takes redis_type redis or redis_sentinel, and client redis")
            _, options = self._parse_connection_string(config.connection_string)
            # Feast takes an IPv6 address apart at its first colon.
            nodes = [part.rpartition(":") for part in config.connection_string.split(",") if "=" not in part]
            addresses = [(host.strip("[] "), int(port)) for host, _, port in nodes]
            sentinel = config.redis_type == RedisType.redis_sentinel
            own = {name.removeprefix("sentinel_"): v for name, v in options.items() if name.startswith("sentinel_")}
            asking = self._options(config) | (own if sentinel else {})
            if asking.get("password") == "":
                asking = asking | {"username": None, "password": None}
            limits = dict.fromkeys(("socket_timeout", "socket_connect_timeout"), LOOK_SECONDS)
            # A Sentinel has no databases.
            client = redis_asyncio.Redis(**asking | limits | {"db": 0, "retry": AsyncRetry(NoBackoff(), 0)})
            self._primary = Primary(addresses, config.sentinel_master if sentinel else "", client)
        return self._primary


@dataclass(frozen=True)
class Answer:
    """What a node says: where the primary is (nothing: somewhere else), and of which failover it knows."""

    address: Address | None
    failover: int = 0


def agreed(answers: Sequence[Answer], nodes: int) -> Address | None:
    """Return the address that more than half of so many Sentinels name."""
    for address, votes in Counter(answer.address for answer in answers).items():
        if votes > nodes // 2:
            return address
    return None


def newest(answers: Sequence[Answer]) -> Address | None:
    """Return the address that the Sentinels name who know of the newest failover."""
    known = [answer for answer in answers if answer.address]
    return max(known, key=lambda answer: answer.failover).address if known else None


def alone(answers: Sequence[Answer]) -> Address | None:
    """Return the address of the one server that says that it is the primary; RedisConnectionError for two."""
    found = {answer.address for answer in answers if answer.address}
    if len(found) > 1:
        said = " and ".join(f"{host}:{port}" for host, port in sorted(found))
        raise RedisConnectionError(f"{said} each say that they are the primary")
    return next(iter(found), None)


class Primary:
    """Where the primary is: asked from all nodes when it is not known, and shared by all connections to it."""

    def __init__(self, nodes: Sequence[Address], name: str, client: redis_asyncio.Redis) -> None:
        """Ask Sentinels for the primary of this name; without a name, Redis servers whether they are the primary.

        Connections to the nodes are made as the client makes its own.
        """
        self.nodes, self.name, self.client = nodes, name, client
        self.address: Address | None = None
        self.away_until = 0.0
        self.why: BaseException | None = None
        self._lock = Lock()
        self._thread: Future[Address] | None = None
        self._task: asyncio.Task[Address] | None = None

    def find(self) -> tuple[Address, bool]:
        """Return the primary's address, and whether it was asked for just now."""
        if address := self._known():
            return address, False
        with self._lock:
            if self._thread is None or self._thread.done():
                pool = ThreadPoolExecutor(1, "redis-primary")
                self._thread = pool.submit(lambda: asyncio.run(self.look()))
                pool.shutdown(wait=False)
            asked = self._thread
        return asked.result(), True

    async def find_async(self) -> tuple[Address, bool]:
        """Do the same without blocking the event loop."""
        if address := self._known():
            return address, False
        task, loop = self._task, asyncio.get_running_loop()
        if task is None or task.done() or task.get_loop() is not loop:
            task = self._task = asyncio.create_task(self.look())
        return await asyncio.shield(task), True

    def _known(self) -> Address | None:
        if time.monotonic() < self.away_until:
            kind = type(self.why) if isinstance(self.why, RedisError) else RedisConnectionError
            raise kind(f"a moment ago: {str(self.why) or 'Redis did not answer in time'}")
        return self.address

    def lost(self, address: Address | None) -> None:
        """Ask again before the next connection, unless another address is known by now."""
        if self.address == address:
            self.address = None

    def away(self, address: Address | None, error: BaseException) -> None:
        """Let other attempts fail at once for a moment: there is no primary where there should be one."""
        self.lost(address)
        self.away_until, self.why = time.monotonic() + AWAY_SECONDS, error

    async def look(self) -> Address:
        """Ask all nodes at once."""
        asked = [asyncio.create_task(self.ask(node)) for node in self.nodes]
        answers: list[Answer] = []
        error: Exception | None = None
        address = None
        try:
            with suppress(TimeoutError):
                for answer in asyncio.as_completed(asked, timeout=LOOK_SECONDS):
                    try:
                        answers.append(await answer)
                    except (RedisError, OSError) as failed:
                        error = error if isinstance(error, AuthenticationError) else failed
                    if self.name and (address := agreed(answers, len(self.nodes))):
                        break
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        address = address or (newest(answers) if self.name else alone(answers))
        if address is None:
            why = f": {error}" if error else ""
            if answers or not isinstance(error, AuthenticationError):
                error = RedisConnectionError(f"no node says where the primary of Redis is{why}")
            self.away(None, error)
            raise error
        self.address = address
        return address

    async def ask(self, node: Address) -> Answer:
        """Return what one node says; raise what redis-py raises where it does not answer."""
        pool = self.client.connection_pool
        connection = pool.connection_class(**pool.connection_kwargs | {"host": node[0], "port": node[1]})
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
            if not self.name:
                return Answer(node if await role(connection) == "master" else None)
            await connection.send_command("SENTINEL", "MASTER", self.name)
            said = pairs(await connection.read_response())
            return Answer((said["ip"], int(said["port"])), int(said["config-epoch"]))
        finally:
            await connection.disconnect(nowait=True)


def pairs(reply: Sequence[Any] | Mapping[Any, Any]) -> dict[str, str]:
    """Return a reply of names and values as a dictionary, in either version of Redis' protocol."""
    items = reply.items() if isinstance(reply, Mapping) else zip(reply[::2], reply[1::2], strict=True)
    return {text(name): text(value) for name, value in items}


def text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


async def role(connection: AbstractConnection) -> str:
    """Return what a server says that it is. HELLO needs no right, unlike ROLE."""
    await connection.send_command("HELLO", check_health=False)
    return pairs(await connection.read_response())["role"]


def refuse_other(address: Address, said: str) -> None:
    if said != "master":
        raise RedisConnectionError(f"{address[0]}:{address[1]} is not the primary of Redis any more")


def not_primary(error: ResponseError) -> bool:
    return text(error.status_code) in NOT_PRIMARY or str(error).startswith(NOT_PRIMARY)


class Follower:
    """What connections to whichever server is the primary have in common."""

    primary: Primary
    made_to: Address | None = None

    def moved(self) -> bool:
        """Return whether another server is known to be the primary by now."""
        return self.primary.address not in (None, self.made_to)

    def lost(self) -> None:
        """Ask again for the primary before the next connection is made."""
        self.primary.lost(self.made_to)


class PrimaryConnection(Follower, Connection):
    """A connection to whichever server is the primary when it is made."""

    def __init__(self, *, primary: Primary, **options: Any) -> None:
        self.primary = primary
        super().__init__(**options)  # type: ignore[no-untyped-call]

    def connect_check_health(self, check_health: bool = True, **_: bool) -> None:  # type: ignore[override]
        """Find the primary, connect and log in, once: redis-py repeats the whole of it."""
        if self._sock and self.moved():
            self.disconnect()
        if self._sock:
            return
        (self.host, self.port), asked = self.primary.find()
        address = self.made_to = (self.host, self.port)
        try:
            super().connect_check_health(check_health, retry_socket_connect=False)
            self.send_command("HELLO", check_health=False)  # type: ignore[no-untyped-call]
            refuse_other(address, pairs(self.read_response())["role"])
        except (RedisError, OSError) as error:
            self.disconnect()
            if asked:
                self.primary.away(address, error)
            raise

    def disconnect(self, *args: Any, **kwargs: Any) -> None:
        self.lost()
        super().disconnect(*args, **kwargs)  # type: ignore[no-untyped-call]

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().read_response(*args, **kwargs)  # type: ignore[no-untyped-call]
        except ResponseError as error:
            if not not_primary(error):
                raise
            self.disconnect()
            raise RedisConnectionError(str(error)) from None


class PrimarySSLConnection(PrimaryConnection, SSLConnection):
    """The same with TLS."""


class AsyncPrimaryConnection(Follower, redis_asyncio.Connection):
    """A connection to whichever server is the primary when it is made."""

    def __init__(self, *, primary: Primary, **options: Any) -> None:
        self.primary = primary
        super().__init__(**options)

    async def connect_check_health(self, check_health: bool = True, **_: bool) -> None:  # type: ignore[override]
        """Find the primary, connect and log in, once: redis-py repeats the whole of it."""
        if self.is_connected and self.moved():
            await self.disconnect(nowait=True)
        if self.is_connected:
            return
        (self.host, self.port), asked = await self.primary.find_async()
        address = self.made_to = (self.host, self.port)
        try:
            await super().connect_check_health(check_health, retry_socket_connect=False)
            refuse_other(address, await role(self))
        except (RedisError, OSError, asyncio.CancelledError) as error:
            # Cancelled: who asks has a time limit of its own, which has passed.
            await self.disconnect(nowait=True)
            if asked:
                self.primary.away(address, error)
            raise

    async def disconnect(self, *args: Any, **kwargs: Any) -> None:
        self.lost()
        await super().disconnect(*args, **kwargs)

    async def read_response(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super().read_response(*args, **kwargs)
        except ResponseError as error:
            if not not_primary(error):
                raise
            await self.disconnect(nowait=True)
            raise RedisConnectionError(str(error)) from None


class AsyncPrimarySSLConnection(AsyncPrimaryConnection, redis_asyncio.SSLConnection):
    """The same with TLS."""
