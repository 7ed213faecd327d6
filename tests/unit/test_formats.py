"""Formats: every entry of the catalogue reads its sample, and files as vendors, browsers and spreadsheets make them."""

import bz2
import gzip
import io
import lzma
import shlex
import zipfile
from datetime import date, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from larder.bars import Options, catalogue, inspect
from larder.errors import ConfigError

SAMPLES = Path(__file__).with_name("samples")
DAYS = [date(2024, 9, 23) + timedelta(n) for n in range(12) if n not in (5, 6)]
OPEN = (101.75, 101.5, 102.5, 103.5, 103.25, 104.25, 105.25, 105.0, 106.0, 107.0)
HIGH = (103.25, 103.05, 104.1, 105.15, 104.95, 106.0, 107.05, 106.85, 107.9, 108.95)
LOW = (100.5, 100.25, 101.25, 102.25, 102.0, 103.0, 104.0, 103.75, 104.75, 105.75)
CLOSE = (101.25, 102.25, 103.25, 103.0, 104.0, 105.0, 104.75, 105.75, 106.75, 106.5)
VOLUME = (1000, 2001, 3002, 4003, 5004, 6005, 7006, 8007, 9008, 10009)
BARS = list(zip(DAYS, OPEN, HIGH, LOW, CLOSE, VOLUME, strict=True))
# Of the samples whose symbol is not the file's name up to its ending.
SYMBOLS = {
    "metatrader5": "EURUSD",
    "metatrader4": "EURUSD",
    "stooq": "STQ.US",
    "stooq-polish": "stq",
    "stooq-download": "stq_us",
    "yfinance": "YFN",
    "binance": "BTCUSDT",
    "binance-header": "BTCUSDT",
    "polygon": "PLG",
    "dukascopy": "EURUSD",
    "dukascopy-local": "EURUSD",
    "dukascopy-node": "eurusd",
    "histdata": "EURUSD",
    "kraken": "XBTUSD",
    "kraken-vwap": "XBTUSD",
    "investing": "INV",
    "nse-bhavcopy": "NSEX",
    "nse-bhavcopy-old": "NSEX",
    "nse-bhavcopy-udiff": "NSEX",
    "cryptodatadownload": "BTC/USDT",
    "cryptodatadownload-old": "BTCUSD",
    "quantmod": "QM",
    "kaggle-sp500": "KGA",
    "alphavantage": "IBM",
    "alphavantage-adjusted": "IBM",
    "tradingview": "AAPL",
    "eodhd": "MCD.US",
    "kaggle-stooq": "kag.us",
    "coinmarketcap": "Litecoin",
}


def told(path, **options):
    """What a load would do, and all of the bars that it would store."""
    return inspect(path, Options(**options))


def stored(path, **options):
    from larder.bars import read

    return [row for batch in read(path, Options(**options)) for row in batch.good.to_pylist()]


def tuples(bars):
    return [tuple(bar[name] for name in ("event_timestamp", "open", "high", "low", "close", "volume")) for bar in bars]


def is_the_sample(bars, volume=VOLUME):
    """Whether bars are those of every sample, in any order."""
    wanted = [(*bar[:5], v) for bar, v in zip(BARS, volume, strict=True)]
    got = sorted(tuples(bars))
    assert len(got) == len(wanted), got
    for one, other in zip(got, wanted, strict=True):
        assert one[0] == other[0]
        assert [*one[1:5], one[5] or 0] == pytest.approx([*other[1:5], other[5] or 0], rel=1e-9)
        assert (one[5] is None) == (other[5] is None)
    return True


