#!/usr/bin/env python3
"""`site.yml` on bare hosts, and again where it changes nothing, against a shell script that installs the same packages.

    python bench/deployment.py .larder/benchmarks/deployment.json

On the controller, with Docker; the hosts are those of `inventory/trial`, new ones for each run:

- ``larder``: ``site.yml``, from bare hosts to a stack that serves;
- ``script``: a shell script on all hosts at once, which installs the Debian packages that ``site.yml`` has installed,
  and the Python packages of the lock where Feast runs, and configures nothing;
- ``unchanged``: ``site.yml`` once more.

The hosts' image is there before.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests/shared"))
import playbooks  # noqa: E402 - the tests' own way to run Ansible, which is on no path here

PLACE = ROOT / ".larder/benchmarks/deployment"
INVENTORY = PLACE / "inventory"
LOCK = next((ROOT / "roles/feast/files").glob("requirements-*.txt"))
UV = ROOT / "roles/feast/files/uv.txt"
CERTIFICATES = sorted(Path("/usr/local/share/ca-certificates").glob("*.crt"))

Hosts = dict[str, list[str]]  # the command that reaches each


def playbook(name: str) -> tuple[float, int]:
    """Run a playbook on the hosts; return the seconds that it took, and how many tasks changed something."""
    password = INVENTORY / ".vault_password"
    started = time.perf_counter()
    done = subprocess.run(
        [Path(sys.executable).with_name("ansible-playbook"), f"--inventory={INVENTORY}", name],
        cwd=ROOT,
        env=playbooks.environment(MOLECULE_SCENARIO_NAME="deployment", MOLECULE_SCENARIO_DIRECTORY=str(PLACE))
        | ({"ANSIBLE_VAULT_PASSWORD_FILE": str(password)} if password.exists() else {}),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(done.stdout[-4000:])
    return seconds, sum(playbooks.changed(done.stdout).values())


def new_hosts(groups: dict[str, Any]) -> Hosts:
    """Start bare hosts, with secrets of their own."""
    shutil.rmtree(INVENTORY, ignore_errors=True)
    variables = "group_vars/all/trial.yml"
    (INVENTORY / variables).parent.mkdir(parents=True)
    shutil.copy(ROOT / "inventory/trial" / variables, INVENTORY / variables)
    (INVENTORY / "hosts.yml").write_text(yaml.safe_dump(groups))
    playbook("molecule/shared/create.yml")
    found = yaml.safe_load((INVENTORY / "addresses.yml").read_text())["all"]
    access = [
        "-i",
        found["vars"]["ansible_ssh_private_key_file"],
        *shlex.split(found["vars"]["ansible_ssh_common_args"]),
    ]
    user = found["vars"]["ansible_user"]
    return {name: ["ssh", *access, f"{user}@{host['ansible_host']}", "sudo"] for name, host in found["hosts"].items()}


def packages(hosts: Hosts) -> dict[str, set[str]]:
    """Return the Debian packages that each host has."""
    shown = "dpkg-query --show --showformat='${Package}\\n'"
    return {name: set(subprocess.check_output([*reach, shown], text=True).split()) for name, reach in hosts.items()}


def commands(wanted: set[str]) -> str:
    """Return what installs the packages, and Feast's too where its environment needs them."""
    lines = [
        "set -eu",
        "export DEBIAN_FRONTEND=noninteractive",
        *(f"cat > {certificate} <<'end'\n{certificate.read_text()}\nend" for certificate in CERTIFICATES),
        "update-ca-certificates > /dev/null",
        "apt-get update -qq",
        f"apt-get install -y -qq --no-install-recommends {' '.join(sorted(wanted))} > /dev/null",
    ]
    if "python3-venv" in wanted:
        lines += [
            f"cat > /tmp/uv.txt <<'end'\n{UV.read_text()}\nend",
            f"cat > /tmp/requirements.txt <<'end'\n{LOCK.read_text()}\nend",
            "export PIP_CERT=/etc/ssl/certs/ca-certificates.crt SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt",
            "python3 -m venv /opt/uv",
            "/opt/uv/bin/pip install --quiet --require-hashes -r /tmp/uv.txt",
            "/opt/uv/bin/uv venv --quiet /opt/feast",
            "/opt/uv/bin/uv pip install --quiet --require-hashes --python=/opt/feast -r /tmp/requirements.txt",
        ]
    return "\n".join(lines)


def by_script(hosts: Hosts, wanted: dict[str, set[str]]) -> float:
    """Install the packages on all hosts at once."""

    def install(name: str) -> None:
        subprocess.run([*hosts[name], "sh"], input=commands(wanted[name]), text=True, stdout=sys.stderr, check=True)

    started = time.perf_counter()
    with ThreadPoolExecutor(len(hosts)) as pool:
        list(pool.map(install, hosts))
    return time.perf_counter() - started


def measure(runs: int) -> dict[str, list[float]]:
    """Measure everything so many times."""
    groups = yaml.safe_load((ROOT / "inventory/trial/hosts.yml").read_text())
    seconds: dict[str, list[float]] = {"larder": [], "script": [], "unchanged": []}
    wanted: dict[str, set[str]] = {}

    def larder() -> None:
        hosts = new_hosts(groups)
        before = packages(hosts)
        seconds["larder"].append(playbook("site.yml")[0])
        took, changed = playbook("site.yml")
        if changed:
            sys.exit(f"The second run changed {changed} things.")
        seconds["unchanged"].append(took)
        wanted.update({name: found - before[name] for name, found in packages(hosts).items()})

    def script() -> None:
        seconds["script"].append(by_script(new_hosts(groups), wanted))

    try:
        for run in range(runs):
            # Each first in turn: ext4 makes files more slowly for minutes after many were removed.
            for way in (larder, script) if run % 2 == 0 else (script, larder):
                way()
                playbook("molecule/shared/destroy.yml")
            print({way: took[-1] for way, took in seconds.items()}, file=sys.stderr)
    finally:
        playbook("molecule/shared/destroy.yml")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure site.yml.")
    parser.add_argument("result", type=Path, help="JSON document to write, times in seconds")
    parser.add_argument("--runs", type=int, default=5)
    chosen = parser.parse_args()
    seconds = measure(chosen.runs)
    document: dict[str, Any] = {
        "benchmark": "deployment",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "kernel": platform.release()},
        "versions": {"ansible-core": version("ansible-core")},
        "hosts": 4,
        "ways": {
            way: {"median": median(took), "least": min(took), "most": max(took), "runs": len(took)}
            for way, took in seconds.items()
        },
    }
    chosen.result.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
