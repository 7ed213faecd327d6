#!/usr/bin/env python3
"""What counting a read for Prometheus costs: the CPU of a read that does nothing, with and without it, in turns.

    PYTHONPATH=src PYTHONOPTIMIZE=1 python bench/metrics.py

The result is JSON: microseconds of CPU for a read, and for a write of the numbers for the other workers. The least of
many turns counts: what else the machine does only adds.
"""

import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

from starlette.types import Message, Receive, Scope, Send

from larder.serving import metrics

READS, TURNS, WRITES = 20_000, 10, 200
SCOPE = {"type": "http", "path": "/get-online-features", "method": "POST"}
HEADERS = [(b"content-length", b"100"), (b"content-type", b"application/json"), (metrics.ANSWER, b"larder")]


async def nothing(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": b""})


async def receive() -> Message:
    return {}


async def send(_: Message) -> None:
    pass


async def reads(counted: bool) -> float:
    begun = time.process_time()
    for _ in range(READS):
        if counted:  # as online.py and redis_line.py do
            await metrics.counted(nothing, SCOPE, receive, send)
            metrics.ROWS.inc(1)
            metrics.REDIS.observe(0.0004)
        else:
            await nothing(SCOPE, receive, send)
    return (time.process_time() - begun) / READS * 1e6


def write(shared: metrics.Shared) -> float:
    begun = time.process_time()
    for _ in range(WRITES):
        metrics.ROWS.inc()
        shared.write()
    return (time.process_time() - begun) / WRITES * 1e6


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        shared = metrics.Shared(Path(directory))
        turns = [(asyncio.run(reads(True)), asyncio.run(reads(False)), write(shared)) for _ in range(TURNS)]
    counted, plain, written = (round(min(took), 2) for took in zip(*turns, strict=True))
    result = {"counted_us": counted, "plain_us": plain, "cost_us": round(counted - plain, 2), "write_us": written}
    json.dump({"benchmark": "metrics", **result}, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
