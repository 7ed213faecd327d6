"""Run playbooks as an operator does, on an inventory that grows and shrinks, while clients read through the gateway."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import playbooks
import pytest
import yaml

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


class Clients:
    """Programs on a machine that is in no group."""

    def __init__(self, inventory: Any) -> None:
        self._inventory = inventory
        variables = inventory.variables("client1")
        for name, content in {
            "load.py": (ROOT / "bench/load.py").read_text(),
            "gap.py": (SCENARIO / "clients/gap.py").read_text(),
            "ca.crt": variables["certificate_authorities"][0]["certificate"],
            "tokens.json": json.dumps(variables["gateway_tokens"]),
        }.items():
            inventory.run("client1", f"cat > /tmp/{name}", content)

    @contextmanager
    def run(self, command: str) -> Iterator[list[str]]:
        """Run a command until the block ends; its output is then in the list."""
        printed: list[str] = []
        self._inventory.run("client1", "rm -f /tmp/stop", "")
        with subprocess.Popen(
            self._inventory.argv("client1", command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                yield printed
            finally:
                self._inventory.run("client1", "touch /tmp/stop", "")
                printed.append(process.communicate(timeout=60)[0])

    @contextmanager
    def load(self, address: str) -> Iterator[dict[str, Any]]:
        """Read and push, and check every value; what was found is in the dictionary when the block has ended."""
        found: dict[str, Any] = {}
        command = f"python3 /tmp/load.py --gateway https://{address}:8443 --ca /tmp/ca.crt --tokens /tmp/tokens.json"
        with self.run(f"{command} --rate 10 --stop /tmp/stop") as printed:
            yield found
        found |= json.loads(printed[0])
        print({name: found[name] for name in ("requests", "failed", "failures", "wrong")}, found["phases"])

    @contextmanager
    def gap(self, address: str) -> Iterator[list[float]]:
        """Ask, and measure the longest time without an answer in seconds."""
        found: list[float] = []
        with self.run(f"python3 /tmp/gap.py {address} /tmp/stop") as printed:
            yield found
        answers, longest = printed[0].split()
        assert int(answers) > 10
        print(f"{answers} answers, {float(longest):.2f} s without one")
        found.append(float(longest))


@pytest.fixture(scope="session")
def clients(inventory: Any) -> Clients:
    return Clients(inventory)
