"""After a run with other values that was killed half-way, and the next one."""

import json
import time
from datetime import UTC, datetime, timedelta

import pytest

testinfra_hosts = ["ansible://server1"]

UNITS = {"feature-server@1": 6566, "feature-server@2": 6567, "push-server@1": 6576}


@pytest.mark.parametrize("unit", UNITS)
def test_every_instance_runs_with_the_new_values(server, unit):
    unit_now = server.host.check_output(f"systemctl show --property=MemoryMax,Environment {unit}")
    assert f"MemoryMax={900 * 2**20}" in unit_now
    running = server.ask(UNITS[unit], "/ready").json
    assert running["status"] == "ready"
    assert f"LARDER_REVISION={running['revision']} " in unit_now


def test_an_unwanted_instance_is_stopped(server):
    assert not server.host.service("push-server@2").is_running
    assert not server.host.service("push-server@2").is_enabled


def test_a_pushed_quote_is_still_read(server):
    assert server.push(6576, "AFTER", 2.5).status == 200
    assert server.read(6566, "AFTER").json["results"][1]["values"] == [2.5]


def test_a_read_is_sampled_and_told_by_the_instance_that_answered_it(server):
    assert server.push(6576, "SAMPLED", 7.5).status == 200
    for _ in range(30):  # an instance keeps one read in ten seconds
        assert server.read(6567, "SAMPLED").json["results"][1]["values"] == [7.5]
        told = [json.loads(line) for line in server.ask(6607, "/served").text.splitlines()]
        if sampled := [sample for sample in told if sample["entity"] == {"symbol": "SAMPLED"}]:
            assert sampled[0]["views"]["market_features"]["values"] == {"close": 7.5}
            return
        time.sleep(1)
    pytest.fail(f"no read was sampled: {told}")


def test_samples_are_hidden_from_other_users(server):
    assert server.host.file("/var/lib/feature-server-1").mode == 0o700
    assert server.host.file("/var/lib/feature-server-1").user == "feast"
    assert not server.host.file("/var/lib/push-server-1").exists


def test_a_push_may_be_as_far_ahead_as_the_variable_allows(server):
    for seconds, status in ((300, 200), (900, 422)):
        ahead = (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
        assert server.push(6576, "AHEAD", 1.0, event_timestamp=ahead).status == status
