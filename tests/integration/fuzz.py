"""Files of bars, and what may become of them: samples of several vendors' formats, and mutations of their bytes.

A mutation either leaves every number that still stands in the file as it was, or makes it none at all: whatever of the
file is then stored has to be a bar of the sample. Those for which that cannot be said are marked as loose.
"""

import bz2
import gzip
import io
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta

import pyarrow as pa
import pyarrow.parquet as pq

Bar = tuple[float, float, float, float, float]  # open, high, low, close, volume
BARS = 60


@dataclass
class File:
    """A file as it is written. bars: those of the sample. exact: nothing else may be stored of it."""

    name: str
    content: bytes
    symbol: str
    bars: dict[date, Bar]
    mutation: str
    exact: bool


def bars_of(chance: random.Random) -> dict[date, Bar]:
    days = [date(2024, 1, 1) + timedelta(days=n) for n in range(BARS * 7 // 5 + 3)]
    bars, close = {}, chance.uniform(20, 300)
    for day in [day for day in days if day.weekday() < 5][:BARS]:
        opened, close = close, max(5, close * chance.uniform(0.97, 1.03))
        high, low = max(opened, close) + chance.uniform(0.01, 1), min(opened, close) - chance.uniform(0.01, 1)
        bars[day] = (
            *(float(f"{price:.2f}") for price in (opened, high, low, close)),
            float(chance.randrange(1000, 10**6)),
        )
    return bars


# --- samples: the lines of a text, or the bytes of a file ---


def plain(symbol: str, bars: dict[date, Bar]) -> tuple[str, list[str]]:
    return f"{symbol}.csv", [
        "Date,Open,High,Low,Close,Volume",
        *(f"{day},{o:.2f},{h:.2f},{lo:.2f},{c:.2f},{v:.0f}" for day, (o, h, lo, c, v) in bars.items()),
    ]


def yahoo(symbol: str, bars: dict[date, Bar]) -> tuple[str, list[str]]:
    return f"{symbol}.csv", [
        "Date,Open,High,Low,Close,Adj Close,Volume",
        *(f"{day},{o:.2f},{h:.2f},{lo:.2f},{c:.2f},{c:.2f},{v:.0f}" for day, (o, h, lo, c, v) in bars.items()),
    ]


def german(symbol: str, bars: dict[date, Bar]) -> tuple[str, list[str]]:
    return f"{symbol}.csv", [
        "Datum;Erster;Hoch;Tief;Schlusskurs;Volumen",
        *(
            ";".join([f"{day:%d.%m.%Y}", *(f"{price:.2f}".replace(".", ",") for price in (o, h, lo, c)), f"{v:.0f}"])
            for day, (o, h, lo, c, v) in bars.items()
        ),
    ]


def metatrader5(symbol: str, bars: dict[date, Bar]) -> tuple[str, list[str]]:
    return f"{symbol}_Daily_202401010000_202404010000.csv", [
        "<DATE>\t<OPEN>\t<HIGH>\t<LOW>\t<CLOSE>\t<TICKVOL>\t<VOL>\t<SPREAD>",
        *(
            f"{day:%Y.%m.%d}\t{o:.2f}\t{h:.2f}\t{lo:.2f}\t{c:.2f}\t{v:.0f}\t0\t12"
            for day, (o, h, lo, c, v) in bars.items()
        ),
    ]


def metatrader4(symbol: str, bars: dict[date, Bar]) -> tuple[str, list[str]]:
    return f"{symbol}1440.csv", [
        f"{day:%Y.%m.%d},00:00,{o:.2f},{h:.2f},{lo:.2f},{c:.2f},{v:.0f}" for day, (o, h, lo, c, v) in bars.items()
    ]


def stooq(symbol: str, bars: dict[date, Bar]) -> tuple[str, list[str]]:
    return f"{symbol.lower()}.us.txt", [
        "<TICKER>,<PER>,<DATE>,<TIME>,<OPEN>,<HIGH>,<LOW>,<CLOSE>,<VOL>,<OPENINT>",
        *(
            f"{symbol},D,{day:%Y%m%d},000000,{o:.2f},{h:.2f},{lo:.2f},{c:.2f},{v:.0f},0"
            for day, (o, h, lo, c, v) in bars.items()
        ),
    ]


def binance(symbol: str, bars: dict[date, Bar]) -> tuple[str, list[str]]:
    def ms(day: date) -> int:
        return (day - date(1970, 1, 1)).days * 86_400_000

    return f"{symbol}-1d-2024-01.csv", [
        f"{ms(day)},{o:.2f},{h:.2f},{lo:.2f},{c:.2f},{v:.2f},{ms(day) + 86_399_999},1.0,100,1.0,1.0,0"
        for day, (o, h, lo, c, v) in bars.items()
    ]


TEXTS = (plain, yahoo, german, metatrader5, metatrader4, stooq, binance)


def parquet(bars: dict[date, Bar]) -> bytes:
    columns = dict(zip(("open", "high", "low", "close", "volume"), zip(*bars.values(), strict=True), strict=True))
    sink = io.BytesIO()
    pq.write_table(pa.table({"date": list(bars), **{name: list(v) for name, v in columns.items()}}), sink)
    return sink.getvalue()


def packed(chance: random.Random, name: str, content: bytes) -> tuple[str, bytes]:
    how = chance.choice(["gz", "bz2", "zip"])
    if how == "gz":
        return f"{name}.gz", gzip.compress(content, mtime=0)
    if how == "bz2":
        return f"{name}.bz2", bz2.compress(content)
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return name.rsplit(".", 1)[0] + ".zip", sink.getvalue()


# --- mutations of lines ---

Lines = list[str]
JUNK = ("?", "~", "#", "\x00", "\x1b[2J", "\ufffd", "€€", '"', "\u202e", "🙂", "\x7f")
NO_NUMBERS = (
    "",
    "-",
    "abc",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "0",
    "-5",
    "1.2.3",
    "0x10",
    "null",
    "=A1",
    "NaN%",
    "9" * 400,
)
NO_DATES = ("", "0001-01-01", "9999-12-31", "31/02/2024", "2024-13-45", "yesterday", "99999999999999999999", "-1", "0")


def _some(chance: random.Random, lines: Lines) -> list[int]:
    return sorted(chance.sample(range(1, len(lines)), chance.choice([1, 1, 2, 5, len(lines) // 2])))


def _separator(lines: Lines) -> str:
    return next(mark for mark in ("\t", ";", ",") if mark in lines[-1])


def no_lines(chance: random.Random, lines: Lines) -> Lines:
    gone = set(_some(chance, lines))
    return [line for n, line in enumerate(lines) if n not in gone]


def twice(chance: random.Random, lines: Lines) -> Lines:
    return [line for n, line in enumerate(lines) for _ in range(1 + (n in set(_some(chance, lines))))]


def shuffled(chance: random.Random, lines: Lines) -> Lines:
    body = lines[1:]
    chance.shuffle(body)
    return [lines[0], *body]


def no_header(_chance: random.Random, lines: Lines) -> Lines:
    return lines[1:]


def header_again(chance: random.Random, lines: Lines) -> Lines:
    at = chance.randrange(1, len(lines))
    return [*lines[:at], lines[0], *lines[at:]]


def junk_in_numbers(chance: random.Random, lines: Lines) -> Lines:
    for n in _some(chance, lines):
        cells = lines[n].split(_separator(lines))
        cell = chance.randrange(len(cells))
        at = chance.randrange(1, len(cells[cell])) if len(cells[cell]) > 1 else 0
        cells[cell] = cells[cell][:at] + chance.choice(JUNK) + cells[cell][at:]
        lines[n] = _separator(lines).join(cells)
    return lines


def no_numbers(chance: random.Random, lines: Lines) -> Lines:
    """Of the prices alone: a volume may be missing, or 0."""
    separator = _separator(lines)
    columns = len(lines[-1].split(separator))
    first = {6: 1, 7: 1, 8: 1, 10: 4, 12: 1}[columns] + (":" in lines[-1].split(separator)[1])
    for n in _some(chance, lines):
        cells = lines[n].split(separator)
        cells[first + chance.randrange(4)] = chance.choice(NO_NUMBERS)
        lines[n] = separator.join(cells)
    return lines


def no_dates(chance: random.Random, lines: Lines) -> Lines:
    separator = _separator(lines)
    column = 2 if len(lines[-1].split(separator)) == 10 else 0
    for n in _some(chance, lines):
        cells = lines[n].split(separator)
        cells[column] = chance.choice(NO_DATES)
        lines[n] = separator.join(cells)
    return lines


def other_columns(chance: random.Random, lines: Lines) -> Lines:
    """Lines with a cell too few or too many; never without the last one alone, which may be the volume's end."""
    separator = _separator(lines)
    for n in _some(chance, lines):
        cells = lines[n].split(separator)
        lines[n] = separator.join(cells[: chance.randrange(len(cells) - 1)] if chance.random() < 0.5 else [*cells, "7"])
    return lines


def junk_lines(chance: random.Random, lines: Lines) -> Lines:
    for _ in range(chance.choice([1, 3, 40])):
        junk = "".join(chance.choice("abc ,;\t#?\"'\x00🙂") for _ in range(chance.choice([0, 5, 5000])))
        lines.insert(chance.randrange(len(lines)), junk)
    return lines


def title(_chance: random.Random, lines: Lines) -> Lines:
    return ["Prices, made for a test", "", *lines]


def cut(chance: random.Random, lines: Lines) -> Lines:
    """The end is missing, from somewhere before the last cell of a line on."""
    at = chance.randrange(1, len(lines))
    last = lines[at].split(_separator(lines))
    return [*lines[:at], _separator(lines).join(last[: chance.randrange(len(last) - 1)])]


LINES: tuple[Callable[[random.Random, Lines], Lines], ...] = (
    *(no_lines, twice, shuffled, no_header, header_again, junk_in_numbers, no_numbers, no_dates, other_columns),
    *(junk_lines, title, cut),
)


# --- mutations of bytes; loose ones: a digit may have become another ---


def flipped(chance: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 4, 64])):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def shortened(chance: random.Random, content: bytes) -> bytes:
    return content[: chance.randrange(len(content))]


def spliced(chance: random.Random, content: bytes) -> bytes:
    at, size = chance.randrange(len(content)), chance.choice([1, 100, 4096])
    return content[:at] + chance.randbytes(size) + content[at + chance.choice([0, size]) :]


LOOSE: tuple[Callable[[random.Random, bytes], bytes], ...] = (flipped, shortened, spliced)


def nothing_of_the_kind(chance: random.Random) -> tuple[str, bytes]:
    return chance.choice(
        [
            ("empty.csv", b""),
            ("blank.csv", b"\n" * chance.randrange(1, 5000)),
            ("random.csv", chance.randbytes(chance.randrange(1, 20_000))),
            ("nul.csv", b"\0" * 5000),
            ("page.csv", b"<!DOCTYPE html><html><body>Not found</body></html>"),
            ("some.json", b'{"bars": [[1, 2, 3]]}'),
            ("deep.json", b"[" * 100_000),
            ("photo.png", b"\x89PNG\r\n\x1a\n" + chance.randbytes(500)),
            ("one_line.csv", b"Date,Open,High,Low,Close,Volume"),
            ("long.csv", b"a" * 3_000_000),
            ("commas.csv", b"," * 100_000 + b"\n" + b"1," * 100_000),
            ("quotes.csv", b'Date,Open,High,Low,Close,Volume\n"' + b"2024-01-02,1,2,1,2,3\n" * 5000),
            ("notes.txt", b"buy low, sell high\n"),
            ("par1.parquet", b"PAR1" + chance.randbytes(300) + b"PAR1"),
            ("zip.zip", b"PK\x03\x04" + chance.randbytes(300)),
            ("gz.csv.gz", b"\x1f\x8b\x08\x00" + chance.randbytes(300)),
        ]
    )


def file_of(number: int, seed: int) -> File:
    """File `number` of a folder; every tenth is a sample as it is."""
    chance = random.Random(seed * 1_000_003 + number)
    symbol, bars = f"F{number:05}", bars_of(chance)
    if number % 10 == 1:
        name, content = nothing_of_the_kind(chance)
        return File(f"{symbol}-{name}", content, symbol, {}, "nothing of the kind", exact=True)
    if chance.random() < 0.15:
        name, content, exact, mutation = f"{symbol}.parquet", parquet(bars), True, "none"
        if number % 10:
            change = chance.choice(LOOSE)
            content, exact, mutation = change(chance, content), False, change.__name__
        return File(name, content, symbol, bars, mutation, exact)
    name, lines = chance.choice(TEXTS)(symbol, bars)
    if name.endswith(".txt"):
        symbol = lines[1].split(",")[0]
    exact, mutation = True, "none"
    if number % 10 and chance.random() < 0.8:
        line_change = chance.choice(LINES)
        lines, mutation = line_change(chance, lines), line_change.__name__
    encoding = chance.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16"])
    content = (ends := chance.choice(["\n", "\r\n", "\r"])).join([*lines, ""]).encode(encoding)
    mutation += f", {encoding}, {ends!r}"
    if chance.random() < 0.3:
        name, content = packed(chance, name, content)
        mutation += f", {name.rsplit('.', 1)[1]}"
        if number % 10 and chance.random() < 0.5:  # a checksum tells
            change = chance.choice(LOOSE)
            content, mutation = change(chance, content), f"{mutation}, {change.__name__}"
    elif number % 10 and chance.random() < 0.2:
        change = chance.choice(LOOSE)
        content, exact, mutation = change(chance, content), False, f"{mutation}, {change.__name__}"
    return File(name, content, symbol, bars, mutation, exact)
