"""Every play, task, block and handler has a name that is understood alone: a verb and its object, no pronoun."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILES = re.compile(r"site\.yml|(ansible|molecule|tests)/.+\.ya?ml|roles/[^/]+/(tasks|handlers)/.+\.ya?ml")
# What a name may begin with: only verbs that some name uses. Add one if none of these says the same.
VERBS = """
    Add Apply Ask Bring Build Change Check Choose Close Compare Compile Complete Compute Configure Connect Converge
    Copy Deploy Drain Drop Encrypt End Fail Fetch Fill Find Gather Give Harden Install Interrupt Issue Keep Kill Leak
    Let Link Listen Load Lock Log Look Make Mark Measure Name Note Prepare Promote Publish Put Read Record Refresh
    Reload Remember Remove Renew Resolve Restart Restore Revoke Rotate Run Say Schedule Set Share Show Sign Start Stop
    Store Take Trust Try Turn Update Upgrade Verify Wait Widen Write
""".split()  # noqa: SIM905 - a list of strings would be a line for each
# Where nothing before it in the name says what is meant: at the beginning, after the verb, after "that".
PRONOUN = re.compile(
    r"(^|^\w+ )(it|its|itself|so|such|them|they|their|theirs|this is|that is|these|those)\b|\bthat (it|they)\b",
    re.IGNORECASE,
)
PLUGINS = {path.stem for folder in ("modules", "action") for path in (ROOT / "ansible/plugins" / folder).glob("*.py")}
LISTS = ["tasks", "pre_tasks", "post_tasks", "handlers", "block", "rescue", "always"]


def named(entries: Any) -> Iterator[str]:
    """Yield the name of each play, task and block in a list, and of those inside them; "" for one without a name."""
    for entry in entries if isinstance(entries, list) else []:
        keys = set(entry) if isinstance(entry, dict) else set()
        if keys & {"hosts", "import_playbook", "block", *PLUGINS} or any("." in key for key in keys):
            yield entry.get("name", "")
            for key in LISTS:
                yield from named(entry.get(key))


def fault(name: str) -> str:
    if not name:
        return "is missing"
    if name.split()[0] not in VERBS:
        return "does not begin with a verb of VERBS"
    if found := PRONOUN.search(name):
        return f"has the pronoun {found[0]!r}"
    return "ends in a full stop" if name.endswith(".") else ""


@pytest.fixture(scope="module")
def names() -> dict[str, list[str]]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = [path for path in listed.splitlines() if FILES.fullmatch(path)]
    return {path: [*named(yaml.safe_load((ROOT / path).read_text()))] for path in paths}


def test_every_name_begins_with_a_verb_and_has_no_pronoun(names: dict[str, list[str]]) -> None:
    faults = [f"{path}: {name!r} {why}" for path, found in names.items() for name in found if (why := fault(name))]
    assert not faults, "\n".join(faults)


def test_every_verb_is_used_and_stands_in_its_place(names: dict[str, list[str]]) -> None:
    assert sorted({name.split()[0] for found in names.values() for name in found if name}) == VERBS


def test_plays_tasks_blocks_and_handlers_are_all_found(names: dict[str, list[str]]) -> None:
    for path, name in {
        "site.yml": "Deploy the gateway",
        "roles/timescaledb/tasks/wait_for_sessions.yml": "Fail and name the sessions that are left",
        "roles/redis/handlers/main.yml": "Restart Redis",
        "molecule/gateway/side_effect.yml": "Verify that the message names the client",
        "ansible/preflight.yml": "Check the inventory and its variables",
    }.items():
        assert name in names[path]


def test_no_two_handlers_share_a_name(names: dict[str, list[str]]) -> None:
    """Handlers of all roles of a play are one list: a notification reaches the last one of its name."""
    handlers = Counter(name for path, found in names.items() if "/handlers/" in path for name in found)
    assert [name for name, count in handlers.items() if count > 1] == []


@pytest.mark.parametrize(
    "name",
    [
        "",
        "They did",
        "The host says so",
        "It is known which users Redis has",
        "Redis is installed",
        "Give it a sandbox",
        "Restart Redis.",
        "What the vault no longer holds is revoked",
        "So is pytest",
        "Verify that it was not restarted",
    ],
)
def test_a_riddle_is_a_fault(name: str) -> None:
    assert fault(name)


def test_every_test_that_a_document_names_exists() -> None:
    sources = [path for folder in ("molecule", "tests") for path in ROOT.glob(f"{folder}/**/test_*.py")]
    tests = {name for path in sources for name in re.findall(r"\bdef (test_\w+)", path.read_text())}
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("roles/*/README.md")]
    named_tests = {name for path in pages for name in re.findall(r"`(test_\w+)`", path.read_text())}
    assert len(named_tests) > 50
    assert named_tests - tests == set()
