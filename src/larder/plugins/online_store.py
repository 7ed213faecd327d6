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
- The Sentinels are asked every WATCH_SECONDS, also while nothing is lost: a former primary that was cut off, or hung,
  goes on to answer for some ten seconds after it is back, and its values are of before.
- With `wait_replicas: 1` a write is done when a replica has it, too: what was acknowledged is not lost with the
  primary, and a primary that is cut off acknowledges nothing. It costs a round trip between the two servers.
- While the primary is away, an attempt ends within the time limits of the connection string, and others that come just
  after it fail at once. `retry_seconds` lets the synchronous client, which materializes, try again for so long.
"""

import asyncio
import os
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock, Thread
from typing import Any, Literal, cast

from feast.infra.online_stores.redis import RedisOnlineStore, RedisOnlineStoreConfig, RedisType
from redis import Connection, ConnectionPool, Redis, SSLConnection
from redis import asyncio as redis_asyncio
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ConstantBackoff, NoBackoff
from redis.client import Pipeline
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

# How long the nodes have for their answers: on a network of hosts they take milliseconds.
LOOK_SECONDS = 1.0
# How long a newer failover may be unknown where nothing was lost: less than a gateway takes to trust an instance again.
WATCH_SECONDS = 0.5
# Redis says that a server is a replica some milliseconds before it says that the other one is the primary.
AGAIN_SECONDS = 0.02
# After an attempt that did not reach the primary, others fail at once for so long, instead of hanging one by one.
AWAY_SECONDS = 0.5
# How long a write may take to reach `wait_replicas` replicas: less than the time limits of connections.
WAIT_MILLISECONDS = 1000
WRITES = frozenset({"HSET", "EXPIRE", "HDEL", "DEL", "UNLINK"})
# A server that answers so is not the primary any more, or has lost its replicas: another may have taken its place.
NOT_PRIMARY = ("READONLY", "NOREPLICAS", "MASTERDOWN", "UNBLOCKED")

Address = tuple[str, int]


class RedisPrimaryOnlineStoreConfig(RedisOnlineStoreConfig):  # type: ignore[misc] # Feast is untyped
    """As `type: redis`, with this class as the type."""

    type: Literal["larder.plugins.online_store.RedisPrimaryOnlineStore"] = (
        "larder.plugins.online_store.RedisPrimaryOnlineStore"
    )

    retry_seconds: int = 0
    """For how many seconds a command of the synchronous client is tried again while there is no primary."""

    wait_replicas: int = 0
    """On how many replicas a write has to be before it counts as done."""


class RedisPrimaryOnlineStore(RedisOnlineStore):  # type: ignore[misc] # Feast is untyped
    """See the module."""

    _client: "PrimaryRedis | None" = None
    _client_async: "AsyncPrimaryRedis | None" = None
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
            self._client = cast(PrimaryRedis, PrimaryRedis.from_pool(pool))
            self._client.wait_replicas = online_store_config.wait_replicas
        return self._client

    async def _get_client_async(self, online_store_config: RedisPrimaryOnlineStoreConfig) -> redis_asyncio.Redis:
        if not self._client_async:
            retry = AsyncRetry(NoBackoff(), 1, (RedisConnectionError,))
            options = self._options(online_store_config) | {"retry": retry}
            made = redis_asyncio.Redis(**options).connection_pool.connection_kwargs
            kind = AsyncPrimarySSLConnection if options.get("ssl") else AsyncPrimaryConnection
            pool = redis_asyncio.ConnectionPool(kind, primary=self._primary_of(online_store_config), **made)
            self._client_async = cast(AsyncPrimaryRedis, AsyncPrimaryRedis.from_pool(pool))
            self._client_async.wait_replicas = online_store_config.wait_replicas
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
        self.failover = 0  # by which the address is known
        self.away_until = 0.0
        self.why: BaseException | None = None
        self._lock = Lock()
        self._thread: Future[Address] | None = None
        self._task: asyncio.Task[Address] | None = None
        self._watcher = 0  # the process that watches

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
            # It is said at once: no time limit has passed for this one.
            kind: type[RedisError] = RedisConnectionError
            if isinstance(self.why, RedisError) and not isinstance(self.why, RedisTimeoutError):
                kind = type(self.why)
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
        """Ask all nodes at once; again while all answer and none is the primary: two servers are changing places."""
        end = time.monotonic() + LOOK_SECONDS
        while True:
            answer, changing, error = await self.ask_all(end - time.monotonic())
            if answer.address or not changing:
                break
            await asyncio.sleep(AGAIN_SECONDS)
        if answer.address is None:
            self.away(None, error)
            raise error
        self.address, self.failover = answer.address, answer.failover
        if self.name and self._watcher != os.getpid():  # a thread does not come along when a process forks
            self._watcher = os.getpid()
            Thread(target=asyncio.run, args=[watch(weakref.ref(self))], name="redis-sentinels", daemon=True).start()
        return answer.address

    def heard(self, answer: Answer) -> None:
        """Follow a failover that is newer than the one by which the address is known."""
        if answer.address and answer.failover > self.failover:
            self.address, self.failover = answer.address, answer.failover

    async def ask_all(self, seconds: float) -> tuple[Answer, bool, Exception]:
        """Return the address that the nodes name, whether it is worth to ask them again, and what to say if not."""
        asked = [asyncio.create_task(self.ask(node)) for node in self.nodes]
        answers: list[Answer] = []
        error: Exception | None = None
        late = False
        address = None
        try:
            for answer in asyncio.as_completed(asked, timeout=seconds):
                try:
                    answers.append(await answer)
                except (RedisError, OSError) as failed:
                    # Also of those that have not answered when the time is over.
                    late = late or isinstance(failed, TimeoutError | RedisTimeoutError)
                    error = error if isinstance(error, AuthenticationError) else failed
                if self.name and (address := agreed(answers, len(self.nodes))):
                    break
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        address = address or (newest(answers) if self.name else alone(answers))
        if answers or not isinstance(error, AuthenticationError):
            why = f": {error}" if error else ""
            kind = RedisTimeoutError if late else RedisConnectionError
            error = kind(f"no node says where the primary of Redis is{why}")
        failover = max((answer.failover for answer in answers if answer.address == address), default=0)
        return Answer(address, failover), len(answers) == len(self.nodes), error

    async def ask(self, node: Address) -> Answer:
        """Return what one node says; raise what redis-py raises where it does not answer."""
        connection = self.connection(node)
        try:
            if not self.name:
                await connection.connect()  # type: ignore[no-untyped-call]
                return Answer(node if await role(connection) == "master" else None)
            return await self.ask_sentinel(connection)
        finally:
            await connection.disconnect(nowait=True)

    def connection(self, node: Address) -> AbstractConnection:
        pool = self.client.connection_pool
        made: AbstractConnection = pool.connection_class(**pool.connection_kwargs | {"host": node[0], "port": node[1]})
        return made

    async def ask_sentinel(self, connection: AbstractConnection) -> Answer:
        await connection.connect()  # type: ignore[no-untyped-call]
        await connection.send_command("SENTINEL", "MASTER", self.name)
        said = pairs(await connection.read_response())
        return Answer((said["ip"], int(said["port"])), int(said["config-epoch"]))


async def watch(reference: "weakref.ref[Primary]") -> None:
    """Hear of failovers from all Sentinels for as long as somebody wants to know the primary."""
    primary = reference()
    nodes = primary.nodes if primary else ()
    del primary
    await asyncio.gather(*(watch_sentinel(reference, node) for node in nodes))


async def watch_sentinel(reference: "weakref.ref[Primary]", node: Address) -> None:
    """Ask one Sentinel again and again, over a connection that is kept."""
    connection: AbstractConnection | None = None
    while primary := reference():
        connection = connection or primary.connection(node)
        try:
            primary.heard(await primary.ask_sentinel(connection))
        except Exception:  # whatever a Sentinel says: a watch that has ended would be missed by nobody
            await connection.disconnect(nowait=True)
            connection = None
        del primary
        await asyncio.sleep(WATCH_SECONDS)


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


def wait(replicas: int, commands: Sequence[Any]) -> list[Any]:
    """Return the command that waits until the replicas have what these write, if they write."""
    writes = replicas and any(words[0] in WRITES for words, _ in commands)
    return [(("WAIT", replicas, WAIT_MILLISECONDS), {})] if writes else []


def too_few(have: int, want: int) -> RedisConnectionError:
    return RedisConnectionError(f"NOREPLICAS {have} of {want} replicas have what was written")


class WaitingPipeline(Pipeline):
    """Commands that are done when the replicas have what they write; else as after a lost connection."""

    wait_replicas = 0

    def _execute_pipeline(self, connection: Any, commands: Any, raise_on_error: Any) -> Any:
        execute: Callable[..., Any] = super()._execute_pipeline
        if not (waiting := wait(self.wait_replicas, commands)):
            return execute(connection, commands, raise_on_error)
        *answers, have = execute(connection, [*commands, *waiting], raise_on_error)
        if have < self.wait_replicas:
            connection.disconnect()
            raise too_few(have, self.wait_replicas)
        return answers


class PrimaryRedis(Redis):
    """A client whose pipelines wait for replicas."""

    wait_replicas = 0

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
        made = WaitingPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)
        made.wait_replicas = self.wait_replicas
        return made


class AsyncWaitingPipeline(redis_asyncio.client.Pipeline):
    """The same without blocking the event loop."""

    wait_replicas = 0

    async def _execute_pipeline(self, connection: Any, commands: Any, raise_on_error: bool) -> Any:
        execute = super()._execute_pipeline
        if not (waiting := wait(self.wait_replicas, commands)):
            return await execute(connection, commands, raise_on_error)
        *answers, have = await execute(connection, [*commands, *waiting], raise_on_error)
        if have < self.wait_replicas:
            await connection.disconnect(nowait=True)
            raise too_few(have, self.wait_replicas)
        return answers


class AsyncPrimaryRedis(redis_asyncio.Redis):
    """The same without blocking the event loop."""

    wait_replicas = 0

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> redis_asyncio.client.Pipeline:
        made = AsyncWaitingPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)
        made.wait_replicas = self.wait_replicas
        return made
