"""Drift is counted in the database as it is outside of it; a feature that moved is told, after as many days as said."""

import json
import os
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import psycopg
import pytest
from click.testing import CliRunner

from larder.bars.load import load
from larder.cli import main
from larder.features import definitions
from larder.features.compute import compute
from larder.features.formulas import Formulas
from larder.operations import checks, drift
from larder.operations.facts import State
from larder.quality import rules

pytestmark = pytest.mark.skipif(
    not os.environ.get("LARDER_TEST_POSTGRES"),
    reason="LARDER_TEST_POSTGRES names no server; the pipeline scenario does",
)
REPOSITORY = Path(__file__).parents[2] / "feature_repo"
DEFINED = definitions.read(REPOSITORY)
RULES = rules.read(REPOSITORY, DEFINED.features())
TODAY = date.today()  # noqa: DTZ011 # the day of the files, not of an instant
DAYS = 130
SYMBOLS = [f"{'US' if n % 2 else 'DE'}{n:02}" for n in range(40)]
RETURN = ("price_action", "daily_return", "")


def lines(symbol, seed, *, wild=0, days=DAYS):
    """A walk, the last days of which are four times as wild; of its own price level and volume."""
    random = np.random.default_rng(seed)
    deviation = np.full(days, 0.01)
    if wild:
        deviation[-wild:] = 0.04
    close = np.exp(random.uniform(1, 6) + np.cumsum(random.normal(0, deviation)))
    volume = np.exp(random.normal(10, 0.2, days))
    for n, (c, v) in enumerate(zip(map(float, close), map(float, volume), strict=True)):
        yield f"{symbol},{TODAY - timedelta(days - n)},{c * 0.995!r},{c * 1.01!r},{c * 0.99!r},{c!r},{v!r}"


def bring(url, path, **options):
    rows = (row for n, symbol in enumerate(SYMBOLS) for row in lines(symbol, n, **options))
    path.write_text("Symbol,Date,Open,High,Low,Close,Volume\n" + "\n".join(rows) + "\n")
    load(url, [path])
    compute(url, Formulas(REPOSITORY))


def ask(url, query, *parameters):
    with psycopg.connect(url, autocommit=True, options="-c timezone=UTC") as connection:
        return connection.execute(query, parameters).fetchall()


def judge(url, asked=RULES, defined=DEFINED, **options):
    with psycopg.connect(url, autocommit=True, options="-c timezone=UTC") as connection:
        return {(one.view, one.feature, one.symbols): one for one in drift.drift(connection, asked, defined, **options)}


def exact_ks(one, other):
    """The distance of the two empirical distributions, at every value."""
    at = np.sort(np.concatenate((one, other)))
    share = [np.searchsorted(np.sort(values), at, side="right") / len(values) for values in (one, other)]
    return np.abs(share[0] - share[1]).max()


def exact_psi(reference, now, bins):
    edges = np.quantile(reference, np.arange(1, bins) / bins)
    p, q = (
        np.bincount(np.searchsorted(edges, values, side="right"), minlength=bins) / len(values)
        for values in (now, reference)
    )
    p, q = np.maximum(p, 0.5 / len(now)), np.maximum(q, 0.5 / len(reference))
    return ((p - q) * np.log(p / q)).sum()


def test_what_the_database_counts_is_what_the_values_themselves_give(url, tmp_path):
    bring(url, tmp_path / "a.csv", wild=6)
    judged = judge(url)
    one = judged[RETURN]
    window = timedelta(days=7)
    since, first = ask(url, "SELECT since, until FROM quality.references WHERE feature = 'daily_return'")[0]
    spanned = (first - since).days
    query = "SELECT daily_return FROM features.price_action WHERE event_timestamp > %s AND event_timestamp <= %s"
    reference = np.array([v for (v,) in ask(url, query, first - timedelta(365), first) if v is not None])
    until = datetime.combine(TODAY - timedelta(1), datetime.max.time(), UTC)
    now = np.array([v for (v,) in ask(url, query, until - window, until)])
    assert sum(one.counts) == len(now)
    assert one.psi == pytest.approx(exact_psi(reference, now, 10), rel=0.1)
    assert one.ks == pytest.approx(exact_ks(reference, now), abs=0.011)
    assert (one.mean, one.deviation) == pytest.approx((now.mean(), now.std(ddof=1)), rel=1e-9)
    assert one.psi_expected == pytest.approx(9 * (1 / 40 + 1 / (40 * spanned / 7)))


