"""What keeps one client from taking a worker away from all others: turns at its work, and a bound on its memory."""

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """A few requests at a time; those that wait are served client by client, however many one of them has waiting."""

    def __init__(self, at_once: int) -> None:
        self.free = at_once
        self.waiting: dict[bytes, deque[asyncio.Future[None]]] = {}

    async def take(self, client: bytes) -> bool:
        """Wait for a turn; return whether there was a wait. Who took a turn gives it back."""
        if self.free:
            self.free -= 1
            return False
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.setdefault(client, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give()
            raise
        return True

    def give(self) -> None:
        """Give the turn to the client that has waited longest for one."""
        while self.waiting:
            client = next(iter(self.waiting))
            turns = self.waiting.pop(client)
            turn = turns.popleft()
            if turns:
                self.waiting[client] = turns
            if not turn.done():
                turn.set_result(None)
                return
        self.free += 1


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
