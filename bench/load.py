#!/usr/bin/env python3
"""Read and push through a gateway, check every answer, and tell what went wrong: a load that does not lie.

    python3 bench/load.py --gateway https://192.0.2.15:8443 --ca ca.crt --tokens tokens.json --seconds 60

Several kinds of clients run side by side, each at its rate on its own connection:

- ``single``: one symbol, on a connection that is kept;
- ``hundred``: a hundred symbols in one request, on a connection that is kept;
- ``connect``: one symbol, on a new connection each;
- ``push``: a quote of a symbol of its own, and the same quote read back at once.

Nothing is tried again, every error is a failure, and every value is compared: with ``--expected`` (JSON: symbol,
feature, value) or with what the first answers said. ``tokens.json`` ({"reader": ..., "writer": ...}) and the CA file
are read again when they change, so that a rotation can be followed. The text in ``--phase FILE`` names the phase under
which requests are counted. The result is JSON on standard output, times of answers in milliseconds; ``gap`` is the
longest time in seconds from an answer to the next one, or to the end, with a failure between them; 0 where nothing
failed. ``longest`` is the longest time in seconds that a request took, whether it was answered or failed.

Only Python's standard library is needed.
"""

from __future__ import annotations

import argparse
import http.client
import json
import ssl
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SYMBOLS = ("GOOG.US", "EURUSD", "SP500", "NASDAQ")
FEATURES = (
    "ohlcv_features:close",
    "technical_indicators_ma:sma_20",
    "technical_indicators_momentum:rsi_14",
    "technical_indicators_volatility:bb_width",
    "volume_indicators:mfi_14",
    "price_action:daily_return",
)
PUSHED = "market_features"
SHOWN = 20


class Watched:
    """What a file holds, read again when the file is another."""

    def __init__(self, path: Path | None, read: Callable[[Path], Any], default: Any = None) -> None:
        self._path, self._read = path, read
        self._seen: tuple[int, int] | None = None
        self._value = default
        self._lock = threading.Lock()

    def get(self) -> Any:
        if self._path is None:
            return self._value
        with self._lock:
            stat = self._path.stat()
            seen = (stat.st_mtime_ns, stat.st_ino)
            if seen != self._seen:
                self._value, self._seen = self._read(self._path), seen
            return self._value


