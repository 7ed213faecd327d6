"""Who asks: clients on other hosts, over the wire, with the passwords of the inventory."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import playbooks
import pytest
import testinfra
from testinfra.backend.base import CommandResult
from testinfra.host import Host

SCENARIO = Path(__file__).parent
ROOT = SCENARIO.parent.parent

FILES = {"sslrootcert": "ca.crt", "sslcert": "tls.crt", "sslkey": "tls.key"}

Query = Callable[..., CommandResult]

spec = importlib.util.spec_from_file_location("secrets_filter", ROOT / "ansible/plugins/filter/secrets.py")
assert spec
assert spec.loader
secrets = importlib.util.module_from_spec(spec)
spec.loader.exec_module(secrets)


def connect(name: str) -> Host:
    return testinfra.get_host(f"ansible://{name}?ansible_inventory={SCENARIO / 'inventory'}")


@pytest.fixture(scope="session")
def store() -> Host:
    return connect("store1")


@pytest.fixture(scope="session")
def passwords(store: Host) -> dict[str, str]:
    return store.ansible.get_variables()["timescaledb_passwords"]


@pytest.fixture(scope="session")
def login() -> Callable[[str, str], str]:
    """Return the login that a purpose's password makes."""
    return lambda purpose, password: f"feast_{secrets.larder_login(purpose, {purpose: password})}"


@pytest.fixture(scope="session")
def client_address() -> str:
    return str(connect("client1").ansible.get_variables()["ansible_host"])


def certificate(service: str = "feast") -> dict[str, str]:
    """Return a client's certificate as libpq's options: the stack's, or under gateway one of a foreign authority."""
    return {option: f"/etc/larder/tls/{service}/current/{name}" for option, name in FILES.items()}


@pytest.fixture(scope="session")
def foreign_certificate() -> dict[str, str]:
    return certificate("gateway")


@pytest.fixture(scope="session")
def query(
    store: Host,
    passwords: dict[str, str],
    login: Callable[[str, str], str],
) -> Query:
    """Run SQL as a purpose from another host; gives psql's result, rows unaligned.

    ``options`` are added to what a proper client has; one that is None is left out. With ``background`` the session
    stays open on its host, and nothing is returned of it.
    """
    address = store.ansible.get_variables()["ansible_host"]

    def run(
        purpose: str,
        sql: str,
        *,
        on: str = "client1",
        user: str = "",
        password: str | None = None,
        background: bool = False,
        **options: str | None,
    ) -> CommandResult:
        secret = passwords.get(purpose, "") if password is None else password
        settings: dict[str, str | None] = {
            "host": address,
            "dbname": "feast",
            "user": user or login(purpose, secret),
            "connect_timeout": "5",
            "sslmode": "verify-full",
            **certificate(),
            **options,
        }
        psql = "psql --no-psqlrc --quiet --tuples-only --no-align --set=ON_ERROR_STOP=1"
        command = f"PGPASSWORD=%s {psql} %s --command=%s"
        if background:
            command = f"PGPASSWORD=%s nohup {psql} %s --command=%s > /tmp/background.log 2>&1 &"
        conninfo = " ".join(f"{name}={value}" for name, value in settings.items() if value is not None)
        return connect(on).run(command, secret, conninfo, sql)

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
        extra = f"--extra-vars={json.dumps(variables)}"
        return playbooks.run(SCENARIO / name, extra, *arguments, inventories=inventories)

    return run
