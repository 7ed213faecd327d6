"""Wrong bars are held back, told as what they are, and used only after a decision; in a real PostgreSQL."""

import json
import os
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import psycopg
import pytest
from click.testing import CliRunner

from larder.bars import load as loading
from larder.bars.load import load
from larder.cli import main
from larder.errors import ConfigError
from larder.features.compute import compute
from larder.features.formulas import Formulas
from larder.operations import checks, drift, quality, verify
from larder.operations.facts import State
from larder.quality import rules

pytestmark = pytest.mark.skipif(
    not os.environ.get("LARDER_TEST_POSTGRES"),
    reason="LARDER_TEST_POSTGRES names no server; the pipeline scenario does",
)
REPOSITORY = Path(__file__).parents[2] / "feature_repo"
RULES = rules.read(REPOSITORY)
HEADER = "Symbol,Date,Open,High,Low,Close,Volume\n"
TODAY = date.today()  # noqa: DTZ011 # the day of the files, not of an instant
COUNT = 90


def ask(url, query, *parameters):
    with psycopg.connect(url, autocommit=True, options="-c timezone=UTC") as connection:
        return connection.execute(query, parameters).fetchall()


def closes(seed, count=COUNT):
    return 100 * np.exp(np.cumsum(np.random.default_rng(seed).normal(0, 0.02, count)))


def rows(symbol, close, *, volume=1000, until=TODAY - timedelta(1)):
    """A line for each close, the last one of a day."""
    return [
        f"{symbol},{until - timedelta(len(close) - 1 - n)},{c * 0.99!r},{c * 1.02!r},{c * 0.98!r},{c!r},{volume}"
        for n, c in enumerate(map(float, close))
    ]


def bring(url, path, *lines, rules=RULES):
    path.write_text(HEADER + "\n".join(lines) + "\n")
    return load(url, [path], rules=rules)


def stored(url, symbol):
    return [
        c
        for (c,) in ask(
            url, "SELECT close FROM market_data.ohlcv_daily WHERE symbol = %s ORDER BY event_timestamp", symbol
        )
    ]


def held(url):
    return ask(url, "SELECT symbol, event_timestamp::date, reason, state FROM quality.quarantine ORDER BY 1, 2")


@pytest.fixture(params=["in memory", "staged"])
def way(request, monkeypatch):
    """Small files are judged in memory, large ones where they wait in the database."""
    if request.param == "staged":
        monkeypatch.setattr(loading, "BARS_IN_MEMORY", 10)


@pytest.mark.usefixtures("way")
def test_a_doubled_price_and_an_unadjusted_split_are_held_and_told_as_what_they_are(url, tmp_path):
    good, double, split = closes(1), closes(2), closes(3)
    double[-1] = double[-2] * 2
    split[-3:] /= 2
    loaded = bring(url, tmp_path / "a.csv", *rows("GOOD", good), *rows("DOUBLE", double), *rows("SPLIT", split))
    assert (loaded.bars, loaded.quarantined, loaded.changed) == (3 * COUNT, 4, 3 * COUNT - 4)
    assert stored(url, "GOOD") == list(good)
    assert stored(url, "DOUBLE") == list(double[:-1])
    assert stored(url, "SPLIT") == list(split[:-3])
    (doubled, *splits) = held(url)
    assert doubled[:2] == ("DOUBLE", TODAY - timedelta(1))
    assert "2.00 times" in doubled[2]
    assert "a jump by " in doubled[2]
    assert [row[:2] for row in splits] == [("SPLIT", TODAY - timedelta(n)) for n in (3, 2, 1)]
    assert all("as after a split of 2:1" in row[2] for row in splits)


@pytest.mark.usefixtures("way")
def test_a_bar_of_a_night_is_judged_by_the_bars_that_are_stored(url, tmp_path):
    close = closes(4)
    bring(url, tmp_path / "a.csv", *rows("A", close[:-2], until=TODAY - timedelta(3)))
    night = close.copy()
    night[-2] *= 10
    loaded = bring(url, tmp_path / "b.csv", *rows("A", night)[-2:])
    assert loaded.quarantined == 1
    assert stored(url, "A") == [*close[:-2], close[-1]], "the bar after a wrong one is judged by the one before it"


