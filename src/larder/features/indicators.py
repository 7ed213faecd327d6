"""The 42 features of the six daily views, each defined in one line (docs/features.md describes them).

Every function takes a symbol's whole history, oldest bar first, and gives one float64 per bar: NaN where the history is
still too short, where the definition divides by zero, and where it needs a volume that is not known. TA-Lib's recursive
indicators (EMA, RSI, ATR, MACD) depend on where a history starts, but forget it: `larder compute` reads the newest part
of a long history (MEMORY).
"""

from collections.abc import Callable, Mapping
from functools import cached_property

import numpy as np
import numpy.typing as npt
import talib
from numpy.lib.stride_tricks import sliding_window_view

from larder.features.definitions import ADJUSTED, AS_LOADED

Array = npt.NDArray[np.float64]

TRADING_DAYS = 252
COLUMNS = ("open", "high", "low", "close", "adjusted_close", "volume")


class Bars:
    """A symbol's history and what several features share: float64, free of NaN but for volumes that are not known.

    `raw` are the bars as loaded. The other prices are what indicators are computed from: as loaded too, or, with
    ADJUSTED, each bar's times adjusted_close / close. The volume is never adjusted.
    """

    def __init__(self, columns: Mapping[str, npt.ArrayLike], prices: str = AS_LOADED) -> None:
        self.raw = {name: np.ascontiguousarray(columns[name], dtype=np.float64) for name in COLUMNS}
        self.open, self.high, self.low, self.close, adjusted_close, self.volume = self.raw.values()
        if prices == ADJUSTED:
            factor = ratio(adjusted_close, self.close)
            factor[np.isnan(factor)] = 1.0
            self.open, self.high, self.low, self.close = (
                price * factor for price in (self.open, self.high, self.low, self.close)
            )

    @cached_property
    def typical(self) -> Array:
        return typical(self.high, self.low, self.close)

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
        """SMA(V, 20), each window by itself: a NaN in TA-Lib's running sum would stay there for ever."""
        return windowed(self.volume, 20, lambda w: w.mean(axis=1))

    @cached_property
    def obv_steps(self) -> Array:
        """What each bar adds to OBV: V where the close rose and for the first bar, -V where it fell."""
        rose = np.sign(self.close - previous(self.close))
        rose[:1] = 1
        return rose * self.volume

    @cached_property
    def mfi_14(self) -> Array:
        """MFI(H, L, C, V, 14): 100 times the flow of rising bars over the flow of all; 0 where there is none.

        TA-Lib's running sums would keep a NaN, and give 0 wherever the flow is below 1, as it is for small volumes.
        """
        flow = np.sign(self.typical - previous(self.typical)) * self.typical * self.volume
        total = window_sum(np.abs(flow), 14)
        return np.where(total == 0, 0.0, 100 * ratio(window_sum(np.maximum(flow, 0), 14), total))


def typical(high: Array, low: Array, close: Array) -> Array:
    return (high + low + close) / 3


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


def total(steps: Array, before: float = 0.0) -> Array:
    """The sum of all steps up to each one, added in their order to `before`; NaN, and nothing added, at a NaN."""
    known = np.isfinite(steps)
    sums = np.cumsum(np.concatenate(([before], np.where(known, steps, 0.0))))[1:]
    return np.where(known, sums, np.nan)


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
        "open":               lambda b: b.raw["open"],
        "high":               lambda b: b.raw["high"],
        "low":                lambda b: b.raw["low"],
        "close":              lambda b: b.raw["close"],
        "volume":             lambda b: b.volume,
        "adjusted_close":     lambda b: b.raw["adjusted_close"],
        "typical_price":      lambda b: typical(b.raw["high"], b.raw["low"], b.raw["close"]),
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
        "obv":                lambda b: total(b.obv_steps),
        "vwap":               lambda b: ratio(window_sum(b.typical * b.volume, 20), window_sum(b.volume, 20)),
        "mfi_14":             lambda b: b.mfi_14,
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

INTEGERS = frozenset({"is_green_candle", "cdl_engulfing"})
# The bars before the first changed one that `larder compute` reads. EMA 50 forgets last: e^-50 of where a history began
# is left. A feature that looks farther back needs more.
MEMORY = 1250
# View and features that are sums from the first bar on, each with its steps: a part of a history gives them from a sum
# before it on.
TOTALS: tuple[str, dict[str, Callable[[Bars], Array]]] = ("volume_indicators", {"obv": lambda b: b.obv_steps})


def compute(view: str, bars: Bars) -> dict[str, Array]:
    """The features of one view for each bar; NaN (never an infinity) where there is no value."""
    results = {}
    for name, function in VIEWS[view].items():
        values = function(bars)
        results[name] = np.where(np.isfinite(values), values, np.nan)
    return results
