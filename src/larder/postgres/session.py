"""Connections to PostgreSQL, and locks there."""

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg import sql

from larder.errors import BusyError, ConfigError, LarderError

MISSING = (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName, psycopg.errors.UndefinedColumn)


@contextmanager
def connect(url: str, purpose: str) -> Iterator[psycopg.Connection]:
    """A connection in UTC. What the server refuses becomes one sentence, without the URL and its password."""
    try:
        timeout = psycopg.conninfo.conninfo_to_dict(url).get("connect_timeout", "10")
    except psycopg.ProgrammingError:
        raise ConfigError(f"The PostgreSQL URL of {purpose} is not valid.") from None
    try:
        connection = psycopg.connect(
            url, application_name=f"larder {purpose}", connect_timeout=timeout, autocommit=True
        )
    except psycopg.OperationalError as error:
        raise LarderError(f"PostgreSQL cannot be reached for {purpose}: {_first_line(error)}") from None
    with connection:
        connection.execute("SET TIME ZONE 'UTC'")
        try:
            yield connection
        except psycopg.errors.InsufficientPrivilege as error:
            raise LarderError(f"PostgreSQL refused {purpose}: {_first_line(error)}.") from error
        except MISSING as error:
            raise LarderError(
                f"PostgreSQL lacks what {purpose} needs: {_first_line(error)}. "
                "site.yml creates the tables that the repository declares."
            ) from error
        except psycopg.OperationalError as error:
            raise LarderError(f"PostgreSQL was lost during {purpose}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_about_data(error: Exception) -> bool:
    """Whether an error is the fault of what was written, and not that of the server, the connection or the rights."""
    if not isinstance(error, psycopg.Error):
        return not isinstance(error, LarderError)
    # Data that PostgreSQL refuses, and what is too large for it; without a code, psycopg itself refused a value.
    code = error.sqlstate or ("22" if isinstance(error, psycopg.DataError) else "")
    return code.startswith(("22", "23", "54", "XX000"))


HELD = """
SELECT EXISTS (
    SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 1
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND (classid::bigint << 32) | objid::bigint = hashtextextended(%s, 0)
)
"""


def is_locked(connection: psycopg.Connection, name: str) -> bool:
    """Whether somebody holds the advisory lock `name` of this database."""
    held: bool = connection.execute(HELD, [name]).fetchall()[0][0]
    return held


@contextmanager
def try_lock(connection: psycopg.Connection, name: str) -> Iterator[None]:
    """Hold the advisory lock `name` of this database, or fail at once. It ends with the session, however that ends."""
    row = connection.execute("SELECT pg_try_advisory_lock(hashtextextended(%s, 0))", [name]).fetchone()
    if not row or not row[0]:
        raise BusyError(f"Another {name} is running: this one leaves it to that.")
    try:
        yield
    finally:
        if not connection.closed:
            connection.execute("SELECT pg_advisory_unlock(hashtextextended(%s, 0))", [name])


def identifier(table: str) -> sql.Identifier:
    return sql.Identifier(*table.split("."))
