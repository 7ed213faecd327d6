"""Who asks: clients on other hosts, over the wire, with the passwords of the inventory."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import testinfra
from testinfra.backend.base import CommandResult
from testinfra.host import Host

SCENARIO = Path(__file__).parent
ROOT = SCENARIO.parent.parent

Query = Callable[..., CommandResult]


def connect(name: str) -> Host:
    return testinfra.get_host(f"ansible://{name}?ansible_inventory={SCENARIO / 'inventory'}")


@pytest.fixture(scope="session")
def store() -> Host:
    return connect("store1")


@pytest.fixture(scope="session")
def passwords(store: Host) -> dict[str, str]:
    return store.ansible.get_variables()["timescaledb_passwords"]


@pytest.fixture(scope="session")
def query(store: Host, passwords: dict[str, str]) -> Query:
    """Run SQL as a purpose from another host; gives psql's result, rows unaligned."""
    address = store.ansible.get_variables()["ansible_host"]

    def run(
        purpose: str,
        sql: str,
        *,
        host: str = "client1",
        user: str = "",
        password: str | None = None,
        options: str = "sslmode=require",
    ) -> CommandResult:
        login = f"host={address} dbname=feast user={user or 'feast_' + purpose} connect_timeout=5 {options}"
        secret = passwords.get(purpose, "") if password is None else password
        return connect(host).run(
            "PGPASSWORD=%s psql --no-psqlrc --quiet --tuples-only --no-align --set=ON_ERROR_STOP=1 %s --command=%s",
            secret,
            login,
            sql,
        )

    return run


@pytest.fixture(scope="session")
def superuser(store: Host) -> Callable[[str], str]:
    """Run SQL on the server itself, for what no client may do."""

    def run(sql: str) -> str:
        options = "--no-psqlrc --quiet --tuples-only --no-align --set=ON_ERROR_STOP=1"
        return store.check_output(f"sudo -u postgres psql {options} feast --command=%s", sql)

    return run


@pytest.fixture(scope="session")
def playbook() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run one of the scenario's playbooks again, with extra variables."""

    def run(name: str, *arguments: str, **variables: Any) -> subprocess.CompletedProcess[str]:
        inventories = [ROOT / "molecule/shared/inventory", SCENARIO / "inventory"]
        command = ["ansible-playbook", *(f"--inventory={path}" for path in inventories), SCENARIO / name]
        return subprocess.run(
            [*command, "--extra-vars", json.dumps(variables), *arguments],
            env=os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    return run
