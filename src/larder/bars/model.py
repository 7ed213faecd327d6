"""What a user may say of a file, what a load gets from one, and what an inspection tells."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

PRICES = ("open", "high", "low", "close", "adjusted_close")
NUMBERS = (*PRICES, "volume")
# What stands beside a number, or a column's name, and changes neither.
CURRENCIES = "USDT?|EUR|GBP|JPY|CHF|CAD|AUD|NZD|CNY|HKD|SGD|INR|KRW|BRL|ZAR|SEK|NOK|PLN|BTC|ETH"
FIELDS = ("date", "time", *NUMBERS, "symbol")


@dataclass(frozen=True)
class Options:
    """What a user says of a file; where it is None, the file or its format decides.

    columns: field to column, by name or, where a file has no header line, by number ("1" is the first).
    zone: the market's zone; stamps that are instants become days there. day_starts: "17:00", on the evening before.
    max_rejected: the share of a file's bars above which the whole file is refused.
    formats: entries of the user's own, tried before the built-in ones.
    """

    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    symbol: str | None = None
    zone: str | None = None
    day_starts: str | None = None
    decimal: str | None = None
    dates: str | None = None
    encoding: str | None = None
    resample: bool = False
    first_day: date = date(1900, 1, 1)
    last_day: date | None = None  # None: tomorrow
    max_rejected: float = 0.05
    formats: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Batch:
    """Bars of one batch, in the file's order. No two bars of a file have the same symbol and day.

    good: symbol, event_timestamp (date32), the prices (float64), volume (float64, null where there is none).
    rejected: symbol, event_timestamp (null where unreadable), reason, bar (the bar's own text).
    """

    good: "pa.Table"
    rejected: "pa.Table"


@dataclass(frozen=True)
class Stored:
    """How a file's good bars compare with those that are stored; a load replaces those with other values."""

    new: int
    equal: int
    replaced: int
    first_replaced: date | None = None
    last_replaced: date | None = None
    symbols: Sequence[str] = ()  # of the replaced ones


@dataclass
class Inspection:
    """What a load of a file would do."""

    file: str
    refusal: str | None = None
    format: str | None = None
    why: str = ""
    encoding: str | None = None
    compression: str | None = None
    delimiter: str | None = None
    decimal: str | None = None
    dates: str | None = None
    zone: str | None = None
    timeframe: str | None = None
    symbols: list[str] = field(default_factory=list)
    symbol_count: int = 0
    first_day: date | None = None
    last_day: date | None = None
    weekdays: dict[str, int] = field(default_factory=dict)
    bars: int = 0
    rejected: int = 0
    left_out: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    head: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    stored: Stored | None = None  # where a database was asked

    def most_reasons(self) -> str:
        """The most frequent reasons of rejected bars, with how many."""
        return ", ".join(f"{reason} ({count:,})" for reason, count in Counter(self.reasons).most_common(3))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
