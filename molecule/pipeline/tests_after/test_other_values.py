"""After a run with other values: cron really starts the pipeline, and a run past its deadline fails."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from testinfra.host import Host

UNIT = "feature-pipeline.service"


@pytest.fixture(scope="module")
def host(inventory: Any) -> Host:
    return inventory.host("pipeline1")


@pytest.fixture
def idle(host: Host) -> Iterator[None]:
    """No run that cron started is under way: `systemctl start` would join it, and it read the directory before."""
    host.check_output("systemctl stop cron")
    wait = f"while [ $(systemctl show --property=ActiveState --value {UNIT}) = activating ]; do sleep 1; done"
    host.check_output(f"timeout 120 sh -c '{wait}'")
    yield
    host.check_output("systemctl start cron")


def test_unit_follows_the_variables(host: Host) -> None:
    shown = host.check_output(f"systemctl show {UNIT} -p TimeoutStartUSec -p MemoryMax -p ExecStart")
    assert "TimeoutStartUSec=1min 30s" in shown
    assert f"MemoryMax={1500 * 2**20}" in shown
    assert "--days 3" in shown


@pytest.mark.usefixtures("idle")
def test_indicators_use_adjusted_prices(inventory: Any, host: Host) -> None:
    """Ten for one after the third of seven bars. A command by hand computes as the unit does: nothing is due."""
    rows = [
        f"2026-01-{day:02},{c},{c * 1.1},{c * 0.9},{c},100,{v}"
        for day, c, v in [(n + 5, 1000 if n < 3 else 100, n * 0.25) for n in range(7)]
    ]
    text = "\n".join(["Date,Open,High,Low,Close,Adj Close,Volume", *rows, ""])
    inventory.run("pipeline1", "sudo tee /var/lib/larder/incoming/SPLIT.csv", text)
    result = host.run(f"systemctl start {UNIT}")
    assert result.rc == 0, host.run(f"journalctl -u {UNIT} -n 40 --no-pager -o cat").stdout
    query = (
        "SELECT close, sma_5, daily_return FROM features.ohlcv_features"
        " JOIN features.technical_indicators_ma USING (symbol, event_timestamp)"
        " JOIN features.price_action USING (symbol, event_timestamp) WHERE symbol = 'SPLIT' ORDER BY event_timestamp"
    )
    stored = host.check_output(f'runuser -u postgres -- psql -At -d feast -c "{query}"').splitlines()
    assert [line.split("|")[0] for line in stored] == ["1000"] * 3 + ["100"] * 4, "the bar itself stays as loaded"
    assert [line.split("|")[1] for line in stored[4:]] == ["100"] * 3
    assert {line.split("|")[2] for line in stored[1:]} == {"0"}
    assert host.check_output("larder compute && larder due").splitlines()[-1] == "not due"


RECEIVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        print(self.headers["Authorization"], self.rfile.read(int(self.headers["Content-Length"])).decode(), flush=True)
        self.send_response(201)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", 4999), Handler).serve_forever()
"""


def lineage(host: Host) -> dict[str, float]:
    text = host.file("/var/lib/larder/metrics/pipeline.prom").content_string
    return {
        name: float(value) for name, value in re.findall(r"^larder_pipeline_lineage_(\w+) (\S+)$", text, re.MULTILINE)
    }


@pytest.mark.usefixtures("idle")
def test_run_without_its_lineage_receiver_succeeds_and_one_with_it_is_told(host: Host) -> None:
    assert host.run(f"systemctl start {UNIT}").rc == 0
    assert lineage(host) == {"sent": 0, "lost": 10}
    # The access log goes elsewhere.
    into = "--property=StandardOutput=truncate:/run/lineage --property=StandardError=null"
    host.check_output(f"systemd-run --unit=receiver {into} python3 -c %s", RECEIVER)
    try:
        host.check_output("timeout 30 sh -c 'until ss -lnt | grep -q :4999; do sleep 1; done'")
        assert host.run(f"systemctl start {UNIT}").rc == 0
        assert lineage(host) == {"sent": 10, "lost": 0}
        lines = host.file("/run/lineage").content_string.splitlines()
    finally:
        host.check_output("systemctl stop receiver")
    assert {line.partition("{")[0] for line in lines} == {"Bearer token-of-the-lineage-receiver "}
    events = [json.loads(line[line.index("{") :]) for line in lines]
    assert [(event["eventType"], event["job"]["name"]) for event in (events[0], events[-1])] == [
        ("START", "pipeline"),
        ("COMPLETE", "pipeline"),
    ]


def test_token_of_the_lineage_receiver_is_in_no_file_and_no_environment(host: Host) -> None:
    shown = host.check_output(f"systemctl show {UNIT}; systemctl cat {UNIT}; cat /etc/larder/pipeline.env")
    assert "token-of-the-lineage-receiver" not in shown
    assert host.run("grep -rl token-of-the-lineage-receiver /etc /var/lib/larder /opt/feast").stdout == ""


def test_commands_know_the_inventorys_formats(host: Host) -> None:
    lines = host.check_output("/opt/feast/current/bin/larder formats").splitlines()
    assert lines[0].strip() == "our export"
    header, row = "day,open,high,low,last", "3/4/2024,1,3,1,2"
    host.check_output(f"printf '%s\\n' {header} {row} > /tmp/OURS.csv")
    told = json.loads(host.check_output("/opt/feast/current/bin/larder inspect --json /tmp/OURS.csv"))[0]
    assert (told["format"], told["first_day"]) == ("our export", "2024-04-03")


def test_cron_starts_the_pipeline(host: Host) -> None:
    started = host.check_output("date +%s")
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        journal = host.run(f"journalctl -u {UNIT} --since=@{started} -o cat --no-pager").stdout
        if "Finished" in journal or "Deactivated successfully" in journal:
            return
        time.sleep(3)
    pytest.fail("two minutes passed and cron did not run the pipeline")


@pytest.mark.usefixtures("idle")
def test_run_past_its_deadline_is_ended_and_the_next_one_recovers(host: Host) -> None:
    # The table is locked away: the run would wait for ever.
    host.check_output(
        "systemd-run --unit=lock --uid=postgres psql -d feast"
        " -c 'BEGIN; LOCK TABLE market_data.pending_compute IN ACCESS EXCLUSIVE MODE; SELECT pg_sleep(600)'"
    )
    drop_in = f"/run/systemd/system/{UNIT}.d"
    host.check_output(f"mkdir -p {drop_in} && printf '[Service]\\nTimeoutStartSec=8s\\n' > {drop_in}/short.conf")
    host.check_output("systemctl daemon-reload")
    try:
        assert host.run(f"systemctl start {UNIT}").rc != 0
        assert "timeout" in host.check_output(f"systemctl show {UNIT} -p Result")
    finally:
        # Neither psql nor the run closes its connection: the server notices by itself.
        host.check_output(f"rm -r {drop_in}; systemctl daemon-reload; systemctl kill --signal=KILL lock")
    sessions = (
        "SELECT count(*) FROM pg_stat_activity WHERE usename LIKE 'feast_pipeline%' OR query LIKE '%pg_sleep%600%'"
    )
    deadline = time.monotonic() + 40
    while int(host.check_output(f'runuser -u postgres -- psql -At -d feast -c "{sessions}"')) > 1:  # this one
        assert time.monotonic() < deadline, "the server keeps the sessions of clients that died"
        time.sleep(1)
    result = host.run(f"systemctl start {UNIT}")
    assert result.rc == 0, host.run(f"journalctl -u {UNIT} -n 40 --no-pager -o cat").stdout
