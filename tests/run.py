"""The whole check: lint, unit tests and every Molecule scenario, two at a time.

    ./larder test            everything but the soak; of the scenario rotation what a day has time for
    ./larder test redis      one scenario; also lint, unit, soak, or several of these
    ./larder test rotation   all of it: three rotations, killed at every step, authorities renewed
    ./larder bench           the scenario bench, which measures, and its report

Each part writes its output to .larder/test/<part>.log; what failed is shown at the end.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / ".larder"
LOGS = STATE / "test"
VENV = STATE / "test-venv"
LOCK = ROOT / "tests/requirements.txt"
# Two scenarios side by side keep two cores busy; the longest start first.
LANES = 2
LONGEST_FIRST = (
    "default",
    "rotation",
    "leaks",
    "repository",
    "feature_server",
    "gateway",
    "pipeline",
    "timescaledb",
    "feast",
    "redis",
)
# What is no part of every day: what takes too long, and what passes nothing and fails nothing.
OTHERS = ("soak", "bench")
# What a failed part shows: of its log, what went wrong, and the end.
WRONG = re.compile(r"^(E {3}|fatal:|failed:|FAILED |ERROR |\[ERROR\]|error:|found |SC\d)|: error: |^\S+:\d+(:\d+)?: ")
WRONG_LINES, TAIL_LINES, WIDTH = 40, 15, 1000


def scenarios() -> list[str]:
    """Return the names of all Molecule scenarios, the longest first."""
    names = sorted(path.parent.name for path in ROOT.glob("molecule/*/molecule.yml"))
    return sorted(names, key=lambda name: LONGEST_FIRST.index(name) if name in LONGEST_FIRST else len(LONGEST_FIRST))


def tracked(*patterns: str) -> list[str]:
    """Return the files under version control that match any of the patterns."""
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, check=True, capture_output=True, text=True)
    return listed.stdout.split()


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
    stamp.write_text(lock)


def lint() -> list[list[str]]:
    """Return the commands that must find nothing."""
    scripts = [
        name for name in tracked() if not name.endswith(".j2") and (ROOT / name).read_bytes().startswith(b"#!/bin/sh")
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
    return [["pytest", "-q", "-p", "no:cacheprovider", "tests/unit"]]


def molecule(scenario: str) -> Callable[[], list[list[str]]]:
    return lambda: [["molecule", "test", "--no-command-borders", "--scenario-name", scenario]]


def whole_rotation() -> list[list[str]]:
    """Return the scenario rotation with all that takes long."""
    return [["env", "LARDER_SOAK=1", *command] for command in molecule("rotation")()]


def soak() -> list[list[str]]:
    return [*molecule("soak")(), *whole_rotation()]


def bench() -> list[list[str]]:
    results = STATE / "benchmarks"
    return [
        *molecule("bench")(),
        [sys.executable, "bench/deployment.py", str(results / "deployment.json")],
        [str(VENV / "bin/python"), "bench/report.py", str(results), "docs"],
    ]


def run(part: str, commands: Callable[[], list[list[str]]]) -> tuple[str, bool, float]:
    """Run a part's commands until one fails; return (part, passed, seconds)."""
    started = time.monotonic()
    env = os.environ | {"NO_COLOR": "1", "ANSIBLE_NOCOLOR": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if part in ("lint", "unit"):
        env["PATH"] = f"{VENV / 'bin'}:{env['PATH']}"
    with (LOGS / f"{part}.log").open("w") as log:
        passed = all(
            subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log).returncode == 0
            for command in commands()
        )
    return part, passed, time.monotonic() - started


def show(part: str) -> None:
    """Print what went wrong in a part, and how it ended."""
    lines = (LOGS / f"{part}.log").read_text(errors="replace").splitlines()
    print(f"\n==> {part}: from .larder/test/{part}.log")
    wrong = [line for line in lines[:-TAIL_LINES] if WRONG.search(line)]
    for line in wrong[-WRONG_LINES:] + lines[-TAIL_LINES:]:
        print(line[:WIDTH])


def chosen(names: Sequence[str]) -> dict[str, Callable[[], list[list[str]]]]:
    """Return the parts to run, by name."""
    parts: dict[str, Callable[[], list[list[str]]]] = {"lint": lint, "unit": unit}
    parts |= {name: molecule(name) for name in scenarios()} | {"soak": soak, "bench": bench}
    unknown = [name for name in names if name not in parts]
    if unknown:
        sys.exit(f"larder test: no such part: {', '.join(unknown)}; there are {', '.join(parts)}")
    if names:
        parts["rotation"] = whole_rotation
    return {name: part for name, part in parts.items() if (name in names if names else name not in OTHERS)}


def main() -> None:
    parts = chosen(sys.argv[1:])
    LOGS.mkdir(parents=True, exist_ok=True)
    if {"lint", "unit", "bench"} & parts.keys():
        environment()
    started = time.monotonic()
    print(f"==> {', '.join(parts)}; output in .larder/test/", flush=True)
    failed = []
    with ThreadPoolExecutor(LANES) as pool:
        for future in as_completed([pool.submit(run, *part) for part in parts.items()]):
            part, passed, seconds = future.result()
            print(f"    {'passed' if passed else 'FAILED'} {part} in {seconds:.0f} s", flush=True)
            if not passed:
                failed.append(part)
    for part in failed:
        show(part)
    print(f"\n{time.monotonic() - started:.0f} s in all")
    print(f"{len(parts) - len(failed)} passed, {len(failed)} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