def test_prices_are_scaled_by_the_mean_of_the_rows_up_to_each_one(url, tmp_path):
    bring(url, tmp_path / "a.csv", days=270)
    one = judge(url)["technical_indicators_ma", "sma_20", ""]
    scaled = []
    for symbol in SYMBOLS:
        query = "SELECT close FROM market_data.ohlcv_daily WHERE symbol = %s ORDER BY event_timestamp"
        close = np.array([c for (c,) in ask(url, query, symbol)])
        query = "SELECT sma_20 FROM features.technical_indicators_ma WHERE symbol = %s ORDER BY event_timestamp"
        sma = [s for (s,) in ask(url, query, symbol)]
        scaled += [sma[n] / close[max(0, n - 251) : n + 1].mean() for n in range(263, 270)]
    assert one.mean == pytest.approx(np.mean(scaled), rel=1e-9)
    assert one.deviation == pytest.approx(np.std(scaled, ddof=1), rel=1e-6)


def test_without_drift_nothing_moves_and_psi_is_about_what_is_expected(url, credentials, tmp_path):
    bring(url, tmp_path / "a.csv")
    judged = judge(url)
    scaled = {*RULES.drift.scaled, *RULES.drift.left_out}
    assert {f"{view}:{feature}" for view, feature, _ in judged} == DEFINED.features().keys() - scaled, (
        "the history is too short for a scale, and a running total is left out"
    )
    assert not [name for name, one in judged.items() if one.moved]
    assert judged[RETURN].psi < 2 * judged[RETURN].psi_expected
    with psycopg.connect(url, autocommit=True) as connection:
        (fact,) = drift.facts(connection)
    assert (fact.state, fact.value) == (State.OK, 0)
    assert CliRunner().invoke(main, ["--credentials", str(credentials.directory), "drift"]).exit_code == 0


def test_a_feature_that_moved_is_told_with_a_report_metrics_and_since_when(url, credentials, tmp_path):
    bring(url, tmp_path / "a.csv", wild=8)
    told = checks.run(credentials, REPOSITORY, tmp_path)
    moved = {f"{one.view}:{one.feature}" for one in told.drift if one.moved}
    assert {"price_action:daily_return", "price_action:log_return"} <= moved
    assert "price_action:is_green_candle" not in moved
    with psycopg.connect(url, autocommit=True) as connection:
        (fact,) = drift.facts(connection)
    assert fact.state == State.WARNING
    assert fact.value == len(moved) / len(told.drift)
    assert "price_action:daily_return: PSI " in fact.sentence
    text = (tmp_path / "drift.prom").read_text()
    assert 'larder_feature_moved{feature="daily_return",symbols="",view="price_action"} 1.0' in text
    report = (tmp_path / "drift.html").read_text()
    assert f"<h2>Features that moved: {len(moved)}</h2>" in report
    assert report.count("<figure>") == len(told.drift)
    assert "http" not in report, "the report needs nothing from elsewhere"
    options = ["--credentials", str(credentials.directory), "drift", "--json"]
    shown = json.loads(CliRunner().invoke(main, options).stdout)
    assert {f"{one['view']}:{one['feature']}" for one in shown if one["moved"]} == moved


