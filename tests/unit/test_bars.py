"""Files of bars: which columns, which bars, which reasons."""

import gzip

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from larder.bars import read
from larder.errors import RefusedFileError

TODAY = np.datetime64("2026-01-31")
HEADER = "Date,Open,High,Low,Close,Volume\n"


def bars_of(path):
    """(good, rejected) as lists of dicts."""
    batches = list(read(path, TODAY))
    return [row for b in batches for row in b.good.to_pylist()], [
        row for b in batches for row in b.rejected.to_pylist()
    ]


@pytest.fixture
def csv(tmp_path):
    def write(text, name="GOOG.US.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.mark.parametrize(
    "header",
    [
        "Date,Open,High,Low,Close,Volume",
        "date,o,h,l,c,v",
        ",Open,High,Low,Close,Volume",
        "\ufeffTimestamp,OPEN,HIGH,LOW,CLOSE,VOL",
        "<DATE>,<OPEN>,<HIGH>,<LOW>,<CLOSE>,<VOL>",
        "Datetime;Open;High;Low;Close;Volume",
        "time\topen\thigh\tlow\tclose\tvolume",
        '"event_timestamp","open","high","low","close","volume"',
    ],
)
def test_columns_are_known_by_their_usual_names(csv, header):
    separator = next(s for s in ";\t," if s in header)
    good, rejected = bars_of(csv(header + "\n" + separator.join(["2026-01-05", "1", "3", "0.5", "2", "100"]) + "\n"))
    assert not rejected
    (bar,) = good
    assert bar["symbol"] == "GOOG.US"
    assert str(bar["event_timestamp"]) == "2026-01-05"
    assert [bar[k] for k in ("open", "high", "low", "close", "adjusted_close", "volume")] == [1, 3, 0.5, 2, 2, 100]


def test_symbol_and_adjusted_close_come_from_their_columns(csv):
    good, _ = bars_of(csv("Ticker,Date,Open,High,Low,Close,Adj Close,Volume\nAAPL.US,2026-01-05,1,3,1,2,1.5,9\n"))
    assert (good[0]["symbol"], good[0]["adjusted_close"]) == ("AAPL.US", 1.5)


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("2026-01-05", "2026-01-05"),
        ("2026-01-05 00:00:00", "2026-01-05"),
        ("2026-01-05T00:00:00Z", "2026-01-05"),
        ("2026-01-05 00:00:00-05:00", "2026-01-05"),
        ("20260105", "2026-01-05"),
        ("2026/1/5", "2026-01-05"),
        ("1/25/2026", "2026-01-25"),
        ("25.01.2026", "2026-01-25"),
        ("1767571200", "2026-01-05"),
        ("1767571200000", "2026-01-05"),
    ],
)
def test_dates_are_read_as_they_are_usually_written(csv, text, day):
    good, rejected = bars_of(csv(HEADER + f"{text},1,3,1,2,9\n"))
    assert not rejected
    assert str(good[0]["event_timestamp"]) == day


def test_a_date_of_two_readings_is_refused(csv):
    with pytest.raises(RefusedFileError, match="month/day and as day/month"):
        bars_of(csv(HEADER + "1/4/2025,1,3,1,2,9\n1/5/2025,1,3,1,2,9\n"))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("2026-01-06,1,1,3,2,9", "high is below low"),
        ("2026-01-06,-1,3,1,2,9", "open is negative"),
        ("2026-01-06,1,3,1,2,-9", "volume is negative"),
        ("2026-01-06,1,3,1,,9", "close is not a number"),
        ("2026-01-06,1,3,nan,2,9", "low is not a number"),
        ("2026-01-06,1,inf,1,2,9", "high is not a number"),
        ("2026-01-06,abc,3,1,2,9", "open is not a number"),
        ("2026-02-01,1,3,1,2,9", "the date is in the future"),
        ("2026-02-30,1,3,1,2,9", "the date cannot be read"),
        (",1,3,1,2,9", "the date cannot be read"),
        ("2026-01-06,1,3,1,2", "the line has too few or too many columns"),
        ("2026-01-06,1,3,1,2,1e300", "volume is too large"),
    ],
)
def test_a_bar_that_cannot_be_is_rejected_and_its_neighbours_are_not(csv, line, reason):
    good, rejected = bars_of(csv(HEADER + f"2026-01-05,1,3,1,2,9\n{line}\n2026-01-07,1,3,1,2,9\n"))
    assert [str(bar["event_timestamp"]) for bar in good] == ["2026-01-05", "2026-01-07"]
    assert [bar["reason"].split("; ")[0] for bar in rejected] == [reason]


