"""Who asks: a client on another host, over the wire; and what is done to the hosts from outside."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import playbooks
import pytest
from testinfra.backend.base import CommandResult

SCENARIO = Path(__file__).parent
ROOT = SCENARIO.parent.parent
CLIENT = "failover3"
TLS = {"sslrootcert": "ca.crt", "sslcert": "tls.crt", "sslkey": "tls.key"}

spec = importlib.util.spec_from_file_location("secrets_filter", ROOT / "ansible/plugins/filter/secrets.py")
assert spec
assert spec.loader
secrets = importlib.util.module_from_spec(spec)
spec.loader.exec_module(secrets)


class Report(NamedTuple):
    """What a writer saw: rows that the server acknowledged, failures, and the longest time without an answer."""

    acknowledged: list[int]
    failures: list[str]
    gap: float


class Database:
    """The database hosts, as the client reaches them."""

    def __init__(self, inventory) -> None:
        self.inventory = inventory
        held = inventory.variables("failover1")
        self.passwords = held["timescaledb_passwords"] | held["timescaledb_replication_passwords"]

    def conninfo(self, on: str, purpose: str = "load", **options: str) -> str:
        password = options.pop("password", self.passwords[purpose])
        settings = {
            "host": self.inventory.address(on),
            "dbname": "feast",
            "user": f"feast_{secrets.larder_login(purpose, self.passwords)}",
            "password": password,
            "sslmode": "verify-full",
            "connect_timeout": "2",
            **{name: f"/etc/larder/tls/feast/current/{file}" for name, file in TLS.items()},
            **options,
        }
        quoted = {name: value.replace("\\", "\\\\").replace("'", "\\'") for name, value in settings.items()}
        return " ".join(f"{name}='{value}'" for name, value in quoted.items())

    def query(self, on: str, sql: str, purpose: str = "pipeline", **options: str) -> CommandResult:
        psql = "psql --no-psqlrc --quiet --tuples-only --no-align --set=ON_ERROR_STOP=1 %s --command=%s"
        return self.inventory.host(CLIENT).run(psql, self.conninfo(on, purpose, **options), sql)

    def answer(self, on: str, sql: str, **options: str) -> str:
        result = self.query(on, sql, **options)
        assert result.rc == 0, result.stderr
        return result.stdout.strip()

    def superuser(self, host: str, sql: str) -> str:
        options = "--no-psqlrc --quiet --tuples-only --no-align --set=ON_ERROR_STOP=1"
        return (
            self.inventory.host(host).check_output(f"sudo -u postgres psql {options} feast --command=%s", sql).strip()
        )

    def rows(self, host: str, symbol: str) -> set[int]:
        """Return the numbers of a writer's rows that a host has; none while it does not answer."""
        sql = (
            "SELECT extract(epoch FROM event_timestamp - '2026-01-01Z')::int FROM market_data.ohlcv_daily"
            f" WHERE symbol = '{symbol}'"
        )
        return {int(line) for line in self.query(host, sql).stdout.split()}

    def holding(self, host: str, secret: str) -> set[str]:
        """Return the files of a host that hold a secret in clear; the command line does not."""
        where = "/etc /var/lib/postgresql /var/lib/etcd /var/log /run"
        command = (
            f"sudo sh -c 'grep --recursive --files-with-matches --fixed-strings --file=- {where} 2> /dev/null; true'"
        )
        return set(self.inventory.run(host, command, secret).split())

    def started(self, host: str) -> str:
        return self.superuser(host, "SELECT pg_postmaster_start_time()")

    def insert(self, on: str, symbol: str, **options: str) -> CommandResult:
        sql = (
            "INSERT INTO market_data.ohlcv_daily"
            " (symbol, event_timestamp, open, high, low, close, adjusted_close, volume)"
            f" VALUES ('{symbol}', now(), 1, 1, 1, 1, 1, 1)"
        )
        return self.query(on, sql, "load", **options)

    @contextmanager
    def writer(self, conninfo: str, symbol: str) -> Iterator[Callable[[], Report]]:
        """Have the client write; the value ends the writer and returns what it saw."""
        name = f"writer-{symbol.lower()}"
        start = f"systemd-run --quiet --collect --unit={name} --property=StandardInput=file:/run/{name}"
        self.inventory.run(CLIENT, f"sudo sh -c 'umask 077; rm -f /run/{name}.json; cat > /run/{name}'", conninfo)
        client = self.inventory.host(CLIENT)
        client.check_output(f"{start} /usr/local/bin/writer {symbol} /run/{name}.json")
        reports: list[Report] = []

        def end() -> Report:
            if not reports:
                client.check_output(f"systemctl stop {name}")
                reports.append(Report(**json.loads(client.check_output(f"cat /run/{name}.json"))))
            return reports[0]

        try:
            yield end
        finally:
            end()


@pytest.fixture(scope="session")
def database(inventory) -> Database:
    return Database(inventory)


@pytest.fixture(scope="session")
def playbook() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a playbook on the scenario's hosts; ``inventories`` are those of the scenario that come after its own."""

    def run(
        name: str, *arguments: str, inventories: tuple[str, ...] = ("grown",), **variables: Any
    ) -> subprocess.CompletedProcess[str]:
        paths = [ROOT / "molecule/shared/inventory", *(SCENARIO / each for each in ("inventory", *inventories))]
        path = ROOT / "ansible" / name if (ROOT / "ansible" / name).exists() else SCENARIO / name
        extra = f"--extra-vars={json.dumps(variables)}"
        return playbooks.run(path, extra, *arguments, inventories=paths, one_stream=True)

    return run


@pytest.fixture(scope="session")
def docker() -> Callable[..., str]:
    """Run a docker command on the container of a host."""

    def run(action: str, host: str, *arguments: str) -> str:
        checkout = hashlib.sha1(str(ROOT).encode()).hexdigest()[:8]
        command = ["docker", action, f"larder-{checkout}-timescaledb_failover-{host}", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    return run


@pytest.fixture(scope="session")
def eventually() -> Callable[..., None]:
    """Wait until something is true."""

    def wait(true: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, "still not true"
            time.sleep(0.5)

    return wait
