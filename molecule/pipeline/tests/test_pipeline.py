"""Bars go in as files and come out of Redis as features: late ones, corrected ones, impossible ones too."""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from testinfra.host import Host

UNIT = "feature-pipeline.service"
TODAY = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
HEADER = "Date,Open,High,Low,Close,Volume"


@pytest.fixture(scope="module")
def host(inventory: Any) -> Host:
    return inventory.host("pipeline1")


def bar(days_ago: int, close: float) -> str:
    day = (TODAY - timedelta(days=days_ago)).date()
    return f"{day},{close},{close + 1},{close - 1},{close},1000"


def bring(inventory: Any, name: str, *rows: str) -> None:
    inventory.run("pipeline1", f"sudo tee /var/lib/larder/incoming/{name}", "\n".join((HEADER, *rows, "")))


def run(host: Host) -> None:
    result = host.run(f"systemctl start {UNIT}")
    assert result.rc == 0, host.run(f"journalctl -u {UNIT} -n 40 --no-pager").stdout


def close_of(inventory: Any, symbol: str) -> tuple[float | None, float | None]:
    """Return (close, sma_5) that the online store holds for a symbol."""
    script = (
        "import os, pathlib; from feast import FeatureStore;"
        "s = FeatureStore(fs_yaml_file=pathlib.Path(os.environ['CREDENTIALS_DIRECTORY'], 'feature_store.yaml'));"
        "f = ['ohlcv_features:close', 'technical_indicators_ma:sma_5'];"
        f"a = s.get_online_features(f, [dict(symbol='{symbol}')]).to_dict();"
        "print('values', a['close'][0], a['sma_5'][0])"
    )
    command = (
        "sudo systemd-run --quiet --wait --collect --pipe --uid=feast"
        " -p LoadCredentialEncrypted=feature_store.yaml:/etc/credstore.encrypted/pipeline.feature_store.yaml"
        " /opt/feast/current/bin/python -O -"
    )
    line = next(text for text in inventory.run("pipeline1", command, script).splitlines() if text.startswith("values"))
    return tuple(None if word == "None" else float(word) for word in line.split()[1:])  # type: ignore[return-value]


