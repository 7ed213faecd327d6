"""Container hosts as machines with a power switch, and programs on a machine that is in no group of the stack."""

from __future__ import annotations

import hashlib
import http.client
import json
import shlex
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# At the device: keepalived sends its ARP past every other hook, and a gateway that is cut off would take the virtual
# address away from the one that clients reach.
CUT_OFF = """
table netdev cut_off {
  chain ingress { type filter hook ingress device eth0 priority 0; policy drop; }
  chain egress { type filter hook egress device eth0 priority 0; policy drop; }
}
"""
CUT_BETWEEN = """
table inet cut_between {
  chain input { type filter hook input priority -10; ip saddr %s drop; }
  chain output { type filter hook output priority -10; ip daddr %s drop; }
}
"""


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
        if names:
            subprocess.run(["docker", verb, *names], check=True, capture_output=True)

    def power_on(self) -> None:
        """Let every host run that is dead or stands still: a test that failed leaves none so to the next one."""
        for state, verb in (("paused", "unpause"), ("exited", "start")):
            shown = ["docker", "ps", "--all", f"--filter=status={state}", "--format={{.Names}}"]
            names = subprocess.run(shown, check=True, capture_output=True, text=True).stdout.split()
            self(verb, *(host for host, name in self._containers.items() if name in names))

    @contextmanager
    def cut_off(self, host: str) -> Iterator[None]:
        """Let no packet in or out of a host, which goes on to run, until the block ends."""
        nft = ["docker", "exec", "--interactive", self._containers[host], "nft", "--file", "-"]
        subprocess.run(nft, input=CUT_OFF, text=True, check=True, capture_output=True)
        try:
            yield
        finally:
            subprocess.run(nft, input="delete table netdev cut_off", text=True, check=True, capture_output=True)

    @contextmanager
    def cut_between(self, host: str, address: str) -> Iterator[None]:
        """Let no packet pass between a host and an address, in neither direction, until the block ends."""
        nft = ["docker", "exec", "--interactive", self._containers[host], "nft", "--file", "-"]
        subprocess.run(nft, input=CUT_BETWEEN % (address, address), text=True, check=True, capture_output=True)
        try:
            yield
        finally:
            subprocess.run(nft, input="delete table inet cut_between", text=True, check=True, capture_output=True)

    def begin(self, host: str, *command: str) -> subprocess.Popen[str]:
        """Run a command on a host, also while it is cut off."""
        return subprocess.Popen(["docker", "exec", self._containers[host], *command], stdout=subprocess.PIPE, text=True)


class Clients:
    """Programs on a machine that is in no group."""

    def __init__(self, inventory: Any) -> None:
        self._inventory = inventory
        self.bring("client1")

    def bring(self, host: str) -> None:
        """Write the programs, and what they log in with, to a host."""
        variables = self._inventory.variables(host)
        for name, content in {
            "load.py": (ROOT / "bench/load.py").read_text(),
            "gap.py": (ROOT / "tests/shared/gap.py").read_text(),
            "acknowledged.py": (ROOT / "tests/shared/acknowledged.py").read_text(),
            "ca.crt": variables["certificate_authorities"][0]["certificate"],
            "tokens.json": json.dumps(variables["gateway_tokens"]),
        }.items():
            self._inventory.run(host, f"cat > /tmp/{name}", content)

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

    def close_of(self, address: str, symbols: list[str]) -> dict[str, float | None]:
        """Read the close that was pushed of each symbol."""
        variables = self._inventory.variables("client1")
        token = variables["gateway_tokens"]["reader"]
        headers = {"Authorization": f"Bearer {token if isinstance(token, str) else token[0]}"}
        body = {"features": ["market_features:close"], "entities": {"symbol": symbols}}
        trusted = ssl.create_default_context(cadata=variables["certificate_authorities"][0]["certificate"])
        connection = http.client.HTTPSConnection(address, 8443, timeout=30, context=trusted)
        headers["Content-Type"] = "application/json"
        connection.request("POST", "/get-online-features", json.dumps(body), headers)
        answer = json.load(connection.getresponse())
        connection.close()
        columns = dict(zip(answer["metadata"]["feature_names"], answer["results"], strict=True))
        return dict(zip(symbols, columns["close"]["values"], strict=True))

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