@pytest.fixture
def file(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def csv(head="Date,Open,High,Low,Close,Volume", row="{d},{o},{h},{l},{c},{v}", bars=BARS, end="\n"):
    lines = [row.format(d=d, o=o, h=h, l=low, c=c, v=v) for d, o, h, low, c, v in bars]
    return end.join([*([head] if head else []), *lines, ""])


@pytest.mark.parametrize("name", [entry.name for entry in catalogue.load().formats])
def test_every_entry_of_the_catalogue_reads_its_sample(name):
    folder = SAMPLES / name
    (sample,) = folder.iterdir()
    found = told(sample)
    assert found.refusal is None
    assert found.format == name
    assert found.warnings == []
    assert found.symbols == [SYMBOLS.get(name, sample.name.split(".")[0].split(" ")[0])]
    assert is_the_sample(stored(sample))


def test_every_sample_has_an_entry():
    assert {folder.name for folder in SAMPLES.iterdir()} == {entry.name for entry in catalogue.load().formats}


def test_the_docs_table_is_the_catalogues():
    page = (Path(__file__).parents[2] / "docs/formats.md").read_text()
    assert catalogue.table() in page, (
        "paste what this prints: from larder.bars import catalogue; print(catalogue.table())"
    )


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (csv(end="\r"), "utf-8"),
        (csv(end="\r\n"), "utf-8-sig"),
        (csv(end="\r\n"), "utf-16"),
        (csv(), "utf-16-le"),
        (csv(), "utf-16-be"),
        (csv(), "utf-32"),
        ("\n\n" + csv(), "utf-8"),
        ("sep=;\r\n" + csv().replace(",", ";"), "utf-8"),
        ("Historical prices as of 11/24/2026\nin USD, adjusted\n\n" + csv(), "utf-8"),
        (csv().replace(",", "\t"), "utf-8"),
        (csv().replace(",", "|"), "utf-8"),
        (csv().replace(",", ", "), "utf-8"),
        (csv("Date,Open,High,Low,Close,Volume,", "{d},{o},{h},{l},{c},{v},"), "utf-8"),
        (csv(row="{d},{o},{h},{l},{c},{v},"), "utf-8"),
        (csv('"Open","High","Low","Close","Volume"', '"{d}",{o},{h},{l},{c},{v}'), "utf-8"),
        (csv(row='"{d}","{o}","{h}","{l}","{c}","{v}"'), "utf-8"),
        (csv("Date,Hintergrund größer,Open,High,Low,Close,Volume", "{d},ä,{o},{h},{l},{c},{v}"), "cp1252"),
        (csv("Date;Erster;Hoch;Tief;Schlusskurs;Stück;Währung", "{d};{o};{h};{l};{c};{v};€"), "cp1252"),
        (csv("Data;Otwarcie;Najwyższy;Najniższy;Zamknięcie;Wolumen", "{d};{o};{h};{l};{c};{v}"), "cp1250"),
        (csv("Fecha,Último,Apertura,Máximo,Mínimo,Vol.", "{d},{c},{o},{h},{l},{v}"), "utf-8"),
        (csv("日期,开盘,最高,最低,收盘,成交量"), "utf-8"),
        (csv("t,o,h,l,c,v"), "utf-8"),
        (csv("Datetime,open_price,high_price,low_price,close_price,Total Volume"), "utf-8"),
        (csv("日期,开盘价,最高价,最低价,收盘价,成交量"), "gb18030"),
        (csv("날짜,시가,고가,저가,종가,거래량"), "cp949"),
        (csv("Дата,Открытие,Максимум,Минимум,Закрытие,Объём"), "cp1251"),
        (csv("Tarih,Açılış,Yüksek,Düşük,Şimdi,Hac."), "utf-8"),  # noqa: RUF001
        (csv("Date,Open (USD),High (USD),Low (USD),Close (USD),Volume (shares)"), "utf-8"),
        (csv("Dates,PX_OPEN,PX_HIGH,PX_LOW,PX_LAST,PX_VOLUME"), "utf-8"),
        (csv("Exchange Date,Open,High,Low,Close,Volume"), "utf-8"),
        (csv("Date\tOpen\tHigh\tLow\tClose Close price adjusted for splits.\tVolume").replace(",", "\t"), "utf-8"),
        (csv("unnamed: 0,Date,Open,High,Low,Close,Volume", "0,{d},{o},{h},{l},{c},{v}"), "utf-8"),
    ],
)
def test_a_file_is_read_whatever_its_encoding_separator_and_first_lines(file, text, encoding):
    path = file("AAPL.csv", text.encode(encoding))
    assert told(path).refusal is None, told(path).refusal
    assert is_the_sample(stored(path))


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("AAPL.csv.gz", gzip.compress),
        ("AAPL.csv", gzip.compress),
        ("AAPL.txt.bz2", bz2.compress),
        ("AAPL.csv.xz", lzma.compress),
        ("AAPL.dat", bytes),
        ("AAPL", bytes),
        ("AAPL.TSV", bytes),
        ("AAPL.csv.gz", lambda data: gzip.compress(data[:50]) + gzip.compress(data[50:])),
    ],
)
def test_what_is_packed_is_known_by_its_bytes_and_not_by_its_name(file, name, pack):
    path = file(name, pack(csv().encode()))
    assert is_the_sample(stored(path))
    assert told(path).symbols == ["AAPL"]


def archive(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for name, text in members.items():
            packed.writestr(name, text)
    return buffer.getvalue()


def test_every_member_of_an_archive_is_a_symbol(file):
    path = file(
        "d_us_txt.zip", archive(**{"data/AAPL.csv": csv(), "data/MSFT.csv": csv(end="\r"), "__MACOSX/._x": "x"})
    )
    assert told(path).symbols == ["AAPL", "MSFT"]
    assert len(stored(path)) == 20


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("DAT_ASCII_X.txt", "Gap of 120s found between 20240101170000 and 20240101170200.\n"),  # HistData's report
        ("data/empty.us.txt", ""),
        ("EMPTY.csv", ""),
        ("licence.pdf", b"%PDF-1.7"),
        ("source.html", "<!doctype html><html>"),
    ],
)
def test_what_is_no_table_beside_tables_of_an_archive_is_passed_over_with_a_word(file, name, content):
    path = file("all.zip", archive(**{name: content, "folder/": "", "folder/AAPL.csv": csv()}))
    assert is_the_sample(stored(path))
    assert [warning.split(" in the archive")[0] for warning in told(path).warnings] == [f"passed over: {name}"]
    alone = told(file("alone.zip", archive(**{name: content}))).refusal
    assert alone.startswith(f"{path.with_name('alone.zip')}: {name} in the archive")


