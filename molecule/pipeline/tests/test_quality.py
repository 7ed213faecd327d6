"""What a night may bring is told as what it is: a doubled price, a split, half of the bars or none, a frozen feed.

With LARDER_SOAK alone: `./larder test soak` runs them.
"""

from __future__ import annotations

import json
import os
import random
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from testinfra.host import Host

pytestmark = pytest.mark.skipif("LARDER_SOAK" not in os.environ, reason="takes too long for every day")
UNIT = "feature-pipeline.service"
TODAY = datetime.now(UTC).date()
HEADER = "Symbol,Date,Open,High,Low,Close,Volume"
SYMBOLS = [f"Q{n:02}" for n in range(12)]
COUNT = 60


@pytest.fixture(scope="module")
def host(inventory: Any) -> Host:
    return inventory.host("pipeline1")


def walk(symbol: str, count: int = COUNT + 8) -> list[float]:
    close, steps = 100.0, random.Random(symbol)
    return [close := close * (1 + steps.gauss(0, 0.01)) for _ in range(count)]


def line(symbol: str, number: int, close: float) -> str:
    """The bar of a symbol; number COUNT + 6 is of today."""
    day = TODAY - timedelta(COUNT + 6 - number)
    return f"{symbol},{day},{close * 0.995!r},{close * 1.01!r},{close * 0.99!r},{close!r},1000"


def night(inventory: Any, host: Host, name: str, *lines: str) -> None:
    """Bring a file and run the pipeline, once a run that has looked at the folder before has ended."""
    wait = f"while [ $(systemctl show --property=ActiveState --value {UNIT}) = activating ]; do sleep 1; done"
    host.check_output(f"timeout 600 sh -c '{wait}'")
    inventory.run("pipeline1", f"sudo tee /var/lib/larder/incoming/{name}", "\n".join((HEADER, *lines, "")))
    result = host.run(f"systemctl start {UNIT}")
    assert result.rc == 0, host.run(f"journalctl -u {UNIT} -n 40 --no-pager").stdout


def status(host: Host) -> dict[str, dict[str, Any]]:
    """Facts by their names and what they are about."""
    told = json.loads(host.run("larder status --json").stdout)
    return {f"{fact['name']} {fact['of']}".strip(): fact for fact in told["facts"]}


def sql(host: Host, query: str) -> str:
    return host.check_output(f'runuser -u postgres -- psql -At -d feast -c "{query}"')


def metric(host: Host, file: str, name: str) -> float:
    text = host.file(f"/var/lib/larder/metrics/{file}.prom").content_string
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found, text
    return float(found[1])


def test_good_bars_are_served_verified_and_doubted_by_no_rule(inventory: Any, host: Host) -> None:
    night(inventory, host, "q.csv", *(line(s, n, walk(s)[n]) for s in SYMBOLS for n in range(COUNT)))
    told = status(host)
    assert told["quarantined_bars"]["value"] == 0
    assert told["quality_check_age_seconds"]["state"] == "ok"
    assert "quality_findings frozen" not in told
    done = host.run("larder verify --sample 1000 --json")
    verified = json.loads(done.stdout)
    assert done.rc == 0, done.stderr
    assert verified["wrong"] == []
    assert verified["symbols"] >= len(SYMBOLS)
    assert metric(host, "quality", "larder_quarantined_bars") == 0
    assert host.file("/var/lib/larder/metrics/drift.html").mode & 0o004


def test_doubled_price_and_unadjusted_split_are_held_and_told_as_what_they_are(inventory: Any, host: Host) -> None:
    closes = {s: walk(s)[COUNT] for s in SYMBOLS}
    closes["Q01"] = walk("Q01")[COUNT - 1] * 2
    closes["Q02"] = walk("Q02")[COUNT - 1] / 2
    night(inventory, host, "q1.csv", *(line(s, COUNT, close) for s, close in closes.items()))
    fact = status(host)["quarantined_bars"]
    assert (fact["state"], fact["value"]) == ("warning", 2)
    day = TODAY - timedelta(6)
    assert re.search(rf"^Q01 {day}: jump: .* 2\.00 times .*a jump by ", fact["sentence"], re.MULTILINE)
    assert re.search(rf"^Q02 {day}: split: .* as after a split of 2:1 ", fact["sentence"], re.MULTILINE)
    assert metric(host, "quality", "larder_quarantined_bars") == 2
    newest = "SELECT max(event_timestamp)::date FROM {} WHERE symbol = '{}'"
    for table in ("market_data.ohlcv_daily", "features.ohlcv_features"):
        assert sql(host, newest.format(table, "Q01")) == str(day - timedelta(1))
        assert sql(host, newest.format(table, "Q03")) == str(day)
    assert "in quarantine:" in host.check_output("larder quality Q02")


def test_released_bar_is_served_and_dropped_one_does_not_come_back(inventory: Any, host: Host) -> None:
    assert host.check_output("larder quarantine release --rule split").splitlines()[-1].startswith("1 released")
    assert host.check_output("larder quarantine drop --symbol Q01").splitlines()[-1] == "1 dropped."
    night(inventory, host, "q2.csv", line("Q01", COUNT, walk("Q01")[COUNT - 1] * 2))
    day = str(TODAY - timedelta(6))
    query = "SELECT string_agg(symbol || ' ' || state, ', ' ORDER BY symbol) FROM quality.quarantine"
    assert sql(host, query) == "Q01 dropped, Q02 released"
    newest = "SELECT max(event_timestamp)::date FROM features.ohlcv_features WHERE symbol = '{}'"
    assert sql(host, newest.format("Q02")) == day
    assert sql(host, newest.format("Q01")) == str(TODAY - timedelta(7))
    night(inventory, host, "q3.csv", line("Q01", COUNT, walk("Q01")[COUNT]))
    assert sql(host, newest.format("Q01")) == day, "the vendor's correction takes the place of the dropped bar"