def test_every_reason_of_a_bar_is_given(csv):
    _, rejected = bars_of(csv(HEADER + "2026-02-01,1,1,3,2,-9\n2026-01-05,1,3,1,2,9\n"))
    assert rejected[0]["reason"] == "the date is in the future; volume is negative; high is below low"
    assert rejected[0]["symbol"] == "GOOG.US"


def test_a_bar_of_today_is_good(csv):
    assert bars_of(csv(HEADER + "2026-01-31,1,3,1,2,9\n"))[0]


def test_a_volume_with_a_fraction_is_rounded(csv):
    assert bars_of(csv(HEADER + "2026-01-05,1,3,1,2,2012.6\n"))[0][0]["volume"] == 2013


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Date,Open,High,Low,Volume\n2026-01-05,1,3,1,9\n", "no column for close"),
        ("Date,Open,High,Low,Close,close,Volume\n2026-01-05,1,3,1,2,2,9\n", "close stands in several columns"),
        ("", "no column for date"),
        (HEADER + "yesterday,1,3,1,2,9\n", "is a date"),
        (b"PK\x03\x04\xff\xfe", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_understood_is_refused_in_one_sentence(csv, text, says):
    with pytest.raises(RefusedFileError, match=says) as caught:
        bars_of(csv(text))
    assert "GOOG.US.csv" in caught.value.message
    assert "\n" not in caught.value.message


def test_a_file_of_another_kind_is_refused(csv):
    with pytest.raises(RefusedFileError, match=r"must end in one of \.csv"):
        bars_of(csv("x", "bars.xlsx"))


def test_gzip(csv):
    assert (
        bars_of(csv(gzip.compress((HEADER + "2026-01-05,1,3,1,2,9\n").encode()), "SPX.csv.gz"))[0][0]["symbol"] == "SPX"
    )


@pytest.mark.parametrize("zone", [None, "America/New_York", "Asia/Tokyo"])
def test_parquet_with_the_index_that_pandas_writes(tmp_path, zone):
    index = pd.DatetimeIndex(["2026-01-05", "2026-01-06"], tz=zone, name="Date")
    frame = pd.DataFrame({"Open": [1, 1.5], "High": [3, 3], "Low": [1, 1], "Close": [2, 2], "Volume": [9, 9]}, index)
    frame.to_parquet(tmp_path / "EURUSD.parquet")
    good, rejected = bars_of(tmp_path / "EURUSD.parquet")
    assert not rejected
    assert [str(bar["event_timestamp"]) for bar in good] == ["2026-01-05", "2026-01-06"]


def test_parquet_of_other_types(tmp_path):
    from decimal import Decimal

    columns = {name: pa.array([Decimal("1.25")]) for name in ("open", "high", "low", "close")}
    table = pa.table({"date": pa.array([20260105]), **columns, "volume": pa.array(["7"]), "symbol": pa.array(["A"])})
    pq.write_table(table, tmp_path / "x.parquet")
    good, _ = bars_of(tmp_path / "x.parquet")
    assert (good[0]["symbol"], good[0]["close"], good[0]["volume"]) == ("A", 1.25, 7)


def test_a_large_file_comes_in_batches(csv):
    lines = "".join(f"2026-01-05,1,3,1,2,9,S{i}\n" for i in range(600_000))
    batches = list(read(csv("Date,Open,High,Low,Close,Volume,Symbol\n" + lines), TODAY))
    assert len(batches) > 1
    assert sum(b.good.num_rows for b in batches) == 600_000
