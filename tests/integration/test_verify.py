"""`larder verify`: a value that is served and is not what the bars give is found and named, in real stores."""

import os

import numpy as np
import psycopg
import pytest
from click.testing import CliRunner
from test_lost_state import REPOSITORY, SYMBOLS, TODAY, online, stack  # noqa: F401 # fixtures

from larder.bars.load import load
from larder.cli import main
from larder.features import definitions
from larder.features.compute import compute
from larder.features.formulas import Formulas
from larder.operations.facts import State
from larder.operations.materialize import materialize
from larder.operations.status import status
from larder.operations.verify import verify

pytestmark = pytest.mark.skipif(
    not os.environ.get("LARDER_TEST_POSTGRES"),
    reason="LARDER_TEST_POSTGRES names no server; the pipeline scenario does",
)
FEATURES = len(definitions.read(REPOSITORY).features())


@pytest.fixture
def walking(stack, tmp_path):  # noqa: F811
    """The stack, whose symbols have other bars than each other."""
    rows = []
    for n, symbol in enumerate(SYMBOLS):
        close = 50 * np.exp(np.random.default_rng(n).normal(0, 0.02, 300).cumsum())
        volume = np.random.default_rng(n).integers(1000, 9000, 300)
        for day, (c, v) in enumerate(zip(map(float, close), volume, strict=True)):
            when = TODAY - np.timedelta64(300 - day, "D").item()
            rows.append(f"{symbol},{when},{c * 0.99!r},{c * 1.02!r},{c * 0.98!r},{c!r},{v}")
    path = tmp_path / "walk.csv"
    path.write_text("Symbol,Date,Open,High,Low,Close,Volume\n" + "\n".join(rows) + "\n")
    load(stack.load_url, [path])
    run(stack)
    return stack


def run(credentials):
    compute(credentials.pipeline_url, Formulas(REPOSITORY))
    materialize(credentials, since=None, days=400)


def change(credentials, statement, *parameters):
    with psycopg.connect(credentials.pipeline_url, autocommit=True) as connection:
        assert connection.execute(statement, parameters).rowcount > 0


def fact(credentials):
    (found,) = [fact for fact in status(credentials).facts if fact.name == "verified_wrong_values"]
    return found


def test_all_values_of_all_symbols_are_what_the_bars_give(walking, tmp_path):
    assert fact(walking).state == State.UNKNOWN
    told = verify(walking, REPOSITORY, 1000)
    assert (told.symbols, told.values, told.wrong, told.skipped) == (len(SYMBOLS), len(SYMBOLS) * FEATURES, [], 0)
    found = fact(walking)
    assert (found.state, found.value) == (State.OK, 0)
    assert verify(walking, REPOSITORY, 3).symbols == 3
    options = ["--credentials", str(walking.directory), "verify", "--repo", str(REPOSITORY), "--sample", "2"]
    done = CliRunner().invoke(main, [*options, "--metrics-dir", str(tmp_path)])
    assert done.exit_code == 0, done.output
    written = (tmp_path / "verify.prom").read_text().splitlines()
    assert f"larder_verified_values {2.0 * FEATURES}" in written
    assert "larder_verified_wrong_values 0.0" in written


def test_one_wrong_value_is_told_with_symbol_view_feature_served_and_expected(walking):
    right = "SELECT sma_20 FROM features.technical_indicators_ma WHERE symbol = 'S007' ORDER BY event_timestamp DESC"
    with psycopg.connect(walking.pipeline_url) as connection:
        expected = connection.execute(right).fetchone()[0]
    # By a millionth; the run that made it is over, and no note says that the symbol is to be computed again.
    change(
        walking,
        "UPDATE features.technical_indicators_ma SET sma_20 = sma_20 * 1.000001 WHERE symbol = 'S007'"
        " AND event_timestamp = (SELECT max(event_timestamp) FROM features.technical_indicators_ma)",
    )
    materialize(walking, days=400)
    (wrong,) = verify(walking, REPOSITORY, 1000).wrong
    assert (wrong.symbol, wrong.view, wrong.feature) == ("S007", "technical_indicators_ma", "sma_20")
    assert wrong.served == pytest.approx(expected * 1.000001, rel=1e-12)
    assert wrong.expected == pytest.approx(expected, rel=1e-12)
    found = fact(walking)
    assert (found.state, found.value) == (State.FAILED, 1)
    assert found.sentence.startswith("S007 technical_indicators_ma:sma_20 of ")
    done = CliRunner().invoke(
        main, ["--credentials", str(walking.directory), "verify", "--repo", str(REPOSITORY), "--symbol", "S007"]
    )
    assert done.exit_code == 5
    assert "1 wrong" in done.stdout
    assert verify(walking, REPOSITORY, 1, ["S008"]).wrong == []


def test_a_row_whose_bar_is_gone_and_a_null_that_is_none_are_wrong(walking):
    change(
        walking,
        "UPDATE features.price_action SET log_return = NULL WHERE symbol = 'S001'"
        " AND event_timestamp = (SELECT max(event_timestamp) FROM features.price_action)",
    )
    materialize(walking, days=400)
    change(
        walking,
        "DELETE FROM market_data.ohlcv_daily WHERE symbol = 'S002'"
        " AND event_timestamp = (SELECT max(event_timestamp) FROM market_data.ohlcv_daily)",
    )
    wrong = verify(walking, REPOSITORY, 1000).wrong
    (null,) = [one for one in wrong if one.symbol == "S001"]
    assert (null.feature, null.served) == ("log_return", None)
    assert len([one for one in wrong if one.symbol == "S002"]) == FEATURES


def test_a_symbol_that_is_about_to_change_is_no_alarm(walking, tmp_path):
    path = tmp_path / "late.csv"
    path.write_text(
        f"Symbol,Date,Open,High,Low,Close,Volume\nS003,{TODAY - np.timedelta64(5, 'D').item()},10,12,9,11,5\n"
    )
    load(walking.load_url, [path])
    told = verify(walking, REPOSITORY, 1000)
    assert (told.skipped, told.wrong) == (1, [])
    compute(walking.pipeline_url, Formulas(REPOSITORY))
    told = verify(walking, REPOSITORY, 1000)
    assert (told.skipped, told.wrong) == (1, []), "the online store has not got it yet"
    materialize(walking)
    told = verify(walking, REPOSITORY, 1000)
    assert (told.skipped, told.wrong) == (0, [])
