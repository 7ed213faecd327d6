"""The features of feature_repo: 42 against their definitions, written here once more without TA-Lib; all by rule."""

import math
from pathlib import Path
from statistics import fmean, pstdev, stdev

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from larder.features.formulas import PRICES, Formulas

REPO = Path(__file__).parents[2] / "feature_repo"
FORMULAS = {prices: Formulas(REPO, prices) for prices in PRICES}
DEFINITIONS = FORMULAS["close"].definitions
SOURCE = DEFINITIONS.sources["market_data.ohlcv_daily"]
VIEWS = {view.name: view for view in DEFINITIONS.views}
OF_VOLUME = ("volume_sma_20", "volume_ratio", "obv", "vwap", "mfi_14")
STANDARD_DEVIATION = {"bb_upper", "bb_lower", "bb_width", "std_20", "hist_volatility_20"}


VOLUME = ["volume", *OF_VOLUME]


def compute(view, bars, prices="close"):
    return FORMULAS[prices].of(SOURCE, bars).features(VIEWS[view])


def history(n, seed=1):
    random = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(random.normal(0, 0.02, n)))
    open_ = close * np.exp(random.normal(0, 0.01, n))
    return {
        "open": open_,
        "high": np.maximum(open_, close) * (1 + random.uniform(0, 0.01, n)),
        "low": np.minimum(open_, close) * (1 - random.uniform(0, 0.01, n)),
        "close": close,
        "adjusted_close": close / 2,
        "volume": random.integers(0, 10**7, n) / 1000,
    }


def with_gaps(bars, *gaps):
    """The bars without the volumes of these places or slices."""
    volume = np.array(bars["volume"], dtype=float)
    for gap in gaps:
        volume[gap] = np.nan
    return bars | {"volume": volume}


def sma(values, n):
    windows = [values[max(i + 1 - n, 0) : i + 1] for i in range(len(values))]
    return [None if len(w) < n or None in w else fmean(w) for w in windows]


def ema(values, n, start=0):
    """Seeded with the mean of the first n values from `start` on."""
    result = [None] * len(values)
    if len(values) < start + n:
        return result
    value = result[start + n - 1] = fmean(values[start : start + n])
    for i in range(start + n, len(values)):
        value = result[i] = value + (values[i] - value) * 2 / (n + 1)
    return result


def wilder(values, n):
    """Smoothed from the second value on: the first has no predecessor."""
    result = [None] * len(values)
    if len(values) <= n:
        return result
    value = result[n] = fmean(values[1 : n + 1])
    for i in range(n + 1, len(values)):
        value = result[i] = (value * (n - 1) + values[i]) / n
    return result


def each(function, *columns):
    return [None if None in row else function(*row) for row in zip(*columns, strict=True)]


def divide(a, b):
    return None if b == 0 else a / b


