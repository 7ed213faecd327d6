"""Ask the instances from the one host that the firewall lets in: their own, which is also the gateway."""

from __future__ import annotations

import json
import shlex
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import testinfra
from testinfra.host import Host

CLIENTS = Path(__file__).parent / "clients"


class Answer(NamedTuple):
    status: int
    text: str
    seconds: float

    @property
    def json(self) -> Any:
        return json.loads(self.text)


class Server:
    """A host with feature servers."""

    def __init__(self, inventory: Any) -> None:
        self.inventory = inventory
        self.host: Host = inventory.host("server1")
        self.variables = inventory.variables("server1")
        self.address = inventory.address("server1")

    @cached_property
    def certificate(self) -> str:
        """The directory of the host's certificate; a copy, which a rotation does not take away."""
        self.host.check_output("rm -rf /root/certificate && cp -rL /etc/larder/tls/feast/current /root/certificate")
        return "/root/certificate"

    def client(self, name: str, request: object) -> Any:
        """Run a client on the host; the request travels on standard input."""
        command = f"sudo python3 -c {shlex.quote((CLIENTS / name).read_text())}"
        return json.loads(self.inventory.run("server1", command, json.dumps(request)))

    def begin(self, name: str, request: object) -> None:
        """Begin a client as the unit `load`, which puts what it has to say into /run/load.out when it ends."""
        self.inventory.run("server1", "sudo tee /run/load.json", json.dumps(request))
        self.inventory.run("server1", "sudo tee /run/load.py", (CLIENTS / name).read_text())
        self.host.check_output(
            "systemd-run --unit=load --collect --property=StandardInput=file:/run/load.json"
            " --property=StandardOutput=truncate:/run/load.out python3 /run/load.py"
        )

    def ask(self, port: int, path: str, body: object = None) -> Answer:
        url = f"https://{self.address}:{port}{path}"
        return Answer(*self.client("ask.py", {"url": url, "body": body, "certificate": self.certificate}))

    def read(self, port: int, symbol: str, feature: str = "market_features:close") -> Answer:
        return self.ask(port, "/get-online-features", {"entities": {"symbol": [symbol]}, "features": [feature]})

    def push(self, port: int, symbol: str, close: float, to: str = "online", **columns: object) -> Answer:
        """Push a quote of now, but for the columns that are given."""
        now = datetime.now(UTC).isoformat()
        row: dict[str, object] = dict.fromkeys(("open", "high", "low", "bid", "ask", "spread"), 1.0)
        row |= {"symbol": symbol, "event_timestamp": now, "created": now, "close": close, "volume": 1, **columns}
        df = {name: [value] for name, value in row.items()}
        return self.ask(port, "/push", {"push_source_name": "market_data_push_source", "df": df, "to": to})

    def quotes(self, symbol: str) -> str:
        """Return when the quotes of a symbol that PostgreSQL holds were made, as seconds since 1970."""
        query = f"SELECT extract(epoch FROM event_timestamp)::numeric FROM market_data.quotes WHERE symbol = '{symbol}'"
        return self.host.check_output("cd / && runuser -u postgres -- psql -Atd feast -c %s", query)


@pytest.fixture(scope="session")
def server(inventory: Any) -> Server:
    return Server(inventory)


@pytest.fixture(scope="session")
def stranger(pytestconfig: pytest.Config) -> Host:
    inventory = pytestconfig.getoption("--ansible-inventory")
    return testinfra.get_host("ansible://client1", ansible_inventory=inventory)
