"""Ask the instances from the one host that the firewall lets in: their own, which is also the gateway."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pytest
import testinfra
from testinfra.host import Host

CLIENT = """
import json, sys, time, urllib.error, urllib.request
request = json.load(sys.stdin)
body = None if request["body"] is None else json.dumps(request["body"]).encode()
started = time.monotonic()
try:
    response = urllib.request.urlopen(
        urllib.request.Request(request["url"], body, {"Content-Type": "application/json"}), timeout=60)
except urllib.error.HTTPError as error:
    response = error
text = response.read().decode()
print(json.dumps([response.status, text, time.monotonic() - started]))
"""


class Answer(NamedTuple):
    status: int
    text: str
    seconds: float

    @property
    def json(self) -> Any:
        return json.loads(self.text)


class Server:
    """A host with feature servers."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.variables = host.ansible.get_variables()

    def ask(self, port: int, path: str, body: object = None) -> Answer:
        request = json.dumps({"url": f"http://{self.variables['ansible_host']}:{port}{path}", "body": body})
        return Answer(*json.loads(self.host.check_output("echo %s | python3 -c %s", request, CLIENT)))

    def read(self, port: int, symbol: str, feature: str = "market_features:close") -> Answer:
        return self.ask(port, "/get-online-features", {"entities": {"symbol": [symbol]}, "features": [feature]})

    def push(self, port: int, symbol: str, close: float) -> Answer:
        now = datetime.now(UTC).isoformat()
        row: dict[str, object] = dict.fromkeys(("open", "high", "low", "bid", "ask", "spread"), 1.0)
        row |= {"symbol": symbol, "event_timestamp": now, "created": now, "close": close, "volume": 1}
        body = {"push_source_name": "market_data_push_source", "df": {k: [v] for k, v in row.items()}}
        return self.ask(port, "/push", body)


@pytest.fixture(scope="session")
def server(pytestconfig: pytest.Config) -> Server:
    inventory = pytestconfig.getoption("--ansible-inventory")
    return Server(testinfra.get_host("ansible://server1?sudo=true", ansible_inventory=inventory))


@pytest.fixture(scope="session")
def stranger(pytestconfig: pytest.Config) -> Host:
    inventory = pytestconfig.getoption("--ansible-inventory")
    return testinfra.get_host("ansible://client1", ansible_inventory=inventory)
