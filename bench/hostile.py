#!/usr/bin/env python3
"""Read through a gateway as other clients do while one hostile reader sends the worst that its token allows.

    python3 bench/hostile.py --gateway https://192.0.2.15:8443 --ca ca.crt --tokens tokens.json

The hostile reader has 64 connections and sends its next request when the last one is answered; it is a process of its
own. The others read one symbol at a steady rate on connections that they keep. Nothing is tried again. First and last
the others are alone, in between comes one kind of request after the other:

- ``values``: as many values as one request may ask for, with their ages;
- ``rows``: one feature of as many symbols as a body holds;
- ``hundred``: a hundred symbols with all features;
- ``demand``: features that Feast computes on demand;
- ``plans``: each request asks for another list of features;
- ``unknown``: each request asks for another feature that nobody has;
- ``refused``: more than one request may ask for;
- ``slow``: the largest answers, read a little at a time;
- ``single``: one symbol, as often as possible.

The result is JSON on standard output: for each kind what the others met, times in milliseconds, and the hostile
reader's statuses. The exit code is 1 where a request of the others failed. Only Python's standard library is needed.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import random
import socket
import ssl
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PATH = "/get-online-features"
KINDS = ("values", "rows", "hundred", "demand", "plans", "unknown", "refused", "slow", "single")
FEATURES = {
    "ohlcv_features": "open high low close volume adjusted_close typical_price",
    "technical_indicators_ma": "sma_5 sma_10 sma_20 sma_50 sma_200 ema_12 ema_26 ema_50",
    "technical_indicators_momentum": "rsi_14 macd macd_signal macd_histogram stoch_k stoch_d roc_10",
    "technical_indicators_volatility": "atr_14 bb_upper bb_middle bb_lower bb_width std_20 hist_volatility_20",
    "volume_indicators": "volume_sma_20 volume_ratio obv vwap mfi_14",
    "price_action": "daily_return log_return price_range body_size upper_shadow lower_shadow is_green_candle"
    " cdl_engulfing",
}
ALL = [f"{view}:{name}" for view, names in FEATURES.items() for name in names.split()]
ON_DEMAND = "price_change:price_change_pct"


def bodies(kind: str, values: int) -> list[bytes]:
    """Return the requests of a kind; `values` is how many one of them may ask for."""
    rows = values // len(ALL)
    if kind == "plans":
        chance = random.Random(1)  # noqa: S311 # not for secrets
        lists = [chance.sample(ALL, len(ALL)) for _ in range(1000)]
        return [body(3, features) for features in lists]
    if kind == "unknown":
        return [body(3, [*ALL[:-1], f"price_action:unknown_{number}"]) for number in range(1000)]
    return [
        {
            "values": lambda: body(rows, ALL, include_age=True, max_age_s=1e9),
            "rows": lambda: body(18_000, ALL[:1]),
            "hundred": lambda: body(100, ALL),
            "demand": lambda: body(values // 10 // 9, [ON_DEMAND]),
            "refused": lambda: body(rows + 1, ALL),
            "slow": lambda: body(rows, ALL),
            "single": lambda: body(1, ALL),
        }[kind]()
    ]


def body(rows: int, features: list[str], **more: object) -> bytes:
    symbols = [f"HOSTILE{number:04}" for number in range(rows)]
    return json.dumps({"features": features, "entities": {"symbol": symbols}} | more, separators=(",", ":")).encode()


def connect(gateway: str, trusted: ssl.SSLContext) -> ssl.SSLSocket:
    url = urlsplit(gateway)
    stream = socket.create_connection((url.hostname, url.port or 443), timeout=60)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return trusted.wrap_socket(stream, server_hostname=url.hostname)


def hostile(
    gateway: str, authority: str, token: str, kind: str, values: int, seconds: float, connections: int, told: Any
) -> None:
    """Send requests of a kind on many connections; put what was answered into the queue."""
    trusted = ssl.create_default_context(cadata=authority)
    requests = []
    for content in bodies(kind, values):
        head = f"POST {PATH} HTTP/1.1\r\nHost: {urlsplit(gateway).netloc}\r\nAuthorization: Bearer {token}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        requests.append(head.encode() + content)
    statuses: Counter[str] = Counter()
    end = time.monotonic() + seconds

    def one(number: int) -> None:
        stream = None
        buffer = bytearray(65536)
        while time.monotonic() < end:
            try:
                stream = stream or connect(gateway, trusted)
                number += 1
                stream.sendall(requests[number % len(requests)])
                received, length, status = 0, 1, ""
                while received < length and time.monotonic() < end + 30:
                    count = stream.recv_into(buffer, 1024 if kind == "slow" else 0)
                    if not count:
                        raise ConnectionError
                    if not status:
                        head = bytes(buffer[:count]).partition(b"\r\n\r\n")[0].lower()
                        status = head.split()[1].decode()
                        length = len(head) + 4 + int(head.partition(b"content-length: ")[2].split()[0])
                    received += count
                    if kind == "slow":
                        time.sleep(0.2)
                        if time.monotonic() > end:
                            return
                statuses[status] += 1
            except (OSError, ValueError, IndexError) as error:
                statuses[type(error).__name__] += 1
                stream = None
                time.sleep(0.05)

    threads = [threading.Thread(target=one, args=[number], daemon=True) for number in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told.put(dict(statuses))


class Others:
    """The clients whom nothing should disturb."""

    def __init__(self, options: argparse.Namespace, token: str, trusted: ssl.SSLContext) -> None:
        self.options, self.token, self.trusted = options, token, trusted

    def run(self, seconds: float) -> dict[str, Any]:
        self.end = time.monotonic() + seconds
        self.times: list[float] = []
        self.failures: list[str] = []
        threads = [threading.Thread(target=self.one, args=[number]) for number in range(self.options.clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        times = sorted(self.times)
        return {
            "requests": len(times) + len(self.failures),
            "failed": len(self.failures),
            "failures": self.failures[:10],
            "p50": round(times[len(times) // 2], 2),
            "p99": round(times[len(times) * 99 // 100], 2),
            "max": round(times[-1], 2),
        }

    def one(self, number: int) -> None:
        url = urlsplit(self.options.gateway)
        content = body(1, ALL)
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        connection = http.client.HTTPSConnection(url.hostname or "", url.port, timeout=30, context=self.trusted)
        time.sleep(number / self.options.rate / self.options.clients)
        while time.monotonic() < self.end:
            started = time.monotonic()
            try:
                connection.request("POST", PATH, content, headers)
                response = connection.getresponse()
                text = response.read()
                if response.status != 200:
                    raise ValueError(f"{response.status} {text[:200]!r}")
                self.times.append((time.monotonic() - started) * 1000)
            except Exception as error:  # whatever it is, the client got no answer
                self.failures.append(f"{type(error).__name__}: {error}")
                connection.close()
            time.sleep(max(0.0, 1 / self.options.rate - (time.monotonic() - started)))
        connection.close()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    tokens = {
        role: token if isinstance(token, str) else token[0]
        for role, token in json.loads(options.tokens.read_text()).items()
    }
    authority = options.ca.read_text()
    others = Others(options, tokens[options.others], ssl.create_default_context(cadata=authority))
    others.run(2)
    alone = others.run(options.seconds)
    kinds: dict[str, Any] = {}
    context = multiprocessing.get_context("spawn")
    for kind in options.kinds:
        told = context.Queue()
        arguments = (
            options.gateway,
            authority,
            tokens[options.hostile],
            kind,
            options.values,
            options.seconds + 3,
            options.connections,
            told,
        )
        process = context.Process(target=hostile, args=arguments, daemon=True)
        process.start()
        time.sleep(2)
        kinds[kind] = others.run(options.seconds)
        kinds[kind]["p99_over_alone"] = round(kinds[kind]["p99"] / alone["p99"], 2)
        kinds[kind]["hostile"] = told.get(timeout=90)
        process.join()
        print(f"{kind}: {kinds[kind]}", file=sys.stderr)
        time.sleep(2)
    return {"alone": alone, "kinds": kinds, "after": others.run(options.seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what one hostile reader does to other clients.")
    parser.add_argument("--gateway", required=True, help="https://host:port")
    parser.add_argument("--ca", type=Path, required=True, help="PEM file of the authority to trust")
    parser.add_argument("--tokens", type=Path, required=True, help='JSON file: {"reader": ..., "writer": ...}')
    parser.add_argument("--hostile", default="reader", help="whose token the hostile reader has")
    parser.add_argument("--others", default="writer", help="whose token the others have")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--values", type=int, default=100_000, help="feature_server_max_values of the servers")
    parser.add_argument("--connections", type=int, default=64, help="of the hostile reader")
    parser.add_argument("--clients", type=int, default=4, help="others")
    parser.add_argument("--rate", type=float, default=25, help="reads per second of each of them")
    parser.add_argument("--seconds", type=float, default=10, help="of each kind")
    options = parser.parse_args()
    found = measure(options)
    json.dump(found, sys.stdout, indent=2)
    print()
    sys.exit(any(run["failed"] for run in [found["alone"], found["after"], *found["kinds"].values()]))


if __name__ == "__main__":
    main()
