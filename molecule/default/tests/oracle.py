"""The 42 daily features, computed a second time: from the bars' CSV alone, by the published definitions.

This module shares nothing with src/larder and needs neither TA-Lib nor numpy. Every window is summed anew with
`math.fsum`, so that no value carries the rounding of the bars before it. A feature is a list with one value per bar,
NaN where the history is too short and where a volume that it needs is not known. What TA-Lib fixes beyond the textbook
(seeds, alignment, ties) is said where it matters.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate, pairwise
from pathlib import Path

Series = list[float]
NAN = math.nan

VIEWS = {
    "ohlcv_features": ["open", "high", "low", "close", "volume", "adjusted_close", "typical_price"],
    "technical_indicators_ma": ["sma_5", "sma_10", "sma_20", "sma_50", "sma_200", "ema_12", "ema_26", "ema_50"],
    "technical_indicators_momentum": [
        *("rsi_14", "macd", "macd_signal", "macd_histogram", "stoch_k", "stoch_d", "roc_10"),
    ],
    "technical_indicators_volatility": [
        *("atr_14", "bb_upper", "bb_middle", "bb_lower", "bb_width", "std_20", "hist_volatility_20"),
    ],
    "volume_indicators": ["volume_sma_20", "volume_ratio", "obv", "vwap", "mfi_14"],
    "price_action": [
        *("daily_return", "log_return", "price_range", "body_size", "upper_shadow", "lower_shadow"),
        *("is_green_candle", "cdl_engulfing"),
    ],
}
REFERENCES = [f"{view}:{name}" for view, names in VIEWS.items() for name in names]
INTEGERS = {"is_green_candle", "cdl_engulfing"}
WITH_STANDARD_DEVIATION = {"bb_upper", "bb_lower", "bb_width", "std_20", "hist_volatility_20"}


@dataclass(frozen=True)
class Bars:
    """A symbol's history in the order of its dates; the volume is NaN where it is not known."""

    dates: list[datetime]
    open: Series
    high: Series
    low: Series
    close: Series
    adjusted_close: Series
    volume: Series


def read_bars(path: Path) -> Bars:
    """Read Date,Open,High,Low,Close,Adj Close,Volume; a bar's time is its date at 00:00 UTC."""
    with path.open(newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["Date"])
    columns = ("Open", "High", "Low", "Close", "Adj Close", "Volume")
    dates = [datetime.fromisoformat(row["Date"]).replace(tzinfo=UTC) for row in rows]
    return Bars(dates, *([float(row[column] or "nan") for row in rows] for column in columns))


def rolling(function: Callable[[Series], float], n: int, x: Series) -> Series:
    """function(x[t-n+1..t])"""
    return [function(x[t - n + 1 : t + 1]) if t >= n - 1 else NAN for t in range(len(x))]


def ratio(a: Series, b: Series) -> Series:
    """a[t] / b[t], NaN where b[t] = 0"""
    return [p / q if q else NAN for p, q in zip(a, b, strict=True)]


def before(x: Series, n: int = 1) -> Series:
    """x[t-n]"""
    return [NAN] * min(n, len(x)) + x[: max(len(x) - n, 0)]


def mean(x: Series) -> float:
    return math.fsum(x) / len(x)


def deviation(x: Series, lost: int = 0) -> float:
    """sqrt(sum (x[i] - mean)^2 / (n - lost)): of the population, or with lost = 1 of a sample"""
    center = mean(x)
    return math.sqrt(math.fsum((value - center) ** 2 for value in x) / (len(x) - lost))


def sma(x: Series, n: int) -> Series:
    return rolling(mean, n, x)


def smoothed(x: Series, n: int, weight: float, start: int) -> Series:
    """s[t] = s[t-1] + weight (x[t] - s[t-1]); the first is the mean of the n values from x[start] on."""
    first = start + n - 1
    if len(x) <= first:
        return [NAN] * len(x)
    steps = accumulate(x[first + 1 :], lambda s, value: s + weight * (value - s), initial=mean(x[start : first + 1]))
    return [NAN] * first + list(steps)


def ema(x: Series, n: int, start: int = 0) -> Series:
    """Exponential moving average, weight 2 / (n + 1)."""
    return smoothed(x, n, 2 / (n + 1), start)


def wilder(x: Series, n: int) -> Series:
    """Wilder's average, weight 1 / n, of a series that begins with the second bar."""
    return smoothed(x, n, 1 / n, start=1)


def rsi(close: Series, n: int = 14) -> Series:
    """100 G / (G + L): Wilder's averages of the gains and the losses; 0 where nothing ever moved."""
    changes = [0.0, *(now - last for last, now in pairwise(close))]
    gains = wilder([max(change, 0.0) for change in changes], n)
    losses = wilder([max(-change, 0.0) for change in changes], n)
    return [100 * gain / (gain + loss) if gain + loss else 0.0 for gain, loss in zip(gains, losses, strict=True)]


def macd(close: Series) -> tuple[Series, Series, Series]:
    """EMA 12 - EMA 26, its EMA 9, the difference of the two.

    Both EMAs begin at the 26th bar: the faster is seeded with bars 15 to 26. All three lines begin with the signal.
    """
    line = [fast - slow for fast, slow in zip(ema(close, 12, start=14), ema(close, 26), strict=True)]
    signal = ema(line, 9, start=25)
    histogram = [m - s for m, s in zip(line, signal, strict=True)]
    return [m if s == s else NAN for m, s in zip(line, signal, strict=True)], signal, histogram


def same(a: float, b: float) -> bool:
    """Whether two prices differ by rounding alone, by TA-Lib's measure."""
    return abs(a - b) <= 1e-14 * (abs(a) + abs(b))


