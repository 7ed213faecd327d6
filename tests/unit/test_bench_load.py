"""What the load tells of requests that failed: a time without an answer counts, also one that does not end."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SOURCE = Path(__file__).parents[2] / "bench/load.py"


@pytest.fixture
def load() -> ModuleType:
    specification = importlib.util.spec_from_file_location("bench_load", SOURCE)
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the clock, which the test moves."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    return clock


def gaps(results: Any) -> dict[str, float]:
    return {kind: said["gap"] for kinds in results.summary()["phases"].values() for kind, said in kinds.items()}


def test_a_failure_between_two_answers_is_a_gap_and_none_is_not(load: ModuleType, now: list[float]) -> None:
    results = load.Results(load.Watched(None, Path))
    for kind in ("single", "push"):
        results.answered("all", kind, 0.01)
    now[0] += 2
    results.failed("all", "single", 0.5, "503")
    now[0] += 3
    for kind in ("single", "push"):
        results.answered("all", kind, 0.01)
    assert gaps(results) == {"single": 5, "push": 0}


def test_what_fails_to_the_end_or_from_the_beginning_has_a_gap(load: ModuleType, now: list[float]) -> None:
    results = load.Results(load.Watched(None, Path))
    results.answered("all", "single", 0.01)
    now[0] += 2
    results.failed("all", "single", 0.5, "503")
    results.failed("all", "push", 0.5, "503")
    now[0] += 40
    assert gaps(results) == {"single": 42, "push": 42}


def test_the_longest_request_is_told_whether_it_failed_or_not(load: ModuleType, now: list[float]) -> None:  # noqa: ARG001
    results = load.Results(load.Watched(None, Path))
    results.answered("all", "single", 0.4)
    results.failed("all", "single", 0.5, "503")
    results.answered("all", "push", 0.7)
    results.failed("all", "push", 0.6, "503")
    assert {kind: said["longest"] for kind, said in results.summary()["phases"]["all"].items()} == {
        "single": 0.5,
        "push": 0.7,
    }
