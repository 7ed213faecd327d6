"""Ask as the gateway's clients do: over the wire, from a machine that is in no group of the inventory."""

from __future__ import annotations

import csv
import http.client
import json
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pytest
import testinfra
from testinfra.host import Host

# Requests of a flood that are sent together: as many as the gateway has read before it refuses one of them.
AT_ONCE = 100
INSTANCES = {"feature-server@1": "6566", "feature-server@2": "6567"}


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


class Gateway:
    """The gateway and the tokens that it knows."""

    def __init__(self, address: str, variables: dict[str, Any]) -> None:
        self.address = address
        self.tokens = variables["gateway_tokens"]
        self.reader = self.tokens["reader"]
        self.writer = self.tokens["writer"]
        self.authority = variables["certificate_authorities"][0]["certificate"]
        self.trusting = ssl.create_default_context(cadata=self.authority)

    def connect(self, trusting: ssl.SSLContext | None = None) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(self.address, 8443, timeout=60, context=trusting or self.trusting)

    def ask(
        self,
        method: str,
        path: str,
        token: str | None = None,
        body: object = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        headers = {"Content-Type": "application/json"} | (headers or {})
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        connection = self.connect()
        content = body if body is None or isinstance(body, str) or not isinstance(body, dict) else json.dumps(body)
        connection.request(method, path, content, headers)
        response = connection.getresponse()
        answer = Answer(
            response.status,
            {k.lower(): v for k, v in response.getheaders()},
            response.read().decode("utf-8", "replace"),
        )
        connection.close()
        return answer

    def read(self, symbol: str, token: str | None) -> Answer:
        body = {"entities": {"symbol": [symbol]}, "features": ["market_features:close"]}
        return self.ask("POST", "/get-online-features", token, body)

    def push(self, symbol: str, close: float, token: str | None) -> Answer:
        now = datetime.now(UTC).isoformat()
        row: dict[str, object] = dict.fromkeys(("open", "high", "low", "bid", "ask", "spread"), 1.0)
        row |= {"symbol": symbol, "event_timestamp": now, "created": now, "close": close, "volume": 1}
        body = {"push_source_name": "market_data_push_source", "df": {k: [v] for k, v in row.items()}}
        return self.ask("POST", "/push", token, body)

    def flood(self, request: bytes, most: int) -> bytes:
        """Send a request over one connection until an answer is 429, or `most` were sent; return all answers."""
        time.sleep(2)  # so that the second in which requests are counted holds none of a test before
        connection = self.connect()
        connection.connect()
        answers = [b""]
        with suppress(OSError):  # the gateway ends the connection with a refusal
            while b" 429 " not in answers[-1] and len(answers) * AT_ONCE <= most:
                connection.sock.sendall(request * AT_ONCE)
                answers.append(b"")
                # Only the newest answers are searched: the rate is the gateway's, not this client's.
                while answers[-1].count(b"HTTP/1.1 ") < AT_ONCE and (more := connection.sock.recv(1 << 20)):
                    answers[-1] += more
        connection.close()
        return b"".join(answers)

    def ask_until(self, good: Callable[[Answer], bool], seconds: float) -> Answer:
        """Ask whether it is ready until the answer is good or the time is over; return the last answer."""
        end = time.monotonic() + seconds
        while True:
            try:
                answer = self.ask("GET", "/ready", self.reader)
                if good(answer) or time.monotonic() > end:
                    return answer
            except OSError:  # the gateway takes no connection
                if time.monotonic() > end:
                    raise
            time.sleep(0.5)

    def read_until(self, detail: str | None, seconds: float) -> Answer:
        """Read until the answer has this detail (None: features) or the time is over; return the last answer."""
        end = time.monotonic() + seconds
        while (answer := self.read("ANY", self.reader)).json.get("detail") != detail and time.monotonic() < end:
            time.sleep(0.5)
        return answer


@pytest.fixture(scope="session")
def hosts(pytestconfig: pytest.Config) -> dict[str, Host]:
    inventory = pytestconfig.getoption("--ansible-inventory")
    return {
        name: testinfra.get_host(f"ansible://{name}?sudo=true", ansible_inventory=inventory)
        for name in ("gateway1", "server1", "client1")
    }


@pytest.fixture(scope="session")
def stats(hosts: dict[str, Host]) -> Callable[..., dict[str, tuple[str, ...]]]:
    """Return what the gateway says of each instance that reads, asked for the fields of HAProxy's `show stat`."""
    script = (
        "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/haproxy/admin.sock'); "
        "s.sendall(b'show stat\\n'); print(s.makefile().read())"
    )

    def stats(*fields: str) -> dict[str, tuple[str, ...]]:
        rows = csv.DictReader(hosts["gateway1"].check_output(f'python3 -c "{script}"').splitlines())
        found = {row["svname"].rpartition(":")[2]: row for row in rows if row["# pxname"] == "feature_servers"}
        return {unit: tuple(found[port][name] for name in fields) for unit, port in INSTANCES.items()}

    return stats


@pytest.fixture(scope="session")
def gateway(hosts: dict[str, Host]) -> Gateway:
    variables = hosts["gateway1"].ansible.get_variables()
    return Gateway(variables["ansible_host"], variables)