@pytest.mark.usefixtures("way")
def test_what_is_held_stays_held_and_a_correction_takes_its_place(url, tmp_path):
    close = closes(5)
    wrong = close.copy()
    wrong[-1] *= 2
    for _ in range(2):
        assert bring(url, tmp_path / "a.csv", *rows("A", wrong)).quarantined == 1
        assert len(held(url)) == 1
    assert bring(url, tmp_path / "a.csv", *rows("A", close)).quarantined == 0
    assert stored(url, "A") == list(close)
    assert [row[3] for row in held(url)] == ["replaced"]


@pytest.mark.usefixtures("way")
def test_bars_that_are_held_are_not_confirmed_by_later_ones_of_the_same_file(url, tmp_path):
    """Each night the vendor's file has all bars: what is held waits for a decision, however many come after it."""
    split = closes(6, COUNT + 8)
    split[COUNT:] /= 3
    for night in range(1, 8):
        until = TODAY - timedelta(8 - night)
        bring(url, tmp_path / "a.csv", *rows("A", split[: COUNT + night], until=until))
        assert len(held(url)) == night
    assert stored(url, "A") == list(split[:COUNT])


@pytest.mark.usefixtures("way")
def test_history_that_confirms_a_new_level_is_used_and_warned_of(url, tmp_path):
    split = closes(7)
    split[50:] /= 10
    assert bring(url, tmp_path / "a.csv", *rows("A", split)).quarantined == 0
    assert stored(url, "A") == list(split)
    ((rule, severity, message),) = ask(url, "SELECT rule, severity, message FROM quality.findings")
    assert (rule, severity) == ("split", "warn")
    assert "as after a split of 10:1" in message
    assert message.endswith("the 5 bars after it confirm it")


def test_a_split_that_the_vendor_knows_is_none(url, tmp_path):
    close = closes(8)
    adjusted = close.copy()
    close[:-1] *= 2
    lines = [f"{line},{a!r}" for line, a in zip(rows("A", close), map(float, adjusted), strict=True)]
    path = tmp_path / "a.csv"
    path.write_text(HEADER.strip() + ",Adj Close\n" + "\n".join(lines) + "\n")
    assert load(url, [path], rules=RULES).quarantined == 0
    assert ask(url, "SELECT count(*) FROM quality.findings") == [(0,)]


@pytest.mark.usefixtures("way")
def test_a_spike_of_the_volume_and_bars_that_repeat_are_used_and_warned_of(url, tmp_path):
    close = closes(9)
    close[-6:] = close[-7]
    lines = rows("A", close)
    lines[40] = lines[40].removesuffix(",1000") + ",90000"
    assert bring(url, tmp_path / "a.csv", *lines).quarantined == 0
    found = ask(url, "SELECT rule, of, event_timestamp::date, message FROM quality.findings ORDER BY rule")
    assert [row[:3] for row in found] == [
        ("repeat", "", TODAY - timedelta(1)),
        ("spike", "volume", TODAY - timedelta(COUNT - 40)),
    ]
    assert "the same in 7 bars" in found[0][3]
    assert "90 times the mean of the 40 bars before" in found[1][3]


@pytest.mark.usefixtures("way")
def test_a_rule_that_rejects_is_told_as_any_other_reject(url, tmp_path):
    (tmp_path / "quality.yml").write_text("bars: [{rule: range, column: close, most: 150, severity: reject}]\n")
    loaded = bring(url, tmp_path / "a.csv", *rows("A", [100.0] * 20 + [151.0] + [100.0]), rules=rules.read(tmp_path))
    assert (loaded.rejected, loaded.quarantined, loaded.changed) == (1, 0, 21)
    ((day, reason),) = ask(url, "SELECT event_timestamp::date, reason FROM market_data.rejected_bars")
    assert (day, reason) == (TODAY - timedelta(2), "range: close is 151; it may be -inf to 150")


