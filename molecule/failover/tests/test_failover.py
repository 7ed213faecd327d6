"""Any host dies, hangs or boots while clients read and push. The tests build on one another, in this order."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import pytest

NODES = ("node1", "node2", "node3")
# Seconds for which a kind of request may fail when a host is lost: the Redis primary may have been there.
READS, PUSHES = 10, 10


def worst(found: dict[str, Any]) -> dict[str, float]:
    """Return the longest time without an answer of each kind of request."""
    gaps: dict[str, float] = {}
    for kinds in found["phases"].values():
        for kind, said in kinds.items():
            gaps[kind] = max(said["gap"], gaps.get(kind, 0))
    return gaps


def test_a_second_run_changes_and_restarts_nothing(play: Any, starts: Any, roles: Any) -> None:
    roles.settled()
    before = starts()
    assert play("site.yml") == {}
    assert starts() == before


def test_all_secrets_rotate_and_no_request_fails(play: Any, clients: Any, starts: Any, vip: str) -> None:
    stores = [unit for unit in starts() if any(name in unit for name in ("patroni", "etcd", "redis-server"))]
    before = starts()
    play("ansible/new_secrets.yml")
    with clients.load(vip) as found:
        play("ansible/rotate_secrets.yml")
    assert found["failed"] == 0, found
    assert found["wrong"] == []
    assert found["requests"] > 300
    assert {unit: starts()[unit] for unit in stores} == {unit: before[unit] for unit in stores}
    assert play("site.yml") == {}


@pytest.mark.parametrize("what", ["postgresql", "redis", "gateway"])
def test_a_killed_host_costs_seconds_and_no_wrong_value(
    machines: Any, clients: Any, roles: Any, vip: str, what: str
) -> None:
    roles.settled()
    lost = getattr(roles, what)()
    others = tuple(node for node in NODES if node != lost)
    was = [name for name in ("postgresql", "redis", "gateway") if getattr(roles, name)() == lost]
    with clients.load(vip, "--timeout=5") as found:
        time.sleep(5)
        machines("kill", lost)
        time.sleep(45)
    gaps = worst(found)
    print(f"{lost}, primary of {', '.join(was)}, killed:", gaps, found["failed"], "of", found["requests"])
    assert found["wrong"] == []
    assert max(gaps[kind] for kind in ("single", "hundred", "connect")) <= READS
    assert gaps["push"] <= PUSHES
    assert roles.postgresql(*others) in others
    assert roles.redis(*others) in others
    with clients.load(vip, "--timeout=5") as found:
        machines("start", lost)
        roles.settled()
    print(f"{lost} came back:", worst(found), found["failed"], "of", found["requests"])
    assert found["wrong"] == []
    assert max(worst(found).values()) <= 3


def test_a_host_that_hangs_costs_seconds_and_no_wrong_value(machines: Any, clients: Any, roles: Any, vip: str) -> None:
    roles.settled()
    hung = roles.redis()
    with clients.load(vip, "--timeout=5") as found:
        time.sleep(5)
        machines("pause", hung)
        time.sleep(45)
        machines("unpause", hung)
        roles.settled()
    print(f"{hung} hung:", worst(found), found["failed"], "of", found["requests"])
    assert found["wrong"] == []
    assert max(worst(found).values()) <= READS


def test_all_hosts_boot_at_once_and_features_are_served_within_90_s(
    machines: Any, clients: Any, roles: Any, vip: str
) -> None:
    with clients.load(vip) as before:
        time.sleep(2)
    assert before["failed"] == 0
    machines("kill", *NODES)
    machines("start", *NODES)
    began, answered = time.monotonic(), False
    while not answered and time.monotonic() - began < 120:
        with suppress(ValueError), clients.load(vip, "--timeout=2", "--no-push") as found:  # no gateway: no result
            time.sleep(1)
        answered = bool(found) and not found["failed"]
    print(f"all hosts booted: features after {time.monotonic() - began:.0f} s")
    assert answered
    assert time.monotonic() - began <= 90
    roles.settled()


def test_the_pipeline_runs_and_status_is_healthy_whoever_is_the_primary(on: Any) -> None:
    on("node1").check_output("systemctl start feature-pipeline.service")
    assert on("node1").check_output("larder status").splitlines()[0] == "healthy"


def test_a_run_after_all_this_changes_and_restarts_nothing(play: Any, starts: Any, roles: Any) -> None:
    roles.settled()
    before = starts()
    assert play("site.yml") == {}
    assert starts() == before
