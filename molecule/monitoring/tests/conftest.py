"""What the monitoring host says, and what breaks."""

from __future__ import annotations

import base64
import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import playbooks
import pytest

ROOT = Path(__file__).resolve().parents[3]
CLIENTS = Path(__file__).parents[1] / "clients"
# Where the pictures of docs/ are made anew: LARDER_PICTURES=docs.
PICTURES = os.environ.get("LARDER_PICTURES", "")


class Monitoring:
    """Prometheus and Alertmanager, asked on their host."""

    def __init__(self, inventory: Any) -> None:
        self._inventory = inventory
        self.prometheus = f"https://{inventory.address('monitor1')}:9090"
        self._client = (CLIENTS / "api.py").read_text()

    def ask(self, path: str, at: str = "") -> Any:
        command = f"sudo python3 - {shlex.quote((at or self.prometheus) + path)}"
        return json.loads(self._inventory.run("monitor1", command, self._client))

    def targets(self) -> dict[tuple[str, str, str], str]:
        """Return (job, host, address) of all targets, each with its error or an empty text."""
        active = self.ask("/api/v1/targets?state=active")["data"]["activeTargets"]
        return {
            (each["labels"]["job"], each["labels"]["host"], each["labels"]["instance"]): ""
            if each["health"] == "up"
            else f"{each['health']}: {each['lastError']}"
            for each in active
        }

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire."""
        alerts = self.ask("/api/v1/alerts")["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def value(self, expression: str) -> float:
        (sample,) = self.ask(f"/api/v1/query?query={quote(expression)}")["data"]["result"]
        return float(sample["value"][1])

    def wait(self, *names: str, seconds: float) -> float:
        """Wait until alerts fire, others beside them or not; return how long it took."""
        return self._until(lambda firing: {*names} <= firing, f"{', '.join(names)} to fire", seconds)

    def quiet(self, seconds: float = 240) -> float:
        """Wait until nothing fires."""
        return self._until(lambda firing: not firing, "all alerts to clear", seconds)

    def _until(self, found: Callable[[set[str]], bool], what: str, seconds: float) -> float:
        begun = time.monotonic()
        while not found(firing := self.firing()):
            assert time.monotonic() - begun < seconds, f"waited {seconds} s for {what}; these fire: {sorted(firing)}"
            time.sleep(2)
        took = time.monotonic() - begun
        print(f"{what}: {took:.0f} s")
        return took


class Browser:
    """A browser that is told what to do, and says what a person sees."""

    def __init__(self, process: subprocess.Popen[str], board: str, viewer: str) -> None:
        self.process, self.board, self.viewer = process, board, viewer

    def do(self, **command: object) -> dict[str, Any]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the browser has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def open(self, **how: object) -> dict[str, Any]:
        """Open the board, or another page, and log in as a viewer."""
        return self.do(**{"do": "open", "url": self.board, "password": self.viewer, **how})

    def picture(self, name: str, **how: object) -> None:
        if PICTURES:
            png = base64.b64decode(self.do(do="picture", **how)["png"])
            (ROOT / PICTURES / name).write_bytes(png)


@pytest.fixture(scope="session")
def browser(inventory: Any) -> Iterator[Browser]:
    argv = inventory.argv("stranger", "sudo -H nice /opt/browser/venv/bin/python /opt/browser/browse.py")
    viewer = inventory.variables("app1")["monitoring_tokens"]["viewer"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        board = f"https://{inventory.address('app1')}:8443/board/"
        yield Browser(process, board, viewer[0] if isinstance(viewer, list) else viewer)
        assert process.stdin
        process.stdin.close()


@pytest.fixture(scope="session")
def monitoring(inventory: Any, told: Callable[[], list[dict[str, str]]]) -> Monitoring:
    told()  # without a receiver, an alert would say so
    return Monitoring(inventory)


@pytest.fixture(scope="session")
def knock(inventory: Any) -> Callable[..., str]:
    """Ask a URL from a host, without a certificate or with one of that host; return the status or why there is none."""
    program = (CLIENTS / "knock.py").read_text()

    def knock(host: str, url: str, directory: str = "") -> str:
        return str(inventory.run(host, f"sudo python3 - {shlex.quote(url)} {directory}", program)).strip()

    return knock


@pytest.fixture(scope="session")
def told(inventory: Any) -> Callable[[], list[dict[str, str]]]:
    """Return what the receiver on another host was told so far."""
    inventory.run("stranger", "cat > /tmp/receiver.py", (CLIENTS / "receiver.py").read_text())
    inventory.run("stranger", "sudo systemctl stop receiver 2> /dev/null || true; sudo rm -f /tmp/alerts.jsonl", "")
    inventory.run("stranger", "sudo systemd-run --quiet --collect --unit=receiver python3 /tmp/receiver.py", "")

    def told() -> list[dict[str, str]]:
        lines = inventory.run("stranger", "cat /tmp/alerts.jsonl 2> /dev/null || true", "").splitlines()
        return [json.loads(line) for line in lines]

    return told


@pytest.fixture
def on(inventory: Any) -> Callable[[str, str], str]:
    """Run a command as root on a host."""

    def on(host: str, command: str) -> str:
        return str(inventory.run(host, f"sudo sh -c {shlex.quote(command)}", ""))

    return on


@pytest.fixture(scope="session")
def play(pytestconfig: pytest.Config) -> Callable[..., dict[str, int]]:
    """Run a playbook; return how many tasks changed something, by host."""
    return partial(playbooks.changes, inventory=pytestconfig.getoption("--ansible-inventory"))
