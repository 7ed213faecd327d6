"""Ask as Redis' clients do: over the wire, from another host. Passwords travel on standard input."""

from __future__ import annotations

import json
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import testinfra

CLIENTS = Path(__file__).parent / "clients"
Answers = list[Any]


class Inventory:
    """The hosts of the scenario, as Ansible reaches them."""

    def __init__(self, path: str, sockets: Path) -> None:
        self._path = path
        self._multiplex = ["-o", "ControlMaster=auto", "-o", "ControlPersist=30", "-o", f"ControlPath={sockets}/%C"]
        self._variables: dict[str, dict[str, Any]] = {}

    def variables(self, name: str) -> dict[str, Any]:
        if name not in self._variables:
            host = testinfra.get_host(f"ansible://{name}", ansible_inventory=self._path)
            self._variables[name] = host.ansible.get_variables()
        return self._variables[name]

    def run(self, name: str, command: str, stdin: str) -> str:
        """Run a command on a host with something secret on its standard input."""
        host = self.variables(name)
        argv = ["ssh", *self._multiplex, "-i", host["ansible_ssh_private_key_file"]]
        argv += shlex.split(host["ansible_ssh_common_args"])
        argv += [f"{host['ansible_user']}@{host['ansible_host']}", command]
        return subprocess.run(argv, input=stdin, text=True, capture_output=True, check=True, timeout=120).stdout


@pytest.fixture(scope="session")
def inventory(pytestconfig: pytest.Config) -> Iterator[Inventory]:
    # A socket's path may have 108 characters; pytest's own temporary directories are longer.
    with tempfile.TemporaryDirectory(prefix="redis") as sockets:
        yield Inventory(pytestconfig.getoption("--ansible-inventory"), Path(sockets))


@pytest.fixture(scope="session")
def address(inventory: Inventory) -> str:
    return str(inventory.variables("cache1")["ansible_host"])


@pytest.fixture(scope="session")
def vault_passwords(inventory: Inventory) -> dict[str, str]:
    return dict(inventory.variables("cache1")["redis_passwords"])


@pytest.fixture(scope="session")
def ask(inventory: Inventory, address: str) -> Callable[..., Answers]:
    """Send commands to Redis from a host; without a user, without authentication."""

    def ask(
        *commands: list[Any], user: str | None = None, password: str | None = None, source: str = "server1"
    ) -> Answers:
        connection = {"host": address, "port": 6379, "username": user, "password": password}
        script = shlex.quote((CLIENTS / "ask.py").read_text())
        request = json.dumps({"connection": connection, "commands": commands})
        answers: Answers = json.loads(inventory.run(source, f"python3 -c {script}", request))
        return answers

    return ask
