"""What the stack promises about its features, asked as clients ask; the answers are computed anew from the raw bars."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import oracle
import pytest
from clients import Gateway, History, Row, Served, Trainer

SYMBOLS = ["EURUSD", "GOOG.US", "NASDAQ", "SP500"]
OFFLINE_TTL = timedelta(days=730)
# The features that one bar alone gives.
OF_THE_FIRST_BAR = {
    *oracle.VIEWS["ohlcv_features"],
    *("obv", "price_range", "body_size", "upper_shadow", "lower_shadow", "is_green_candle"),
}
# Value and event time of a missing row. Its status is PRESENT: Feast's Redis store cannot tell (0.67).
NOTHING = (None, datetime.fromtimestamp(0, UTC))
PUSHED = ["GOOG.US", "PUSHED.ONLY"]
# Prints the status of a POST that is refused.
ASK = """
import ssl, sys, urllib.error, urllib.request
url, header, body, authority = sys.argv[1:]
try:
    request = urllib.request.Request(url, body.encode(), {"Authorization": header} if header else {})
    trusted = ssl.create_default_context(cadata=authority)
    print(urllib.request.urlopen(request, timeout=10, context=trusted).read().decode())
except urllib.error.HTTPError as error:
    print(error.code)
"""

each_symbol = pytest.mark.parametrize("symbol", SYMBOLS)


def differences(expected: Row, actual: Row) -> Row:
    """Return (expected, actual) of the features that are not the same number; NaN, or no row at all, is null."""

    def equal(name: str) -> bool:
        value, answer = expected[name], actual[name]
        if math.isnan(value) or answer is None:
            return math.isnan(value) and answer is None
        return math.isclose(answer, value, rel_tol=1e-7 if name in oracle.WITH_STANDARD_DEVIATION else 1e-9)

    assert expected.keys() == actual.keys()
    return {name: (expected[name], actual[name]) for name in expected if not equal(name)}


def instants(bars: oracle.Bars) -> list[datetime]:
    """Bars where values begin, bars from all of the history, and instants between, before and after bars."""
    dates = bars.dates
    chosen = {*dates[:40], *dates[47:52], *dates[197:202], *dates[200::97], dates[-1]}
    between = [dates[150] + timedelta(hours=13), dates[-1] + OFFLINE_TTL]
    nothing_known = [dates[0] - timedelta(seconds=1), dates[-1] + OFFLINE_TTL + timedelta(seconds=1)]
    return sorted([*chosen, *between, *nothing_known])


def change(quotes: dict[str, list[Any]], place: int) -> float:
    """Return (close - open) / open in per cent."""
    return (quotes["close"][place] - quotes["open"][place]) / quotes["open"][place] * 100


def newest_bar(bars: oracle.Bars, instant: datetime) -> int | None:
    """Return the place of the bar that is known at an instant and not yet too old."""
    place = bisect_right(bars.dates, instant) - 1
    return place if place >= 0 and instant - bars.dates[place] <= OFFLINE_TTL else None


@pytest.fixture(scope="module")
def computed(bars: dict[str, oracle.Bars]) -> dict[str, dict[str, oracle.Series]]:
    assert sorted(bars) == SYMBOLS
    return {symbol: oracle.features(bars[symbol]) for symbol in SYMBOLS}


@pytest.fixture(scope="module")
def served(gateway: Gateway) -> dict[str, dict[str, Served]]:
    return gateway.read(SYMBOLS, features=oracle.REFERENCES)


@pytest.fixture(scope="module")
def history(trainer: Trainer, bars: dict[str, oracle.Bars]) -> History:
    entities = [(symbol, instant) for symbol in SYMBOLS for instant in instants(bars[symbol])]
    return trainer.read(oracle.REFERENCES, entities)


@pytest.fixture(scope="module")
def quotes(gateway: Gateway) -> dict[str, list[Any]]:
    """Push a quote of a symbol that has bars and of one that has none."""
    now = datetime.now(UTC).replace(microsecond=0).isoformat()
    frame = {
        "symbol": PUSHED,
        "event_timestamp": [now, now],
        "open": [800.0, 12.5],
        "high": [815.75, 12.75],
        "low": [799.5, 11.0],
        "close": [812.2, 11.1],
        "volume": [3_000_000_001, 0.25],
        "bid": [812.1, 11.05],
        "ask": [812.3, 11.15],
        "spread": [0.2, 0.1],
        "created": [now, now],
    }
    push = {"push_source_name": "market_data_push_source", "df": frame, "to": "online_and_offline"}
    status, answer = gateway.post("/push", push, role="writer")
    assert status == 200, answer
    return frame


@each_symbol
def test_the_gateway_serves_every_feature_as_computed_from_the_raw_bars(symbol, served, computed):
    newest = {name: series[-1] for name, series in computed[symbol].items()}
    assert differences(newest, {name: feature.value for name, feature in served[symbol].items()}) == {}


@each_symbol
def test_every_served_feature_is_of_the_newest_bar(symbol, served, bars):
    newest = bars[symbol].dates[-1]
    known = {(feature.status, feature.event_timestamp) for feature in served[symbol].values()}
    assert known == {("PRESENT", newest)}


def test_only_integer_features_are_served_as_integers(served):
    for features in served.values():
        integers = {name for name, feature in features.items() if isinstance(feature.value, int)}
        assert integers == oracle.INTEGERS


@each_symbol
def test_history_has_every_feature_as_computed_from_the_raw_bars(symbol, history, bars, computed):
    wrong = {}
    for instant in instants(bars[symbol]):
        place = newest_bar(bars[symbol], instant)
        expected = {name: math.nan if place is None else series[place] for name, series in computed[symbol].items()}
        wrong[instant] = differences(expected, history[symbol, instant])
    assert {instant: features for instant, features in wrong.items() if features} == {}


@each_symbol
def test_on_a_first_bar_only_features_of_one_bar_are_not_null(symbol, history, bars):
    first = history[symbol, bars[symbol].dates[0]]
    assert {name for name, value in first.items() if value is not None} == OF_THE_FIRST_BAR


@each_symbol
def test_history_is_known_from_the_first_bar_until_two_years_after_the_last(symbol, history, bars):
    dates = bars[symbol].dates
    second = timedelta(seconds=1)
    assert history[symbol, dates[-1] + OFFLINE_TTL] == history[symbol, dates[-1]]
    for instant in [dates[0] - second, dates[-1] + OFFLINE_TTL + second]:
        assert set(history[symbol, instant].values()) == {None}


@each_symbol
def test_training_and_serving_agree_to_the_last_bit(symbol, served, history, bars):
    trained = history[symbol, bars[symbol].dates[-1]]
    assert {name: feature.value for name, feature in served[symbol].items()} == trained


@pytest.mark.parametrize(
    ("host", "asks"),
    [
        ("server1", "systemctl show --property=Environment feature-server@1"),
        ("server1", "systemctl show --property=Environment push-server@1"),
        ("pipeline1", "systemctl show --property=Environment feature-pipeline"),
        ("pipeline1", "systemd-run --quiet --wait --collect --pipe --unit=feast-environment env"),
    ],
)
def test_python_runs_with_the_optimization_of_its_bytecode(host_named, host, asks):
    # Without -O, an import takes four times as long, and Feast checks types at each call.
    host = host_named(host)
    with host.sudo():
        assert "PYTHONOPTIMIZE=1" in host.check_output(asks)


@pytest.fixture(scope="module")
def bars_without_volume(host_named, bars):
    """Store EURUSD under two more names: without any volume, and without that of 30 bars and of the last 3."""
    eurusd = bars["EURUSD"]
    last = len(eurusd.dates)
    gaps = {*range(170, 200), *range(last - 3, last)}
    several = {
        "NO.VOLUME": replace(eurusd, volume=[math.nan] * last),
        "GAPS": replace(eurusd, volume=[math.nan if i in gaps else v for i, v in enumerate(eurusd.volume)]),
    }
    pipeline = host_named("pipeline1")
    with pipeline.sudo():
        for symbol, some in several.items():
            lines = ["Date,Open,High,Low,Close,Adj Close,Volume"]
            for date, *prices, volume in zip(
                some.dates, some.open, some.high, some.low, some.close, some.adjusted_close, some.volume, strict=True
            ):
                cells = [*map(repr, prices), "" if math.isnan(volume) else repr(volume)]
                lines.append(",".join([f"{date:%Y-%m-%d}", *cells]))
            pipeline.check_output(
                f"install --mode=644 /dev/stdin /var/lib/larder/incoming/{symbol}.csv <<'BARS'\n"
                + "\n".join(lines)
                + "\nBARS"
            )
        pipeline.check_output("systemctl start feature-pipeline.service")
    return several


def test_without_a_volume_prices_are_served_and_volume_features_are_null(gateway, trainer, bars_without_volume):
    served = gateway.read(list(bars_without_volume), features=oracle.REFERENCES)
    history = trainer.read(
        oracle.REFERENCES, [(symbol, instant) for symbol, some in bars_without_volume.items() for instant in some.dates]
    )
    of_volume = {"volume", *oracle.VIEWS["volume_indicators"]}
    for symbol, some in bars_without_volume.items():
        computed = oracle.features(some)
        for place, instant in enumerate(some.dates):
            expected = {name: series[place] for name, series in computed.items()}
            assert differences(expected, history[symbol, instant]) == {}, (symbol, instant)
        newest = {name: feature.value for name, feature in served[symbol].items()}
        assert newest == history[symbol, some.dates[-1]]
        assert {name for name, value in newest.items() if value is None} == of_volume
        assert {(f.status, f.event_timestamp) for f in served[symbol].values()} == {("PRESENT", some.dates[-1])}
    # The day before the last gap: no window of it holds the first one.
    recovered = history["GAPS", bars_without_volume["GAPS"].dates[-4]]
    assert None not in recovered.values()


def test_an_unknown_symbol_is_null_and_the_others_are_served(gateway, served):
    answer = gateway.read(["NO.SUCH", "EURUSD"], features=oracle.REFERENCES)
    assert {(feature.value, feature.event_timestamp) for feature in answer["NO.SUCH"].values()} == {NOTHING}
    assert answer["EURUSD"] == served["EURUSD"]


def test_an_unknown_feature_is_a_client_error(gateway):
    for feature in ["ohlcv_features:no_such", "no_such_view:close"]:
        status, _ = gateway.post("/get-online-features", {"features": [feature], "entities": {"symbol": ["EURUSD"]}})
        assert 400 <= status < 500


@pytest.mark.parametrize("authorization", ["", "Bearer ", "Bearer wrong", "Basic cmVhZGVyOg=="])
def test_a_client_without_a_token_is_refused(host_named, gateway, authorization):
    body = json.dumps({"features": oracle.REFERENCES, "entities": {"symbol": SYMBOLS}})
    for path in ["/get-online-features", "/push", "/materialize", "/docs", "/health", "/"]:
        request = (gateway.url + path, authorization, body, gateway.authority)
        assert host_named("stranger").check_output("python3 -c %s %s %s %s %s", ASK, *request) == "401", path


def test_a_reader_may_not_push(gateway):
    push = {"push_source_name": "market_data_push_source", "df": {}, "to": "online"}
    status, _ = gateway.post("/push", push, role="reader")
    assert status == 403


def test_a_pushed_quote_is_served_at_once(gateway, quotes):
    answer = gateway.read(PUSHED, feature_service="trading_signals")
    for place, symbol in enumerate(PUSHED):
        assert answer[symbol].keys() == {"close", "volume", "spread"}
        for name, feature in answer[symbol].items():
            pushed = Served(quotes[name][place], "PRESENT", datetime.fromisoformat(quotes["event_timestamp"][place]))
            assert feature == pushed


def test_price_change_is_computed_when_it_is_read(gateway, quotes):
    answer = gateway.read(PUSHED, features=["price_change:price_change_pct"])
    for place, symbol in enumerate(PUSHED):
        assert answer[symbol]["price_change_pct"].value == pytest.approx(change(quotes, place), rel=1e-9)


@pytest.mark.usefixtures("quotes")
def test_a_pushed_quote_changes_no_daily_feature(gateway, served):
    answer = gateway.read(PUSHED, features=oracle.REFERENCES)
    assert answer["GOOG.US"] == served["GOOG.US"]
    assert {(feature.value, feature.event_timestamp) for feature in answer["PUSHED.ONLY"].values()} == {NOTHING}


def test_a_pushed_quote_is_a_row_of_the_offline_store(host_named, quotes):
    instant = quotes["event_timestamp"][0]
    query = f"SELECT json_agg(q ORDER BY symbol) FROM market_data.quotes q WHERE event_timestamp = '{instant}'"
    psql = "psql --no-psqlrc --quiet --tuples-only --no-align --dbname=feast --command=%s"
    database = host_named("database1")
    with database.sudo("postgres"):
        rows = json.loads(database.check_output(psql, query))
    for row in rows:
        row |= {name: datetime.fromisoformat(row[name]).isoformat() for name in ("event_timestamp", "created")}
    assert rows == [{name: values[place] for name, values in quotes.items()} for place in range(len(PUSHED))]


def test_models_can_be_trained_with_a_pushed_quote(trainer, quotes):
    names = ["open", "high", "low", "close", "volume", "bid", "ask", "spread"]
    references = [*(f"market_features:{name}" for name in names), "price_change:price_change_pct"]
    instant = datetime.fromisoformat(quotes["event_timestamp"][0])
    rows = trainer.read(references, [(symbol, instant) for symbol in PUSHED])
    for place, symbol in enumerate(PUSHED):
        row = rows[symbol, instant]
        assert {name: row[name] for name in names} == {name: quotes[name][place] for name in names}
        assert row["price_change_pct"] == pytest.approx(change(quotes, place), rel=1e-9)
