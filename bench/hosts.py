#!/usr/bin/env python3
"""`site.yml` where it changes nothing, over one host, four, eight and twelve.

    python bench/hosts.py hosts.json

On the controller, with Docker, on container hosts of this machine. One host has all roles, four are those of
`inventory/trial`, and each further one is a feature server. The result says how many seconds more a host costs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from deployment import ROOT, new_hosts, playbook

COUNTS = (1, 4, 8, 12)


def inventory(count: int) -> dict[str, Any]:
    """Return the groups of so many hosts."""
    groups: dict[str, Any] = yaml.safe_load((ROOT / "inventory/trial/hosts.yml").read_text())
    if count == 1:
        return {group: {"hosts": {"host1": None}} for group in groups}
    used = len({name for group in groups.values() for name in group["hosts"]})
    groups["feature_server"]["hosts"] |= {f"server{number + 2}": None for number in range(count - used)}
    return groups


def unchanged(count: int, runs: int) -> list[float]:
    """Return the seconds that each run took on hosts where nothing is to be done."""
    new_hosts(inventory(count))
    try:
        playbook("site.yml")
        took = []
        for _ in range(runs):
            seconds, changed = playbook("site.yml")
            if changed:
                sys.exit(f"A run that should change nothing changed {changed} things on {count} hosts.")
            took.append(seconds)
        return took
    finally:
        playbook("molecule/shared/destroy.yml")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure unchanged site.yml over a growing number of hosts.")
    parser.add_argument("result", type=Path, help="JSON document to write, times in seconds")
    parser.add_argument("--runs", type=int, default=3)
    chosen = parser.parse_args()
    took = {}
    for count in COUNTS:
        took[count] = unchanged(count, chosen.runs)
        print(count, took[count], file=sys.stderr)
    document = {
        "benchmark": "hosts",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cores": os.cpu_count(), "kernel": platform.release()},
        "versions": {"ansible-core": version("ansible-core")},
        "seconds": took,
        "seconds_per_further_host": {
            f"{less} to {more}": (min(took[more]) - min(took[less])) / (more - less)
            for less, more in itertools.pairwise(COUNTS)
        },
    }
    chosen.result.parent.mkdir(parents=True, exist_ok=True)
    chosen.result.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