def test_one_day_beyond_is_no_drift_and_days_within_end_it(url, tmp_path):
    bring(url, tmp_path / "a.csv")
    judge(url)

    def day(shift, number):
        """A day on which all returns are shifted; the window is that day alone."""
        asked = replace(RULES, drift=replace(RULES.drift, window_days=1))
        when = TODAY + timedelta(number - 20)
        statement = "UPDATE features.price_action SET daily_return = daily_return + %s WHERE event_timestamp = %s"
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(statement, [shift, when])
            connection.execute("DELETE FROM quality.drift WHERE day >= %s", [when])
            source = DEFINED.sources["market_data.ohlcv_daily"]
            view = next(view for view in DEFINED.views if view.name == "price_action")
            one = drift._View(connection, asked.drift, source, view)
            found = one.judge([when], one.references())
        return next(judged.moved for judged in found if judged.feature == "daily_return")

    shifts = [0, 0.05, 0, 0.05, 0.05, 0.05, 0, 0, 0.05, 0, 0, 0]
    moved = [day(shift, number) for number, shift in enumerate(shifts)]
    # Two days in a row raise it, three within all thresholds clear it.
    assert moved == [False, False, False, False, True, True, True, True, True, True, True, False]


def test_groups_of_symbols_are_judged_by_themselves(url, tmp_path):
    groups = {"us": "^US", "de": "^DE"}
    asked = replace(RULES, drift=replace(RULES.drift, groups=groups, fewest_symbols=15))
    bring(url, tmp_path / "a.csv")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "UPDATE features.price_action SET daily_return = daily_return * 5"
            " WHERE symbol ~ '^DE' AND event_timestamp > %s",
            [TODAY - timedelta(10)],
        )
    judged = judge(url, asked)
    by_group = {symbols: one.moved for (_, feature, symbols), one in judged.items() if feature == "daily_return"}
    assert by_group["us"] is False
    assert by_group["de"] is True
    assert judged["price_action", "daily_return", "us"].symbol_count == 20
    judge(url)
    assert ask(url, "SELECT DISTINCT symbols FROM quality.drift") == [("",)], "former groups are forgotten"


def test_a_reference_stays_until_its_feature_is_declared_otherwise(url, tmp_path):
    bring(url, tmp_path / "a.csv")
    judge(url)
    made = dict(ask(url, "SELECT feature, made_at FROM quality.references"))
    judge(url)
    assert dict(ask(url, "SELECT feature, made_at FROM quality.references")) == made
    views = [
        replace(
            view, features=tuple(replace(f, formula=f.formula.replace("growth - 1", "growth-1")) for f in view.features)
        )
        for view in DEFINED.views
    ]
    judge(url, defined=replace(DEFINED, views=tuple(views)))
    again = dict(ask(url, "SELECT feature, made_at FROM quality.references"))
    assert [feature for feature in made if again[feature] != made[feature]] == ["daily_return"]
    judge(url, new_reference=True)
    assert all(made[feature] < time for feature, time in ask(url, "SELECT feature, made_at FROM quality.references"))


def test_a_share_of_nulls_that_grows_is_drift(url, tmp_path):
    bring(url, tmp_path / "a.csv")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "UPDATE features.price_action SET log_return = NULL WHERE event_timestamp > %s AND symbol < 'DE20'",
            [TODAY - timedelta(12)],
        )
    one = judge(url)["price_action", "log_return", ""]
    assert one.moved
    assert one.null_ratio == pytest.approx(0.25)
    assert one.reference_null_ratio == pytest.approx(0, abs=0.01)
    assert "null 25% (in the reference 1%)" in drift.differs(one)


def test_of_few_symbols_or_few_days_nothing_is_said(url, credentials, tmp_path):
    path = tmp_path / "a.csv"
    rows = (row for n, symbol in enumerate(SYMBOLS[:10]) for row in lines(symbol, n))
    path.write_text("Symbol,Date,Open,High,Low,Close,Volume\n" + "\n".join(rows) + "\n")
    load(url, [path])
    compute(url, Formulas(REPOSITORY))
    assert judge(url) == {}
    shown = CliRunner().invoke(main, ["--credentials", str(credentials.directory), "drift"]).stdout
    assert shown.startswith("Nothing was judged yet")
