"""Run playbooks as an operator does, on an inventory that grows and shrinks, while clients read through the gateway."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import playbooks
import pytest
import yaml
from machines import Clients, Machines

ROOT = Path(__file__).resolve().parents[3]
SCENARIO = ROOT / "molecule/growth"


class Run(NamedTuple):
    """What a playbook ended in."""

    code: int
    output: str

    @property
    def sentence(self) -> str:
        return " ".join(self.output.split())

    @property
    def changed(self) -> dict[str, int]:
        return {host: count for host, count in playbooks.changed(self.output).items() if count}


class Growing:
    """The lines that were added to the scenario's inventory."""

    def __init__(self, directory: Path, inventory: str) -> None:
        self.path = directory / "hosts.yml"
        self.inventories = [ROOT / "molecule/shared/inventory", Path(inventory), self.path]
        self.set()

    def set(self, groups: dict[str, list[str]] | None = None, **variables: Any) -> None:
        """Say which hosts are in the groups beside those of the scenario."""
        hosts = {group: {"hosts": dict.fromkeys(names)} for group, names in (groups or {}).items()}
        self.path.write_text(yaml.safe_dump({"all": {"vars": variables}, **hosts}))

    def play(self, playbook: str, *arguments: str, **options: Any) -> Run:
        result = playbooks.run(playbook, *arguments, inventories=self.inventories, one_stream=True, **options)
        return Run(result.returncode, result.stdout)


@pytest.fixture(scope="session")
def growing(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Growing:
    return Growing(tmp_path_factory.mktemp("grown"), pytestconfig.getoption("--ansible-inventory"))


@pytest.fixture(scope="session")
def vip(inventory: Any) -> str:
    """Return an address of the scenario's network that no host has."""
    return str(inventory.address("gateway1")).rpartition(".")[0] + ".250"


@pytest.fixture(scope="session")
def units() -> dict[str, list[str]]:
    return {
        "server1": [
            "postgresql@17-main",
            "redis-server",
            "cron",
            "feature-server@1",
            "feature-server@2",
            "push-server@1",
        ],
        "gateway1": ["haproxy"],
    }


@pytest.fixture(scope="session")
def holder(inventory: Any, vip: str) -> Callable[[], list[str]]:
    """Return the gateways of a list that have the virtual address."""

    def holder(*gateways: str) -> list[str]:
        return [name for name in gateways if vip in inventory.host(name).check_output("ip -brief address")]

    return holder


@pytest.fixture(scope="session")
def cut_off(inventory: Any) -> Callable[[str], Any]:
    """Let a host take no new SSH connections for as long as the block takes."""

    @contextmanager
    def cut_off(name: str) -> Iterator[None]:
        begin = (
            "nft add table inet outage && nft 'add chain inet outage in { type filter hook input priority -10; }'"
            " && nft add rule inet outage in tcp dport 22 ct state new drop"
        )
        shell = shlex.join(["sudo", "sh", "-c", f"{begin} && echo begun; cat; nft delete table inet outage"])
        with subprocess.Popen(
            inventory.argv(name, shell), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as held:
            assert held.stdout
            assert held.stdout.readline() == "begun\n"
            yield

    return cut_off


@pytest.fixture(scope="session")
def clients(inventory: Any) -> Clients:
    return Clients(inventory)


@pytest.fixture
def machines() -> Iterator[Machines]:
    machines = Machines("growth")
    yield machines
    machines.power_on()
