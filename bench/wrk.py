"""A closed loop of reads by wrk, whose every answer is judged.

wrk (Debian: wrk) asks the next request of a connection when the last one is answered. Its script keeps each answer that
it has not had before, so that all of them are judged when it has ended, and none costs the client more than a look
into a table. `client_cores` says how much of one core the client took: near 1, the figure would be the client's own.
"""

from __future__ import annotations

import json
import resource
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

PATH = "/get-online-features"
WARM_TRIES = 30
SCRIPT = Path(__file__).with_suffix(".lua")
Columns = dict[str, list[Any]]


class Different(Exception):  # noqa: N818 # not an error of the program
    """An answer that is not what it should be."""


class SilentError(Exception):
    """A server that has answered nothing."""


class Answers:
    """What is known of the right answers, by the symbols asked for."""

    def __init__(self, values: Mapping[tuple[str, ...], Columns] | None = None) -> None:
        """Judge by these values, if there are any, and by what was answered before."""
        self.values = values
        self.known: dict[tuple[str, ...], str] = {}

    def check(self, body: bytes) -> None:
        """Compare an answer with the values and with the other servers' answers, columns sorted by name."""
        answer = json.loads(body)
        columns = dict(zip(answer["metadata"]["feature_names"], answer["results"], strict=True))
        symbols = tuple(columns["symbol"]["values"])
        if self.values is not None:
            served = {name: column["values"] for name, column in columns.items() if name != "symbol"}
            if served != self.values.get(symbols):
                raise Different(f"not what Redis has: {body[:200]!r}")
        normal = json.dumps(columns, sort_keys=True)
        if self.known.setdefault(symbols, normal) != normal:
            raise Different(f"not what was answered before: {body[:200]!r}")


def http_request(
    url: str, symbols: Sequence[str], features: Sequence[str], token: str = "", *, fresh: bool = False
) -> bytes:
    """Return a read as it is sent; `fresh`: on a connection of its own."""
    body = json.dumps({"features": features, "entities": {"symbol": symbols}, "full_feature_names": True}).encode()
    head = [f"POST {PATH} HTTP/1.1", f"Host: {urlsplit(url).netloc}", "Content-Type: application/json"]
    head += [f"Authorization: Bearer {token}"] if token else []
    head += ["Connection: close"] if fresh else []
    return "\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body


def kept(path: Path) -> Iterator[tuple[int, bytes]]:
    """Return the status and the body of each answer that the script wrote."""
    with path.open("rb") as file:
        while line := file.readline():
            status, length = map(int, line.split())
            yield status, file.read(length)


class Load:
    """Requests to one address, over and over, on a number of connections."""

    def __init__(self, url: str, requests: Sequence[bytes], answers: Answers, connections: int) -> None:
        self.url, self.requests, self.answers, self.connections = url, requests, answers, connections

    def warm(self) -> None:
        """Ask until there are answers: a server's first one may take seconds."""
        for _ in range(WARM_TRIES - 1):
            with suppress(SilentError):
                self.run(1)
                return
        self.run(1)

    def run(self, seconds: float) -> dict[str, float]:
        """Ask for some seconds; return the rate, percentiles of an answer's time, and what the client took.

        The time is from a request's first byte to its answer's last one, without the handshake of a new connection.
        Raises Different for an answer that is wrong, SilentError where there is none, RuntimeError where wrk fails.
        """
        with TemporaryDirectory() as directory:
            asked, answered = Path(directory, "requests"), Path(directory, "answers")
            asked.touch(mode=0o600)  # a request has its token
            asked.write_bytes(b"".join(b"%d\n%b" % (len(request), request) for request in self.requests))
            wrk = ["wrk", "--threads=1", f"--connections={self.connections}", f"--duration={max(1, round(seconds))}s"]
            before, started = spent(), time.perf_counter()
            ended = subprocess.run(
                [*wrk, "--timeout=30s", f"--script={SCRIPT}", self.url, "--", str(asked), str(answered)],
                capture_output=True,
                text=True,
                check=False,
            )
            client_cores = (spent() - before) / (time.perf_counter() - started)
            for status, body in kept(answered) if answered.exists() else ():
                if status != 200:
                    raise Different(f"{status} {body[:200]!r}")
                self.answers.check(body)
        if ended.returncode:
            raise RuntimeError(f"wrk: {ended.stdout[-500:]}{ended.stderr[-500:]}")
        said = json.loads(ended.stdout.splitlines()[-1])
        if not said["requests"]:
            raise SilentError(f"{self.url} answered nothing: {said}")
        return {
            "requests_per_s": said["requests"] / said["seconds"],
            "p50_ms": said["p50_ms"],
            "p99_ms": said["p99_ms"],
            "resets": said["resets"] + said["timeouts"],
            "client_cores": round(client_cores, 3),
        }


def spent() -> float:
    """Return the CPU seconds of the processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
