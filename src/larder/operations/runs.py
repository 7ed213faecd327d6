"""How the last run of the pipeline went: kept in the registry's schema, so that status knows it on whichever host."""

from dataclasses import dataclass
from datetime import datetime

from larder.operations.credentials import Credentials
from larder.postgres import session

TABLE = """
CREATE TABLE IF NOT EXISTS larder_run (
    project text PRIMARY KEY,
    began_at timestamptz NOT NULL,
    ended_at timestamptz, -- null: it is under way, or was killed
    failure text -- null: it did all its stages
)
"""
BEGIN = """
INSERT INTO larder_run (project, began_at) VALUES (%s, clock_timestamp())
ON CONFLICT (project) DO UPDATE SET (began_at, ended_at, failure) = (excluded.began_at, NULL, NULL)
"""
END = "UPDATE larder_run SET (ended_at, failure) = (clock_timestamp(), %s) WHERE project = %s"
LAST = "SELECT began_at, ended_at, failure FROM larder_run WHERE project = %s"


@dataclass
class Run:
    """The last run; `failure` says why it failed, and is None where it did not."""

    began: datetime
    ended: datetime | None
    failure: str | None
    under_way: bool

    def problem(self) -> str | None:
        if self.under_way:
            return None
        if self.ended is None:
            return (
                f"The last run began at {self.began:%Y-%m-%d %H:%M} UTC and never ended: it was killed, "
                "or its host went down."
            )
        return f"The last run failed at {self.ended:%Y-%m-%d %H:%M} UTC: {self.failure}" if self.failure else None


def begin(credentials: Credentials) -> None:
    """Note that a run begins: one that is killed leaves this note as it is."""
    with session.connect(credentials.registry_url, "run") as connection:
        connection.execute(TABLE)
        connection.execute(BEGIN, [credentials.feature_store_config()["project"]])


def end(credentials: Credentials, failure: str | None = None) -> None:
    """Note that it ended, and why it failed if it did."""
    with session.connect(credentials.registry_url, "run") as connection:
        connection.execute(END, [failure, credentials.feature_store_config()["project"]])


def last(credentials: Credentials, *, under_way: bool) -> Run | None:
    """The last run; None where there was none. `under_way`: whether one holds the lock."""
    with session.connect(credentials.registry_url, "status") as connection:
        if connection.execute("SELECT to_regclass('larder_run')").fetchall()[0][0] is None:
            return None
        row = connection.execute(LAST, [credentials.feature_store_config()["project"]]).fetchone()
        return Run(row[0], row[1], row[2], under_way) if row else None