def test_night_with_half_of_the_bars_is_told_as_one(inventory: Any, host: Host) -> None:
    night(
        inventory, host, "q4.csv", *(line(s, COUNT + 6, walk(s)[COUNT + 6]) for s in SYMBOLS[3:9])
    )  # Q02 is at another level by now
    fact = status(host)["newest_day_symbols_ratio"]
    assert fact["state"] == "warning"
    assert fact["sentence"].startswith(f"Symbols with a bar of {TODAY}: 6; ")


def test_frozen_feed_is_told_as_one(inventory: Any, host: Host) -> None:
    # Today's bar of every symbol that the host knows is the one before, but for its day.
    query = (
        "SELECT DISTINCT ON (symbol) symbol, open, high, low, close, coalesce(volume, 0) FROM market_data.ohlcv_daily"
        " WHERE event_timestamp < current_date ORDER BY symbol, event_timestamp DESC"
    )
    rows = [row.split("|") for row in sql(host, query).splitlines()]
    night(inventory, host, "q5.csv", *(",".join((symbol, str(TODAY), *bar)) for symbol, *bar in rows))
    fact = status(host)["quality_findings frozen"]
    assert fact["state"] == "failed"
    assert "the feed repeats itself" in fact["sentence"]
    told = host.run("larder status")
    assert told.rc == 5
    assert "frozen: " in told.stdout
    assert host.run("larder check").rc == 5
    # The vendor's correction ends it.
    good = [",".join((symbol, str(TODAY), *(str(float(v) * 1.01) for v in bar[:4]), bar[4])) for symbol, *bar in rows]
    night(inventory, host, "q5.csv", *good)
    assert "quality_findings frozen" not in status(host)


def test_night_without_bars_is_told_by_the_calendar(host: Host) -> None:
    """The calendar is that of the bars; so much later the next ones should have come."""
    # By the age at which a day's rows are late: the clock of the host stays as it is.
    sql(host, "CREATE TABLE IF NOT EXISTS public.kept AS SELECT * FROM features.ohlcv_features WHERE false")
    move = (
        "WITH gone AS (DELETE FROM features.ohlcv_features WHERE event_timestamp > current_date - 5 RETURNING *)"
        " INSERT INTO public.kept SELECT * FROM gone"
    )
    sql(host, move)
    try:
        fact = status(host)["feature_age_seconds ohlcv_features"]
        assert fact["state"] in ("warning", "failed")
        assert re.search(r"see whether bars arrive|a holiday, or missing bars", fact["sentence"])
    finally:
        sql(host, "INSERT INTO features.ohlcv_features SELECT * FROM public.kept; DROP TABLE public.kept")


def test_wrong_served_value_is_found_within_the_hour_and_told(host: Host) -> None:
    newest = "(SELECT max(event_timestamp) FROM features.technical_indicators_ma WHERE symbol = 'Q05')"
    where = f"WHERE symbol = 'Q05' AND event_timestamp = {newest}"
    sql(host, f"UPDATE features.technical_indicators_ma SET sma_20 = sma_20 * 1.001 {where}")
    host.check_output("larder materialize --days 30")
    try:
        drop_in = "/run/systemd/system/feast-verify.service.d"
        larder = "/opt/feast/current/bin/larder verify --sample 1000 --metrics-dir /var/lib/larder/metrics"
        command = f"ExecStart=\\nExecStart={larder}"
        host.check_output(f"mkdir -p {drop_in} && printf '[Service]\\n{command}\\n' > {drop_in}/all.conf")
        host.check_output("systemctl daemon-reload")
        assert host.run("systemctl start feast-verify.service").rc != 0, "the unit fails: systemd tells of it, too"
        fact = status(host)["verified_wrong_values"]
        assert (fact["state"], fact["value"]) == ("failed", 1)
        assert re.match(
            r"Q05 technical_indicators_ma:sma_20 of .* is served as .*, and the bars give ", fact["sentence"]
        )
        assert metric(host, "verify", "larder_verified_wrong_values") == 1
    finally:
        sql(host, f"UPDATE features.technical_indicators_ma SET sma_20 = sma_20 / 1.001 {where}")
        host.check_output("larder materialize --days 30")
    host.check_output("systemctl start feast-verify.service")
    assert status(host)["verified_wrong_values"]["state"] == "ok"
    host.check_output(f"rm -r {drop_in} && systemctl daemon-reload")
    assert metric(host, "verify", "larder_verified_wrong_values") == 0


def test_unit_of_the_verification_is_sandboxed(host: Host) -> None:
    assert host.run("systemd-analyze security --no-pager --threshold=15 feast-verify.service").rc == 0


def test_wrong_rule_is_refused_before_anything_changes(host: Host) -> None:
    rules = "/opt/feast/feature_repo/quality.yml"
    host.check_output(f"cp {rules} /tmp/quality.yml && sed -i 's/bars: 5,/bars: 1,/' {rules}")
    try:
        for command in ("larder apply", f"systemctl start {UNIT}"):
            assert host.run(command).rc != 0
        journal = host.check_output(f"journalctl -u {UNIT} -n 20 -o cat --no-pager")
        assert "quality.yml: bars: repeat: bars is 1; it has to be a whole number from 2 to 1000." in journal
    finally:
        host.check_output(f"cp /tmp/quality.yml {rules}")
    assert host.run(f"systemctl start {UNIT}").rc == 0