def test_a_bad_member_of_an_archive_is_named(file):
    path = file("all.zip", archive(**{"AAPL.csv": csv(), "MSFT.csv": "nothing,that\nis,known\n"}))
    assert "MSFT.csv in the archive" in told(path).refusal


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.xlsx", archive(**{"[Content_Types].xml": "x"}), "Excel workbook"),
        ("x.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "Excel workbook"),
        ("x.csv", b"", "is empty"),
        ("x.csv", b"\n \n", "is empty"),
        ("x.csv", b"Date,Open,High,Low,Close,Volume\n", "holds no bars"),
        ("x.csv", b"<!DOCTYPE html><html>", "a page"),
        ("x.csv", b'{"chart": {"result": []}}', "JSON"),
        ("x.csv", b'[{"date": "2024-09-23"}]', "JSON"),
        ("x.csv", bytes(range(256)) * 4, "no text"),
        ("x.csv", b"PK\x03\x04 broken", "cannot be read"),
        ("x.csv.gz", gzip.compress(csv().encode(), mtime=0)[:-30], "damaged or cut off: fetch it again"),
        ("x.csv.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("x.zip", archive(**{"AAPL.csv": csv()})[:-40], "damaged or cut off: fetch it again"),
        ("x.zip", archive(**{"AAPL.csv": csv()}).replace(b"101.75", b"901.75", 1), "damaged or cut off"),
        ("x.csv", csv().encode() + b"\0" * 100, "no text"),
        (
            "x.csv",
            csv("Symbol,Date,Open,High,Low,Close,Volume", "MUV,{d},{o},{h},{l},{c},{v}", BARS * 900).encode()
            + b"M\xdcV,2024-10-07,1,2,1,1,5\n",
            "--encoding",
        ),
        ("x.txt", csv().replace(",", "  ").encode(), "blanks alone"),
        ("x.csv", "".join(f'"{line}"\n' for line in csv().splitlines()).encode(), "quoted as a whole"),
        ("x.csv", csv().replace("2024-09-25", '"2024-09-25').encode(), "a quotation mark that nothing ends"),
        ("AAPL 5 years.csv", csv().encode(), "rename it to SYMBOL.csv, or say --symbol NAME"),
        ("2.csv", f"AAPL\n{csv(bars=BARS[:5])}\nMSFT\n{csv(bars=BARS[5:])}".encode(), "tables of several symbols"),
        ("x.csv", csv(row="{d},101'165,101'200,101'000,101'085,{v}").encode(), "thirty-seconds"),
        ("x.zip", archive(**{"y.zip": archive(a="b")}), "packed twice"),
        ("x.parquet", b"PAR1 broken PAR1", "cannot be read"),
        ("x.csv.crdownload", csv().encode(), "not whole yet"),
        ("x.pdf", b"%PDF-1.7", "a PDF"),
        ("x.csv", csv("Date,Open,High,Low,Volume").encode(), "no column for close"),
        ("x.csv", csv(None).encode(), "no header line"),
        (
            "x.csv",
            csv("Date,Open,High,Low,Close,close,Volume", "{d},{o},{h},{l},{c},{c},{v}").encode(),
            "several columns",
        ),
        ("data.csv", csv().encode(), "nothing names its symbol"),
        ("2024-09-23.csv", csv().encode(), "nothing names its symbol"),
        (
            "HistoricalData_1727.csv",
            csv("Date,Close/Last,Volume,Open,High,Low", "{d},{c},{v},{o},{h},{l}").encode(),
            "symbol",
        ),
    ],
)
def test_what_is_no_table_of_bars_is_refused_by_name_with_a_way_on(file, name, content, says):
    path = file(name, content)
    refusal = told(path).refusal
    assert refusal
    assert says in refusal
    assert refusal.startswith(str(path))
    assert "\n" not in refusal
    assert stored_nothing(path)


def stored_nothing(path, **options):
    from larder.bars import read
    from larder.errors import RefusedFileError

    with pytest.raises(RefusedFileError):
        list(read(path, Options(**options)))
    return True


@pytest.mark.parametrize(
    ("name", "symbol"),
    [
        ("AAPL (1).csv", "AAPL"),
        ("AAPL (12).csv.gz", "AAPL"),
        ("AAPL - Copy.csv", "AAPL"),
        ("AAPL copy 2.csv", "AAPL"),
        ("BRK.B.csv", "BRK.B"),
        ("^GSPC.csv", "^GSPC"),
        ("0700.HK.csv", "0700.HK"),
        ("US30.csv", "US30"),
        ("symbol=GC%3DF/part-0.csv", "GC=F"),
        ("AAPL_daily.csv", "AAPL"),
        ("AAPL-1d.csv", "AAPL"),
        ("AAPL_2024-01-01_2024-12-31.csv", "AAPL"),
        ("AAPL_D1_20240101-20241231.csv.gz", "AAPL"),
        ("BRK-B 2024-01-01 to 2024-12-31.csv", "BRK-B"),
        ("BTC-USD.csv", "BTC-USD"),
        ("EURIBOR_3M.csv", "EURIBOR_3M"),
    ],
)
def test_the_symbol_is_the_files_name_without_what_browsers_add(file, name, symbol):
    assert told(file(name, csv())).symbols == [symbol]


@pytest.mark.parametrize(
    ("name", "symbol"),
    [
        ("EURUSD_D1_202409230000_202410040000.csv", "EURUSD"),
        ("EURUSDDaily.csv", "EURUSD"),
        ("US30_Daily_202409230000_202410040000 (1).csv", "US30"),
        ("ESH26.csv", "ESH26"),
    ],
)
def test_names_of_metatraders_exports(file, name, symbol):
    text = csv(
        "<DATE>\t<OPEN>\t<HIGH>\t<LOW>\t<CLOSE>\t<TICKVOL>\t<VOL>\t<SPREAD>", "{d}\t{o}\t{h}\t{l}\t{c}\t{v}\t0\t1"
    )
    assert told(file(name, text)).symbols == [symbol]


@pytest.mark.parametrize(
    "name", ["EURUSD_H1_202409230000_202410040000.csv", "EURUSD_M15.csv", "EURUSD_Weekly_202409230000_202410040000.csv"]
)
def test_a_name_of_another_timeframe_is_refused(file, name):
    text = csv(
        "<DATE>\t<OPEN>\t<HIGH>\t<LOW>\t<CLOSE>\t<TICKVOL>\t<VOL>\t<SPREAD>", "{d}\t{o}\t{h}\t{l}\t{c}\t{v}\t0\t1"
    )
    assert "not daily" in told(file(name, text)).refusal


def test_a_name_that_ends_in_a_year_is_the_symbol_and_is_named(file):
    found = told(file("TLT_2024.csv", csv()))
    assert (found.symbols, len(found.warnings)) == (["TLT_2024"], 1)
    assert "--symbol" in found.warnings[0]


def test_a_volume_of_a_unit_that_is_not_known_is_not_taken_and_named(file):
    path = file("AAPL.csv", csv("Date,Open,High,Low,Close,Volume (000s)"))
    assert is_the_sample(stored(path), [None] * 10)
    assert "--columns volume=" in told(path).warnings[0]
    assert is_the_sample(stored(path, columns={"volume": "Volume (000s)"}))


