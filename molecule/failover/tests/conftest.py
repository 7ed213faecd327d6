"""The hosts of the stack, who is the primary of what among them, and the playbooks that an operator runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import playbooks
import pytest
from machines import Clients, Machines

ROOT = Path(__file__).resolve().parents[3]
NODES = ("node1", "node2", "node3")


@pytest.fixture
def machines() -> Iterator[Machines]:
    machines = Machines("failover")
    yield machines
    machines.power_on()


@pytest.fixture(scope="session")
def clients(inventory: Any) -> Clients:
    return Clients(inventory)


@pytest.fixture(scope="session")
def vip(inventory: Any) -> str:
    """Return the address that group_vars make gateway_vip."""
    return str(inventory.address("node1")).rpartition(".")[0] + ".250"


@pytest.fixture(scope="session")
def play(pytestconfig: pytest.Config) -> Callable[..., dict[str, int]]:
    """Run a playbook; return how many tasks changed something, by host."""
    return partial(playbooks.changes, inventory=pytestconfig.getoption("--ansible-inventory"))


@pytest.fixture(scope="session")
def units() -> dict[str, list[str]]:
    every = [
        "patroni",
        "etcd",
        "redis-server",
        "redis-sentinel",
        "feature-server@1",
        "feature-server@2",
        "push-server@1",
    ]
    return {"node1": [*every, "haproxy", "keepalived"], "node2": [*every, "haproxy", "keepalived"], "node3": every}


class Roles:
    """Who is what at this moment; an empty text for nobody."""

    def __init__(self, on: Callable[[str], Any], inventory: Any, vip: str) -> None:
        self._on, self._addresses, self._vip = on, {inventory.address(name): name for name in NODES}, vip

    def _first(self, command: str, nodes: tuple[str, ...]) -> str:
        for node in nodes:
            try:
                # With a member of etcd lost, patronictl asks the others after some seconds.
                answer = self._on(node).run(f"timeout 20 {command}")
            except RuntimeError:  # the host boots
                continue
            if answer.rc == 0 and answer.stdout.strip():
                return str(answer.stdout)
        return ""

    def postgresql(self, *nodes: str) -> str:
        said = self._first("patronictl -c /etc/patroni/config.yml list --format json", nodes or NODES)
        leaders = [member["Member"] for member in json.loads(said or "[]") if member["Role"] == "Leader"]
        return leaders[0] if leaders else ""

    def redis(self, *nodes: str) -> str:
        said = self._first("/usr/local/sbin/larder-redis status", nodes or NODES)
        return self._addresses.get(json.loads(said or "{}").get("primary", ""), "")

    def gateway(self, *nodes: str) -> str:
        gateways = [node for node in nodes or NODES if node != "node3"]
        holders = [node for node in gateways if self._vip in self._first("ip -brief address", (node,))]
        return holders[0] if len(holders) == 1 else ""

    def whole(self) -> bool:
        """Return whether every member of everything is there."""
        said = self._first("patronictl -c /etc/patroni/config.yml list --format json", NODES)
        states = sorted(member["State"] for member in json.loads(said or "[]"))
        redis = self.redis()
        status = json.loads(self._first("/usr/local/sbin/larder-redis status", (redis,)) or "{}") if redis else {}
        return (
            states == ["running", "streaming", "streaming"]
            and len(status.get("replicas", ())) == 2
            and status["sentinels"] == 3
            and bool(self.gateway())
        )

    def settled(self, seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while not self.whole():
            assert time.monotonic() < end, {name: getattr(self, name)() for name in ("postgresql", "redis", "gateway")}
            time.sleep(1)


@pytest.fixture(scope="session")
def roles(on: Callable[[str], Any], inventory: Any, vip: str) -> Roles:
    return Roles(on, inventory, vip)
