"""What keeps one client from taking a worker away from all others: turns at its work, and a bound on its memory."""

import asyncio
import os
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

# Columns times rows in one request: some 9 MB of JSON where a read gets an event time and an age with every value.
MAX_VALUES = 100_000
# Small reads within so many seconds are reason enough to leave them room.
RECENT_SECONDS = 0.25
# How long the event loop is left to small reads after a piece, in times of the piece, when many requests wait.
MOST_REST = 4


def max_values() -> int:
    """How many values one request may read or push."""
    return int(os.environ.get("LARDER_MAX_VALUES", MAX_VALUES))


class Turns:
    """A few requests at a time; those that wait are served client by client, however many one of them has waiting."""

    def __init__(self, at_once: int, each: int | None = None) -> None:
        """Give `at_once` turns in all, and no client more than `each` at a time."""
        self.free, self.each = at_once, each or at_once
        self.taken: Counter[bytes] = Counter()
        self.waiting: dict[bytes, deque[asyncio.Future[None]]] = {}

    async def take(self, client: bytes) -> bool:
        """Wait for a turn; return whether there was a wait. Who took a turn gives it back."""
        if self.free and self.taken[client] < self.each:
            self._begin(client)
            return False
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.setdefault(client, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give(client)
            raise
        return True

    def length(self) -> int:
        """Return how many wait."""
        return sum(map(len, self.waiting.values()))

    def _begin(self, client: bytes) -> None:
        self.free -= 1
        self.taken[client] += 1

    def give(self, client: bytes) -> None:
        """Take a turn back from a client, and give it to the one that has waited longest for one."""
        self.free += 1
        self.taken[client] -= 1
        if not self.taken[client]:
            del self.taken[client]
        for waiting in list(self.waiting):
            if not self.free:
                return
            turns = self.waiting.pop(waiting)
            while turns and turns[0].done():  # its client has gone
                turns.popleft()
            if turns and self.taken[waiting] < self.each:
                self._begin(waiting)
                turns.popleft().set_result(None)
                if turns:
                    self.waiting[waiting] = turns
            elif turns:
                self.waiting[waiting] = turns


class Pieces:
    """Larger work, one piece at a time for all clients, and the event loop left to small reads in between."""

    def __init__(self, *queues: Turns) -> None:
        """Give turns at pieces; what waits in the queues, too, is larger work."""
        self.turns = Turns(1)
        self.queues = [self.turns, *queues]
        self.last_small = float("-inf")

    def small(self) -> None:
        """Note that there is a small read."""
        self.last_small = time.perf_counter()

    def rest(self, took: float) -> float:
        """Return for how long no piece begins after one that took so many seconds: the more of them wait, the longer.

        One large read after the other loses nothing by it; a flood of them leaves small reads most of the time.
        """
        if time.perf_counter() - self.last_small > RECENT_SECONDS:
            return 0.0
        return took * min(MOST_REST, 1 + sum(queue.length() for queue in self.queues))

    @asynccontextmanager
    async def piece(self, client: bytes) -> AsyncIterator[None]:
        """Hold all other pieces back; what is done meanwhile must wait for no client."""
        await self.turns.take(client)
        begun = time.perf_counter()
        try:
            yield
        finally:
            rest = self.rest(time.perf_counter() - begun)
            asyncio.get_running_loop().call_later(rest, self.turns.give, client)


class Unsent:
    """The answers that wait for clients to read them: of so many bytes, the oldest is given up for a new one."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.bytes: dict[asyncio.Task[object], int] = {}

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Count an answer while its task sends it; raise TimeoutError there when the room is needed."""
        task = asyncio.current_task()
        assert task
        for oldest in list(self.bytes):
            if sum(self.bytes.values()) + size <= self.most:
                break
            del self.bytes[oldest]
            oldest.cancel()
        self.bytes[task] = size
        try:
            yield
        except asyncio.CancelledError:
            if task in self.bytes:
                raise
            task.uncancel()
            raise TimeoutError("a client that reads slowly") from None
        finally:
            self.bytes.pop(task, None)
