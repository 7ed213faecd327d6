"""Bars of a file: which are taken, which are rejected and why, and when a file is refused for them."""

from datetime import date

import pytest

from larder.bars import Options, inspect, read
from larder.errors import RefusedFileError

TODAY = date(2026, 1, 31)
HEADER = "Date,Open,High,Low,Close,Volume\n"


def bars_of(path, max_rejected=1.0):
    """(good, rejected) as lists of dicts."""
    batches = list(read(path, Options(last_day=TODAY, max_rejected=max_rejected)))
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
    ("line", "reason"),
    [
        ("2026-01-06,1,1,3,2,9", "high is below low"),
        ("2026-01-06,-1,3,1,2,9", "open is not positive"),
        ("2026-01-06,0,0,0,0,0", "open is not positive"),
        ("2026-01-06,1,3,1,30,9", "close is outside low and high"),
        ("2026-01-06,0.5,3,1,2,9", "open is outside low and high"),
        ("0001-01-01,1,3,1,2,9", "the date is before 1900-01-01"),
        ("9999-12-31,1,3,1,2,9", "the date is in the future"),
        ("2026-01-06,1,3,1,2,many", "volume is not a number"),
        ("2026-01-06,1,3,1,2,-9", "volume is negative"),
        ("2026-01-06,1,3,1,,9", "close is missing"),
        ("2026-01-06,1,3,nan,2,9", "low is missing"),
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


@pytest.mark.parametrize("symbol", ["", " ", "TWO WORDS", "TAB\tBED", "BELL\a", "X" * 65])
def test_a_bar_whose_symbol_is_not_a_name_is_rejected_and_its_neighbours_are_not(csv, symbol):
    lines = "".join(f"2026-01-05,1,3,1,2,9,{name}\n" for name in ("GOOG.US", symbol, "X" * 64, "BRK/B", "^ÄÖ=F"))
    good, rejected = bars_of(csv("Date,Open,High,Low,Close,Volume,Symbol\n" + lines))
    assert [bar["symbol"] for bar in good] == ["GOOG.US", "X" * 64, "BRK/B", "^ÄÖ=F"]
    assert [bar["reason"] for bar in rejected] == ["the symbol is not a name"]


@pytest.mark.parametrize("nothing", ["", "nan", "null", "-"])
def test_an_adjusted_close_that_is_not_there_is_the_close(csv, nothing):
    good, rejected = bars_of(
        csv(f"Date,Open,High,Low,Close,Adj Close,Volume\n2026-01-05,1,3,1,2,1.5,9\n2026-01-06,1,3,1,2.5,{nothing},9\n")
    )
    assert not rejected
    assert [bar["adjusted_close"] for bar in good] == [1.5, 2.5]


@pytest.mark.parametrize(
    ("adjusted", "reason"),
    [
        ("many", "adjusted_close is not a number"),
        ("inf", "adjusted_close is not a number"),
        ("0", "adjusted_close is not positive"),
        ("-1.5", "adjusted_close is not positive"),
    ],
)
def test_an_adjusted_close_that_cannot_be_is_a_fault(csv, adjusted, reason):
    good, rejected = bars_of(
        csv(f"Date,Open,High,Low,Close,Adj Close,Volume\n2026-01-05,1,3,1,2,1.5,9\n2026-01-06,1,3,1,2,{adjusted},9\n")
    )
    assert len(good) == 1
    assert [bar["reason"] for bar in rejected] == [reason]


def test_every_reason_of_a_bar_is_given(csv):
    _, rejected = bars_of(csv(HEADER + "2026-02-01,1,1,3,2,-9\n2026-01-05,1,3,1,2,9\n"))
    assert rejected[0]["reason"] == "the date is in the future; volume is negative; high is below low"
    assert rejected[0]["symbol"] == "GOOG.US"


def test_a_bar_of_today_is_good(csv):
    assert bars_of(csv(HEADER + "2026-01-31,1,3,1,2,9\n"))[0]


@pytest.mark.parametrize("close", [2.00015, 1.99985, 0.99995])
def test_a_close_that_is_outside_by_rounding_alone_is_taken(csv, close):
    low, high = (1, 2) if close > 1.5 else (1, 3)
    good, rejected = bars_of(csv(HEADER + f"2026-01-05,1.5,{high},{low},{close},9\n"))
    assert (len(good), len(rejected)) == (1, 0)


def test_one_bad_bar_alone_refuses_no_file_and_too_many_do(csv):
    def lines(good, bad):
        days = [f"2025-{m:02}-{d:02}" for m in range(1, 13) for d in range(1, 28)]
        return HEADER + "".join(
            f"{day},1,{3 if n < good else 0.5},1,2,9\n" for n, day in zip(range(good + bad), days, strict=False)
        )

    assert len(bars_of(csv(lines(1, 1)), 0.05)[0]) == 1
    assert len(bars_of(csv(lines(95, 5)), 0.05)[0]) == 95
    with pytest.raises(RefusedFileError, match="6 of its 100 bars cannot be taken") as caught:
        bars_of(csv(lines(94, 6)), 0.05)
    assert "high is below low" in caught.value.message
    with pytest.raises(RefusedFileError, match="none of its 1 bars"):
        bars_of(csv(lines(0, 1)), 1.0)


@pytest.mark.parametrize("first_is_bad", [False, True])
def test_the_first_good_bar_of_a_day_stays_and_another_one_is_rejected(csv, first_is_bad):
    first = f"2026-01-05,1,{0.5 if first_is_bad else 3},1,2,9\n"
    good, rejected = bars_of(
        csv(HEADER + first + "2026-01-05,1,3,1,2.5,9\n2026-01-05,1,3,1,2.5,9\n2026-01-06,1,3,1,2,9\n")
    )
    assert [bar["close"] for bar in good] == [2.5 if first_is_bad else 2, 2]
    assert len(rejected) == (1 if first_is_bad else 2)


def test_a_bar_that_is_twice_the_same_is_taken_once_without_a_word(csv):
    good, rejected = bars_of(csv(HEADER + "2026-01-05,1,3,1,2,9\n" * 3))
    assert (len(good), rejected) == (1, [])


def test_inspection_tells_what_a_load_would_do(csv):
    path = csv(HEADER + "2026-01-05,1,3,1,2,9\n2026-01-06,1,0.5,1,2,9\n2026-01-07,1,3,1,2,9\n")
    told = inspect(path, Options(last_day=TODAY))
    assert (told.bars, told.rejected, told.refusal) == (2, 1, None)
    assert (told.symbols, str(told.first_day), str(told.last_day)) == (["GOOG.US"], "2026-01-05", "2026-01-07")
    assert told.weekdays == {"Monday": 1, "Wednesday": 1}
    assert told.reasons == {"high is below low": 1}
    assert told.examples[0]["bar"] == "date=2026-01-06 open=1 high=0.5 low=1 close=2 volume=9"
    assert told.head[0]["close"] == 2
    assert (told.format, told.encoding, told.delimiter, told.decimal) == ("generic", "utf-8", ",", ".")


@pytest.mark.parametrize("text", ["x\n", HEADER + "2026-01-05,1,0.5,1,2,9\n", "Date,Open\n1,2\n"])
def test_a_refusal_is_the_same_text_by_load_and_inspect(csv, text):
    path = csv(text)
    with pytest.raises(RefusedFileError) as caught:
        list(read(path))
    assert inspect(path).refusal == caught.value.message


def test_a_large_file_comes_in_batches(csv):
    lines = "".join(f"2026-01-05,1,3,1,2,9,S{i}\n" for i in range(600_000))
    batches = list(read(csv("Date,Open,High,Low,Close,Volume,Symbol\n" + lines), Options(last_day=TODAY)))
    assert len(batches) > 1
    assert sum(b.good.num_rows for b in batches) == 600_000
