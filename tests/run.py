"""The whole check: lint, unit tests and every Molecule scenario that a day has time for, three at a time.

    ./larder test            lint, unit, and the scenarios of molecule/ that are not in LONG
    ./larder test quick      lint and unit, side by side
    ./larder test redis      one scenario; also lint, unit, soak, or several of these
    ./larder test rotation   one of LONG, with all of it: three rotations, killed at every step, CAs renewed
    ./larder bench           the scenario bench, which measures, and its report

A scenario runs in the caller's environment, as `molecule test -s NAME` does. Each part writes its output to
.larder/test/<part>.log; what failed is shown when it has. Stopped by a signal, this stops what it started and removes
the hosts of the scenarios that ran.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / ".larder"
LOGS = STATE / "test"
VENV = STATE / "test-venv"
LOCK = ROOT / "tests/requirements.txt"
PROMTOOL = STATE / "promtool"
# Three scenarios side by side keep two cores busy, since each waits a third of its time; the longest start first.
LANES = 3
LONGEST_FIRST = (
    "default",
    "rotation",
    "failover",
    "leaks",
    "growth",
    "feature_server",
    "timescaledb_failover",
    "monitoring",
    "timescaledb",
    "redis_failover",
    "restore",
    "pipeline",
    "gateway",
    "feast",
    "redis",
    "repository",
    "base",
)
QUICK = ("lint", "unit")
# These scenarios take too long for the whole check. They run by name and in soak, with their long tests (LARDER_SOAK).
LONG = ("failover", "growth", "monitoring", "redis_failover", "restore", "rotation", "timescaledb_failover")
# The soaks take too long for every day, and bench measures without passing or failing: outside molecule/, where
# `molecule test --all` does not find them.
OTHERS = ("soak", "soak_restore", "bench")
OTHERS_GLOB = "tests/*/molecule.yml"
# What is shown of a failed part's log: the lines that went wrong, and the end.
COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
WRONG = re.compile(r"^(E {3}|fatal:|failed:|FAILED |ERROR |\[ERROR\]|error:|found |SC\d)|: error: |^\S+:\d+(:\d+)?: ")
WRONG_LINES, TAIL_LINES, WIDTH = 40, 15, 1000


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def where(part: str) -> str:
    """Return where a part's output goes, from the checkout."""
    return str((LOGS / f"{part}.log").relative_to(ROOT))


def scenarios() -> list[str]:
    """Return the names of all Molecule scenarios, the longest first."""
    names = sorted(path.parent.name for path in ROOT.glob("molecule/*/molecule.yml"))
    return sorted(names, key=lambda name: LONGEST_FIRST.index(name) if name in LONGEST_FIRST else len(LONGEST_FIRST))


def tracked(*patterns: str) -> list[str]:
    """Return the files under version control that match any of the patterns."""
    listed = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=ROOT, check=True, capture_output=True, text=True)
    return listed.stdout.split("\0")[:-1]


def environment() -> None:
    """Make the environment of the unit tests: the controller's and the hosts' packages together, every hash checked."""
    lock = LOCK.read_text()
    stamp = VENV / ".lock"
    if stamp.exists() and stamp.read_text() == lock:
        return
    subprocess.run(["uv", "venv", "--quiet", "--clear", "--python", sys.executable, VENV], check=True)
    subprocess.run(
        ["uv", "pip", "install", "--quiet", "--system-certs", "--require-hashes", "--python", VENV, "-r", LOCK],
        check=True,
    )
    # As in .venv: the tests start Ansible and Feast again and again.
    compileall = [str(VENV / "bin/python"), "-m", "compileall", "-q", "-j", "0", "-x", "ansible_collections"]
    # Some files are templates of Python: what cannot be compiled is not imported either.
    subprocess.run([*compileall, str(VENV / "lib")], stdout=subprocess.DEVNULL, check=False)
    stamp.write_text(lock)


def promtool() -> None:
    """Take promtool out of Debian's package, whose installation would start a Prometheus on this machine."""
    if shutil.which("promtool") or (PROMTOOL / "usr/bin/promtool").exists():
        return
    PROMTOOL.mkdir(parents=True, exist_ok=True)
    # A fresh machine has no list of packages.
    subprocess.run(["apt-get", "update", "-qq"], check=True)
    subprocess.run(["apt-get", "download", "-qq", "prometheus"], cwd=PROMTOOL, check=True)
    (package,) = PROMTOOL.glob("prometheus_*.deb")
    subprocess.run(["dpkg", "--extract", package, PROMTOOL], check=True)
    package.unlink()


def lint() -> list[list[str]]:
    """Return the commands that must find nothing."""
    scripts = [
        name
        for name in tracked()
        # A link to a directory is a name under version control, too.
        if not name.endswith(".j2") and (ROOT / name).is_file() and (ROOT / name).read_bytes().startswith(b"#!/bin/sh")
    ]
    return [
        ["yamllint", "--strict", "."],
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["shellcheck", *scripts],
        ["ansible-lint", "--offline", "--strict"],
    ]


def unit() -> list[list[str]]:
    return [["pytest", "-q", "-p", "no:cacheprovider", "--numprocesses=2", "--dist=loadfile", "tests/unit"]]


def molecule(scenario: str, action: str = "test") -> list[str]:
    """Return the command that does something with a scenario."""
    found = ["env", f"MOLECULE_GLOB={OTHERS_GLOB}"] if scenario in OTHERS else []
    return [*found, "molecule", action, "--no-command-borders", "--scenario-name", scenario]


