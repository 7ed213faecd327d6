"""Container hosts as machines with a power switch, and programs on a machine that is in no group of the stack."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Machines:
    """The container hosts of a scenario."""

    def __init__(self, scenario: str) -> None:
        checkout = hashlib.sha1(str(ROOT).encode(), usedforsecurity=False).hexdigest()[:8]
        labels = (f"--filter=label=larder.{name}" for name in (f"set={scenario}", f"checkout={checkout}"))
        named = ["docker", "ps", "--all", *labels, "--format={{.Names}}"]
        names = subprocess.run(named, check=True, capture_output=True, text=True).stdout.split()
        self._containers = {name.rpartition("-")[2]: name for name in names}

    def __call__(self, verb: str, *hosts: str) -> None:
        """Do with hosts what docker does: kill, start, pause, unpause."""
        names = [self._containers[host] for host in hosts]
        subprocess.run(["docker", verb, *names], check=True, capture_output=True)


class Clients:
    """Programs on a machine that is in no group."""

    def __init__(self, inventory: Any) -> None:
        self._inventory = inventory
        variables = inventory.variables("client1")
        for name, content in {
            "load.py": (ROOT / "bench/load.py").read_text(),
            "gap.py": (ROOT / "tests/shared/gap.py").read_text(),
            "ca.crt": variables["certificate_authorities"][0]["certificate"],
            "tokens.json": json.dumps(variables["gateway_tokens"]),
        }.items():
            inventory.run("client1", f"cat > /tmp/{name}", content)

    @contextmanager
    def run(self, command: str) -> Iterator[list[str]]:
        """Run a command until the block ends; its output is then in the list."""
        printed: list[str] = []
        self._inventory.run("client1", "rm -f /tmp/stop", "")
        with subprocess.Popen(
            self._inventory.argv("client1", command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                yield printed
            finally:
                self._inventory.run("client1", "touch /tmp/stop", "")
                printed.append(process.communicate(timeout=60)[0])

    @contextmanager
    def load(self, address: str, *options: str) -> Iterator[dict[str, Any]]:
        """Read and push, and check every value; what was found is in the dictionary when the block has ended."""
        found: dict[str, Any] = {}
        command = f"python3 /tmp/load.py --gateway https://{address}:8443 --ca /tmp/ca.crt --tokens /tmp/tokens.json"
        with self.run(shlex.join([*command.split(), "--rate=10", "--stop=/tmp/stop", *options])) as printed:
            yield found
        found |= json.loads(printed[0])
        print({name: found[name] for name in ("requests", "failed", "failures", "wrong")}, found["phases"])

    @contextmanager
    def gap(self, address: str) -> Iterator[list[float]]:
        """Ask, and measure the longest time without an answer in seconds."""
        found: list[float] = []
        with self.run(f"python3 /tmp/gap.py {address} /tmp/stop") as printed:
            yield found
        answers, longest = printed[0].split()
        assert int(answers) > 10
        print(f"{answers} answers, {float(longest):.2f} s without one")
        found.append(float(longest))
