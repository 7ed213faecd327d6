"""Ask as Redis' clients do: over the wire, from another host. Passwords travel on standard input."""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import playbooks
import pytest

SCENARIO = Path(__file__).parent
ROOT = SCENARIO.parent.parent
PORT = 6379
Answers = list[Any]
Passwords = dict[str, str]

spec = importlib.util.spec_from_file_location("secrets", ROOT / "ansible/plugins/filter/secrets.py")
assert spec
assert spec.loader
secrets = importlib.util.module_from_spec(spec)
spec.loader.exec_module(secrets)


def script(name: str) -> str:
    return "sudo python3 -c " + shlex.quote((SCENARIO / "clients" / name).read_text())


@pytest.fixture(scope="session")
def address(inventory: Any) -> str:
    return inventory.address("cache1")


@pytest.fixture(scope="session")
def vault_passwords(inventory: Any) -> Passwords:
    return dict(inventory.variables("cache1")["redis_passwords"])


@pytest.fixture(scope="session")
def login() -> Callable[[str, Passwords], str]:
    return secrets.larder_login


@pytest.fixture(scope="session")
def certificate(inventory: Any) -> Callable[[str], str]:
    """Return the directory of a client host's certificate."""
    return lambda host: inventory.run(host, "ls -d /etc/larder/tls/feast/*Z", "").strip()


@pytest.fixture(scope="session")
def connection(address: str, certificate: Callable[[str], str]) -> Callable[..., dict[str, Any]]:
    """Return redis-py's arguments by which a host connects, with TLS and the host's certificate."""
    tls: dict[str, str] = {}

    def connection(source: str, user: str | None, password: str | None) -> dict[str, Any]:
        directory = tls.setdefault(source, certificate(source))
        return {
            "host": address,
            "port": PORT,
            "username": user,
            "password": password,
            "ssl_ca_certs": f"{directory}/ca.crt",
            "ssl_certfile": f"{directory}/tls.crt",
            "ssl_keyfile": f"{directory}/tls.key",
            "ssl_check_hostname": True,
        }

    return connection


@pytest.fixture(scope="session")
def ask(inventory: Any, connection: Callable[..., dict[str, Any]]) -> Callable[..., Answers]:
    """Send commands to Redis from a host; without a user, without authentication; ``other`` names another server."""

    def ask(
        *commands: list[Any],
        user: str | None = None,
        password: str | None = None,
        source: str = "server1",
        **other: Any,
    ) -> Answers:
        request = {"connection": connection(source, user, password) | {"ssl": True} | other, "commands": commands}
        answers: Answers = json.loads(inventory.run(source, script("ask.py"), json.dumps(request)))
        return answers

    return ask


@pytest.fixture(scope="session")
def greet(inventory: Any, address: str, certificate: Callable[[str], str]) -> Callable[..., str]:
    """Return what a client without a password hears that comes with other TLS settings."""

    def greet(source: str = "server1", **other: Any) -> str:
        directory = certificate(source)
        request = {"host": address, "port": PORT, "tls": True, "name": address, "newest": "TLSv1_3", "show": "answer"}
        request |= {"authorities": f"{directory}/ca.crt", "certificate": directory}
        return str(inventory.run(source, script("greet.py"), json.dumps(request | other))).strip()

    return greet


@pytest.fixture(scope="session")
def hold(inventory: Any, connection: Callable[..., dict[str, Any]]) -> Iterator[Callable[..., Callable[[], None]]]:
    """Hold sessions of (login, password) pairs and write to /tmp/NAME.json which live; return what ends them."""
    held: list[str] = []

    def hold(name: str, sessions: dict[str, tuple[str, str]]) -> Callable[[], None]:
        connections = {key: connection("server1", *session) for key, session in sessions.items()}
        request = {"connections": connections, "state": f"/tmp/{name}.json"}
        inventory.run("server1", script("hold.py"), json.dumps(request))
        held.append(name)
        return lambda: release(name)

    def release(name: str) -> None:
        held.remove(name)
        state = f"/tmp/{name}.json"
        stop = f"import json, os, signal; os.kill(json.load(open('{state}'))['pid'], signal.SIGTERM)"
        # The client may have ended by itself: Redis cuts it off in some of the tests.
        inventory.run("server1", f'sudo python3 -c "{stop}" || true; sudo rm -f {state}', "")

    yield hold
    for name in [*held]:
        release(name)


@pytest.fixture(scope="session")
def playbook() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run one of the scenario's playbooks; its variables, secrets among them, travel in a file of ours."""

    def run(name: str, **variables: Any) -> subprocess.CompletedProcess[str]:
        inventories = [ROOT / "molecule/shared/inventory", SCENARIO / "inventory"]
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(variables, file)
            file.flush()
            extra = f"--extra-vars=@{file.name}"
            return playbooks.run(SCENARIO / name, extra, inventories=inventories, timeout=600)

    return run