def expected(bars):
    o, h, l, c = (list(map(float, bars[k])) for k in ("open", "high", "low", "close"))  # noqa: E741 - as in the specification
    v = [None if math.isnan(x) else float(x) for x in bars["volume"]]
    n = len(c)
    typical = [(h[i] + l[i] + c[i]) / 3 for i in range(n)]

    def last(values, length, i):
        return values[i + 1 - length : i + 1]

    def window(length, function):
        return [None if i + 1 < length else function(i) for i in range(n)]

    out = {name: list(map(float, bars[name])) for name in ("open", "high", "low", "close", "adjusted_close")}
    out["volume"], out["typical_price"] = v, typical
    out |= {f"sma_{k}": sma(c, k) for k in (5, 10, 20, 50, 200)}
    out |= {f"ema_{k}": ema(c, k) for k in (12, 26, 50)}

    change = [0.0, *(c[i] - c[i - 1] for i in range(1, n))]
    up, down = wilder([max(x, 0) for x in change], 14), wilder([max(-x, 0) for x in change], 14)
    out["rsi_14"] = each(lambda a, b: 0.0 if a + b == 0 else 100 * a / (a + b), up, down)

    # TA-Lib starts both averages so that their first values fall on the same bar, and shows nothing before the signal.
    macd = each(lambda a, b: a - b, ema(c, 12, start=14), ema(c, 26))
    signal = [None] * 25 + ema(macd[25:], 9) if n > 25 else [None] * n
    out["macd"] = each(lambda m, _: m, macd, signal)
    out["macd_signal"] = signal
    out["macd_histogram"] = each(lambda m, s: m - s, macd, signal)

    fast = window(14, lambda i: (c[i] - min(last(l, 14, i)), max(last(h, 14, i)) - min(last(l, 14, i))))
    fast = each(lambda p: 0.0 if p[1] == 0 else 100 * p[0] / p[1], fast)
    k = [None] * 13 + sma(fast[13:], 3) if n > 13 else [None] * n
    d = [None] * 15 + sma(k[15:], 3) if n > 15 else [None] * n
    out["stoch_k"], out["stoch_d"] = each(lambda a, _: a, k, d), d
    out["roc_10"] = [None if i < 10 else 100 * (c[i] / c[i - 10] - 1) for i in range(n)]

    true_range = [0.0, *(max(h[i], c[i - 1]) - min(l[i], c[i - 1]) for i in range(1, n))]
    out["atr_14"] = wilder(true_range, 14)
    deviation = window(20, lambda i: pstdev(last(c, 20, i)))
    middle = sma(c, 20)
    out["bb_middle"], out["std_20"] = middle, deviation
    out["bb_upper"] = each(lambda m, s: m + 2 * s, middle, deviation)
    out["bb_lower"] = each(lambda m, s: m - 2 * s, middle, deviation)
    out["bb_width"] = each(lambda a, b, m: divide(a - b, m), out["bb_upper"], out["bb_lower"], middle)
    log_return = [None, *(math.log(c[i] / c[i - 1]) for i in range(1, n))]
    out["hist_volatility_20"] = [None if i < 20 else stdev(last(log_return, 20, i)) * math.sqrt(252) for i in range(n)]

    out["volume_sma_20"] = sma(v, 20)
    out["volume_ratio"] = each(divide, v, out["volume_sma_20"])
    sign = [1, *((c[i] > c[i - 1]) - (c[i] < c[i - 1]) for i in range(1, n))]
    so_far, out["obv"] = 0.0, []
    for i in range(n):
        so_far += sign[i] * (v[i] or 0)
        out["obv"].append(None if v[i] is None else so_far)
    flow = each(lambda t, x: t * x, typical, v)

    def sums(columns, length, i):
        """The sum of each column's last values; None where one of them is."""
        windows = [last(values, length, i) for values in columns]
        return None if any(None in w for w in windows) else [math.fsum(w) for w in windows]

    out["vwap"] = each(lambda s: divide(*s), window(20, lambda i: sums((flow, v), 20, i)))
    up = [None, *(typical[i] > typical[i - 1] for i in range(1, n))]
    down = [None, *(typical[i] < typical[i - 1] for i in range(1, n))]
    money = [each(lambda a, x: a * x, way, flow) for way in (up, down)]
    money = window(14, lambda i: sums(money, 14, i))
    out["mfi_14"] = each(lambda s: 0.0 if sum(s) == 0 else 100 * s[0] / sum(s), money)

    out["daily_return"] = [None, *(c[i] / c[i - 1] - 1 for i in range(1, n))]
    out["log_return"] = log_return
    out["price_range"] = [h[i] - l[i] for i in range(n)]
    out["body_size"] = [abs(c[i] - o[i]) for i in range(n)]
    out["upper_shadow"] = [h[i] - max(o[i], c[i]) for i in range(n)]
    out["lower_shadow"] = [min(o[i], c[i]) - l[i] for i in range(n)]
    out["is_green_candle"] = [1 if c[i] > o[i] else 0 for i in range(n)]
    out["cdl_engulfing"] = [None if i < 2 else engulfing(o, c, i) for i in range(n)]
    return out


def engulfing(o, c, i):
    """The body of the bar holds the one before, of the other colour; one end may be the same."""
    if c[i] >= o[i] and c[i - 1] < o[i - 1]:
        ends = (c[i] - o[i - 1], c[i - 1] - o[i])
        sign = 1
    elif c[i] < o[i] and c[i - 1] >= o[i - 1]:
        ends = (o[i] - c[i - 1], o[i - 1] - c[i])
        sign = -1
    else:
        return 0
    return 100 * sign if min(ends) >= 0 and max(ends) > 0 else 0


# A feature that is added needs no definition here; `larder apply` tries it by the rules that no formula may break.
WRITTEN_TWICE = expected(history(60)).keys()
FEATURES = {f.name: name for name, view in VIEWS.items() for f in view.features if f.name in WRITTEN_TWICE}


def check(bars, name):
    actual = compute(FEATURES[name], bars)[name]
    wanted = np.array([np.nan if x is None else x for x in expected(bars)[name]], dtype=float)
    assert np.array_equal(np.isnan(actual), np.isnan(wanted)), "NULL where the other has a value"
    np.testing.assert_allclose(actual, wanted, rtol=1e-9, atol=1e-9 * max(bars["close"]) if name != "obv" else 0)


def test_the_42_features_are_there_and_each_has_its_definition():
    assert len(FEATURES) == len(WRITTEN_TWICE) == 42
    assert {view: sum(name == view for name in FEATURES.values()) for view in VIEWS} == {
        "ohlcv_features": 7,
        "technical_indicators_ma": 8,
        "technical_indicators_momentum": 7,
        "technical_indicators_volatility": 7,
        "volume_indicators": 5,
        "price_action": 8,
    }


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("bars", [1, 2, 3, 14, 15, 20, 21, 34, 300])
def test_feature_equals_its_definition(name, bars):
    check(history(bars, seed=bars), name)