def daily(scenario: str) -> Callable[[], list[list[str]]]:
    return lambda: [molecule(scenario)]


def whole(scenario: str) -> Callable[[], list[list[str]]]:
    """Return a scenario with all that takes long."""
    return lambda: [["env", "LARDER_SOAK=1", *molecule(scenario)]]


def soak() -> list[list[str]]:
    return [
        molecule("soak"),
        molecule("soak_restore"),
        *(command for name in (*LONG, "pipeline") for command in whole(name)()),
    ]


def bench() -> list[list[str]]:
    results = STATE / "benchmarks"
    return [
        molecule("bench"),
        [sys.executable, "bench/deployment.py", str(results / "deployment.json")],
        [sys.executable, "bench/hosts.py", str(results / "hosts.json")],
        [str(VENV / "bin/python"), "bench/report.py", str(results), "docs"],
    ]


class Lanes:
    """The commands that run side by side, each with all that it starts in a process group of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[int, str] = {}
        self._stopped = False

    def run(self, part: str, commands: Callable[[], list[list[str]]]) -> tuple[str, bool, float]:
        """Run a part's commands until one fails; return (part, passed, seconds)."""
        started = time.monotonic()
        env = dict(os.environ)
        if part in ("lint", "unit"):
            env["PATH"] = f"{VENV / 'bin'}:{env['PATH']}"
        with (LOGS / f"{part}.log").open("w") as log:
            passed = all(self._run(part, command, env, log) for command in commands())
        return part, passed, time.monotonic() - started

    def _run(self, part: str, command: list[str], env: dict[str, str], log: IO[str]) -> bool:
        with self._lock:
            if self._stopped:
                return False
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
            self._running[process.pid] = part
        ended = process.wait()
        with self._lock:
            self._running.pop(process.pid, None)
        return ended == 0

    def stop(self) -> list[str]:
        """End every command and all that it started, and start no more; return the parts that ran."""
        with self._lock:
            self._stopped = True
            for group in self._running:
                with suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
            return list(self._running.values())


def interrupted(lanes: Lanes, number: int) -> None:
    """End everything, remove the hosts of the scenarios that ran, and exit as a command that a signal ended."""
    for name in SIGNALS:
        signal.signal(name, signal.SIG_IGN)
    parts = lanes.stop()
    with suppress(OSError):  # the terminal may be gone
        print(f"\n==> stopped by {signal.Signals(number).name}: {', '.join(parts)}", flush=True)
    for part in parts:
        if part not in QUICK:
            subprocess.run(molecule(part, "destroy"), cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
    os._exit(128 + number)


def plain(text: str) -> str:
    """Return a log's text without colours."""
    return COLOUR.sub("", text)


def show(part: str) -> None:
    """Print what went wrong in a part, and how it ended."""
    lines = plain((LOGS / f"{part}.log").read_text(errors="replace")).splitlines()
    wrong = [line for line in lines[:-TAIL_LINES] if WRONG.search(line)]
    told = [f"==> {part}: from {where(part)}", *(line[:WIDTH] for line in wrong[-WRONG_LINES:] + lines[-TAIL_LINES:])]
    print("\n", "\n".join(told), "\n", sep="", flush=True)


def chosen(names: Sequence[str]) -> dict[str, Callable[[], list[list[str]]]]:
    """Return the parts to run, by name."""
    parts: dict[str, Callable[[], list[list[str]]]] = {"lint": lint, "unit": unit}
    parts |= {name: (whole if name in LONG else daily)(name) for name in scenarios()} | {"soak": soak, "bench": bench}
    unknown = [name for name in names if name not in (*parts, "quick")]
    if unknown:
        sys.exit(f"larder test: no such part: {', '.join(unknown)}; there are quick, {', '.join(parts)}")
    wanted = {*names, *(QUICK if "quick" in names else ())} or parts.keys() - {*OTHERS, *LONG}
    return {name: part for name, part in parts.items() if name in wanted}


def summary(parts: int, failed: int) -> str:
    """Return the last line, which CI reads."""
    return f"{parts - failed} passed, {failed} failed"


def main() -> None:
    parts = chosen(sys.argv[1:])
    LOGS.mkdir(parents=True, exist_ok=True)
    if {"lint", "unit", "bench"} & parts.keys():
        environment()
    if "unit" in parts:
        promtool()
    started = time.monotonic()
    logs = ", ".join(map(where, parts)) if len(parts) <= 3 else f"{LOGS.relative_to(ROOT)}/"
    print(f"==> {', '.join(parts)}; output in {logs}", flush=True)
    lanes = Lanes()
    for name in SIGNALS:
        signal.signal(name, lambda number, _frame: interrupted(lanes, number))
    failed = []
    with ThreadPoolExecutor(LANES) as pool:
        running = {pool.submit(lanes.run, *part) for part in parts.items()}
        while running:
            # A signal that comes just before the wait does not end it: Python sees the signal after this second.
            ended, running = wait(running, timeout=1, return_when=FIRST_COMPLETED)
            for part, passed, seconds in (future.result() for future in ended):
                print(f"    {'passed' if passed else 'FAILED'} {part} in {seconds:.0f} s: {where(part)}", flush=True)
                if not passed:
                    failed.append(part)
                    # At once: whoever ends a check that takes too long still learns what went wrong.
                    show(part)
    print(f"\n{time.monotonic() - started:.0f} s in all")
    print(summary(len(parts), len(failed)))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