def test_the_company_beside_a_symbol_is_no_symbol(file):
    path = file("x.csv", csv("Symbol,date,open,high,low,close,volume,Name", "AAPL,{d},{o},{h},{l},{c},{v},Apple"))
    assert told(path).symbols == ["AAPL"]


@pytest.mark.parametrize(
    ("text", "rejected"),
    [
        (csv() + '\n"Source: a vendor",,,,,\nGenerated 2024-10-15\n', 0),
        (csv() + "Total,,,,,55055\n", 0),
        (csv(bars=BARS[:5]) + csv(bars=BARS[5:]), 0),
        (csv(bars=BARS[:5]) + "".join(csv(bars=BARS[5:6]) for _ in range(20)) + csv(bars=BARS[6:]) + "Total,,,,,\n", 0),
        (csv().replace("Volume\n", "Volume\n,USD,USD,USD,USD,shares\n"), 0),
        (csv(bars=BARS[:5]) + "2024-09-27,0.25 Dividend,,,,\n" + csv(None, bars=BARS[5:]), 0),
        (csv(bars=BARS[:5]) + '"Sep 30, 2024",4:1 Stock Split\n' + csv(None, bars=BARS[5:]), 1),
        ("# a vendor\n" + csv(bars=BARS[:5]) + "# page 2\n" + csv(None, bars=BARS[5:]), 0),
        (csv(row="{d},{o},{h},{l},{c},{v},") + ",,,,,,\n", 0),
        (csv() + "2024-10-0", 1),
    ],
)
def test_lines_that_are_no_bars_are_left_out_and_bars_are_not(file, text, rejected):
    path = file("AAPL.csv", text)
    assert is_the_sample(stored(path))
    assert told(path).rejected == rejected
    assert rejected or told(path).left_out


def test_tables_below_each_other_are_one_where_the_user_says_so(file):
    path = file("2.csv", f"AAPL\n{csv(bars=BARS[:5])}\nAAPL\n{csv(bars=BARS[5:])}")
    assert "tables of several symbols" in told(path).refusal
    assert is_the_sample(stored(path, symbol="AAPL"))


def test_many_lines_that_are_no_bars_are_rejected_ones(file):
    assert "30 of its 40 bars cannot be taken" in told(file("AAPL.csv", csv() + "x,,,,,\n" * 40)).refusal


def test_a_remark_does_not_make_two_readings_of_dates_that_have_one(file):
    bars = [(d.strftime("%m/%d/%Y"), *rest) for d, *rest in BARS[:3]]
    found = told(file("AAPL.csv", csv(bars=bars) + '"Source: a vendor",,,,,\n'))
    assert (found.refusal, found.bars, found.dates) == (None, 3, "M/D/Y")


def test_ticks_are_the_volume_where_no_volume_was_traded_and_not_where_some_was(file):
    head = "<DATE>\t<OPEN>\t<HIGH>\t<LOW>\t<CLOSE>\t<TICKVOL>\t<VOL>\t<SPREAD>"
    none = file("A.csv", csv(head, "{d}\t{o}\t{h}\t{l}\t{c}\t{v}\t0\t1"))
    some = file("B.csv", csv(head, "{d}\t{o}\t{h}\t{l}\t{c}\t7\t{v}\t1").replace("\t7\t1000\t", "\t7\t0\t"))
    assert is_the_sample(stored(none))
    assert [bar["volume"] for bar in stored(some)] == [0, *VOLUME[1:]]


@pytest.mark.parametrize("junk", ["\x1b[2J0", "7a", "12:30", "--5"])
def test_junk_in_one_bar_does_not_make_a_column_of_zeros_the_volume_of_the_others(file, junk):
    head = "<DATE>\t<OPEN>\t<HIGH>\t<LOW>\t<CLOSE>\t<TICKVOL>\t<VOL>\t<SPREAD>"
    bars = BARS * 4  # one bar of ten is more than a file may have rejected
    lines = csv(head, "{d}\t{o}\t{h}\t{l}\t{c}\t{v}\t0\t1", bars=bars).replace("\t0\t1", f"\t{junk}\t1", 1)
    found = stored(file("A.csv", lines))
    assert {bar["volume"] for bar in found} <= set(VOLUME)


@pytest.mark.parametrize("order", ["Ticker", "Price"])
def test_yfinance_of_several_symbols_by_either_level(tmp_path, order):
    days = pd.DatetimeIndex(DAYS, name="Date")
    frames = {
        s: pd.DataFrame({"Close": CLOSE, "High": HIGH, "Low": LOW, "Open": OPEN, "Volume": VOLUME}, days)
        for s in ("A", "B")
    }
    frame = pd.concat(frames, axis=1, names=["Ticker", "Price"])
    if order == "Price":
        frame = frame.swaplevel(axis=1)
    frame.to_csv(tmp_path / "both.csv")
    frame.to_parquet(tmp_path / "both.parquet")
    for path in (tmp_path / "both.csv", tmp_path / "both.parquet"):
        found = told(path)
        assert (found.refusal, found.format, found.symbols) == (None, "yfinance", ["A", "B"])
        assert is_the_sample([bar for bar in stored(path) if bar["symbol"] == "A"])


def test_prices_that_are_all_the_same_in_the_first_bar_are_no_symbol(file):
    path = file("EURUSD.csv", "Date,Open,High,Low,Close\n2024-09-23,1.1,1.1,1.1,1.1\n2024-09-24,1.1,1.2,1.1,1.2\n")
    assert (told(path).symbols, told(path).bars) == (["EURUSD"], 2)


