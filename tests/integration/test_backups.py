"""What `larder status` says of backups, from the table that the drill writes."""

from datetime import UTC, datetime, timedelta

import pytest

from larder.operations import backups
from larder.postgres import session

# As roles/backup makes it.
TABLE = """
CREATE SCHEMA larder_backup;
CREATE TABLE larder_backup.drills (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(), began_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    ended_at timestamptz, failure text, backup text, backup_ended_at timestamptz, rows bigint, good_until timestamptz
)
"""
NOW = datetime.now(UTC)


@pytest.fixture
def connection(url):
    with session.connect(url, "test") as connection:
        yield connection


@pytest.fixture
def drill(connection):
    connection.execute(TABLE)

    def drill(days_ago, failure=None, *, ended=True, good_days=8):
        at = NOW - timedelta(days=days_ago)
        connection.execute(
            "INSERT INTO larder_backup.drills (began_at, ended_at, failure, backup, backup_ended_at, good_until) "
            "VALUES (%s, %s, %s, 'F', %s, %s)",
            [at, at if ended else None, failure, at, at + timedelta(days=good_days)],
        )

    return drill


def test_a_stack_without_backups_says_nothing_of_them(connection):
    assert backups.proof(connection) == (None, [])


def test_a_proven_backup_is_healthy_and_has_an_age(connection, drill):
    drill(9)
    drill(2)
    found, problems = backups.proof(connection)
    assert problems == []
    assert found.age_seconds == pytest.approx(2 * 86400, abs=60)
    assert backups.told(found).endswith("2.0 days ago")


def test_no_proof_yet_is_not_healthy(connection, drill):
    assert drill
    found, problems = backups.proof(connection)
    assert problems == ["No backup is proven by a restore yet: the drill of the backup host does it."]
    assert backups.told(found) == "never"


def test_a_failed_drill_is_not_healthy_however_young_the_last_proof(connection, drill):
    drill(2)
    drill(1, "the repository is damaged")
    found, [problem] = backups.proof(connection)
    assert problem.startswith("The last restore drill failed at")
    assert "the repository is damaged" in problem
    assert found.age_seconds > 86400


def test_a_proof_that_is_too_old_is_not_healthy(connection, drill):
    drill(9)
    _, [problem] = backups.proof(connection)
    assert "was good until" in problem


def test_a_drill_under_way_is_healthy_and_one_that_never_ended_is_not(connection, drill):
    drill(3)
    drill(0.1, ended=False)
    assert backups.proof(connection)[1] == []
    drill(-0.1)  # proven since
    assert backups.proof(connection)[1] == []
    connection.execute("DELETE FROM larder_backup.drills WHERE began_at > now() - interval '2 days'")
    drill(1.5, ended=False)
    _, [problem] = backups.proof(connection)
    assert problem.endswith("never ended.")
