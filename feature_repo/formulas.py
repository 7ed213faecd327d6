"""What the formulas of computed_views.yml call, beside NumPy (np) and TA-Lib (talib).

Every function takes and gives float64 arrays of one value per bar, oldest bar first: NaN where the history is still too
short, where the definition divides by zero, and where it needs a volume that is not known.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import talib
from numpy.lib.stride_tricks import sliding_window_view

Array = npt.NDArray[np.float64]


def adjustment(bar: SimpleNamespace, indicator_prices: str) -> Array:
    """What each bar's prices are multiplied by: 1, or adjusted_close / close where adjusted prices are asked for."""
    factor = np.ones(len(bar.close))
    if indicator_prices == "adjusted_close":
        np.divide(bar.adjusted_close, bar.close, out=factor, where=bar.close != 0)
    return factor


def previous(values: Array) -> Array:
    """The value of the bar before."""
    return np.concatenate(([np.nan], values[:-1]))


def ratio(numerator: Array, denominator: Array) -> Array:
    return np.where(denominator == 0, np.nan, numerator / denominator)


def rolling(function: Callable[..., Any], values: Array, length: int, **options: Any) -> Array:
    """A NumPy function of the last `length` values, each window by itself.

    TA-Lib's running sums keep a NaN for ever, and their squares cancel where prices hardly move.
    """
    result = np.full(len(values), np.nan)
    if len(values) >= length:
        result[length - 1 :] = function(sliding_window_view(values, length), axis=1, **options)
    return result


def signed_volume(close: Array, volume: Array) -> Array:
    """What each bar adds to OBV: V where the close rose and for the first bar, -V where it fell."""
    direction = np.sign(close - previous(close))
    direction[:1] = 1
    return direction * volume


def money_flow_index(typical: Array, volume: Array, length: int) -> Array:
    """100 times the flow of rising bars over the flow of all; 0 where there is none.

    TA-Lib gives 0 wherever the flow is below 1, as it is for small volumes.
    """
    flow = np.sign(typical - previous(typical)) * typical * volume
    total = rolling(np.sum, np.abs(flow), length)
    return np.where(total == 0, 0.0, 100 * ratio(rolling(np.sum, np.maximum(flow, 0), length), total))


def engulfing(open: Array, high: Array, low: Array, close: Array) -> Array:  # noqa: A002 # the bar's open
    """CDLENGULFING as -100, 0, 100, NaN for the first two bars.

    TA-Lib puts zeros where it has seen too few bars, and since 0.6 says 80 where one end of the two bodies is the same.
    """
    result = 100 * np.sign(np.asarray(talib.CDLENGULFING(open, high, low, close), dtype=np.float64))
    result[:2] = np.nan
    return result