def test_parquet_data_sets_in_hive_folders_of_every_type(tmp_path):
    from decimal import Decimal

    folder = tmp_path / "symbol=AAPL" / "year=2024"
    folder.mkdir(parents=True)
    table = pa.table(
        {
            "Date": pa.array(DAYS, pa.date32()).dictionary_encode(),
            "Open": pa.array([Decimal(str(v)) for v in OPEN]),
            "High": pa.array(HIGH, pa.float64()),
            "Low": pa.array([str(v) for v in LOW], pa.large_string()),
            "Close": pa.array(CLOSE, pa.float64()),
            "Volume": pa.array(VOLUME, pa.uint32()),
        }
    )
    pq.write_table(table, folder / "part-0.parquet")
    assert told(folder / "part-0.parquet").symbols == ["AAPL"]
    assert is_the_sample(stored(folder / "part-0.parquet"))


@pytest.mark.parametrize("kind", [pa.string(), pa.float64(), pa.int64(), pa.null()])
def test_parquet_without_volumes_has_none_and_without_a_price_no_bar(tmp_path, kind):
    columns = {"date": DAYS, "open": OPEN, "high": HIGH, "low": LOW, "close": CLOSE}
    columns |= {"volume": pa.array([None] * 10, kind)}
    pq.write_table(pa.table(columns), tmp_path / "AAPL.parquet")
    assert is_the_sample(stored(tmp_path / "AAPL.parquet"), [None] * 10)
    columns["close"] = pa.array([None, *map(str, CLOSE[1:])])
    pq.write_table(pa.table(columns), tmp_path / "AAPL.parquet")
    assert told(tmp_path / "AAPL.parquet").reasons == {"close is missing": 1}


@pytest.mark.parametrize("unit", [1, 10**3, 10**6, 10**9])
def test_parquet_with_unix_time_in_integers_and_floats(tmp_path, unit):
    stamps = [int(datetime(d.year, d.month, d.day, tzinfo=ZoneInfo("UTC")).timestamp()) * unit for d in DAYS]
    for n, kind in enumerate((pa.int64(), pa.float64(), pa.string())):
        column = pa.array([float(s) for s in stamps] if n == 1 else stamps if n == 0 else list(map(str, stamps)), kind)
        columns = {"open": OPEN, "high": HIGH, "low": LOW, "close": CLOSE, "volume": VOLUME}
        pq.write_table(pa.table({"time": column, **columns}), tmp_path / f"AAPL{n}.parquet")
        assert is_the_sample(stored(tmp_path / f"AAPL{n}.parquet"))


@pytest.mark.parametrize("zone", [None, "America/New_York", "Asia/Tokyo", "Europe/London"])
def test_the_index_that_pandas_writes_counts_in_its_own_zone(tmp_path, zone):
    index = pd.DatetimeIndex(DAYS, tz=zone)
    pd.DataFrame({"Open": OPEN, "High": HIGH, "Low": LOW, "Close": CLOSE, "Volume": VOLUME}, index).to_parquet(
        tmp_path / "AAPL.parquet"
    )
    assert is_the_sample(stored(tmp_path / "AAPL.parquet"))


@pytest.mark.parametrize(
    "zone", ["America/New_York", "Asia/Tokyo", "Europe/London", "Asia/Kolkata", "Australia/Sydney"]
)
@pytest.mark.parametrize("clock", [0, 16])
def test_instants_become_the_markets_days_where_the_zone_is_said_and_are_refused_with_it_where_it_is_not(
    file, zone, clock
):
    def utc(d):
        return datetime(d.year, d.month, d.day, clock, tzinfo=ZoneInfo(zone)).astimezone(ZoneInfo("UTC"))

    for text in (
        csv(bars=[(f"{utc(b[0]):%Y-%m-%dT%H:%M:%SZ}", *b[1:]) for b in BARS]),
        csv(bars=[(int(utc(b[0]).timestamp() * 1000), *b[1:]) for b in BARS]),
    ):
        path = file("AAPL.csv", text)
        assert is_the_sample(stored(path, zone=zone))
        refusal = told(path).refusal
        assert "--zone" in refusal
        if clock == 0 and zone != "Australia/Sydney":
            assert zone in refusal
        assert stored_nothing(path)


def test_a_day_that_begins_on_the_evening_before_is_the_day_in_which_it_ends(file):
    evening = [(f"{d - timedelta(1)}T22:00:00+00:00", *rest) for d, *rest in BARS]  # 17:00 in winter, 18:00 in summer
    assert is_the_sample(stored(file("AAPL.csv", csv(bars=evening)), zone="America/New_York", day_starts="17:00"))


