"""A load on the client, the container hosts as machines, and plays over one host or three."""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import playbooks
import pytest

SCENARIO = Path(__file__).parent
ROOT = SCENARIO.parent.parent
CACHES = ("cache1", "cache2", "cache3")
STATUS = "/usr/local/sbin/larder-redis status"


class Load:
    """Pushes and reads on the client, by the servers' own code (see clients/load.py)."""

    def __init__(self, inventory: Any, name: str) -> None:
        self._client, self.name = inventory.host("client1"), name
        command = f"/opt/feast/current/bin/python -O /run/larder-test/load.py {name}"
        self._client.check_output(f"systemd-run --quiet --unit=load-{name} --setenv=PYTHONUNBUFFERED=1 {command}")
        self.until(lambda said: said and all(said["done"].values()), 180)

    def now(self) -> dict[str, Any]:
        read = self._client.run(f"cat /run/larder-test/{self.name}.json")
        said: dict[str, Any] = json.loads(read.stdout) if read.rc == 0 else {}
        return said

    def until(self, condition: Callable[[dict[str, Any]], Any], seconds: float) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while not condition(said := self.now()):
            assert time.monotonic() < end, said or self._client.check_output(
                f"journalctl --no-pager -u load-{self.name}"
            )
            time.sleep(0.5)
        return said

    def fresh(self) -> dict[str, Any]:
        """Return what the load says of a moment from now on."""
        asked = time.time()
        return self.until(lambda said: said["time"] > asked, 20)

    def gaps(self, since: float) -> list[dict[str, Any]]:
        """Return the times without a success that ended after a moment, or have not ended."""
        said = self.fresh()
        ended = [gap for gap in said["gaps"] if gap["to"] > since]
        return ended + [gap | {"seconds": said["time"] - gap["from"]} for gap in said["open"].values()]

    def recovered(self) -> None:
        """Wait until every kind of request succeeds again."""
        done = self.fresh()["done"]
        self.until(lambda said: not said["open"] and all(said["done"][kind] > done[kind] for kind in done), 30)

    def end(self) -> dict[str, Any]:
        self._client.check_output(f"touch /run/larder-test/{self.name}.stop")
        return self.until(lambda said: "lost" in said, 60)


@pytest.fixture(scope="session")
def load(inventory: Any) -> Callable[[str], Load]:
    return lambda name: Load(inventory, name)


@pytest.fixture(scope="session")
def play() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a playbook over three Redis hosts, or those of another inventory; it has to fail where it is said to."""

    def play(
        *arguments: str, grown: Path = SCENARIO / "grown", name: str = "converge.yml", fails: bool = False
    ) -> subprocess.CompletedProcess[str]:
        inventories = [ROOT / "molecule/shared/inventory", grown, SCENARIO / "inventory"]
        path = ROOT / name if "/" in name else SCENARIO / name
        done = playbooks.run(path, *arguments, inventories=inventories, timeout=600)
        assert (done.returncode != 0) == fails, done.stdout[-8000:] + done.stderr[-2000:]
        return done

    return play


class Machines:
    """The container hosts, as machines with a power switch."""

    def __init__(self) -> None:
        checkout = hashlib.sha1(str(ROOT).encode(), usedforsecurity=False).hexdigest()[:8]
        self._prefix = f"larder-{checkout}-redis_failover-"

    def _docker(self, verb: str, host: str, *command: str) -> None:
        subprocess.run(["docker", verb, f"{self._prefix}{host}", *command], check=True, capture_output=True)

    def kill(self, host: str) -> None:
        self._docker("kill", host)

    def start(self, host: str) -> None:
        self._docker("start", host)

    def freeze(self, host: str) -> None:
        """Stop every process but the first, as of a machine that hangs: the kernel goes on to accept connections."""
        self._docker("exec", host, "sh", "-c", "kill -STOP -1")

    def thaw(self, host: str) -> None:
        self._docker("exec", host, "sh", "-c", "kill -CONT -1")


@pytest.fixture(scope="session")
def machines() -> Machines:
    return Machines()


@pytest.fixture(scope="session")
def status(inventory: Any) -> Callable[[str], dict[str, Any]]:
    def status(host: str) -> dict[str, Any]:
        try:
            found = inventory.host(host).run(STATUS)
        except RuntimeError:  # the host boots
            return {}
        said: dict[str, Any] = json.loads(found.stdout) if found.rc == 0 else {}
        return said

    return status


@pytest.fixture(scope="session")
def primary(inventory: Any, status: Callable[[str], dict[str, Any]]) -> Callable[..., str]:
    """Return the host that is the primary, as the other hosts say; ``without`` leaves out a host that is away."""

    def primary(without: str = "") -> str:
        address = next(said for host in CACHES if host != without and (said := status(host)))["primary"]
        return next(host for host in CACHES if inventory.address(host) == address)

    return primary


@pytest.fixture(scope="session")
def settled(status: Callable[[str], dict[str, Any]]) -> Callable[[float], None]:
    """Wait until one host is the primary, both others follow it, and all Sentinels would vote."""

    def settled(seconds: float) -> None:
        end = time.monotonic() + seconds
        while True:
            said = [status(host) for host in CACHES]
            roles = sorted(str(each.get("role")) for each in said)
            if (
                roles == ["primary", "replica", "replica"]
                and len({each["primary"] for each in said}) == 1
                and all(each["sentinels"] == 3 for each in said)
                and all(each.get("link", "connected") == "connected" for each in said)
                and all(len(each.get("replicas", "12")) == 2 for each in said)
            ):
                return
            assert time.monotonic() < end, said
            time.sleep(0.5)

    return settled
