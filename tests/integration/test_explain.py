"""`larder explain`: from a value that is served back to the file that brought each bar, in real stores."""

import hashlib
import json
import os
from datetime import UTC, datetime, timedelta

import numpy as np
import psycopg
import pytest
from click.testing import CliRunner
from test_lost_state import REPOSITORY, TODAY, online, stack  # noqa: F401 # fixtures
from test_materialize import ADMIN

from larder.bars.load import load
from larder.cli import main
from larder.features.compute import compute
from larder.features.formulas import Formulas
from larder.operations.explain import as_text, explain
from larder.operations.materialize import materialize

pytestmark = pytest.mark.skipif(not ADMIN, reason="LARDER_TEST_POSTGRES names no server; the pipeline scenario does")
INVOCATION = os.environ.get("INVOCATION_ID")
SMA = "technical_indicators_ma:sma_10"


def bars(path, closes):
    """A file of bars that end yesterday."""
    days = [TODAY - timedelta(len(closes) - n) for n in range(len(closes))]
    rows = [f"S003,{day},{c},{c + 1},{c - 1},{c},100" for day, c in zip(days, closes, strict=True)]
    path.write_text("Symbol,Date,Open,High,Low,Close,Volume\n" + "\n".join(rows) + "\n")
    return path


def run(credentials):
    compute(credentials.pipeline_url, Formulas(REPOSITORY))
    materialize(credentials)


def told(credentials, feature=SMA, at=None, symbol="S003"):
    return explain(credentials, REPOSITORY, symbol, feature, at)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_value_is_followed_to_its_run_its_bars_and_the_file_of_each(stack, tmp_path, monkeypatch):  # noqa: F811
    first = tmp_path / "bars.csv"
    closes = [20 + n for n in range(4)]
    second = bars(tmp_path / "S003.csv", closes)
    monkeypatch.setenv("LARDER_HOST", "pipeline9")
    monkeypatch.setenv("INVOCATION_ID", "0123abcd")
    load(stack.load_url, [second])
    run(stack)
    found = told(stack)
    assert found.problems == []
    # The stack's own bars close at 11.
    expected = np.mean([11] * 6 + closes)
    assert found.served.value == found.row.value == pytest.approx(expected)
    assert found.computed.value == pytest.approx(expected)
    assert found.row.event_timestamp == datetime.combine(TODAY - timedelta(1), datetime.min.time(), UTC)
    assert (found.table, found.computed.formula, found.computed.deployed) == (
        "features.technical_indicators_ma",
        "talib.SMA(close, 10)",
        True,
    )
    assert (found.computed.run["run_id"], found.computed.run["host"]) == (2, "pipeline9")
    assert [(bar["close"], bar["load_id"]) for bar in found.computed.bars] == [(11, 1)] * 6 + [(c, 2) for c in closes]
    assert [(one["path"], one["sha256"], one["invocation"]) for one in found.computed.loads] == [
        (str(first), sha256(first), INVOCATION),
        (str(second), sha256(second), "0123abcd"),
    ]
    text = as_text(found)
    assert f"10 of market_data.ohlcv_daily, {TODAY - timedelta(10)} to {TODAY - timedelta(1)}" in text
    assert "on pipeline9" in text
    assert "journalctl _SYSTEMD_INVOCATION_ID=0123abcd" in text
    assert str(second) in text


def test_a_bar_that_comes_again_with_its_own_values_keeps_its_load(stack, tmp_path):  # noqa: F811
    load(stack.load_url, [bars(tmp_path / "S003.csv", [11, 11, 11])])  # open, high and low are other ones
    load(stack.load_url, [bars(tmp_path / "again.csv", [11, 11, 30])])
    run(stack)
    assert [bar["load_id"] for bar in told(stack).computed.bars] == [1] * 7 + [2, 2, 3]


def test_another_symbol_keeps_the_run_that_wrote_it(stack, tmp_path):  # noqa: F811
    load(stack.load_url, [bars(tmp_path / "S003.csv", [30])])
    run(stack)
    assert told(stack).computed.run["run_id"] == 2
    assert told(stack, symbol="S004").computed.run["run_id"] == 1
    before = told(stack, at=datetime.combine(TODAY - timedelta(5), datetime.min.time(), UTC))
    assert before.computed.run["run_id"] == 1, "rows before the changed bar are as they were"
    assert (before.served, before.problems) == (None, [])