def metric(host: Host, name: str) -> float:
    text = host.file("/var/lib/larder/metrics/pipeline.prom").content_string
    found = re.search(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
    assert found, text
    return float(found[1])


def test_bars_are_served_after_a_run(inventory: Any, host: Host) -> None:
    bring(inventory, "AAA.csv", *(bar(days, 100 + days) for days in range(10, 1, -1)))
    run(host)
    assert close_of(inventory, "AAA") == (102.0, 104.0)


def test_served_rows_live_for_a_year(inventory: Any, host: Host) -> None:
    login = host.check_output("grep -oE '^user admin(_g[0-9a-f]{8})? ' /etc/redis/users.acl").split()[1]
    password = inventory.variables("pipeline1")["redis_passwords"]["admin"].encode()
    escaped = "".join(f"\\x{byte:02x}" for byte in password)

    def redis(command: str) -> str:
        lines = f'AUTH {login} "{escaped}"\n{command}\n'
        return inventory.run("pipeline1", "sudo redis-cli --no-raw -s /run/redis/redis.sock", lines)

    (key,) = [key for key in re.findall(r'"(?:[^"\\]|\\.)*"', redis("SCAN 0 COUNT 10000")) if "AAA" in key]
    seconds = re.search(r"\(integer\) (-?\d+)", redis(f"TTL {key}"))
    assert seconds
    year = 365 * 24 * 60 * 60
    assert year - 24 * 60 * 60 < int(seconds[1]) <= year


def test_late_bar_arrives(inventory: Any, host: Host) -> None:
    # Yesterday's bar, stamped 00:00, comes after a run that ended today: materialize-incremental would never see it.
    bring(inventory, "AAA.csv", *(bar(days, 100 + days) for days in range(10, 1, -1)), bar(1, 200))
    run(host)
    assert close_of(inventory, "AAA")[0] == 200.0


def test_corrected_bar_reaches_redis_although_its_timestamp_is_the_same(inventory: Any, host: Host) -> None:
    bring(inventory, "AAA.csv", *(bar(days, 100 + days) for days in range(10, 1, -1)), bar(1, 210))
    run(host)
    assert close_of(inventory, "AAA")[0] == 210.0


def test_correction_in_the_middle_changes_dependent_features(inventory: Any, host: Host) -> None:
    before = close_of(inventory, "AAA")[1]
    bring(
        inventory,
        "AAA.csv",
        *(bar(days, 100 + days + (5 if days == 3 else 0)) for days in range(10, 1, -1)),
        bar(1, 210),
    )
    run(host)
    after = close_of(inventory, "AAA")[1]
    assert before is not None
    assert after == pytest.approx(before + 1.0, rel=1e-12)


def test_symbol_whose_newest_bar_is_older_than_the_window_is_served(inventory: Any, host: Host) -> None:
    bring(inventory, "OLD.csv", *(bar(days, 50 + days) for days in range(60, 40, -1)))
    run(host)
    assert close_of(inventory, "OLD")[0] == 91.0


def test_impossible_bar_is_rejected_with_its_reason_and_the_good_ones_go_in(inventory: Any, host: Host) -> None:
    bad = (TODAY - timedelta(days=2)).date()
    bring(inventory, "BAD.csv", bar(3, 10), f"{bad},10,9,11,10,1000", bar(1, 12))
    run(host)
    assert close_of(inventory, "BAD")[0] == 12.0
    query = "SELECT symbol, event_timestamp::date, reason FROM market_data.rejected_bars WHERE symbol = 'BAD'"
    rows = host.check_output(f'runuser -u postgres -- psql -At -d feast -c "{query}"').splitlines()
    assert len(rows) == 1
    assert rows[0].startswith(f"BAD|{bad}|")
    assert metric(host, "larder_rejected_bars") == 1


def test_bad_file_harms_only_itself_and_journal_metric_and_status_say_why(inventory: Any, host: Host) -> None:
    incoming = "/var/lib/larder/incoming"
    inventory.run("pipeline1", f"sudo tee {incoming}/notes.txt", "buy low, sell high\n")
    inventory.run("pipeline1", f"sudo tee {incoming}/CUT.parquet", "PAR1 and no more PAR1")
    # Line ends of CR alone, as Excel for the Mac writes them; the others are the newest files of the folder.
    rows = [bar(days, 100 + days) for days in range(10, 0, -1)]
    inventory.run("pipeline1", f"sudo tee {incoming}/MAC.csv", "\r".join([HEADER, *rows, ""]))
    bring(inventory, "AFTER.csv", *rows)
    assert host.run(f"systemctl start {UNIT}").rc != 0
    assert host.check_output(f"systemctl show {UNIT} -p ExecMainStatus") == "ExecMainStatus=3"
    assert close_of(inventory, "MAC") == close_of(inventory, "AFTER") == (101.0, 103.0)
    assert metric(host, "larder_pipeline_files_refused") == 2
    # As the docs say; what a good run tells of is left out.
    journal = host.check_output(f"journalctl -u {UNIT} -p warning -n 20 -o cat --no-pager")
    (last,) = [line for line in journal.splitlines() if line.startswith("Error: ")][-1:]
    assert last.endswith("all else was done. Next: sudo larder status")
    status = host.run("larder status")
    assert status.rc == 5
    assert status.stdout.splitlines()[0] == "not healthy:"
    assert "left out refused files" in status.stdout
    # Ansible shows both streams: no sentence is in both.
    assert status.stderr.splitlines()[-1] == "Error: Not healthy, for the reasons above."
    for name in ("notes.txt", "CUT.parquet"):
        inspected = host.run(f"/opt/feast/current/bin/larder inspect --json {incoming}/{name}")
        assert inspected.rc == 3
        (told,) = json.loads(inspected.stdout)
        assert told["refusal"] in journal
        assert told["refusal"] in status.stdout
    host.check_output(f"rm {incoming}/notes.txt {incoming}/CUT.parquet")
    run(host)
    status = host.run("larder status")
    assert "No file is refused.\n" in status.stdout
    assert "succeeded" in status.stdout


def test_a_file_that_replaces_the_bars_of_another_one_is_named_before_and_when_it_is_loaded(
    inventory: Any, host: Host
) -> None:
    bring(inventory, "TWICE.csv", *(bar(days, 100 + days) for days in range(5, 0, -1)))
    run(host)
    other = "\n".join([HEADER, *(bar(days, 100 + days + (7 if days == 2 else 0)) for days in range(5, 0, -1)), ""])
    inventory.run("pipeline1", "sudo tee /var/lib/larder/incoming/TWICE_daily.csv", other)
    day = (TODAY - timedelta(days=2)).date()
    inspected = host.check_output("larder inspect /var/lib/larder/incoming/TWICE_daily.csv")
    assert f"0 new, 4 stored already, 1 stored with other values, which would be replaced: {day} to {day} of TWICE" in (
        inspected
    )
    run(host)
    journal = host.check_output(f"journalctl -u {UNIT} -p warning -n 20 -o cat --no-pager")
    assert f"replaced file=TWICE_daily.csv bars=1 first={day} last={day} symbols=TWICE" in journal
    host.check_output("rm /var/lib/larder/incoming/TWICE*.csv")


def test_file_in_an_unreadable_folder_is_reported(host: Host) -> None:
    host.check_output("chmod 700 /root && touch /root/hidden.csv")
    for command in ("larder load /root/hidden.csv", "cd /root && larder load hidden.csv"):
        result = host.run(command)
        assert result.rc == 2
        assert "may not look into /root, so /root/hidden.csv cannot be read" in result.stdout + result.stderr


def test_second_run_changes_nothing(host: Host) -> None:
    run(host)
    assert metric(host, "larder_pipeline_bars_changed") == 0
    assert metric(host, "larder_pipeline_feature_rows_changed") == 0


def test_metrics_tell_of_the_last_success_and_its_duration(host: Host) -> None:
    now = float(host.check_output("date +%s.%N"))
    assert 0 <= now - metric(host, "larder_pipeline_last_success_timestamp_seconds") < 600
    assert metric(host, "larder_pipeline_duration_seconds") > 0
    assert host.file("/var/lib/larder/metrics/pipeline.prom").mode & 0o004  # node_exporter is another user


def test_three_starts_at_once_are_one_run(host: Host) -> None:
    before = int(host.check_output(f"journalctl -u {UNIT} --no-pager -o cat | grep -c 'Starting '"))
    host.check_output(f"systemctl start {UNIT} & systemctl start {UNIT} & systemctl start {UNIT} & wait")
    after = int(host.check_output(f"journalctl -u {UNIT} --no-pager -o cat | grep -c 'Starting '"))
    assert after == before + 1


def test_manual_run_beside_another_is_refused_with_its_own_exit_code(host: Host) -> None:
    # The lock of a run, held by hand: a real one could be over before the other begins.
    host.check_output(
        "systemd-run --unit=holder --uid=postgres psql -d feast"
        " -c \"SELECT pg_advisory_lock(hashtextextended('larder run', 0)), pg_sleep(600)\""
    )
    held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted"
    try:
        deadline = time.monotonic() + 30
        while host.check_output(f'runuser -u postgres -- psql -At -d feast -c "{held}"') == "0":
            assert time.monotonic() < deadline
            time.sleep(0.2)
        result = host.run("larder run")
        assert result.rc == 4, result.stderr
    finally:
        end = "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"
        host.check_output(f'runuser -u postgres -- psql -At -d feast -c "{end}"')


def test_failed_run_fails_the_unit_and_the_next_recovers(host: Host) -> None:
    host.check_output("systemctl stop redis-server")
    try:
        assert host.run(f"systemctl start {UNIT}").rc != 0
        assert metric(host, "larder_pipeline_success") == 0
        message = host.check_output(f"journalctl -u {UNIT} -n 30 -o cat --no-pager")
        assert "Traceback" not in message
    finally:
        host.check_output("systemctl start redis-server")
    status = host.run("larder status")
    assert status.rc == 5
    assert "The last run failed at" in status.stdout
    run(host)
    assert "The last run failed" not in host.run("larder status").stdout
    assert metric(host, "larder_pipeline_success") == 1


def test_cron_starts_it_daily_and_after_a_missed_night(host: Host) -> None:
    lines = [
        line
        for line in host.file("/etc/cron.d/feature-pipeline").content_string.splitlines()
        if not line.startswith("#")
    ]
    assert [line.split(" root ")[0] for line in lines] == ["0 2 * * *", "17 * * * *", "@reboot"]
    assert host.service("cron").is_running
    assert host.service("cron").is_enabled


def test_unit_is_sandboxed(host: Host) -> None:
    assert host.run(f"systemd-analyze security --no-pager --threshold=15 {UNIT}").rc == 0


def test_unit_sees_its_credentials_and_its_environment_holds_no_secret(inventory: Any, host: Host) -> None:
    shown = host.check_output(f"systemctl show {UNIT}") + host.check_output(f"systemctl cat {UNIT}")
    shown += host.check_output(f"journalctl -u {UNIT} --no-pager")
    for passwords in ("timescaledb_passwords", "redis_passwords"):
        for secret in inventory.variables("pipeline1")[passwords].values():
            assert secret not in shown
