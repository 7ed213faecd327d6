"""Rows as COPY BINARY has them."""

import struct
from datetime import date

import pyarrow as pa
import pytest

from larder.postgres import binary


def test_every_type_and_null():
    rows = pa.table(
        {
            "symbol": ["A", "Ärger.DE", None],
            "day": pa.array([date(2000, 1, 1), date(1999, 12, 31), None]),
            "price": [1.5, None, -0.0],
            "volume": [1, 2**53, None],
            "seconds": pa.array([None, 2, 3], pa.int32()),
        }
    )
    umlaut = "Ärger.DE".encode()
    day = 86_400_000_000
    expected = (
        struct.pack(">hi1siqidiqi", 5, 1, b"A", 8, 0, 8, 1.5, 8, 1, -1)
        + struct.pack(f">hi{len(umlaut)}siqiiqii", 5, len(umlaut), umlaut, 8, -day, -1, 8, 2**53, 4, 2)
        + struct.pack(">hiiidiii", 5, -1, -1, 8, -0.0, -1, 4, 3)
    )
    assert b"".join(binary.write(rows)) == b"PGCOPY\n\xff\r\n\0" + bytes(8) + expected + b"\xff\xff"


def test_many_rows_in_blocks():
    n = 3 * binary.ROWS_AT_ONCE + 1
    blocks = list(binary.write(pa.table({"volume": pa.array(range(n))})))
    body = b"".join(blocks)[len(binary.HEADER) : -len(binary.END)]
    assert [v for _, _, v in struct.iter_unpack(">hiq", body)] == list(range(n))
    assert len(blocks) == 2 + 4


def test_no_rows():
    assert b"".join(binary.write(pa.table({"volume": pa.array([], pa.int64())}))) == binary.HEADER + binary.END


@pytest.mark.parametrize(
    ("column", "name"),
    [
        (pa.string(), "text"),
        (pa.large_string(), "text"),
        (pa.date32(), "timestamp with time zone"),
        (pa.timestamp("us", "UTC"), "timestamp with time zone"),
        (pa.float64(), "double precision"),
        (pa.float32(), "real"),
        (pa.int64(), "bigint"),
        (pa.int32(), "integer"),
        (pa.int16(), "smallint"),
    ],
)
def test_a_column_is_of_postgresqls_type(column, name):
    widths = {"real": 4, "integer": 4, "smallint": 2, "text": 1}
    assert binary.type_of(column) == name
    values, _ = binary.field(pa.chunked_array([pa.nulls(1, column)]))
    assert values.itemsize == widths.get(name, 8)
