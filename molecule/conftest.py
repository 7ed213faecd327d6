"""What the tests of all scenarios share: hosts by name, and commands whose secrets travel on standard input."""

from __future__ import annotations

import shlex
import ssl
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import testinfra
from testinfra.host import Host


class Inventory:
    """The hosts of the scenario, as Ansible reaches them."""

    def __init__(self, path: str, sockets: Path) -> None:
        self.path = path
        self._multiplex = ["-o", "ControlMaster=auto", "-o", "ControlPersist=30", "-o", f"ControlPath={sockets}/%C"]
        self._variables: dict[str, dict[str, Any]] = {}

    def host(self, name: str) -> Host:
        """Return a host whose commands run as root."""
        return testinfra.get_host(f"ansible://{name}?sudo=true", ansible_inventory=self.path)

    def variables(self, name: str) -> dict[str, Any]:
        if name not in self._variables:
            self._variables[name] = self.host(name).ansible.get_variables()
        return self._variables[name]

    def address(self, name: str) -> str:
        return str(self.variables(name)["ansible_host"])

    def trusted(self) -> ssl.SSLContext:
        """Return how the gateway's clients check its certificate: by the file that they were given."""
        return ssl.create_default_context(cafile=str(Path(self.path) / "ca.crt"))

    def argv(self, name: str, command: str) -> list[str]:
        """Return the local command that runs a command on a host."""
        host = self.variables(name)
        argv = ["ssh", *self._multiplex, "-i", host["ansible_ssh_private_key_file"]]
        argv += shlex.split(host["ansible_ssh_common_args"])
        return [*argv, f"{host['ansible_user']}@{host['ansible_host']}", command]

    def run(self, name: str, command: str, stdin: str) -> str:
        """Run a command on a host with something secret on its standard input; return what it prints."""
        argv = self.argv(name, command)
        return subprocess.run(argv, input=stdin, text=True, capture_output=True, check=True, timeout=300).stdout


@pytest.fixture(scope="session")
def inventory(pytestconfig: pytest.Config) -> Iterator[Inventory]:
    # A socket's path may have 108 characters; pytest's own temporary directories are longer.
    with tempfile.TemporaryDirectory(prefix="larder") as sockets:
        yield Inventory(pytestconfig.getoption("--ansible-inventory"), Path(sockets))


@pytest.fixture(scope="session")
def on(inventory: Inventory) -> Callable[[str], Host]:
    """Return the host of a name; its commands run as root."""
    return inventory.host


@pytest.fixture(scope="session")
def units() -> dict[str, list[str]]:
    """Return the units that `starts` watches, by host; each scenario overrides this."""
    return {}


@pytest.fixture(scope="session")
def starts(inventory: Inventory, units: dict[str, list[str]]) -> Callable[[], dict[str, str]]:
    """Return when each unit was started, and its main process: equal twice, it was not restarted in between."""

    def starts() -> dict[str, str]:
        return {
            f"{name}: {unit}": inventory.host(name).check_output(
                f"systemctl show {unit} -p ActiveEnterTimestampMonotonic -p MainPID -p ActiveState"
            )
            for name, watched in units.items()
            for unit in watched
        }

    return starts
