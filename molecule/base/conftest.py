"""Helpers of both verifications: the hosts by name, and whether one reaches another."""

from __future__ import annotations

from typing import Any

import pytest
import testinfra


class Hosts(dict[str, Any]):
    """The scenario's hosts by name, reached by SSH as Ansible does."""

    def __init__(self, inventory: str) -> None:
        self._inventory = inventory

    def __missing__(self, name: str) -> Any:
        self[name] = testinfra.get_host(f"ansible://{name}", ansible_inventory=self._inventory)
        return self[name]

    def reach(self, client: str, server: str, port: int, ipv6: bool = False) -> bool:
        """Whether a connection from one host to another opens within two seconds."""
        variables = self[server].backend.get_variables()
        address = variables["test_ipv6" if ipv6 else "ansible_host"]
        probe = f"import socket; socket.create_connection(('{address}', {port}), 2)"
        return self[client].run("python3 -c %s", probe).rc == 0


@pytest.fixture(scope="session")
def hosts(pytestconfig: pytest.Config) -> Hosts:
    return Hosts(pytestconfig.getoption("--ansible-inventory"))
