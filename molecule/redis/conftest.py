"""Ask as Redis' clients do: over the wire, from another host. Passwords travel on standard input."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CLIENTS = Path(__file__).parent / "clients"
Answers = list[Any]


@pytest.fixture(scope="session")
def address(inventory: Any) -> str:
    return inventory.address("cache1")


@pytest.fixture(scope="session")
def vault_passwords(inventory: Any) -> dict[str, str]:
    return dict(inventory.variables("cache1")["redis_passwords"])


@pytest.fixture(scope="session")
def ask(inventory: Any, address: str) -> Callable[..., Answers]:
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