@pytest.mark.parametrize("name", FEATURES)
def test_feature_of_prices_that_never_move_and_volumes_of_zero(name):
    n = 60
    bars = {k: np.full(n, 123.456) for k in ("open", "high", "low", "close", "adjusted_close")} | {
        "volume": np.zeros(n)
    }
    check(bars, name)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize(
    "gaps", [[slice(None)], [0], [-1], [60], [slice(0, 30)], [slice(100, 140), 170, slice(250, 300)]]
)
def test_feature_of_bars_without_a_volume(name, gaps):
    bars = history(300, seed=len(gaps))
    check(with_gaps(bars, *gaps), name)
    if name not in VOLUME:
        np.testing.assert_array_equal(
            *(compute(FEATURES[name], b)[name] for b in (bars, with_gaps(bars, *gaps))), err_msg=name
        )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 120), st.integers(0, 2**32 - 1), st.sets(st.integers(0, 119)))
def test_volume_features_are_null_at_a_gap_and_recover_within_their_window(n, seed, gaps):
    bars = with_gaps(history(n, seed), [gap for gap in gaps if gap < n])
    missing = np.isnan(bars["volume"])
    for name in VOLUME:
        check(bars, name)
        known = ~np.isnan(compute(FEATURES[name], bars)[name])
        assert not known[missing].any(), name
        for i in range(20, n):
            assert known[i] or missing[i - 19 : i + 1].any(), (name, i)


@pytest.mark.parametrize("name", VOLUME)
@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_volume_may_be_a_fraction(name, size):
    bars = history(80)
    bars["volume"] *= size
    check(bars, name)
    if name == "mfi_14":
        assert compute("volume_indicators", bars)[name][-1] > 0


@pytest.mark.parametrize("name", sorted(STANDARD_DEVIATION))
def test_standard_deviation_where_prices_hardly_move(name):
    bars = history(400)
    for k in ("open", "high", "low", "close", "adjusted_close"):
        bars[k] = 1e5 + bars[k] * 1e-4
    actual = compute(FEATURES[name], bars)[name]
    wanted = np.array([np.nan if x is None else x for x in expected(bars)[name]], dtype=float)
    np.testing.assert_allclose(actual, wanted, rtol=1e-7)


def test_an_engulfing_bar_may_open_where_the_last_one_closed():
    bars = {"open": [10, 10, 9, 9], "close": [10, 9, 11, 8], "high": [12] * 4, "low": [7] * 4}
    bars |= {"adjusted_close": bars["close"], "volume": [1] * 4}
    assert list(compute("price_action", bars)["cdl_engulfing"][2:]) == [100, 0]


def test_a_price_of_zero_gives_no_infinity():
    bars = history(60)
    for k in ("open", "high", "low", "close"):
        bars[k][30] = 0
    for view in VIEWS:
        for name, values in compute(view, bars).items():
            assert not np.isinf(values).any(), name


@pytest.mark.parametrize("name", [*FEATURES])
def test_prices_as_loaded_are_the_default(name):
    bars = history(260)
    bars["adjusted_close"] = bars["close"] / 7
    check(bars, name)


@pytest.mark.parametrize("name", FEATURES)
def test_a_split_is_no_crash_where_indicators_are_of_adjusted_prices(name):
    """Ten for one at bar 130, dividends besides: all is as if prices had been so ever since, but for the bar itself."""
    adjusted = history(300)
    factor = np.where(np.arange(300) < 130, 0.1, 1.0) * (1 - 0.01 * (np.arange(300) < 200))
    adjusted["adjusted_close"] = adjusted["close"]
    loaded = adjusted | {k: adjusted[k] / factor for k in ("open", "high", "low", "close")}
    wanted = np.array([np.nan if x is None else x for x in expected(adjusted)[name]], dtype=float)
    if FEATURES[name] == "ohlcv_features":
        wanted = np.array(expected(loaded)[name], dtype=float)
    actual = compute(FEATURES[name], loaded, "adjusted_close")[name]
    np.testing.assert_allclose(actual, wanted, rtol=1e-7, atol=1e-9 * max(adjusted["close"]))


def test_a_close_of_zero_is_not_adjusted():
    bars = history(60)
    for k in ("open", "high", "low", "close"):
        bars[k][30] = 0
    sma = compute("technical_indicators_ma", bars, "adjusted_close")["sma_5"]
    assert np.isfinite(sma[4:]).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 260), st.integers(0, 2**32 - 1), st.sets(st.integers(0, 259)), st.data())
def test_later_bars_change_no_earlier_value(n, seed, gaps, data):
    bars = with_gaps(history(n, seed), [gap for gap in gaps if gap < n])
    cut = data.draw(st.integers(1, n))
    for view in VIEWS:
        whole, part = compute(view, bars), compute(view, {k: v[:cut] for k, v in bars.items()})
        for name in whole:
            np.testing.assert_array_equal(whole[name][:cut], part[name], err_msg=name)


def test_every_formula_keeps_the_rules():
    """`larder apply` tries them: no later row changes a value, and `rows_before` rows are enough for one."""
    for formulas in FORMULAS.values():
        formulas.try_out()
