"""A run that is killed anywhere is finished by running it again."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import playbooks
import pytest
import testinfra

ROOT = Path(__file__).resolve().parents[3]
# One kill after so many tasks more than the time before, until a run comes to its end.
STEP = 6


@pytest.fixture
def inventory(pytestconfig: pytest.Config) -> str:
    return str(pytestconfig.getoption("--ansible-inventory"))


@pytest.fixture
def command(inventory: str) -> list[str]:
    inventories = [ROOT / "molecule/shared/inventory", inventory]
    return ["ansible-playbook", *(f"--inventory={path}" for path in inventories), "site.yml"]


def run_until(command: list[str], tasks: int) -> int | None:
    """Kill a run when so many tasks have begun; return its exit code if it ended before."""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=playbooks.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    ) as process:
        assert process.stdout
        begun = 0
        for line in process.stdout:
            begun += line.startswith(("TASK [", "RUNNING HANDLER ["))
            if begun > tasks:
                os.killpg(process.pid, signal.SIGKILL)
                return None
        return process.wait()


def test_killed_runs_are_finished_by_the_next(command: list[str], inventory: str) -> None:
    tasks = STEP
    while (code := run_until(command, tasks)) is None:
        tasks += STEP
    assert code == 0
    host = testinfra.get_host("ansible://soak1?sudo=true", ansible_inventory=inventory)
    assert host.check_output("systemctl is-system-running") == "running"
    assert "ohlcv_features" in host.check_output("feast feature-views list")
    for unit in (
        "postgresql@17-main",
        "redis-server",
        "feature-server@1",
        "feature-server@2",
        "push-server@1",
        "haproxy",
        "cron",
    ):
        assert host.service(unit).is_running, unit
