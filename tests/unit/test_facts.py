"""What is said of values that are late, of certificates that end, and of what is so of several views."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from larder.operations import metrics
from larder.operations.facts import Fact, State, told
from larder.operations.freshness import freshness
from larder.operations.survey import certificates

LATE = timedelta(hours=26)
# Christmas 2025 was a Thursday, and the Friday after it is left out as well; Good Friday 2026 was the third of April.
HOLIDAYS = {datetime(2025, 12, 25, tzinfo=UTC), datetime(2025, 12, 26, tzinfo=UTC), datetime(2026, 4, 3, tzinfo=UTC)}


def market(until, days=365, holidays=HOLIDAYS):
    """The days of a market up to one, the newest first."""
    every = (until - timedelta(days=n) for n in range(days))
    return [day for day in every if day.weekday() < 5 and day not in holidays]


def day(text, hour=0):
    return datetime.fromisoformat(f"{text}T{hour:02}:00+00:00")


def state(newest, now):
    return freshness("feature_age_seconds", "view", market(newest), now, LATE).state


@pytest.mark.parametrize(
    ("newest", "now", "expected"),
    [
        # Thursday's bars are there on Friday night, and the weekend brings none.
        ("2026-05-08", day("2026-05-09", 12), State.OK),
        ("2026-05-08", day("2026-05-11", 23), State.OK),
        ("2026-05-08", day("2026-05-13", 1), State.OK),
        # Monday's bars did not come: a holiday, as far as anybody can know until the longest pause after a Friday.
        ("2026-05-08", day("2026-05-13", 3), State.WARNING),
        ("2026-05-11", day("2026-05-14", 3), State.WARNING),
        # A Monday has never been followed by more than one day without bars.
        ("2026-05-11", day("2026-05-18", 0), State.FAILED),
        ("2026-05-08", day("2026-05-18", 0), State.FAILED),
    ],
)
def test_weekends_are_no_alarm_and_a_feed_that_is_dead_is_one(newest, now, expected):
    holidays = {*HOLIDAYS, day("2026-02-10"), day("2026-02-16")}  # a Tuesday, and a Monday
    told = freshness("feature_age_seconds", "view", market(day(newest), holidays=holidays), now, LATE)
    assert told.state == expected, told.sentence
    assert told.value == (now - day(newest)).total_seconds()


def test_a_holiday_of_the_year_before_is_known_by_its_weekday():
    # After the Wednesday before Christmas, five days passed.
    assert state(day("2026-05-13"), day("2026-05-19", 12)) == State.WARNING
    assert state(day("2026-05-13"), day("2026-05-20", 12)) == State.FAILED


def test_a_market_that_never_closes_is_late_after_a_day():
    days = [day("2026-05-13") - timedelta(days=n) for n in range(300)]
    assert freshness("x", "", days, day("2026-05-16", 1), LATE).state == State.OK
    assert freshness("x", "", days, day("2026-05-16", 3), LATE).state == State.FAILED


def test_a_bar_at_the_end_of_its_day_is_no_later_than_one_at_its_begin():
    days = [day("2026-05-13", 21) - timedelta(days=n) for n in range(300)]
    assert freshness("x", "", days, day("2026-05-16", 1), LATE).state == State.OK
    assert freshness("x", "", days, day("2026-05-16", 3), LATE).state == State.FAILED


def test_of_a_few_days_no_calendar_is_made_and_none_at_all_are_wrong():
    assert freshness("x", "", market(day("2026-05-13"), days=5), day("2027-01-01"), LATE).state == State.UNKNOWN
    assert freshness("x", "", [], day("2027-01-01"), LATE).state == State.FAILED


def test_what_is_so_of_several_views_is_said_once():
    facts = [
        Fact("feature_age_seconds", State.FAILED, 1, "No rows.", "a"),
        Fact("refused_files", State.FAILED, 2, "One.\nTwo."),
        Fact("feature_age_seconds", State.FAILED, 1, "No rows.", "b"),
        Fact("feature_age_seconds", State.OK, 1, "Rows.", "c"),
    ]
    assert told(facts, State.FAILED) == ["a, b: No rows.", "One.", "Two."]


def test_a_certificate_is_a_warning_before_it_ends_and_wrong_shortly_before(tmp_path):
    now = day("2026-05-13")
    for service, days in (("feast", 100), ("gateway", 20), ("redis", 5)):
        metric = f'larder_certificate_not_after_timestamp_seconds{{service="{service}"}}'
        ends = (now + timedelta(days=days)).timestamp()
        (tmp_path / f"certificate_{service}.prom").write_text(f"# TYPE {metric.split('{')[0]} gauge\n{metric} {ends}\n")
    (tmp_path / "certificate_torn.prom").write_text("{")
    found = {fact.of: fact for fact in certificates(tmp_path, now)}
    assert {of: fact.state for of, fact in found.items()} == {
        "feast": State.OK,
        "gateway": State.WARNING,
        "redis": State.FAILED,
    }
    assert found["redis"].sentence == "The certificate ends on 2026-05-18: site.yml makes a new one."
    assert found["redis"].value == timedelta(days=5).total_seconds()


def test_the_documented_facts_are_those_that_have_a_metric():
    rows = (Path(__file__).parents[2] / "docs/schedule-and-backfill.md").read_text().splitlines()
    table = rows[rows.index(next(row for row in rows if row.startswith("| `name` in `--json`"))) + 2 :]
    named = {name for row in table[: table.index("")] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == set(metrics.FACTS_HELP)


def test_facts_are_written_with_value_state_and_a_verdict(tmp_path):
    facts = [
        Fact("feature_age_seconds", State.OK, 5, "", "a"),
        Fact("feature_age_seconds", State.UNKNOWN, None, "", "b"),
        Fact("redis_evicted_keys", State.WARNING, 7, ""),
    ]
    metrics.write_facts(tmp_path, facts)
    lines = (tmp_path / "status.prom").read_text().splitlines()
    assert 'larder_status_feature_age_seconds{of="a"} 5.0' in lines
    assert not [line for line in lines if line.startswith('larder_status_feature_age_seconds{of="b"}')]
    assert 'larder_status_state{fact="feature_age_seconds",of="b"} 3.0' in lines
    assert 'larder_status_state{fact="redis_evicted_keys",of=""} 1.0' in lines
    assert "larder_status_healthy 1.0" in lines
    metrics.write_facts(tmp_path, [*facts, Fact("refused_files", State.FAILED, 1, "")])
    assert "larder_status_healthy 0.0" in (tmp_path / "status.prom").read_text().splitlines()
