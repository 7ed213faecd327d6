"""Reads what a plan names from Redis: one HMGET per entity, for all of its views, all in one round trip."""

from collections.abc import Mapping, Sequence
from typing import Any

from feast import FeatureStore

from larder.serving.plan import Group, Plan
from larder.serving.redis_line import Line


class Hashes:
    """The hashes of a store's online store, read over one connection, which is made when it is needed."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store
        self.line: Line | None = None

    async def read(self, plan: Plan, entities: Mapping[str, Sequence[Any]]) -> list[list[Sequence[bytes | None]]]:
        """Return, for each of the plan's groups, for each row, the values of the group's fields."""
        asked = [(group, group.keys(entities, plan.project)) for group in plan.groups]
        # Each key is read once.
        distinct = [(group, dict.fromkeys(keys)) for group, keys in asked]
        commands = b"".join(command(group, key) for group, keys in distinct for key in keys)
        replies = iter(await self.ask(commands, sum(len(keys) for _, keys in distinct)))
        found = [{key: next(replies) for key in keys} for _, keys in distinct]
        return [[by_key[key] for key in keys] for by_key, (_, keys) in zip(found, asked, strict=True)]

    async def ask(self, commands: bytes, count: int) -> list[Any]:
        if self.line is None:
            online = self.store._get_provider().online_store
            self.line = Line(await online._get_client_async(self.store.config.online_store))
        return await self.line.ask(commands, count)

    def close(self) -> None:
        if self.line:
            self.line.close()


def command(group: Group, key: bytes) -> bytes:
    """Return the HMGET of a key in Redis' protocol."""
    return b"*%d\r\n$5\r\nHMGET\r\n$%d\r\n%b\r\n%b" % (len(group.fields) + 2, len(key), key, group.tail)
