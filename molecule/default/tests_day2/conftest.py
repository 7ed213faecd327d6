"""Run site.yml as an operator does, and watch what a client sees meanwhile."""

from __future__ import annotations

import json
import ssl
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import playbooks
import pytest

ROOT = Path(__file__).resolve().parents[3]
SCENARIO = ROOT / "molecule/default"


class Run(NamedTuple):
    """What one run of site.yml ended in."""

    code: int
    output: str

    @property
    def changed(self) -> dict[str, int]:
        """Return the number of changed tasks by host, from the recap."""
        return playbooks.changed(self.output)


@pytest.fixture(scope="session")
def site(pytestconfig: pytest.Config) -> Callable[..., Run]:
    """Run site.yml with more arguments; extra variables go by a file of mode 0600, for they may be secrets."""

    def site(
        *arguments: str, variables: dict[str, Any] | None = None, inventories: tuple[Path, ...] = (), **options: Any
    ) -> Run:
        paths = [ROOT / "molecule/shared/inventory", Path(pytestconfig.getoption("--ansible-inventory")), *inventories]
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(variables or {}, file)
            file.flush()
            extra = f"--extra-vars=@{file.name}"
            result = playbooks.run("site.yml", *arguments, extra, inventories=paths, one_stream=True, **options)
        return Run(result.returncode, result.stdout)

    return site


@pytest.fixture(scope="session")
def units() -> dict[str, list[str]]:
    return {
        "database1": ["postgresql@17-main"],
        "cache1": ["redis-server"],
        "server1": ["feature-server@1", "feature-server@2", "push-server@1", "haproxy"],
        "pipeline1": ["cron"],
    }


class Client:
    """Somebody who reads a feature through the gateway, again and again."""

    def __init__(self, url: str, token: str, trusted: ssl.SSLContext) -> None:
        self._url = url
        self._trusted = trusted
        self.token = token
        self.answers = 0
        self.failures: list[str] = []

    def read(self, features: list[str], symbols: list[str]) -> dict[str, list[Any]]:
        body = json.dumps({"features": features, "entities": {"symbol": symbols}}).encode()
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        request = urllib.request.Request(self._url, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=20, context=self._trusted) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            error.msg = f"{error.msg}: {error.read().decode()}"  # the gateway, or the instance, says why
            raise
        names = answer["metadata"]["feature_names"]
        return {name: column["values"] for name, column in zip(names, answer["results"], strict=True)}

    def watch(self, stop: threading.Event) -> None:
        expected = self.read(["ohlcv_features:close"], ["GOOG.US", "SP500"])
        while not stop.wait(0.05):
            try:
                answer = self.read(["ohlcv_features:close"], ["GOOG.US", "SP500"])
            except OSError as error:
                self.failures.append(str(error))
            else:
                self.answers += 1
                if answer != expected:
                    self.failures.append(f"{answer} instead of {expected}")


@pytest.fixture
def client(inventory: Any) -> Client:
    url = f"https://{inventory.address('server1')}:8443/get-online-features"
    return Client(url, inventory.variables("server1")["gateway_tokens"]["reader"], inventory.trusted())


@pytest.fixture
def watched(client: Client) -> Callable[[], Any]:
    """Let the client read for as long as the block takes."""

    @contextmanager
    def watched() -> Iterator[Client]:
        stop = threading.Event()
        thread = threading.Thread(target=client.watch, args=[stop])
        thread.start()
        try:
            yield client
        finally:
            stop.set()
            thread.join()

    return watched
