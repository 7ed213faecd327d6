"""The one way in which rows of bars and features are written: COPY what is new, upsert the rest."""

from collections.abc import Mapping, Sequence

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
from psycopg import sql

from larder.errors import LarderError
from larder.postgres import binary
from larder.postgres.session import identifier

KEY = ("symbol", "event_timestamp")
TYPES = """
SELECT attname, format_type(atttypid, NULL) FROM pg_attribute
WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped
"""


def check_types(connection: psycopg.Connection, table: str, rows: pa.Table) -> None:
    """Raise LarderError where a column of the table has another type than the rows.

    PostgreSQL takes any eight bytes for a bigint, and for a double precision as well; and it rounds one to the other.
    """
    types: dict[str, str] = dict(connection.execute(TYPES, [identifier(table).as_string(connection)]).fetchall())
    for field in rows.schema:
        if field.name in types and types[field.name] != (wanted := binary.type_of(field.type)):
            raise LarderError(
                f"{table} has the column {field.name} as {types[field.name]}, and {wanted} is written. "
                "A run of site.yml brings the column to the type that the repository declares."
            )


def stage(connection: psycopg.Connection, name: str, table: str, columns: Sequence[str]) -> None:
    """Create a temporary table of some columns of a table, which is empty whenever a transaction ends."""
    connection.execute(
        sql.SQL("CREATE TEMP TABLE {} ON COMMIT DELETE ROWS AS SELECT {} FROM {} WITH NO DATA").format(
            sql.Identifier(name), sql.SQL(", ").join(map(sql.Identifier, columns)), identifier(table)
        )
    )


def copy_in(connection: psycopg.Connection, table: str, rows: pa.Table) -> None:
    """COPY an Arrow table into a table that has columns of the same names and of binary.type_of's types."""
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
SELECT n - 1, timestamptz_send(newest) FROM unnest(%s::{type}[]) WITH ORDINALITY AS wanted (key, n), LATERAL (
    SELECT {time} FROM {table} WHERE {key} = wanted.key ORDER BY {time} DESC LIMIT 1
) AS found (newest)
"""


def append(
    connection: psycopg.Connection,
    table: str,
    rows: pa.Table,
    columns: Sequence[str],
    key: tuple[str, str] = KEY,
    noted: Mapping[str, int] | None = None,
) -> tuple[pa.Table, pa.Table]:
    """COPY these columns of the rows that are newer than all of their key in the table; none where pgaudit is on.

    `noted`: integer columns that have one value in all rows that are written.
    Returns the rows that were written, and the others, which need an upsert. No two rows may have the same key, and
    the caller sees to it that nobody else writes to the table until the transaction ends.
    """
    if connection.execute(AUDITED).fetchall()[0][0]:
        check_types(connection, table, rows.select(columns))
        return rows.slice(0, 0), rows
    name, time = key
    keys = rows[name].combine_chunks().dictionary_encode()
    newest = sql.SQL(NEWEST).format(
        table=identifier(table),
        key=sql.Identifier(name),
        time=sql.Identifier(time),
        type=sql.SQL(binary.type_of(keys.dictionary.type)),
    )
    limits = np.full(len(keys.dictionary), np.iinfo(np.int64).min)
    for n, stamp in connection.cursor(binary=True).execute(newest, [keys.dictionary.to_pylist()]):
        limits[n] = int.from_bytes(stamp, signed=True)
    new = pa.array(binary.field(rows[time])[0] > limits[keys.indices])
    written = rows.filter(new)
    if written.num_rows:
        copied = written.select(columns)
        for column, number in (noted or {}).items():
            copied = copied.append_column(column, pa.repeat(pa.scalar(number, pa.int32()), len(copied)))
        copy_in(connection, table, copied)
    return written, rows.slice(0, 0) if written.num_rows == rows.num_rows else rows.filter(pc.invert(new))


def upsert(
    table: str,
    stage: str,
    columns: Sequence[str],
    key: tuple[str, str] = KEY,
    noted: Mapping[str, int] | None = None,
) -> sql.Composed:
    """INSERT … ON CONFLICT of the staged rows that are new or differ, RETURNING keys, and whether a row was replaced.

    Rows that are equal already are not touched: no dead tuples, nothing to recompute, and what is `noted` in them (see
    append) stays.
    """
    values = [c for c in columns if c not in key]
    names = sql.SQL(", ").join
    noted = noted or {}
    return sql.SQL(
        "INSERT INTO {table} AS kept ({written}) SELECT {read} FROM {stage} "
        "ON CONFLICT ({keys}) DO UPDATE SET ({set}) = ROW({put}) "
        "WHERE ({kept}) IS DISTINCT FROM ({new}) RETURNING {returned}, "
        # An inserted row was never locked; one that is updated was, by this very statement.
        "kept.xmax <> 0 AS replaced"
    ).format(
        table=identifier(table),
        stage=sql.Identifier(stage),
        written=names(map(sql.Identifier, (*columns, *noted))),
        read=names([*map(sql.Identifier, columns), *map(sql.Literal, noted.values())]),
        keys=names(map(sql.Identifier, key)),
        returned=names(sql.Identifier("kept", c) for c in key),
        set=names(map(sql.Identifier, (*values, *noted))),
        put=names(sql.Identifier("excluded", c) for c in (*values, *noted)),
        kept=names(sql.Identifier("kept", c) for c in values),
        new=names(sql.Identifier("excluded", c) for c in values),
    )