@pytest.mark.parametrize(
    ("feature", "count", "value"),
    [
        ("ohlcv_features:close", 1, 11),
        ("technical_indicators_ma:sma_20", 20, 11),
        ("price_action:daily_return", 2, 0),
        ("volume_indicators:obv", 40, 100),  # a running total is made of all bars
        ("technical_indicators_ma:sma_50", 40, None),  # too few bars
    ],
)
def test_the_bars_are_those_that_the_value_needs(stack, feature, count, value):  # noqa: F811
    found = told(stack, feature)
    assert len(found.computed.bars) == count
    assert found.row.value == found.computed.value == value
    assert found.problems == []


def test_a_value_that_does_not_follow_from_its_bars_is_told(stack):  # noqa: F811
    with psycopg.connect(stack.pipeline_url, autocommit=True) as connection:
        connection.execute("UPDATE market_data.ohlcv_daily SET close = 2 * close WHERE symbol = 'S003'")
    (problem,) = told(stack).problems
    assert problem.startswith("The bars as they are now give 22.0 by the deployed formula, and the row has 11.0")
    with psycopg.connect(stack.pipeline_url, autocommit=True) as connection:
        connection.execute("UPDATE features.technical_indicators_ma SET sma_10 = 22 WHERE symbol = 'S003'")
    (problem,) = told(stack).problems
    assert problem == "The row has another value than what is served: larder materialize writes it."


def test_what_the_online_store_lost_and_what_nobody_has_is_told(stack, online):  # noqa: F811
    online.flushall()
    found = told(stack)
    assert found.served is None
    assert [problem.split(":")[0] for problem in found.problems] == ["The online store has nothing of it"]
    assert found.row.value == 11
    (problem,) = told(stack, symbol="NONE").problems
    assert "has no row of NONE" in problem
    assert "market_data.quotes has no row" in told(stack, "market_features:bid").problems[0]


def test_bars_and_rows_from_before_loads_and_runs_were_noted_are_explained(stack):  # noqa: F811
    with psycopg.connect(stack.pipeline_url, autocommit=True) as connection:
        connection.execute("UPDATE market_data.ohlcv_daily SET load_id = NULL")
        connection.execute("UPDATE features.technical_indicators_ma SET run_id = NULL")
    found = told(stack)
    assert (found.problems, found.computed.run, found.computed.loads) == ([], None, [])
    assert "by a load from before they were noted" in as_text(found)


def test_a_repository_whose_tables_have_no_loads_goes_on_to_load(stack, tmp_path):  # noqa: F811
    with psycopg.connect(stack.load_url, autocommit=True) as connection:
        connection.execute("DROP TABLE market_data.loads; ALTER TABLE market_data.ohlcv_daily DROP COLUMN load_id")
    assert load(stack.load_url, [bars(tmp_path / "S003.csv", [30])]).changed == 1
    run(stack)
    assert told(stack).computed.bars[-1]["load_id"] is None


def test_the_command_says_it_as_text_and_as_json(stack):  # noqa: F811
    def larder(*arguments):
        options = ["--credentials", str(stack.directory), "explain", "--repo", str(REPOSITORY)]
        return CliRunner().invoke(main, [*options, *arguments])

    assert larder("S003", SMA).output.startswith(f"S003 {SMA}\nserved      11.0, of ")
    found = json.loads(larder("S003", SMA, "--json").output)
    assert (found["served"]["value"], len(found["computed"]["bars"])) == (11, 10)
    old = larder("S003", SMA, "--at", f"{TODAY - timedelta(100)}")
    assert old.exit_code == 5
    assert "has no row of S003 up to" in old.output
    wrong = larder("S003", "technical_indicators_ma:sma_11")
    assert wrong.exit_code == 2
    assert "has no feature 'sma_11'; it has sma_5," in wrong.output
    assert larder("S003", "nothing").exit_code == 2
