"""Whether backups are taken and proven: by the table of the role backup's drill, and by PostgreSQL's archiver."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

import psycopg

from larder.operations.facts import Fact, State

# A drill has half a day by default; one that has not ended after a whole one was killed with its host.
LAST = """
SELECT began_at, ended_at, failure, ended_at IS NULL AND began_at < now() - interval '1 day'
FROM larder_backup.drills ORDER BY began_at DESC LIMIT 1
"""
PROVEN = """
SELECT backup, backup_ended_at, good_until, extract(epoch FROM now() - backup_ended_at)::float8, good_until < now()
FROM larder_backup.drills WHERE ended_at IS NOT NULL AND failure IS NULL ORDER BY backup_ended_at DESC LIMIT 1
"""
ARCHIVER = """
SELECT last_failed_time, failed_count FROM pg_stat_archiver
WHERE last_failed_time > coalesce(last_archived_time, '-infinity')
"""


@dataclass
class Proof:
    """The newest backup that a restore has proven; where none is, its fields are None."""

    backup: str | None = None
    ended: datetime | None = None
    age_seconds: float | None = None


def proof(connection: psycopg.Connection) -> tuple[Proof | None, list[str]]:
    """Return the newest proven backup, and what is wrong; None and nothing where the stack has no backup host."""
    if connection.execute("SELECT to_regclass('larder_backup.drills')").fetchall()[0][0] is None:
        return None, []
    found, problems = Proof(), []
    last = connection.execute(LAST).fetchone()
    row = connection.execute(PROVEN).fetchone()
    if row:
        found = Proof(row[0], row[1], row[3])
    if last and last[2]:
        problems.append(f"The last restore drill failed at {last[1]:%Y-%m-%d %H:%M} UTC: {last[2]}.")
    elif last and last[3]:
        problems.append(f"The last restore drill began at {last[0]:%Y-%m-%d %H:%M} UTC and never ended.")
    if not row:
        problems.append("No backup is proven by a restore yet: the drill of the backup host does it.")
    elif row[4]:
        problems.append(
            f"The newest backup that is proven by a restore is of {row[1]:%Y-%m-%d %H:%M} UTC, and was good until "
            f"{row[2]:%Y-%m-%d %H:%M} UTC: see the backup host's larder-backup@ and larder-drill units."
        )
    failing = connection.execute(ARCHIVER).fetchone()
    if failing:
        problems.append(
            f"PostgreSQL cannot archive its WAL (last tried at {failing[0]:%Y-%m-%d %H:%M} UTC): what is written now "
            "is in no backup. Its log says why."
        )
    return found, problems


def facts(connection: psycopg.Connection) -> Iterator[Fact]:
    """What status says of backups; nothing where the stack has no backup host."""
    found, problems = proof(connection)
    if found:
        state = State.FAILED if problems else State.OK
        said = "\n".join(problems) or f"The newest backup proven by a restore is of {told(found)}."
        yield Fact("backup_proven_age_seconds", state, found.age_seconds, said)


def told(found: Proof) -> str:
    """When the proven backup ended, and how long ago that is."""
    if found.ended is None or found.age_seconds is None:
        return "never"
    return f"{found.ended:%Y-%m-%d %H:%M}, {found.age_seconds / 86400:.1f} days ago"
