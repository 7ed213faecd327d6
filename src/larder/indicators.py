"""The 42 features of the six daily views, each defined in one line (docs/features.md describes them).

Every function takes a symbol's whole history, oldest bar first, and gives one float64 per bar: NaN where the history is
still too short or where the definition divides by zero. TA-Lib's recursive indicators (EMA, RSI, ATR, MACD) depend on
where a history starts, but forget it: `larder compute` reads the newest part of a long history (MEMORY).
"""

from collections.abc import Callable, Mapping
from functools import cached_property

import numpy as np
import numpy.typing as npt
import talib
from numpy.lib.stride_tricks import sliding_window_view

Array = npt.NDArray[np.float64]

TRADING_DAYS = 252


class Bars:
    """A symbol's history and what several features share. Prices and volume as float64, free of NaN."""

    def __init__(self, columns: Mapping[str, npt.ArrayLike]) -> None:
        def column(name: str) -> Array:
            return np.ascontiguousarray(columns[name], dtype=np.float64)

        self.open, self.high, self.low, self.close = map(column, ("open", "high", "low", "close"))
        self.volume, self.adjusted_close = map(column, ("volume", "adjusted_close"))

    @cached_property
    def typical(self) -> Array:
        return (self.high + self.low + self.close) / 3

    @cached_property
    def growth(self) -> Array:
        """C / C[t-1]."""
        return ratio(self.close, previous(self.close))

    @cached_property
    def log_return(self) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log(self.growth)

    @cached_property
    def macd(self) -> tuple[Array, Array, Array]:
        line, signal, histogram = talib.MACD(self.close, 12, 26, 9)
        return line, signal, histogram

    @cached_property
    def stoch(self) -> tuple[Array, Array]:
        k, d = talib.STOCH(self.high, self.low, self.close, 14, 3, talib.MA_Type.SMA, 3, talib.MA_Type.SMA)
        return k, d

    @cached_property
    def std_20(self) -> Array:
        """STDDEV(C, 20, 1), each window by itself: TA-Lib's running sums of squares cancel where prices hardly move."""
        return windowed(self.close, 20, lambda w: w.std(axis=1))

    @cached_property
    def hist_volatility_20(self) -> Array:
        with np.errstate(invalid="ignore"):
            return windowed(self.log_return, 20, lambda w: w.std(axis=1, ddof=1) * np.sqrt(TRADING_DAYS))

    @cached_property
    def sma_20(self) -> Array:
        return np.asarray(talib.SMA(self.close, 20))

    @cached_property
    def volume_sma_20(self) -> Array:
        return np.asarray(talib.SMA(self.volume, 20))


def previous(values: Array) -> Array:
    """The value of the bar before, NaN for the first."""
    return np.concatenate(([np.nan], values[:-1]))


def ratio(numerator: Array, denominator: Array) -> Array:
    """NaN where the denominator is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(denominator == 0, np.nan, numerator / denominator)


def windowed(values: Array, length: int, function: Callable[[Array], Array]) -> Array:
    """`function` of (n, length) windows of the last `length` values, one result per window; NaN until one is full."""
    result = np.full(len(values), np.nan)
    if len(values) >= length:
        result[length - 1 :] = function(sliding_window_view(values, length))
    return result


def window_sum(values: Array, length: int) -> Array:
    return windowed(values, length, lambda w: w.sum(axis=1))


def engulfing(b: Bars) -> Array:
    """CDLENGULFING as -100, 0, 100, NaN for the first two bars.

    TA-Lib puts zeros where it has seen too few bars, and since 0.6 says 80 where one end of the two bodies is the same.
    """
    result = 100 * np.sign(np.asarray(talib.CDLENGULFING(b.open, b.high, b.low, b.close), dtype=np.float64))
    result[:2] = np.nan
    return result


# fmt: off
VIEWS: dict[str, dict[str, Callable[[Bars], Array]]] = {
    "ohlcv_features": {
        "open":               lambda b: b.open,
        "high":               lambda b: b.high,
        "low":                lambda b: b.low,
        "close":              lambda b: b.close,
        "volume":             lambda b: b.volume,
        "adjusted_close":     lambda b: b.adjusted_close,
        "typical_price":      lambda b: b.typical,
    },
    "technical_indicators_ma": {
        "sma_5":              lambda b: talib.SMA(b.close, 5),
        "sma_10":             lambda b: talib.SMA(b.close, 10),
        "sma_20":             lambda b: b.sma_20,
        "sma_50":             lambda b: talib.SMA(b.close, 50),
        "sma_200":            lambda b: talib.SMA(b.close, 200),
        "ema_12":             lambda b: talib.EMA(b.close, 12),
        "ema_26":             lambda b: talib.EMA(b.close, 26),
        "ema_50":             lambda b: talib.EMA(b.close, 50),
    },
    "technical_indicators_momentum": {
        "rsi_14":             lambda b: talib.RSI(b.close, 14),
        "macd":               lambda b: b.macd[0],
        "macd_signal":        lambda b: b.macd[1],
        "macd_histogram":     lambda b: b.macd[2],
        "stoch_k":            lambda b: b.stoch[0],
        "stoch_d":            lambda b: b.stoch[1],
        "roc_10":             lambda b: talib.ROC(b.close, 10),
    },
    "technical_indicators_volatility": {
        "atr_14":             lambda b: talib.ATR(b.high, b.low, b.close, 14),
        "bb_upper":           lambda b: b.sma_20 + 2 * b.std_20,
        "bb_middle":          lambda b: b.sma_20,
        "bb_lower":           lambda b: b.sma_20 - 2 * b.std_20,
        "bb_width":           lambda b: ratio(4 * b.std_20, b.sma_20),
        "std_20":             lambda b: b.std_20,
        "hist_volatility_20": lambda b: b.hist_volatility_20,
    },
    "volume_indicators": {
        "volume_sma_20":      lambda b: b.volume_sma_20,
        "volume_ratio":       lambda b: ratio(b.volume, b.volume_sma_20),
        "obv":                lambda b: talib.OBV(b.close, b.volume),
        "vwap":               lambda b: ratio(window_sum(b.typical * b.volume, 20), window_sum(b.volume, 20)),
        "mfi_14":             lambda b: talib.MFI(b.high, b.low, b.close, b.volume, 14),
    },
    "price_action": {
        "daily_return":       lambda b: b.growth - 1,
        "log_return":         lambda b: b.log_return,
        "price_range":        lambda b: b.high - b.low,
        "body_size":          lambda b: np.abs(b.close - b.open),
        "upper_shadow":       lambda b: b.high - np.maximum(b.open, b.close),
        "lower_shadow":       lambda b: np.minimum(b.open, b.close) - b.low,
        "is_green_candle":    lambda b: np.where(b.close > b.open, 1.0, 0.0),
        "cdl_engulfing":      engulfing,
    },
}
# fmt: on

INTEGERS = frozenset({"volume", "is_green_candle", "cdl_engulfing"})
# The bars before the first changed one that `larder compute` reads. EMA 50 forgets last: e^-50 of where a history began
# is left. A feature that looks farther back needs more.
MEMORY = 1250
# View and features that are sums from the first bar on: a part of a history gives them but for the sum before it.
TOTALS = ("volume_indicators", ("obv",))


def compute(view: str, bars: Bars) -> dict[str, Array]:
    """The features of one view for each bar; NaN (never an infinity) where there is no value."""
    results = {}
    for name, function in VIEWS[view].items():
        values = function(bars)
        results[name] = np.where(np.isfinite(values), values, np.nan)
    return results