def stochastic(high: Series, low: Series, close: Series) -> tuple[Series, Series]:
    """K = SMA 3 of 100 (C - lowest) / (highest - lowest) of 14 bars, 0 where these are the same; D = SMA 3 of K.

    Both begin with D.
    """
    bands = zip(rolling(max, 14, high), rolling(min, 14, low), close, strict=True)
    fast = [0.0 if same(top, bottom) else 100 * (c - bottom) / (top - bottom) for top, bottom, c in bands]
    k = sma(fast, 3)
    d = sma(k, 3)
    return [a if b == b else NAN for a, b in zip(k, d, strict=True)], d


def atr(high: Series, low: Series, close: Series, n: int = 14) -> Series:
    """Wilder's average of the true range max(H, C[t-1]) - min(L, C[t-1]), which the first bar lacks."""
    bars = zip(high[1:], low[1:], close[:-1], strict=True)
    return wilder([NAN, *(max(top, last) - min(bottom, last) for top, bottom, last in bars)], n)


def obv(close: Series, volume: Series) -> Series:
    """On-balance volume: the first bar's volume, then plus V where C rose and minus V where it fell.

    A bar whose volume is not known has none, and adds nothing.
    """
    signs = [1, *((now > last) - (now < last) for last, now in pairwise(close))]
    sums = accumulate(sign * v if v == v else 0.0 for sign, v in zip(signs, volume, strict=True))
    return [so_far if v == v else NAN for so_far, v in zip(sums, volume, strict=True)]


def mfi(typical: Series, volume: Series, n: int = 14) -> Series:
    """100 P / (P + N): sums over n bars of typical * V where typical rose (P) and where it fell (N); 0 without any.

    TA-Lib also says 0 where the sums are below 1, which they are where the volume is small.
    """
    rising, falling = [NAN], [NAN]
    for (last, now), v in zip(pairwise(typical), volume[1:], strict=True):
        flow = 0.0 if same(last, now) else now * v
        rising.append(flow if now > last else 0.0 * v)
        falling.append(flow if now < last else 0.0 * v)
    sums = zip(rolling(math.fsum, n, rising), rolling(math.fsum, n, falling), strict=True)
    return [100 * p / (p + q) if p + q else 0.0 for p, q in sums]


def engulfing(open_: Series, close: Series) -> Series:
    """100 where a white body engulfs the black one before it, -100 where a black one engulfs a white one, else 0.

    White is C >= O. The bodies may share one end but not both; TA-Lib's 80 and -80 for that are 100 and -100 here.
    TA-Lib answers from the third bar on.
    """

    def pattern(o1: float, c1: float, o2: float, c2: float) -> float:
        white, was_white = c2 >= o2, c1 >= o1
        inner, outer = sorted((o1, c1)), sorted((o2, c2))
        if white == was_white or inner == outer or outer[0] > inner[0] or outer[1] < inner[1]:
            return 0.0
        return 100.0 if white else -100.0

    bodies = list(zip(open_, close, strict=True))
    return [NAN, NAN, *(pattern(*bodies[t - 1], *bodies[t]) for t in range(2, len(bodies)))][: len(bodies)]


def features(bars: Bars) -> dict[str, Series]:
    """All 42 features by name."""
    o, h, low, c, v = bars.open, bars.high, bars.low, bars.close, bars.volume
    typical = [math.fsum(prices) / 3 for prices in zip(h, low, c, strict=True)]
    growth = ratio(c, before(c))
    log_return = [math.log(g) if g > 0 else NAN for g in growth]
    macd_line, macd_signal, macd_histogram = macd(c)
    stoch_k, stoch_d = stochastic(h, low, c)
    middle, std = sma(c, 20), rolling(deviation, 20, c)
    volume_sma = sma(v, 20)
    traded = [price * amount for price, amount in zip(typical, v, strict=True)]
    return {
        "open": o,
        "high": h,
        "low": low,
        "close": c,
        "volume": v,
        "adjusted_close": bars.adjusted_close,
        "typical_price": typical,
        **{f"sma_{n}": sma(c, n) for n in (5, 10, 20, 50, 200)},
        **{f"ema_{n}": ema(c, n) for n in (12, 26, 50)},
        "rsi_14": rsi(c),
        "macd": macd_line,
        "macd_signal": macd_signal,
        "macd_histogram": macd_histogram,
        "stoch_k": stoch_k,
        "stoch_d": stoch_d,
        "roc_10": [100 * (g - 1) for g in ratio(c, before(c, 10))],
        "atr_14": atr(h, low, c),
        "bb_upper": [m + 2 * s for m, s in zip(middle, std, strict=True)],
        "bb_middle": middle,
        "bb_lower": [m - 2 * s for m, s in zip(middle, std, strict=True)],
        "bb_width": ratio([4 * s for s in std], middle),
        "std_20": std,
        "hist_volatility_20": [
            s * math.sqrt(252) for s in rolling(lambda window: deviation(window, lost=1), 20, log_return)
        ],
        "volume_sma_20": volume_sma,
        "volume_ratio": ratio(v, volume_sma),
        "obv": obv(c, v),
        "vwap": ratio(rolling(math.fsum, 20, traded), rolling(math.fsum, 20, v)),
        "mfi_14": mfi(typical, v),
        "daily_return": [g - 1 for g in growth],
        "log_return": log_return,
        "price_range": [top - bottom for top, bottom in zip(h, low, strict=True)],
        "body_size": [abs(last - first) for first, last in zip(o, c, strict=True)],
        "upper_shadow": [top - max(body) for top, *body in zip(h, o, c, strict=True)],
        "lower_shadow": [min(body) - bottom for bottom, *body in zip(low, o, c, strict=True)],
        "is_green_candle": [float(last > first) for first, last in zip(o, c, strict=True)],
        "cdl_engulfing": engulfing(o, c),
    }
