"""Clients of the stack: of the gateway over HTTP, of the offline store as somebody who trains a model."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from testinfra.host import Host

Row = dict[str, Any]
History = dict[tuple[str, datetime], Row]


class Served(NamedTuple):
    """One feature of one symbol, as the gateway answers."""

    value: Any
    status: str
    event_timestamp: datetime


class Gateway:
    """The address that clients know, and their tokens."""

    def __init__(self, url: str, tokens: dict[str, str], trusted: Path) -> None:
        self.url = url
        self.authority = trusted.read_text()
        self._trusted = ssl.create_default_context(cafile=str(trusted))
        self._tokens = tokens

    def post(self, path: str, body: Any, role: str = "reader") -> tuple[int, Any]:
        """Send JSON as a role; return the status and the answer's JSON, None where it is empty."""
        headers = {"Authorization": f"Bearer {self._tokens[role]}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=60, context=self._trusted) as answer:
                return answer.status, json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or "null")

    def read(self, symbols: list[str], **features: Any) -> dict[str, dict[str, Served]]:
        """Read features=[...] or feature_service="..."; return them by symbol and name."""
        status, answer = self.post("/get-online-features", {**features, "entities": {"symbol": symbols}})
        assert status == 200, answer
        columns = {}
        for name, column in zip(answer["metadata"]["feature_names"], answer["results"], strict=True):
            instants = map(datetime.fromisoformat, column["event_timestamps"])
            columns[name] = list(map(Served, column["values"], column["statuses"], instants))
        assert [served.value for served in columns.pop("symbol")] == symbols
        return {symbol: {name: columns[name][row] for name in columns} for row, symbol in enumerate(symbols)}


class Trainer:
    """Reads history on a host that has a credential for it."""

    SCRIPT = (Path(__file__).parent / "read_history.py").read_text()
    COMMAND = (
        "systemd-run --quiet --wait --collect --pipe --expand-environment=no --uid=feast --setenv=PYTHONOPTIMIZE=1"
        " --property=LoadCredentialEncrypted=feature_store.yaml:/etc/credstore.encrypted/train.feature_store.yaml"
        " /opt/feast/current/bin/python -W ignore -c %s %s"
    )

    def __init__(self, host: Host) -> None:
        self._host = host

    def read(self, features: list[str], entities: Iterable[tuple[str, datetime]]) -> History:
        """Ask get_historical_features for features of (symbol, instant) pairs."""
        symbols, instants = zip(*entities, strict=True)
        request = {"features": features, "symbol": symbols, "event_timestamp": [i.isoformat() for i in instants]}
        with self._host.sudo():
            rows = json.loads(self._host.check_output(self.COMMAND, self.SCRIPT, json.dumps(request)))
        return {(row.pop("symbol"), datetime.fromisoformat(row.pop("event_timestamp"))): row for row in rows}
