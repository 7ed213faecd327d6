"""Rows of a key as arrays: one row per key, each column the values' own bytes, as a row per bar costs more than it."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

import numpy as np
import numpy.typing as npt
import psycopg
from psycopg import sql

from larder.postgres.session import identifier

Array = npt.NDArray[np.float64]
Times = npt.NDArray[np.int64]  # microseconds since 2000, as PostgreSQL has them
Key = str | int

# All rows from `since` on, and the last ones before it: all of them where their number is NULL. The columns share one,
# arbitrary, order.
ROWS = """
SELECT {key}, rows.* FROM unnest(%s::{key_type}[], %s::timestamptz[]) AS wanted ({key}, since), LATERAL (
    SELECT string_agg(timestamptz_send({time}), ''), {values} FROM (
        (SELECT * FROM {table} AS row WHERE row.{key} = wanted.{key} AND {time} >= since)
        UNION ALL
        (SELECT * FROM {table} AS row WHERE row.{key} = wanted.{key} AND {time} < since ORDER BY {time} DESC LIMIT %s)
    ) AS row HAVING count(*) > 0
) AS rows
"""


def read(
    connection: psycopg.Connection,
    table: str,
    columns: Sequence[str],
    since: Mapping[Key, datetime],
    before: int | None,
    *,
    key: tuple[str, str] = ("symbol", "event_timestamp"),
    key_type: str = "text",
) -> Iterator[tuple[Key, Times, dict[str, Array]]]:
    """Keys with their times and values, the oldest first: NaN for null. Of each key from a time on, and some before."""
    if not since:
        return
    each = "string_agg(float8send(coalesce({}::float8, 'NaN')), '')"
    query = sql.SQL(ROWS).format(
        table=identifier(table),
        key=sql.Identifier(key[0]),
        key_type=sql.SQL(key_type),
        time=sql.Identifier(key[1]),
        values=sql.SQL(", ").join(sql.SQL(each).format(sql.Identifier(name)) for name in columns),
    )
    parameters = [list(since), list(since.values()), before]
    for name, stamps, *values in connection.cursor(binary=True).execute(query, parameters):
        times = np.frombuffer(stamps, ">i8").astype(np.int64)
        order = np.argsort(times)
        arrays = (np.frombuffer(column, ">f8").astype(np.float64)[order] for column in values)
        yield name, times[order], dict(zip(columns, arrays, strict=True))
