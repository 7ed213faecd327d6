"""PostgreSQL: connections, locks, and the one way in which rows are written."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psycopg
from psycopg import sql

from larder.errors import BusyError, ConfigError, LarderError

if TYPE_CHECKING:
    import pyarrow as pa

KEY = ("symbol", "event_timestamp")
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
                "site.yml creates the tables that the repository's tables.yml declares."
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


TYPES = """
SELECT attname, format_type(atttypid, NULL) FROM pg_attribute
WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped
"""


def check_types(connection: psycopg.Connection, table: str, rows: "pa.Table") -> None:
    """Raise LarderError where a column of the table has another type than the rows.

    PostgreSQL takes any eight bytes for a bigint, and for a double precision as well; and it rounds one to the other.
    """
    from larder import binary

    types: dict[str, str] = dict(connection.execute(TYPES, [identifier(table).as_string(connection)]).fetchall())
    for field in rows.schema:
        if field.name in types and types[field.name] != (wanted := binary.type_of(field.type)):
            raise LarderError(
                f"{table} has the column {field.name} as {types[field.name]}, and {wanted} is written. "
                "A run of site.yml brings the column to the type that tables.yml declares."
            )


def copy_in(connection: psycopg.Connection, table: str, rows: "pa.Table") -> None:
    """COPY an Arrow table into a table that has columns of the same names and of binary.type_of's types."""
    from larder import binary

    check_types(connection, table, rows)
    statement = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT binary)").format(
        identifier(table), sql.SQL(", ").join(map(sql.Identifier, rows.column_names))
    )
    with connection.cursor() as cursor, cursor.copy(statement) as copy:
        for block in binary.write(rows):
            copy.write(block)


# With pgaudit, a COPY into a hypertable ends the server: timescale/timescaledb#7667. The role timescaledb turns it off
# in the database of the hypertables; another server, or one that is not that far yet, may have it on.
AUDITED = """
SELECT coalesce(current_setting('pgaudit.log', true), '') NOT IN ('', 'none')
    OR coalesce(current_setting('pgaudit.role', true), '') <> ''
"""

NEWEST = """
SELECT n - 1, timestamptz_send(newest) FROM unnest(%s::text[]) WITH ORDINALITY AS wanted (symbol, n), LATERAL (
    SELECT event_timestamp FROM {table} WHERE symbol = wanted.symbol ORDER BY event_timestamp DESC LIMIT 1
) AS found (newest)
"""


def append(
    connection: psycopg.Connection, table: str, rows: "pa.Table", columns: Sequence[str]
) -> tuple["pa.Table", "pa.Table"]:
    """COPY these columns of the rows that are newer than all of their symbol in the table; none where pgaudit is on.

    Returns the rows that were written, and the others, which need an upsert. No two rows may have the same key, and
    the caller sees to it that nobody else writes to the table until the transaction ends.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    from larder import binary

    if connection.execute(AUDITED).fetchall()[0][0]:
        check_types(connection, table, rows.select(columns))
        return rows.slice(0, 0), rows
    symbols = rows["symbol"].combine_chunks().dictionary_encode()
    newest = sql.SQL(NEWEST).format(table=identifier(table))
    limits = np.full(len(symbols.dictionary), np.iinfo(np.int64).min)
    for n, time in connection.cursor(binary=True).execute(newest, [symbols.dictionary.to_pylist()]):
        limits[n] = int.from_bytes(time, signed=True)
    new = pa.array(binary.field(rows["event_timestamp"])[0] > limits[symbols.indices])
    written = rows.filter(new)
    if written.num_rows:
        copy_in(connection, table, written.select(columns))
    return written, rows.slice(0, 0) if written.num_rows == rows.num_rows else rows.filter(pc.invert(new))


def upsert(table: str, stage: str, columns: Sequence[str]) -> sql.Composed:
    """INSERT … ON CONFLICT of the staged rows that are new or differ, RETURNING the keys of what changed.

    Rows that are equal already are not touched: no dead tuples, nothing to recompute.
    """
    values = [c for c in columns if c not in KEY]
    names = sql.SQL(", ").join
    return sql.SQL(
        "INSERT INTO {table} AS kept ({all}) SELECT {all} FROM {stage} "
        "ON CONFLICT (symbol, event_timestamp) DO UPDATE SET ({values}) = ROW({new}) "
        "WHERE ({kept}) IS DISTINCT FROM ({new}) RETURNING kept.symbol, kept.event_timestamp"
    ).format(
        table=identifier(table),
        stage=sql.Identifier(stage),
        all=names(map(sql.Identifier, columns)),
        values=names(map(sql.Identifier, values)),
        kept=names(sql.Identifier("kept", c) for c in values),
        new=names(sql.Identifier("excluded", c) for c in values),
    )
