"""Write real daily bars as CSV, one file per symbol, re-dated so that the newest bar is the last business day.

    python real_bars.py PACKAGES OUT [--today YYYY-MM-DD]

PACKAGES is a directory that holds the packages ``arch`` and ``backtesting``; OUT gets GOOG.US.csv, EURUSD.csv (hourly
bars made daily), SP500.csv and NASDAQ.csv. The same day gives the same files.
"""

from __future__ import annotations

import argparse
import csv
import gzip
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

COLUMNS = ("Date", "Open", "High", "Low", "Close", "Adj Close", "Volume")


class Bar(NamedTuple):
    open: float
    high: float
    low: float
    close: float
    adjusted_close: float
    volume: float


def read(path: Path) -> Iterator[tuple[str, Bar]]:
    """Yield (time as written, bar) of a CSV file whose first column is the time."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open(newline="") as file:
        for row in csv.DictReader(file):
            time = next(iter(row.values()))
            yield (
                time,
                Bar(
                    open=float(row["Open"]),
                    high=float(row["High"]),
                    low=float(row["Low"]),
                    close=float(row["Close"]),
                    adjusted_close=float(row.get("Adj Close", row["Close"])),
                    volume=float(row["Volume"]),
                ),
            )


def daily(bars: Iterator[tuple[str, Bar]]) -> Iterator[Bar]:
    """Make one bar of each day's bars; daily bars stay as they are."""
    for _, group in groupby(bars, key=lambda timed: timed[0].split(" ")[0]):
        day = [bar for _, bar in group]
        yield Bar(
            open=day[0].open,
            high=max(bar.high for bar in day),
            low=min(bar.low for bar in day),
            close=day[-1].close,
            adjusted_close=day[-1].adjusted_close,
            volume=sum(bar.volume for bar in day),
        )


def business_days_until(last: date) -> Iterator[date]:
    """Yield the business days before ``last``, newest first."""
    day = last
    while True:
        day -= timedelta(days=1)
        if day.weekday() < 5:
            yield day


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--today", type=date.fromisoformat, default=datetime.now(UTC).date())
    arguments = parser.parse_args()
    sources = {
        "GOOG.US": arguments.packages / "backtesting/test/GOOG.csv",
        "EURUSD": arguments.packages / "backtesting/test/EURUSD.csv",
        "SP500": arguments.packages / "arch/data/sp500/sp500.csv.gz",
        "NASDAQ": arguments.packages / "arch/data/nasdaq/nasdaq.csv.gz",
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    for symbol, source in sources.items():
        bars = list(daily(read(source)))
        dates = sorted(day for day, _ in zip(business_days_until(arguments.today), bars, strict=False))
        with (arguments.out / f"{symbol}.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows((day.isoformat(), *bar) for day, bar in zip(dates, bars, strict=True))


if __name__ == "__main__":
    main()
