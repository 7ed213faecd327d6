"""PostgreSQL's archive_command: what is passed over, and what stops the archive. The scenario failover fails over."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "roles/backup/files/larder-pgbackrest-archive.sh"
DUPLICATE = 45  # what pgBackRest ends with where the repository has a file of this name with other bytes


def archive(tmp_path: Path, name: str, pgbackrest: int) -> subprocess.CompletedProcess[str]:
    """Archive a file of a server on timeline 16, where pgBackRest ends so."""
    wal = tmp_path / "pg_wal"
    wal.mkdir()
    for history in ("00000002.history", "0000000A.history", "00000010.history"):
        (wal / history).touch()
    stand_in = tmp_path / "pgbackrest"
    stand_in.write_text(f"#!/bin/sh\nexit {pgbackrest}\n")
    stand_in.chmod(0o755)
    program = tmp_path / "larder-pgbackrest-archive"
    program.write_text(PROGRAM.read_text().replace("/usr/bin/pgbackrest", str(stand_in)))
    # As Debian's.
    shell = shutil.which("dash") or "/bin/sh"
    return subprocess.run([shell, program, f"pg_wal/{name}"], cwd=tmp_path, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "name", ["0000000F0000000000000016", "000000090000000000000016", "000000020000000000000016.partial"]
)
def test_a_segment_of_a_former_timeline_that_the_repository_has_otherwise_is_passed_over_and_told(
    tmp_path: Path, name: str
) -> None:
    ended = archive(tmp_path, name, DUPLICATE)
    assert ended.returncode == 0
    assert f"{name} is of a former timeline" in ended.stderr


@pytest.mark.parametrize(
    ("name", "pgbackrest"),
    [
        ("000000100000000000000016", DUPLICATE),  # of the present timeline: another cluster writes to this repository
        ("000000110000000000000016", DUPLICATE),
        ("00000002.history", DUPLICATE),
        ("000000020000000000000016.00000028.backup", DUPLICATE),
        ("000000020000000000000016", 1),
        ("000000020000000000000016", 82),
    ],
)
def test_everything_else_that_fails_stops_the_archive(tmp_path: Path, name: str, pgbackrest: int) -> None:
    ended = archive(tmp_path, name, pgbackrest)
    assert (ended.returncode, ended.stderr) == (pgbackrest, "")


def test_a_server_that_never_failed_over_has_no_history(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    ended = archive(tmp_path / "other", "000000100000000000000016", DUPLICATE)
    assert ended.returncode == DUPLICATE
    for history in (tmp_path / "other/pg_wal").iterdir():
        history.unlink()
    ended = subprocess.run(
        ["/bin/sh", tmp_path / "other/larder-pgbackrest-archive", "pg_wal/000000010000000000000016"],
        cwd=tmp_path / "other",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (DUPLICATE, "")


def test_what_is_archived_is_archived(tmp_path: Path) -> None:
    ended = archive(tmp_path, "000000100000000000000016", 0)
    assert (ended.returncode, ended.stderr) == (0, "")