class Results:
    """What all clients found, by phase and kind."""

    def __init__(self, phase: Watched) -> None:
        self._phase = phase
        self._lock = threading.Lock()
        self._times: dict[tuple[str, str], list[float]] = defaultdict(list)
        self._failures: list[str] = []
        self._wrong: list[str] = []
        # When each kind was answered last, whether one has failed since, and its longest time without an answer.
        self._began = time.monotonic()
        self._last: dict[str, float] = {}
        self._failing: set[str] = set()
        self._gaps: dict[tuple[str, str], float] = {}
        self._longest: dict[tuple[str, str], float] = defaultdict(float)

    def phase(self) -> str:
        return str(self._phase.get() or "all")

    def answered(self, phase: str, kind: str, seconds: float) -> None:
        with self._lock:
            self._times[phase, kind].append(seconds * 1000)
            self._longest[phase, kind] = max(seconds, self._longest[phase, kind])
            if kind in self._failing:
                self._end_gap(phase, kind)
            self._last[kind] = time.monotonic()

    def _end_gap(self, phase: str, kind: str) -> None:
        self._failing.remove(kind)
        gap = time.monotonic() - self._last.get(kind, self._began)
        self._gaps[phase, kind] = max(gap, self._gaps.get((phase, kind), 0))

    def failed(self, phase: str, kind: str, seconds: float, why: str) -> None:
        with self._lock:
            self._failing.add(kind)
            self._longest[phase, kind] = max(seconds, self._longest[phase, kind])
            self._failures.append(f"{datetime.now(UTC):%H:%M:%S.%f} {phase} {kind}: after {seconds:.2f} s: {why}")

    def wrong(self, phase: str, kind: str, what: str) -> None:
        with self._lock:
            self._wrong.append(f"{datetime.now(UTC):%H:%M:%S.%f} {phase} {kind}: {what}")

    def summary(self) -> dict[str, Any]:
        # What fails to the end has a gap, too.
        for kind in sorted(self._failing):
            self._end_gap(self.phase(), kind)
        phases: dict[str, dict[str, Any]] = defaultdict(dict)
        for (phase, kind), times in sorted(self._times.items()):
            times.sort()
            phases[phase][kind] = {
                "requests": len(times),
                "p50": round(times[len(times) // 2], 3),
                "p99": round(times[len(times) * 99 // 100], 3),
                "max": round(times[-1], 3),
            }
        for phase, kind in self._times.keys() | self._gaps.keys():
            shown = phases[phase].setdefault(kind, {"requests": 0})
            shown["gap"] = round(self._gaps.get((phase, kind), 0), 3)
            shown["longest"] = round(self._longest[phase, kind], 3)
        return {
            "requests": sum(map(len, self._times.values())) + len(self._failures),
            "failed": len(self._failures),
            "failures": self._failures[:SHOWN],
            "wrong": self._wrong[:SHOWN],
            "phases": phases,
        }


class Client:
    """One connection to the gateway."""

    def __init__(self, gateway: str, trusted: Watched, tokens: Watched, timeout: float) -> None:
        url = urlsplit(gateway)
        self._timeout = timeout
        self._host, self._port, self._tls = url.hostname or "", url.port, url.scheme == "https"
        self._trusted, self._tokens = trusted, tokens
        self._connection: http.client.HTTPConnection | None = None
        self._context: ssl.SSLContext | None = None

    def post(self, path: str, body: dict[str, Any], role: str = "reader") -> Any:
        """Return the answer's JSON; raise OSError, HTTPException or ValueError where there is none."""
        token = self._tokens.get()[role]
        headers = {
            "Authorization": f"Bearer {token if isinstance(token, str) else token[0]}",
            "Content-Type": "application/json",
        }
        trusted = self._trusted.get()
        if trusted is not self._context:  # http.client would take the old one when it connects again
            self.close()
        if self._connection is None:
            self._connection = self._connect(trusted)
        try:
            self._connection.request("POST", path, json.dumps(body), headers)
            response = self._connection.getresponse()
            text = response.read()
        except BaseException:
            self.close()
            raise
        if response.status != 200:
            raise ValueError(f"{response.status} {text[:200]!r}")
        return json.loads(text or b"null")

    def close(self) -> None:
        if self._connection:
            self._connection.close()
        self._connection = None

    def _connect(self, trusted: ssl.SSLContext) -> http.client.HTTPConnection:
        self._context = trusted
        if self._tls:
            return http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout, context=trusted)
        return http.client.HTTPConnection(self._host, self._port, timeout=self._timeout)


def read(client: Client, symbols: list[str], features: list[str]) -> dict[str, dict[str, Any]]:
    """Return the values by symbol and feature; features of two views must not share a name."""
    answer = client.post("/get-online-features", {"features": features, "entities": {"symbol": symbols}})
    names = answer["metadata"]["feature_names"]
    columns = {name: column["values"] for name, column in zip(names, answer["results"], strict=True)}
    if columns.pop("symbol") != symbols:
        raise ValueError("the answer is for other symbols")
    return {symbol: {name: columns[name][row] for name in columns} for row, symbol in enumerate(symbols)}


class Load:
    """The clients, until they are told to stop."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._trusted = Watched(options.ca, lambda path: ssl.create_default_context(cafile=str(path)), None)
        if options.ca is None:
            self._trusted = Watched(None, Path, ssl.create_default_context())
        self._tokens = Watched(options.tokens, lambda path: json.loads(path.read_text()))
        self.results = Results(Watched(options.phase, lambda path: path.read_text().strip()))
        self._ends = time.monotonic() + options.seconds if options.seconds else None
        self._symbols, self._features = list(options.symbols), list(options.features)
        self._many = (self._symbols + [f"LOAD-NOBODY-{number}" for number in range(100)])[:100]
        self._expected = self._first_answers()

    def _first_answers(self) -> dict[str, dict[str, Any]]:
        client = self._client()
        answered = read(client, self._many, self._features)
        client.close()
        if self._options.expected:
            given = json.loads(self._options.expected.read_text())
            for symbol, values in given.items():
                answered.setdefault(symbol, {}).update(values)
        return answered

    def _client(self) -> Client:
        return Client(self._options.gateway, self._trusted, self._tokens, self._options.timeout)

    def _over(self) -> bool:
        stop = self._options.stop
        return bool(stop and stop.exists()) or (self._ends is not None and time.monotonic() >= self._ends)

    def run(self) -> dict[str, Any]:
        kinds: list[tuple[str, Callable[[Client, int, int], None], float]] = [
            ("single", self._single, self._options.rate),
            ("hundred", self._hundred, self._options.rate / 10),
            ("connect", self._connect, self._options.rate / 5),
        ]
        if not self._options.no_push:
            kinds.append(("push", self._push, self._options.rate / 10))
        threads = [
            threading.Thread(target=self._repeat, args=(kind, action, rate, number))
            for kind, action, rate in kinds
            for number in range(self._options.clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.results.summary()

    def _repeat(self, kind: str, action: Callable[[Client, int, int], None], rate: float, number: int) -> None:
        client = self._client()
        turn = 0
        while not self._over():
            phase = self.results.phase()
            started = time.monotonic()
            try:
                action(client, number, turn)
            except AssertionError as difference:
                self.results.wrong(phase, kind, str(difference))
                self.results.answered(phase, kind, time.monotonic() - started)
            except Exception as error:  # whatever it is, the client got no answer
                self.results.failed(phase, kind, time.monotonic() - started, f"{type(error).__name__}: {error}")
            else:
                self.results.answered(phase, kind, time.monotonic() - started)
            turn += 1
            time.sleep(max(0.0, 1 / rate - (time.monotonic() - started)))
        client.close()

    def _check(self, answered: dict[str, dict[str, Any]]) -> None:
        for symbol, values in answered.items():
            expected = self._expected[symbol]
            for name, value in values.items():
                if value != expected[name]:
                    raise AssertionError(f"{name} of {symbol} is {value} and not {expected[name]}")

    def _single(self, client: Client, _: int, turn: int) -> None:
        self._check(read(client, [self._symbols[turn % len(self._symbols)]], self._features))

    def _hundred(self, client: Client, _: int, __: int) -> None:
        self._check(read(client, self._many, self._features))

    def _connect(self, client: Client, number: int, turn: int) -> None:
        try:
            self._single(client, number, turn)
        finally:
            client.close()

    def _push(self, client: Client, number: int, turn: int) -> None:
        symbol, now = f"LOAD-PUSH-{number}", datetime.now(UTC).isoformat()
        row: dict[str, Any] = dict.fromkeys(("open", "high", "low", "bid", "ask", "spread"), 1.0)
        row |= {"symbol": symbol, "event_timestamp": now, "created": now, "volume": 1, "close": float(turn + 1)}
        body = {"push_source_name": "market_data_push_source", "df": {name: [value] for name, value in row.items()}}
        client.post("/push", body, "writer")
        served = read(client, [symbol], [f"{PUSHED}:close"])[symbol]["close"]
        if served != turn + 1:
            raise AssertionError(f"close of {symbol} is {served} and {turn + 1} was pushed")


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Read and push through a gateway and check every answer.")
    parser.add_argument("--gateway", required=True, help="https://host:port")
    parser.add_argument("--ca", type=Path, help="PEM file of the authority to trust; the system's by default")
    parser.add_argument("--tokens", type=Path, required=True, help='JSON file: {"reader": ..., "writer": ...}')
    parser.add_argument("--expected", type=Path, help="JSON file: symbol, feature, value")
    parser.add_argument("--symbols", nargs="+", default=SYMBOLS)
    parser.add_argument("--features", nargs="+", default=FEATURES, help="view:feature, each name once")
    parser.add_argument("--rate", type=float, default=50, help="single reads per second of each client")
    parser.add_argument("--clients", type=int, default=1, help="clients of each kind")
    parser.add_argument("--no-push", action="store_true")
    parser.add_argument("--phase", type=Path, help="file whose text names the present phase")
    parser.add_argument("--timeout", type=float, default=30, help="seconds that a client waits")
    parser.add_argument("--seconds", type=float, help="how long")
    parser.add_argument("--stop", type=Path, help="file whose existence ends the load")
    chosen = parser.parse_args(arguments)
    if not (chosen.seconds or chosen.stop):
        parser.error("give --seconds or --stop")
    return chosen


def main() -> None:
    result = Load(options(sys.argv[1:])).run()
    json.dump(result, sys.stdout, indent=2)
    print()
    sys.exit(1 if result["failed"] or result["wrong"] else 0)


if __name__ == "__main__":
    main()
