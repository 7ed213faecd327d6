"""An operator who rotates secrets, sometimes killed on the way, and the clients who must not notice."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import playbooks
import pytest
import yaml
from ansible.parsing.vault import VaultLib, VaultSecret

ROOT = Path(__file__).resolve().parents[3]
specification = importlib.util.spec_from_file_location("secrets_filter", ROOT / "ansible/plugins/filter/secrets.py")
assert specification
assert specification.loader
encodings = importlib.util.module_from_spec(specification)
specification.loader.exec_module(encodings)


class Run(NamedTuple):
    """What one playbook ended in; without a code it was killed."""

    code: int | None
    output: str

    @property
    def changed(self) -> int:
        return sum(playbooks.changed(self.output).values())

    @property
    def sentence(self) -> str:
        return " ".join(self.output.split())


class Operator:
    """Somebody at the controller, with the scenario's inventory and vault."""

    def __init__(self, inventory: str) -> None:
        self.inventory = Path(inventory)
        self.vault = self.inventory / "group_vars/all/vault.yml"

    def play(self, playbook: str, *arguments: str, kill_at: str = "") -> Run:
        """Run a playbook; kill it, and all that it started, when a line of its output begins so."""
        sources = [f"--inventory={path}" for path in (ROOT / "molecule/shared/inventory", self.inventory)]
        lines = []
        with subprocess.Popen(
            ["ansible-playbook", *sources, playbook, *arguments],
            cwd=ROOT,
            env=playbooks.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        ) as process:
            assert process.stdout
            for line in process.stdout:
                lines.append(line)
                if kill_at and line.startswith(kill_at):
                    os.killpg(process.pid, signal.SIGKILL)
                    return Run(None, "".join(lines))
            return Run(process.wait(), "".join(lines))

    def rotate(self, *arguments: str, kill_at: str = "") -> Run:
        return self.play("ansible/rotate_secrets.yml", *arguments, kill_at=kill_at)

    def renew(self) -> dict[str, Any]:
        """Write fresh secrets into the vault; return what it held before."""
        before = self.secrets()
        run = self.play("ansible/new_secrets.yml")
        assert run.code == 0, run.output
        return before

    def undo(self) -> None:
        """Put the vault back as it was."""
        shutil.copy(self.vault.with_name("vault.yml.former"), self.vault)

    def secrets(self) -> dict[str, Any]:
        password = VaultSecret((self.inventory / ".vault_password").read_bytes().strip())
        secrets: dict[str, Any] = yaml.safe_load(VaultLib([("default", password)]).decrypt(self.vault.read_bytes()))
        return secrets


@pytest.fixture(scope="session")
def operator(pytestconfig: pytest.Config) -> Operator:
    return Operator(pytestconfig.getoption("--ansible-inventory"))


@pytest.fixture(scope="session")
def first_tokens(operator: Operator) -> dict[str, str]:
    """Return the gateway's tokens before the first rotation, one of each role."""
    tokens: dict[str, str] = operator.secrets()["gateway_tokens"]
    return tokens


class Stores:
    """Logins at both stores, from the pipeline's host and with its certificate."""

    SCRIPT = (Path(__file__).parent / "log_in.py").read_text()

    def __init__(self, inventory: Any) -> None:
        self._inventory = inventory

    def logins(self, secrets: dict[str, Any]) -> dict[str, bool]:
        """Try every password of a vault; return whether its login was let in."""
        asked = []
        for purpose in secrets["timescaledb_passwords"]:
            login = encodings.larder_login(f"feast_{purpose}", _prefixed("feast_", secrets["timescaledb_passwords"]))
            asked.append(("timescaledb", login, secrets["timescaledb_passwords"][purpose]))
        for purpose in secrets["redis_passwords"]:
            login = encodings.larder_login(purpose, secrets["redis_passwords"])
            asked.append(("redis", login, secrets["redis_passwords"][purpose]))
        self._inventory.host("store1").check_output("mkdir -p /run/larder-test")
        self._inventory.run("store1", "sudo tee /run/larder-test/log_in.py", self.SCRIPT)
        address = self._inventory.address("store1")
        command = f"sudo /opt/feast/current/bin/python /run/larder-test/log_in.py {address}"
        answered = self._inventory.run("store1", command, json.dumps(asked))
        return dict(zip((f"{store} {login}" for store, login, _ in asked), json.loads(answered), strict=True))

    def generations(self) -> set[str]:
        """Return every login that the stores know and that carries a generation."""
        host = self._inventory.host("store1")
        roles = host.check_output(
            "runuser -u postgres -- psql -At -c \"SELECT rolname FROM pg_roles WHERE rolname ~ '_g[0-9a-f]{8}$'\""
        )
        users = host.check_output("cat /etc/redis/users.acl")
        return set(roles.split()) | set(re.findall(r"^user (\w+_g[0-9a-f]{8}) ", users, re.MULTILINE))