def hours(d, o, h, low, c, v, first=0):
    """Four intraday bars that make the daily one."""
    yield f"{d} {first:02}:00", o, o, low, o, v // 4
    yield f"{d} {first + 4:02}:00", o, h, low, o, v // 4
    yield f"{d} {first + 8:02}:00", o, o, o, o, v // 4
    yield f"{d} {first + 9:02}:30", c, max(o, c), min(o, c), c, v - 3 * (v // 4)


@pytest.mark.parametrize("columns", ["one", "two"])
@pytest.mark.parametrize("backwards", [False, True])
def test_intraday_bars_are_refused_and_made_daily_ones_where_that_is_asked_for(file, columns, backwards):
    rows = [row for bar in BARS for row in hours(*bar)]
    rows = rows[::-1] if backwards else rows
    head, row = "Date,Open,High,Low,Close,Volume", "{d},{o},{h},{l},{c},{v}"
    if columns == "two":
        head = head.replace("Date,", "Date,Time,")
        rows = [(row[0].replace(" ", ","), *row[1:]) for row in rows]
    path = file("AAPL.csv", csv(head, row, rows))
    assert "intraday" in told(path).refusal
    assert "--resample 1d" in told(path).refusal
    assert stored_nothing(path)
    assert is_the_sample(stored(path, resample=True, zone="America/New_York"))


def test_intraday_instants_are_made_days_of_the_markets_zone(file):
    zone = ZoneInfo("Asia/Tokyo")
    rows = []
    for bar in BARS:
        for stamp, *rest in hours(*bar, first=9):
            local = datetime.strptime(stamp, "%Y-%m-%d %H:%M").replace(tzinfo=zone)
            rows.append((int(local.timestamp()), *rest))
    assert is_the_sample(stored(file("AAPL.csv", csv(bars=rows)), resample=True, zone="Asia/Tokyo"))


AFTERNOON = datetime.fromisoformat("2024-09-23T14:00")


def hourly(first, count, stamp="%Y-%m-%d %H:%M"):
    times = [first + timedelta(hours=n) for n in range(count)]
    return csv(bars=[(t.strftime(stamp), 2, 3, 1, 2, 9) for t in times])


def test_a_day_that_the_file_cuts_is_named_and_whole_ones_are_not(file):
    cut = told(file("A.csv", hourly(AFTERNOON, 94)), resample=True)
    assert cut.bars == 5
    assert [part.split(": ")[-1] for part in cut.warnings[0].split("; ")] == [
        "the first day of A, 2024-09-23, has 10 of usually 24",
        "the last day of A, 2024-09-27, has 12 of usually 24 bars",
    ]
    # On a Friday, trading ends a few hours early.
    week = hourly(AFTERNOON - timedelta(hours=14), 24 * 5 - 2)
    assert told(file("B.csv", week), resample=True).warnings == []


@pytest.mark.parametrize(
    ("name", "stamp", "given", "command"),
    [
        ("A.csv", "%Y-%m-%d %H:%M", {}, "--resample 1d"),
        ("A_H1.csv", "%Y-%m-%d %H:%M", {}, "--resample 1d"),
        ("A.csv", "%Y-%m-%dT%H:%MZ", {}, "--resample 1d --zone AREA/CITY"),
        ("A_H1.csv", "%Y-%m-%dT%H:%MZ", {}, "--resample 1d --zone AREA/CITY"),
        ("A.csv", "%Y-%m-%dT%H:%MZ", {"resample": True}, "--resample 1d --zone AREA/CITY"),
        ("A.csv", "%Y-%m-%dT%H:%MZ", {"zone": "Asia/Tokyo"}, "--resample 1d --zone Asia/Tokyo"),
        ("A.csv", "%Y-%m-%d %H:%M", {"symbol": "B"}, "--resample 1d --symbol B"),
        (
            "A b.csv",
            "%Y-%m-%d %H:%M",
            {"symbol": "B", "columns": {"volume": "Volume"}},
            "--columns volume=Volume --resample 1d --symbol B",
        ),
    ],
)
def test_the_refusal_of_an_hourly_file_has_the_whole_command_to_type_next(file, name, stamp, given, command):
    path = file(name, hourly(AFTERNOON, 94, stamp))
    assert told(path, **given).refusal.endswith(f"larder load {command} {shlex.quote(str(path))}.")


@pytest.mark.parametrize("name", ["EURUSD_Weekly_202409230000_202410040000.csv", "EURUSD_MN1.csv"])
def test_nobody_is_told_to_make_daily_bars_of_longer_ones(file, name):
    head = "<DATE>\t<OPEN>\t<HIGH>\t<LOW>\t<CLOSE>\t<TICKVOL>\t<VOL>\t<SPREAD>"
    refusal = told(file(name, csv(head, "{d}\t{o}\t{h}\t{l}\t{c}\t{v}\t0\t1"))).refusal
    assert "export daily bars" in refusal
    assert "--resample" not in refusal


def test_what_a_file_is_called_is_no_reason_to_refuse_daily_bars(file):
    path = file("prices_weekly.csv", csv("Symbol,Date,Open,High,Low,Close,Volume", "AAPL,{d},{o},{h},{l},{c},{v}"))
    assert is_the_sample(stored(path))


def test_times_of_the_evening_before_are_refused_with_the_option_that_moves_them(file):
    evening = [(f"{d - timedelta(1)} 17:00", *rest) for d, *rest in BARS]
    path = file("AAPL.csv", csv(bars=evening))
    assert f"larder load --day-starts 17:00 {path}" in told(path).refusal
    assert is_the_sample(stored(path, day_starts="17:00"))


def test_a_bar_that_comes_twice_does_not_double_the_volume_of_its_day(file):
    rows = [row for bar in BARS for row in hours(*bar)]
    assert is_the_sample(stored(file("AAPL.csv", csv(bars=rows + rows[:7])), resample=True))


@pytest.mark.parametrize("step", [7, 30])
def test_weekly_and_monthly_bars_are_refused(file, step):
    bars = [(date(2024, 1, 1) + timedelta(step * n), *bar[1:]) for n, bar in enumerate(BARS)]
    assert f"{step} days apart" in told(file("AAPL.csv", csv(bars=bars))).refusal


def test_a_bar_on_a_weekend_is_named(file):
    found = told(file("AAPL.csv", csv(bars=[*BARS[:9], (date(2024, 10, 5), *BARS[9][1:])])))
    assert found.bars == 10
    assert "AAPL 2024-10-05" in found.warnings[0]
    many = [(date(2024, 1, 1) + timedelta(n), 2, 3, 1, 2, 9) for n in range(200) if n % 7 < 5 or n == 61]
    assert "2024-03-02" in told(file("AAPL.csv", csv(bars=many))).warnings[0]


@pytest.mark.parametrize(
    "form",
    [
        "%Y-%m-%d",
        "%Y/%m/%d",
        "%Y%m%d",
        "%d-%b-%Y",
        "%d %B %Y",
        "%b %d, %Y",
        "%B %d, %Y",
        "%A, %B %d, %Y",
        "%a %d %b %Y",
        "%d-%b-%y",
        "%d/%b/%Y",
        "%m/%d/%Y",
        "%d/%m/%Y",
        "%d.%m.%Y",
        "%d.%m.%y",
        "%m/%d/%y",
        "%Y-%m-%d %H:%M:%S",
        "%Y-%m-%dT%H:%M:%SZ",
        "%Y-%m-%dT%H:%M:%S.000Z",
        "%Y-%m-%d 00:00:00-04:00",
        "%m/%d/%Y 4:00:00 PM",
        "%Y%m%d %H%M%S",
        "%Y%m%d%H%M%S",
        "%Y年%m月%d日",
        "%Y.%m.%d",
        "%d.%m.%Y 00:00:00.000 GMT+0200",
        "%a %b %d %Y 00:00:00 GMT-0400 (Eastern Daylight Time)",
        "%Y. %m. %d.",
        "%Y년 %m월 %d일",
        "%b-%d-%Y",
        "%Y-%m-%d 16:00:00 EDT",
    ],
)
def test_dates_as_they_are_written(file, form):
    path = file("AAPL.csv", csv(row='"{d}",{o},{h},{l},{c},{v}', bars=[(b[0].strftime(form), *b[1:]) for b in BARS]))
    assert told(path).refusal is None, told(path).refusal
    assert is_the_sample(stored(path))


def test_dates_as_excels_numbers_and_in_other_languages(file):
    excel = [((d - date(1899, 12, 30)).days, *rest) for d, *rest in BARS]
    assert is_the_sample(stored(file("A.csv", csv(bars=excel))))
    german = [(f"{d.day}. {'Sept.' if d.month == 9 else 'Okt.'} {d.year}", *rest) for d, *rest in BARS]
    assert is_the_sample(stored(file("B.csv", csv(bars=german))))


def test_a_year_of_four_digits_is_no_day_of_the_month(file):
    bars = [(f"{n:02}/01/0001", *bar[1:]) for n, bar in zip((21, 22, 23), BARS, strict=False)]
    assert "no value of its date column is a date" in told(file("AAPL.csv", csv(bars=bars)), dates="Y/M/D").refusal


def test_the_refusal_of_two_readings_shows_the_date_that_has_them(file):
    bars = [*BARS, ("31/12/0001", *BARS[0][1:])]
    assert "its dates (31/12/0001) can be read as" in told(file("AAPL.csv", csv(bars=bars))).refusal


def test_usual_names_begin_with_the_plain_one(file):
    refusal = told(file("AAPL.csv", csv("Date,Price,High,Low,Close,Volume"))).refusal
    assert "no column for open among Date, Price, High, Low, Close, Volume; usual names are open, o, " in refusal
    assert " and others, and --columns open=… names another one" in refusal


@pytest.mark.parametrize("form", ["%m/%d/%Y", "%d/%m/%y", "%y-%m-%d"])
def test_dates_of_two_readings_are_refused_and_read_where_the_order_is_said(file, form):
    bars = [(date(2007, 3, n).strftime(form), *bar[1:]) for n, bar in zip((1, 2, 5, 6, 7, 8, 9), BARS, strict=False)]
    path = file("AAPL.csv", csv(bars=bars))
    assert "can be read as" in told(path).refusal
    assert "--dates" in told(path).refusal
    order = form.replace("%", "").upper().replace("-", "/")
    assert stored(path, dates=order)[0]["event_timestamp"] == date(2007, 3, 1)


@pytest.mark.parametrize(
    ("price", "volume"),
    [
        ("{:.2f}", "{:,}"),
        ("${:,.2f}", "{}"),
        ("{:,.2f} €", "{:,}"),
        ("₹{:.2f}", "{}"),
        ("{:,.2f} USD", "{:,}"),
        ("Rs {:.2f}", "{}"),
        ("{:.4f}", "{}.0"),
        ("{:e}", "{:e}"),
        ("{:.2f}", "{:.3f}K"),
    ],
)
def test_numbers_with_thousands_currencies_and_units(file, price, volume):
    def row(d, o, h, low, c, v):
        unit = v / 1000 if volume.endswith("K") else v
        return ",".join(f'"{x}"' for x in (d, *(price.format(x) for x in (o, h, low, c)), volume.format(unit)))

    path = file("AAPL.csv", "\n".join(["Date,Open,High,Low,Close,Volume", *(row(*bar) for bar in BARS)]))
    assert told(path).refusal is None, told(path).refusal
    assert is_the_sample(stored(path))


@pytest.mark.parametrize("separator", [";", "\t", ","])
@pytest.mark.parametrize("thousands", [".", " ", "\u00a0", "\u202f", "'", ""])
def test_decimal_commas(file, separator, thousands):
    def number(value):
        return f"{value:,.2f}".replace(",", "T").replace(".", ",").replace("T", thousands)

    rows = [
        separator.join(
            f'"{x}"' for x in (f"{d:%d.%m.%Y}", *map(number, (o * 1000, h * 1000, low * 1000, c * 1000)), number(v))
        )
        for d, o, h, low, c, v in BARS
    ]
    path = file("AAPL.csv", "\n".join([separator.join(["Date", "Open", "High", "Low", "Close", "Volume"]), *rows]))
    found = told(path)
    assert found.refusal is None, found.refusal
    assert found.decimal == ","
    assert is_the_sample([bar | {k: bar[k] / 1000 for k in ("open", "high", "low", "close")} for bar in stored(path)])


def test_numbers_of_two_readings_are_refused_and_read_where_the_mark_is_said(file):
    bars = [(d, "1,100", "1,300", "1,000", "1,200", "5") for d in DAYS]
    path = file("AAPL.csv", csv(row="{d};{o};{h};{l};{c};{v}", head="Date;Open;High;Low;Close;Volume", bars=bars))
    assert "--decimal" in told(path).refusal
    assert stored(path, decimal=",")[0]["close"] == 1.2
    assert stored(path, decimal=".")[0]["close"] == 1200


def test_a_point_before_three_digits_between_semicolons_is_refused_unless_another_number_shows_the_mark(file):
    head, row = "Datum;Open;High;Low;Close", "{d};18.{v:.3};18.{v:.3};18.{v:.3};18.{v:.3}"
    bars = [(day, 0, 0, 0, 0, str(volume)) for day, *_, volume in BARS]
    path = file("DAX.csv", csv(head, row, bars))
    assert "18.100 can be read with a decimal point and with a point between thousands" in told(path).refusal
    assert [bar["close"] for bar in stored(path, decimal=",")][:2] == [18100, 18200]
    assert [bar["close"] for bar in stored(path, decimal=".")][:2] == [18.1, 18.2]
    other = file("DAX2.csv", csv(head, row, bars) + "2024-11-04;18.5;18.5;18.5;18.5\n")
    assert stored(other)[0]["close"] == 18.1
    assert stored(file("USDJPY.csv", csv(head, row, bars).replace(";", ",")))[0]["close"] == 18.1


@pytest.mark.parametrize("nothing", ["", "-", "--", "N/A", "null", "NaN", "None"])
def test_no_volume_is_null_and_not_zero(file, nothing):
    path = file("AAPL.csv", csv(bars=[(*bar[:5], nothing) for bar in BARS]))
    assert is_the_sample(stored(path), [None] * 10)


def test_a_file_without_a_column_for_the_volume_has_none(file):
    assert is_the_sample(stored(file("A.csv", csv("Date,Open,High,Low,Close", "{d},{o},{h},{l},{c}"))), [None] * 10)


@pytest.mark.parametrize("volume", [0.2, 0.84755, 1e-8, 123456789.123, 5e12])
def test_a_volume_keeps_its_fraction(file, volume):
    assert stored(file("AAPL.csv", csv(bars=[(*bar[:5], volume) for bar in BARS])))[0]["volume"] == volume


def test_several_symbols_without_a_known_column_are_refused(file):
    rows = [(d, o * k, h * k, low * k, c * k, f"{v},{k}") for k in (1, 2) for d, o, h, low, c, v in BARS]
    path = file("AAPL.csv", csv("Date,Open,High,Low,Close,Volume,Firm", bars=rows))
    assert "second bar of the day" in told(path).refusal
    assert [bar["symbol"] for bar in stored(path, columns={"symbol": "Firm"})] == ["1"] * 10 + ["2"] * 10


def test_columns_are_named_by_the_user_by_name_and_by_number(file):
    named = file("A.csv", csv("Tag,Auf,Spitze,Boden,Zu,Menge"))
    columns = {"date": "Tag", "open": "Auf", "high": "Spitze", "low": "Boden", "close": "Zu", "volume": "Menge"}
    assert "none of its first lines names columns such as date, open" in told(named).refusal
    assert is_the_sample(stored(named, columns=columns))
    numbered = file("B.csv", csv(None))
    numbers = {"date": "1", "open": "2", "high": "3", "low": "4", "close": "5", "volume": "6"}
    assert is_the_sample(stored(numbered, columns=numbers))
    assert is_the_sample(stored(named, columns=numbers))
    assert "'Preis'" in told(named, columns=columns | {"close": "Preis"}).refusal


def test_a_users_own_entry_is_recognised_before_those_of_the_catalogue(file):
    own = [
        {
            "name": "broker",
            "header": ["Tag", "Zu"],
            "columns": {
                "date": "Tag",
                "open": "Auf",
                "high": "Spitze",
                "low": "Boden",
                "close": "Zu",
                "volume": "Menge",
            },
            "dates": "D/M/Y",
            "volume_factor": 100,
        }
    ]
    bars = [(f"{d:%d/%m/%Y}", *rest, v // 100) for d, *rest, v in BARS]
    path = file("A.csv", csv("Tag,Auf,Spitze,Boden,Zu,Menge", bars=bars))
    assert told(path, formats=own).format == "broker"
    assert is_the_sample(stored(path, formats=own), [v // 100 * 100 for v in VOLUME])


def test_an_entry_of_file_names_says_more_of_what_another_entry_recognises(file):
    own = [{"name": "tokyo", "files": ["tokyo/*.csv"], "zone": "Asia/Tokyo"}]
    stamps = [(f"{d - timedelta(1)}T15:00:00Z", *rest) for d, *rest in BARS]
    assert is_the_sample(stored(file("tokyo/A.csv", csv(bars=stamps)), formats=own))
    assert "--zone" in told(file("other/A.csv", csv(bars=stamps)), formats=own).refusal


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("x", "a mapping with a name"),
        ({"name": ""}, "a mapping with a name"),
        ({"name": "x", "colour": "red"}, "unknown key 'colour'"),
        ({"name": "x", "zone": "Mars/Olympus"}, "zone is 'Mars/Olympus'"),
        ({"name": "x", "decimal": "x"}, "decimal is 'x'"),
        ({"name": "x", "dates": "Y/D/M"}, "dates is 'Y/D/M'"),
        ({"name": "x", "day_starts": "25:00"}, "day_starts is '25:00'"),
        ({"name": "x", "symbol": "("}, "symbol is '('"),
        ({"name": "x", "symbol": "(a)"}, "symbol is"),
        ({"name": "x", "columns": {"price": "P"}}, "columns names 'price'"),
        ({"name": "x", "fields": ["date", "price"]}, "fields names 'price'"),
        ({"name": "x", "volume_factor": 0}, "volume_factor is 0"),
        ({"name": "x", "encoding": "klingon"}, "encoding is 'klingon'"),
        ({"name": "x", "wide": "yes"}, "wide is 'yes'"),
        ({"name": "yahoo", "header": ["a"]}, "is taken"),
        ({"name": "x", "header": 5.5}, "header is 5.5"),
        ({"name": "x", "period": {"column": "P"}}, "period is"),
    ],
)
def test_an_entry_that_cannot_be_is_refused_in_one_sentence(entry, says):
    with pytest.raises(ConfigError) as caught:
        catalogue.load([entry])
    assert says in caught.value.message
    assert "\n" not in caught.value.message
