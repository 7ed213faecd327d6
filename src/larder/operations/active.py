"""Which host runs the pipeline: the database says so, and a run on any other host is refused.

The inventory's order cannot say it (a line that is added above would move the pipeline), nor can a file on a host: one
that was lost and comes back still has its own. Here, a move is one statement under the lock that a run holds, so two
hosts never run at once, whatever their schedules say.
"""

import os

from larder.errors import SpareError
from larder.operations.credentials import Credentials
from larder.postgres import session

# In the registry's own schema, as what the last run left.
TABLE = """
CREATE TABLE IF NOT EXISTS larder_pipeline (
    project text PRIMARY KEY,
    host text NOT NULL,
    since timestamptz NOT NULL DEFAULT clock_timestamp()
)
"""
CLAIM = "INSERT INTO larder_pipeline (project, host) VALUES (%s, %s) ON CONFLICT DO NOTHING"
MOVE = """
INSERT INTO larder_pipeline AS known (project, host) VALUES (%s, %s)
ON CONFLICT (project) DO UPDATE SET (host, since) = (excluded.host, excluded.since) WHERE known.host <> excluded.host
"""
ACTIVE = "SELECT host FROM larder_pipeline WHERE project = %s"


def here() -> str | None:
    """The inventory's name of this host; None where no role told it."""
    return os.environ.get("LARDER_HOST") or None


def active(credentials: Credentials) -> str | None:
    """The host that runs the pipeline; None before the first run."""
    with session.connect(credentials.registry_url, "active") as connection:
        if connection.execute("SELECT to_regclass('larder_pipeline')").fetchall()[0][0] is None:
            return None
        row = connection.execute(ACTIVE, [credentials.feature_store_config()["project"]]).fetchone()
        return str(row[0]) if row else None


def claim(credentials: Credentials, host: str) -> str:
    """Let a host run the pipeline if none does yet; return the one that does."""
    project = credentials.feature_store_config()["project"]
    with session.connect(credentials.registry_url, "active") as connection:
        connection.execute(TABLE)
        connection.execute(CLAIM, [project, host])
        return str(connection.execute(ACTIVE, [project]).fetchall()[0][0])


def move(credentials: Credentials, host: str) -> None:
    """Let a host run the pipeline from now on; BusyError while a run is under way, wherever it is."""
    with (
        session.connect(credentials.pipeline_url, "active") as lock,
        session.try_lock(lock, "larder run"),
        session.connect(credentials.registry_url, "active") as connection,
    ):
        connection.execute(TABLE)
        connection.execute(MOVE, [credentials.feature_store_config()["project"], host])


def refuse_a_spare(credentials: Credentials) -> None:
    """Raise SpareError unless this host runs the pipeline; the first one that asks does from then on."""
    if (host := here()) and (runs := claim(credentials, host)) != host:
        raise SpareError(f"{runs} runs the pipeline, and {host} is a spare: ansible/move_pipeline.yml moves it.")
