"""What the drill takes for a good copy, and what it tells. The scenario restore has a real one."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[2] / "roles/backup/files/backup.py"
spec = importlib.util.spec_from_file_location("backup_program", PROGRAM)
assert spec
assert spec.loader
program = importlib.util.module_from_spec(spec)
spec.loader.exec_module(program)

BARS = "market_data.bars"


def tables(rows: int = 1000, checksum: str = "17", sampled: int = 100) -> dict[str, Any]:
    return {BARS: program.Figures(rows, sampled, checksum)}


def test_an_equal_copy_is_good() -> None:
    assert program.compare(tables(), tables(), tables()) == []


@pytest.mark.parametrize(
    ("copy", "sentence"),
    [
        ({}, f"{BARS} is not in the copy"),
        (tables(999), f"{BARS} has 999 rows in the copy and 1,000 in the live database"),
        (tables(checksum="18"), f"{BARS} has other values in the copy than in the live database"),
        (tables(sampled=99), f"{BARS} has other values in the copy than in the live database"),
    ],
    ids=["lost table", "lost row", "changed row", "moved row"],
)
def test_a_copy_that_differs_is_named(copy: dict[str, Any], sentence: str) -> None:
    assert program.compare(tables(), tables(), copy) == [sentence]


def test_a_table_that_changes_meanwhile_is_only_counted() -> None:
    before, after = tables(1000, "1"), tables(1100, "2")
    assert program.compare(before, after, tables(1050, "3")) == []
    assert program.compare(before, after, tables(500, "3")) == [
        f"{BARS} has 500 rows in the copy and 1,100 in the live database"
    ]


def test_a_table_that_comes_or_goes_meanwhile_is_left_out() -> None:
    assert program.compare(tables(), {}, {}) == []
    assert program.compare({}, tables(), {}) == []


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(program, "METRICS", tmp_path / "metrics")
    return {"state": str(tmp_path)}


def test_a_failure_is_reported_with_the_last_success(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program.note(settings, "drill", last_success_timestamp_seconds=1764000000, rows_compared=42)
    for result, expected in (("success", 1), ("timeout", 0), ("oom-kill", 0)):
        monkeypatch.setenv("SERVICE_RESULT", result)
        program.report(settings, "drill")
        lines = (tmp_path / "metrics/larder_restore_drill.prom").read_text().splitlines()
        assert f"larder_restore_drill_success {expected}" in lines
        assert "larder_restore_drill_last_success_timestamp_seconds 1764000000" in lines
        assert "larder_restore_drill_rows_compared 42" in lines
    assert [path.name for path in (tmp_path / "metrics").iterdir()] == ["larder_restore_drill.prom"]


def test_of_the_notes_numbers_alone_become_metrics(settings: dict[str, Any], tmp_path: Path) -> None:
    """They are written by another user than the metrics."""
    (tmp_path / "drill.json").write_text(json.dumps({"rows_compared": "1\nevil 2", "duration_seconds": 3.5}))
    assert program.noted(settings, "drill") == {"duration_seconds": 3.5}
    (tmp_path / "drill.json").write_text("[1")
    assert program.noted(settings, "drill") == {}


def test_what_pgbackrest_wrote_for_the_recovery_is_taken_out_alone(tmp_path: Path) -> None:
    auto = tmp_path / "postgresql.auto.conf"
    auto.write_text("work_mem = '8MB'\nrecovery_target_time = 'x'\nrestore_command = 'y'\n")
    program.forget(tmp_path, lambda line: line.startswith("recovery_target"))
    assert auto.read_text() == "work_mem = '8MB'\nrestore_command = 'y'\n"
