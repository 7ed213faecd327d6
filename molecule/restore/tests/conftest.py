"""The operator's playbooks with the inventory of the moment, and what the hosts say."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import playbooks
import pytest
from testinfra.host import Host

ROOT = Path(__file__).resolve().parents[3]
SCENARIO = ROOT / "molecule/restore"
LAYERS = "--tags=base,backup,timescaledb"

Hosts = Callable[[str], Host]


class Run(NamedTuple):
    """What one run of a playbook ended in."""

    code: int
    output: str

    @property
    def changed(self) -> dict[str, int]:
        return playbooks.changed(self.output)

    @property
    def sentence(self) -> str:
        """Return the output in one line, for messages are wrapped."""
        return " ".join(self.output.split())


@pytest.fixture(scope="session")
def play(pytestconfig: pytest.Config) -> Callable[..., Run]:
    """Run a playbook with the groups of a file, of the database's layers alone."""

    def play(name: str, groups: str, *arguments: str) -> Run:
        paths = [
            ROOT / "molecule/shared/inventory",
            SCENARIO / f"groups/{groups}.yml",
            Path(pytestconfig.getoption("--ansible-inventory")),
        ]
        result = playbooks.run(name, LAYERS, *arguments, inventories=paths, one_stream=True)
        return Run(result.returncode, result.stdout)

    return play


@pytest.fixture(scope="session")
def sql(on: Hosts) -> Callable[..., str]:
    """Run SQL as the superuser of a database host."""
    options = "--no-psqlrc --quiet --tuples-only --no-align --set=ON_ERROR_STOP=1"
    return lambda host, query: on(host).check_output(
        f"cd / && runuser -u postgres -- psql {options} feast --command=%s", query
    )


@pytest.fixture(scope="session")
def held(on: Hosts) -> Callable[[], list[dict[str, Any]]]:
    """Return the backups in the repository, the oldest first."""

    def held() -> list[dict[str, Any]]:
        told = on("backup1").check_output("larder-backup --output=json --log-level-console=off info")
        backups: list[dict[str, Any]] = json.loads(told)[0]["backup"]
        return backups

    return held


@pytest.fixture(scope="session")
def ended(on: Hosts) -> Callable[[str], str]:
    """Wait until a unit that was started has ended, and return how: success, or another word of systemd."""

    def ended(unit: str) -> str:
        for _ in range(300):
            shown = on("backup1").check_output(f"systemctl show --property=ActiveState,Result,Job {unit}").splitlines()
            state = dict(line.split("=", 1) for line in shown)
            if state["ActiveState"] in {"inactive", "failed"} and state.get("Job", "0") in {"", "0"}:
                return state["Result"]
            time.sleep(1)
        raise AssertionError(f"{unit} has not ended within five minutes")

    return ended


@pytest.fixture(scope="session")
def metric(on: Hosts) -> Callable[[str], float]:
    """Return a metric that the node exporter would give."""

    def metric(name: str) -> float:
        text = on("backup1").check_output("cat /var/lib/larder/metrics/*.prom")
        return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name} "))

    return metric