def test_a_finding_goes_when_its_bar_is_corrected_and_stays_when_the_bar_comes_again(url, tmp_path):
    close = closes(10)
    odd = rows("A", close)
    odd[40] = odd[40].removesuffix(",1000") + ",90000"
    for _ in range(2):
        bring(url, tmp_path / "a.csv", *odd)
        assert ask(url, "SELECT rule FROM quality.findings") == [("spike",)]
    bring(url, tmp_path / "a.csv", *rows("A", close))
    assert ask(url, "SELECT rule FROM quality.findings") == []


def command(credentials, *words):
    return CliRunner().invoke(main, ["--credentials", str(credentials.directory), *words])


def test_a_released_bar_is_stored_computed_with_and_not_held_again(url, credentials, tmp_path):
    close = closes(11)
    close[-1] *= 2
    bring(url, tmp_path / "a.csv", *rows("A", close))
    compute(url, Formulas(REPOSITORY))
    listed = command(credentials, "quarantine", "list")
    assert "a jump by " in listed.output
    assert command(credentials, "quarantine", "release").exit_code == 2, "which bars was not said"
    assert command(credentials, "quarantine", "release", "--rule", "split").exit_code == 2
    assert command(credentials, "quarantine", "release", "--symbol", "A").stdout.startswith("1 released")
    assert stored(url, "A") == list(close)
    assert compute(url, Formulas(REPOSITORY)) > 0, "the bar was noted for the next run"
    newest = ask(url, "SELECT close FROM features.ohlcv_features ORDER BY event_timestamp DESC LIMIT 1")
    assert newest == [(close[-1],)]
    assert bring(url, tmp_path / "a.csv", *rows("A", close)).quarantined == 0
    assert [row[3] for row in held(url)] == ["released"]
    assert command(credentials, "quarantine", "list").stdout == "No bar is in quarantine.\n"


@pytest.mark.usefixtures("way")
def test_a_dropped_bar_is_left_out_when_it_comes_again_and_another_one_of_the_day_is_judged(url, credentials, tmp_path):
    close = closes(12)
    close[-1] *= 2
    bring(url, tmp_path / "a.csv", *rows("A", close))
    assert command(credentials, "quarantine", "drop", "--all").exit_code == 0
    for _ in range(2):
        assert bring(url, tmp_path / "a.csv", *rows("A", close)).quarantined == 0
        assert stored(url, "A") == list(close[:-1])
        assert [row[3] for row in held(url)] == ["dropped"]
    other = close.copy()
    other[-1] *= 1.5
    assert bring(url, tmp_path / "a.csv", *rows("A", other)).quarantined == 1
    assert [row[3] for row in held(url)] == ["held"]


def facts(url, name):
    now = datetime.now(UTC)
    late = timedelta(hours=26)
    with psycopg.connect(url, autocommit=True) as connection:
        every = [*quality.facts(connection, now, late), *verify.facts(connection, now, late), *drift.facts(connection)]
    return [fact for fact in every if fact.name == name]


def checked(credentials, tmp_path):
    return checks.run(credentials, REPOSITORY, tmp_path / "metrics")


def test_a_frozen_feed_is_told_as_one(url, credentials, tmp_path):
    lines = [line for n in range(10) for line in rows(f"S{n}", frozen(n, 30, still=n < 6))]
    bring(url, tmp_path / "a.csv", *lines)
    (found,) = checked(credentials, tmp_path).findings
    assert (found.rule, found.severity, found.symbol) == ("frozen", "fail", "")
    (fact,) = facts(url, "quality_findings")
    assert (fact.of, fact.state) == ("frozen", State.FAILED)
    assert "6 of 10 symbols" in fact.sentence
    assert "the feed repeats itself" in fact.sentence
    result = command(credentials, "check", "--repo", str(REPOSITORY))
    assert result.exit_code == 5
    bring(url, tmp_path / "b.csv", *(rows(f"S{n}", closes(n, 31), until=TODAY)[-1] for n in range(10)))
    assert checked(credentials, tmp_path).findings == []
    (fact,) = facts(url, "quality_findings")
    assert fact.state == State.OK


