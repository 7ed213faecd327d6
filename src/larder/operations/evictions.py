"""How many keys Redis has evicted since the last materialization began: each is a symbol that reads as null."""

from typing import Any

from larder.errors import reason
from larder.operations.credentials import Credentials
from larder.operations.facts import Fact, State
from larder.postgres import session

NAME = "redis_evicted_keys"
# In the registry's own schema, as what the last run left.
TABLE = """
CREATE TABLE IF NOT EXISTS larder_evictions (
    project text PRIMARY KEY,
    redis_run text NOT NULL, -- a Redis that was restarted counts anew
    evicted bigint NOT NULL,
    noted_at timestamptz NOT NULL
)
"""
NOTE = """
INSERT INTO larder_evictions VALUES (%s, %s, %s, clock_timestamp())
ON CONFLICT (project) DO UPDATE SET (redis_run, evicted, noted_at)
    = (excluded.redis_run, excluded.evicted, excluded.noted_at)
"""
NOTED = "SELECT redis_run, evicted, noted_at FROM larder_evictions WHERE project = %s"


def _counted(store: Any) -> tuple[str, int]:
    """Redis' run, and how many keys it has evicted since it started. Raises what redis-py does."""
    client = store._get_provider().online_store._get_client(store.config.online_store)
    return str(client.info("server")["run_id"]), int(client.info("stats")["evicted_keys"])


def note(credentials: Credentials, store: Any) -> None:
    """Note the number at the begin of a materialization; nothing where the online store cannot say it."""
    try:
        run, evicted = _counted(store)
    except Exception:  # another store, or a user without the right: status says so
        return
    with session.connect(credentials.registry_url, "materialize") as connection:
        connection.execute(TABLE)
        connection.execute(NOTE, [store.project, run, evicted])


def fact(credentials: Credentials, store: Any) -> Fact:
    """Whether keys were evicted since. The materialization itself may evict: what does not fit is written, and lost."""
    try:
        run, evicted = _counted(store)
    except Exception as error:
        return Fact(NAME, State.UNKNOWN, None, f"How many keys Redis has evicted is not known: {reason(error)}.")
    with session.connect(credentials.registry_url, "status") as connection:
        known = connection.execute("SELECT to_regclass('larder_evictions')").fetchall()[0][0] is not None
        row = connection.execute(NOTED, [store.project]).fetchone() if known else None
    since = "Redis started"
    if row and row[0] == run:
        evicted -= row[1]
        since = f"the materialization of {row[2]:%Y-%m-%d %H:%M} UTC began"
    if not evicted:
        return Fact(NAME, State.OK, 0, f"Redis has evicted no key since {since}.")
    return Fact(
        NAME,
        State.WARNING,
        evicted,
        f"Redis has evicted {evicted:,} keys since {since}: its memory is full. Raise redis_maxmemory, run site.yml, "
        "then larder materialize --since 2000-01-01.",
    )
