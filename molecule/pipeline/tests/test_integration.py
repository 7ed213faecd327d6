"""The package's own integration tests, run on the host: its TimescaleDB, its Python, its packages."""

from __future__ import annotations

from typing import Any


def test_bars_become_features_in_a_real_database(inventory: Any) -> None:
    result = inventory.host("pipeline1").run(
        "cd /opt/checkout && runuser -u postgres -- env PYTHONPATH=/opt/pytest PYTHONDONTWRITEBYTECODE=1"
        " LARDER_TEST_POSTGRES='host=/var/run/postgresql dbname=postgres'"
        " /opt/feast/current/bin/python -m pytest -q --disable-warnings -p no:cacheprovider"
        " --override-ini=pythonpath= tests/integration"
    )
    assert result.rc == 0, result.stdout[-5000:]
    assert "skipped" not in result.stdout
