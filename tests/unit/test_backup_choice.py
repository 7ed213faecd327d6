"""Which backup a restore takes, and on which timeline."""

from __future__ import annotations

import importlib.util
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from ansible.errors import AnsibleFilterError

PLUGIN = Path(__file__).parents[2] / "ansible/plugins/filter/backups.py"
spec = importlib.util.spec_from_file_location("backups_filter", PLUGIN)
assert spec
assert spec.loader
backups = importlib.util.module_from_spec(spec)
spec.loader.exec_module(backups)


def epoch(day: int, hour: int = 0) -> int:
    return int(datetime(2026, 11, day, hour, tzinfo=UTC).timestamp())


def backup(day: int, timeline: int = 1, cluster: int = 1) -> dict[str, Any]:
    return {
        "label": f"202611{day:02}F",
        "timestamp": {"stop": epoch(day, 4)},
        "database": {"id": cluster},
        "archive": {"start": f"{timeline:08X}0000000000000001"},
        "info": {"size": 1000 + day},
    }


def repository(*held: dict[str, Any], cluster: int = 1) -> list[dict[str, Any]]:
    return [{"db": [{"id": number} for number in range(1, cluster + 1)], "backup": list(held)}]


def histories(**days: int) -> dict[str, dict[str, int]]:
    """When each timeline began, such as t2=20."""
    return {f"17-1/{int(name[1:]):08X}.history": {"time": epoch(day, 12)} for name, day in days.items()}


def choose(held: list[dict[str, Any]], begun: dict[str, dict[str, int]], at: str | None) -> tuple[str, str]:
    chosen = backups.larder_backup_choice(held, begun, at)
    return chosen["label"], chosen["timeline"]


def test_the_newest_backup_that_ended_before_the_moment_is_taken() -> None:
    held = repository(backup(1), backup(8), backup(15))
    assert choose(held, {}, "2026-11-14 09:30") == ("20261108F", "")
    assert choose(held, {}, "2026-11-15 03:59:59") == ("20261108F", "")
    assert choose(held, {}, "2026-11-15 04:00:01Z") == ("20261115F", "")
    assert choose(held, {}, None) == ("20261115F", "")


@pytest.mark.parametrize(
    ("at", "target"),
    [
        ("2026-11-25 09:30", "2026-11-25 09:30:00+00"),
        ("2026-11-25T09:30:15", "2026-11-25 09:30:15+00"),
        ("2026-11-25 09:30 UTC", "2026-11-25 09:30:00+00"),
        ("2026-11-25 09:30+01:00", "2026-11-25 08:30:00+00"),
        ("2026-11-25 00:30:00 +05:30", "2026-11-24 19:00:00+00"),
    ],
)
def test_a_moment_is_in_utc_unless_it_says_another_zone(at: str, target: str) -> None:
    assert backups.larder_backup_choice(repository(backup(1)), {}, at)["at"] == target


@pytest.mark.parametrize("at", ["yesterday", "2026-11-25", "2026-02-30 10:00", "09:30", "2026-11-25 09:30 CET", ""])
def test_what_is_no_moment_is_refused_with_an_example(at: str) -> None:
    with pytest.raises(AnsibleFilterError, match="must be a moment such as '2026-11-25 09:30'"):
        backups.larder_backup_choice(repository(backup(1)), {}, at)


def test_a_moment_in_the_future_is_refused() -> None:
    with pytest.raises(AnsibleFilterError, match="in the future"):
        backups.larder_backup_choice(repository(backup(1)), {}, "2126-11-25 09:30")


def test_a_moment_before_all_backups_is_refused_and_the_oldest_named() -> None:
    with pytest.raises(AnsibleFilterError, match="before 2026-11-01 03:00; the oldest ended at 2026-11-01 04:00:00"):
        choose(repository(backup(1)), {}, "2026-11-01 03:00")


def test_an_empty_repository_is_refused() -> None:
    for held in ([], repository()):
        with pytest.raises(AnsibleFilterError, match=r"no backup of the present cluster[.] Nothing was changed"):
            choose(held, {}, None)


def test_the_timeline_is_that_on_which_the_database_was() -> None:
    """After a restore on the 20th, WAL of the former timeline is still there; the 18th is on the former one."""
    held, begun = repository(backup(15), backup(22, timeline=2)), histories(t2=20)
    assert choose(held, begun, "2026-11-18 09:30") == ("20261115F", "1")
    assert choose(held, begun, "2026-11-21 09:30") == ("20261115F", "")
    assert choose(held, begun, "2026-11-23 09:30") == ("20261122F", "")
    assert choose(held, begun, None) == ("20261122F", "")


def test_between_two_restores_it_is_the_timeline_of_the_first() -> None:
    held, begun = repository(backup(15)), histories(t2=18, t3=20)
    assert choose(held, begun, "2026-11-19 09:30") == ("20261115F", "2")


def test_backups_and_timelines_of_a_former_cluster_are_left_alone() -> None:
    held = repository(backup(1), backup(20, cluster=2), cluster=2)
    begun = histories(t7=25) | {"17-2/00000002.history": {"time": epoch(21)}}
    assert choose(held, begun, None) == ("20261120F", "")
    assert choose(held, begun, "2026-11-20 12:00") == ("20261120F", "1")
    with pytest.raises(AnsibleFilterError, match="the oldest ended at 2026-11-20"):
        choose(held, begun, "2026-11-10 09:30")
