"""Push and read as the servers do, by their own code, and write down what failed and what was lost.

    load.py NAME    writes /run/larder-test/NAME.json twice a second, until there is a file NAME.stop

A push writes a number under a symbol of its own. Reads ask for a symbol that was pushed two seconds ago, in the fast
way and in Feast's own. At the end every push that was acknowledged is looked for.
"""

import asyncio
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from feast import Entity, FeatureStore, FeatureView, Field, PushSource, RepoConfig, ValueType
from feast.feature_server import PushFeaturesRequest
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import PostgreSQLSource
from feast.types import Int64

from larder.serving import push
from larder.serving.application import fail_fast
from larder.serving.failures import failed
from larder.serving.online import Online
from larder.serving.query import Query

DIRECTORY = Path("/run/larder-test")
PAUSES = {"push": 0.02, "fast": 0.05, "feast": 0.1}


def store_of(purpose: str, name: str) -> FeatureStore:
    """Return the store of a server's configuration, with a registry of its own."""
    settings = yaml.safe_load((DIRECTORY / f"{purpose}.yaml").read_text())
    settings["registry"] = {"registry_type": "file", "path": str(DIRECTORY / f"{name}.{purpose}.db")}
    store = FeatureStore(config=RepoConfig(repo_path=DIRECTORY, **settings))
    symbol = Entity(name="symbol", join_keys=["symbol"], value_type=ValueType.STRING)
    batch = PostgreSQLSource(name="numbers", table="numbers", timestamp_field="event_timestamp")
    source = PushSource(name="numbers_push", batch_source=batch)
    view = FeatureView(name="numbers", entities=[symbol], schema=[Field(name="number", dtype=Int64)], source=source)
    store.apply([symbol, source, view])
    return store


class Load:
    def __init__(self, name: str) -> None:
        self.name = name
        self.reader, self.writer = store_of("serve", name), store_of("push", name)
        self.acknowledged: list[tuple[float, int]] = []
        self.next = 0
        self.done = dict.fromkeys(PAUSES, 0)
        self.last = dict.fromkeys(PAUSES, time.time())
        self.open: dict[str, dict[str, Any]] = {}
        # Each is a time without a success: from the last one before it to the first one after it.
        self.gaps: list[dict[str, Any]] = []
        self.wrong: list[str] = []

    async def begin(self) -> None:
        await fail_fast(self.reader)
        await fail_fast(self.writer)
        self.online = Online(self.reader, None, failed)

    def push(self) -> None:
        self.next += 1
        number = self.next
        row = {"symbol": [f"S{number}"], "number": [number], "event_timestamp": [datetime.now(UTC).isoformat()]}
        push.push(self.writer, PushFeaturesRequest(push_source_name="numbers_push", df=row, to="online"))
        self.acknowledged.append((time.time(), number))

    def wanted(self) -> int:
        """Return a number that was acknowledged two seconds ago, or a little before; 0 for none."""
        now = time.time()
        return next((number for at, number in reversed(self.acknowledged[-2000:]) if at < now - 2), 0)

    async def fast(self) -> None:
        if number := self.wanted():
            query = Query.of({"features": ["numbers:number"], "entities": {"symbol": [f"S{number}"]}})
            parts = await self.online.read(query, await self.online.plan(query))
            self.compare("fast", number, json.loads(b"".join(parts))["results"][-1]["values"][0])

    def feast(self) -> None:
        if number := self.wanted():
            read = self.reader.get_online_features(["numbers:number"], [{"symbol": f"S{number}"}])
            self.compare("feast", number, read.to_dict()["number"][0])

    def compare(self, kind: str, number: int, read: Any) -> None:
        if read != number:
            self.wrong.append(f"{time.time():.1f} {kind}: {read} and not {number}")

    async def repeat(self, kind: str, stop: Path) -> None:
        while not stop.exists():
            begun = time.time()
            try:
                if kind == "fast":
                    await self.fast()
                else:
                    await asyncio.to_thread(self.push if kind == "push" else self.feast)
            except Exception as error:  # whatever it is, a client sees a failure
                gap = self.open.setdefault(kind, {"kind": kind, "from": self.last[kind], "failures": 0, "longest": 0})
                gap["failures"] += 1
                gap["longest"] = max(gap["longest"], time.time() - begun)
                gap["error"] = f"{type(error).__name__}: {error}"
            else:
                self.done[kind] += 1
                self.last[kind] = time.time()
                if gap := self.open.pop(kind, None):
                    self.gaps.append(gap | {"to": self.last[kind], "seconds": self.last[kind] - gap["from"]})
            await asyncio.sleep(PAUSES[kind])

    async def report(self, stop: Path) -> None:
        while not stop.exists():
            self.write({})
            await asyncio.sleep(0.5)

    def write(self, more: dict[str, Any]) -> None:
        said = {"time": time.time(), "done": self.done, "gaps": self.gaps, "open": self.open, "wrong": self.wrong}
        new = DIRECTORY / f"{self.name}.new"
        new.write_text(json.dumps(said | {"acknowledged": len(self.acknowledged)} | more))
        new.replace(DIRECTORY / f"{self.name}.json")

    def lost(self) -> list[int]:
        """Return the numbers that were acknowledged and are not there."""
        numbers = [number for _, number in self.acknowledged]
        found: list[Any] = []
        for start in range(0, len(numbers), 500):
            rows = [{"symbol": f"S{number}"} for number in numbers[start : start + 500]]
            found += self.reader.get_online_features(["numbers:number"], rows).to_dict()["number"]
        return [number for number, value in zip(numbers, found, strict=True) if value != number]

    async def run(self) -> None:
        stop = DIRECTORY / f"{self.name}.stop"
        await self.begin()
        await asyncio.gather(self.report(stop), *(self.repeat(kind, stop) for kind in PAUSES))
        self.write({"lost": self.lost()})


asyncio.run(Load(sys.argv[1]).run())
