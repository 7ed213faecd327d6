"""After a run with other values that was killed half-way, and the next one."""

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


def test_a_push_may_be_as_far_ahead_as_the_variable_allows(server):
    for seconds, status in ((300, 200), (900, 422)):
        ahead = (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
        assert server.push(6576, "AHEAD", 1.0, event_timestamp=ahead).status == status