class Load:
    """Clients that read and push all the while, as bench/load.py has them."""

    def __init__(self, inventory: Any, operator: Operator, directory: Path) -> None:
        self._inventory = inventory
        self._files = {name: directory / name for name in ("tokens", "phase", "stop", "ca", "result")}
        self.use(operator.secrets()["gateway_tokens"])
        self.trust(operator.inventory / "ca.crt")
        self._files["phase"].write_text("start")
        self._files["result"].touch()
        url = f"https://{inventory.address('store1')}:8443"
        options = [f"--{name}={self._files[name]}" for name in ("tokens", "phase", "stop", "ca")]
        # The soak's percentiles need many requests. A failure shows at the lower rate, which leaves more to Ansible.
        options.append(f"--rate={50 if 'LARDER_SOAK' in os.environ else 20}")
        with self._files["result"].open("w") as result:
            self._process = subprocess.Popen(
                [sys.executable, ROOT / "bench/load.py", f"--gateway={url}", *options], stdout=result
            )
        self._result: dict[str, Any] = {}

    def _write(self, name: str, text: str) -> None:
        """Replace a file at once: the load may be reading it."""
        new = self._files[name].with_suffix(".new")
        new.write_text(text)
        new.replace(self._files[name])

    def use(self, tokens: dict[str, Any]) -> None:
        self._write("tokens", json.dumps(tokens))

    def trust(self, authorities: Path) -> None:
        self._write("ca", authorities.read_text())

    def phase(self, name: str, seconds: float = 0) -> None:
        self._write("phase", name)
        self.steady(seconds)

    def steady(self, seconds: float) -> None:
        """Let the load go on for a while."""
        time.sleep(seconds)
        assert self._process.poll() is None, "the load has ended by itself"

    def materialize(self) -> None:
        self._inventory.host("store1").check_output("systemctl start --no-block feature-pipeline.service")

    def _connect(self) -> http.client.HTTPSConnection:
        trusted = ssl.create_default_context(cafile=str(self._files["ca"]))
        return http.client.HTTPSConnection(self._inventory.address("store1"), 8443, timeout=30, context=trusted)

    def status(self, token: str) -> int:
        """Return what the gateway answers to a token."""
        connection = self._connect()
        connection.request("GET", "/health", headers={"Authorization": f"Bearer {token}"})
        return connection.getresponse().status

    def certificate(self) -> bytes | None:
        connection = self._connect()
        connection.connect()
        return connection.sock.getpeercert(binary_form=True)  # type: ignore[union-attr]

    def end(self) -> dict[str, Any]:
        if not self._result:
            self._files["stop"].touch()
            self._process.wait(timeout=120)
            self._result = json.loads(self._files["result"].read_text())
        return self._result

    def slow_reads(self, *phases: str) -> list[float]:
        """Return the 99th percentile of the single reads of each phase, in milliseconds."""
        return [self.end()["phases"][phase]["single"]["p99"] for phase in phases]


@pytest.fixture(scope="session")
def load(inventory: Any, operator: Operator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Load]:
    running = Load(inventory, operator, tmp_path_factory.mktemp("load"))
    yield running
    print(json.dumps(running.end(), indent=2))


@pytest.fixture(scope="session")
def units() -> dict[str, list[str]]:
    return {
        "store1": ["postgresql@17-main", "redis-server", "haproxy"],
        "server1": ["feature-server@1", "push-server@1"],
        "server2": ["feature-server@1", "push-server@1"],
    }


@pytest.fixture(scope="session")
def at_first(starts: Callable[[], dict[str, str]]) -> dict[str, str]:
    return {unit: start for unit, start in starts().items() if unit.startswith("store1")}


def _prefixed(prefix: str, passwords: dict[str, str]) -> dict[str, str]:
    return {prefix + purpose: password for purpose, password in passwords.items()}


@pytest.fixture(scope="session")
def stores(inventory: Any) -> Stores:
    return Stores(inventory)
