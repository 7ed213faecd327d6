"""Run Ansible from a test with the same words everywhere, whatever the colours, locale and settings of its caller."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Variables that choose Ansible's behaviour and colours, or the language and encoding of a program's words.
CHOICES = re.compile(r"ANSIBLE_.*|LC_.*|LANG|LANGUAGE|PYTHONIOENCODING|PYTHONUTF8")
RECAP = re.compile(r"^(\S+) +: ok=\d+ +changed=(\d+) ", re.MULTILINE)


def environment(**more: str) -> dict[str, str]:
    """Return the caller's environment for Ansible, with the checkout's settings alone, without colours and in UTF-8.

    ``more`` is added to it. Of the caller's settings for Ansible only the vault's password file stays.
    """
    kept = {name: value for name, value in os.environ.items() if not CHOICES.fullmatch(name)}
    vault = {name: os.environ[name] for name in ["ANSIBLE_VAULT_PASSWORD_FILE"] if name in os.environ}
    settings = {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", "LC_ALL": "C.UTF-8"}
    return kept | vault | settings | more


def run(
    playbook: str | Path,
    *arguments: str,
    inventories: Iterable[str | Path],
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    one_stream: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a playbook of the checkout to its end; with ``one_stream``, errors and warnings are part of ``stdout``."""
    command = [
        "ansible-playbook",
        *(f"--inventory={inventory}" for inventory in inventories),
        *arguments,
        str(playbook),
    ]
    try:
        return subprocess.run(
            command,
            cwd=ROOT,
            env=environment() if env is None else env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if one_stream else subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as ended:
        said = (ended.stdout or b"").decode(errors="replace")
        raise AssertionError(f"{playbook} had not ended after {timeout} s:\n{said[-4000:]}") from None


def changed(output: str) -> dict[str, int]:
    """Return how many tasks changed something, by host, from the recap of a playbook's output."""
    return {host: int(count) for host, count in RECAP.findall(output.rpartition("PLAY RECAP")[2])}


def changes(playbook: str, *arguments: str, inventory: str | Path) -> dict[str, int]:
    """Run a playbook over a scenario's hosts; return how many tasks changed something, by host where any did."""
    inventories = [ROOT / "molecule/shared/inventory", inventory]
    result = run(playbook, *arguments, inventories=inventories, one_stream=True, timeout=1200)
    assert result.returncode == 0, result.stdout[-6000:]
    return {host: count for host, count in changed(result.stdout).items() if count}


def tasks_that_changed(output: str) -> list[str]:
    """Return the names of the tasks that changed something, from a playbook's output."""
    return [task.partition("]")[0] for task in output.split("\nTASK [")[1:] if "\nchanged: [" in task]