def frozen(seed, count, *, still):
    close = closes(seed, count)
    if still:
        close[-1] = close[-2]
    return close


def test_days_that_a_symbol_lacks_are_told_by_the_calendar_of_the_others(url, credentials, tmp_path):
    lines = {f"S{n}": rows(f"S{n}", closes(n, 40)) for n in range(6)}
    del lines["S3"][20:22]
    lines["S4"] = lines["S4"][25:]  # it is new: that is no gap
    held_back = closes(5, 40)
    held_back[-1] *= 2  # it is in quarantine: that is no gap, either
    lines["S5"] = rows("S5", held_back)
    bring(url, tmp_path / "a.csv", *(line for each in lines.values() for line in each))
    (found,) = checked(credentials, tmp_path).findings
    first, last = TODAY - timedelta(20), TODAY - timedelta(19)
    assert (found.rule, found.symbol) == ("gap", "S3")
    assert found.message == f"no bar of 2 days, {first} to {last}, when most symbols have one"
    page = json.loads(command(credentials, "quality", "S3", "--json").stdout)
    assert [finding["rule"] for finding in page["findings"]] == ["gap"]
    assert page["bars"] == 38
    assert command(credentials, "quality", "NONE").exit_code == 2


def test_features_out_of_their_range_and_nulls_are_told(url, credentials, tmp_path):
    bring(url, tmp_path / "a.csv", *(line for n in range(4) for line in rows(f"S{n}", closes(n, 60))))
    compute(url, Formulas(REPOSITORY))
    assert checked(credentials, tmp_path).findings == []
    newest = TODAY - timedelta(1)
    with psycopg.connect(url, autocommit=True) as connection:
        for change, symbol in (
            ("technical_indicators_momentum SET rsi_14 = 101", "S1"),
            ("price_action SET log_return = NULL", "S2"),
        ):
            statement = f"UPDATE features.{change} WHERE symbol = %s AND event_timestamp = %s"
            assert connection.execute(statement, [symbol, newest]).rowcount == 1
    outside, nulls = checked(credentials, tmp_path).findings
    assert outside.symbol == "S1"
    assert outside.of == "technical_indicators_momentum:rsi_14"
    assert outside.message == "rsi_14 is 101; it may be 0 to 100"
    assert nulls.of == "price_action:log_return"
    assert nulls.message.startswith("log_return is null for 1 of 4 keys")
    text = (tmp_path / "metrics/quality.prom").read_text()
    assert 'larder_quality_findings{rule="range",severity="fail"} 1.0' in text


def test_bars_in_quarantine_are_a_warning_with_the_reason(url, tmp_path):
    (fact,) = facts(url, "quarantined_bars")
    assert fact.state == State.OK
    close = closes(13)
    close[-1] /= 2
    bring(url, tmp_path / "a.csv", *rows("A", close))
    (fact,) = facts(url, "quarantined_bars")
    assert (fact.state, fact.value) == (State.WARNING, 1)
    assert f"A {TODAY - timedelta(1)}: split: " in fact.sentence
    assert [f.state for f in facts(url, "quality_check_age_seconds")] == [State.UNKNOWN]


def test_a_repository_without_rules_judges_nothing_and_needs_no_tables(url, tmp_path):
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA quality CASCADE")
    double = closes(14)
    double[-1] *= 2
    path = tmp_path / "a.csv"
    path.write_text(HEADER + "\n".join(rows("A", double)) + "\n")
    assert load(url, [path]).changed == COUNT
    assert facts(url, "quarantined_bars") == []
    with pytest.raises(ConfigError, match=r"the database lacks its tables: site\.yml makes them"):
        load(url, [path], rules=RULES)
