"""What the first run did to the services on its way."""

from __future__ import annotations

import pytest
from conftest import Hosts


@pytest.mark.parametrize(
    ("host", "unit"), [("database1", "postgresql@17-main"), ("cache1", "redis-server"), ("server1", "haproxy")]
)
def test_no_service_has_run_with_debians_settings(host_named: Hosts, host: str, unit: str) -> None:
    """Each service has started once: its package did not start it, but its role, after writing the configuration."""
    named = host_named(host)
    with named.sudo():
        journal = named.check_output(f"journalctl --unit {unit} --output cat --no-pager")
    assert sum(line.startswith("Started ") for line in journal.splitlines()) == 1
