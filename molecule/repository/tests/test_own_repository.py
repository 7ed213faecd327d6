"""Larder knows nothing of moving averages: another entity, another hypertable, the same stack, on one host."""

from __future__ import annotations

import json
import urllib.request
from typing import Any


def read(inventory: Any, view: str, names: list[str], accounts: list[int]) -> dict[str, list[Any]]:
    """Read a view through the gateway."""
    token = inventory.variables("single1")["gateway_tokens"]["reader"]
    features = [f"{view}:{name}" for name in names]
    body = json.dumps({"features": features, "entities": {"account_id": accounts}})
    request = urllib.request.Request(
        f"https://{inventory.address('single1')}:8443/get-online-features",
        body.encode(),
        {"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=20, context=inventory.trusted()) as response:
        answer = json.load(response)
    return {
        name: column["values"]
        for name, column in zip(answer["metadata"]["feature_names"], answer["results"], strict=True)
    }


def test_values_of_another_entity_are_served(inventory: Any) -> None:
    assert read(inventory, "account_limits", ["max_notional", "tier", "breaches"], [7, 8, 9]) == {
        "account_id": [7, 8, 9],
        "max_notional": [2.5e6, None, None],
        "tier": ["gold", "new", None],
        "breaches": [1, 0, None],
    }


def test_values_computed_from_the_teams_own_hypertable_are_served(inventory: Any) -> None:
    assert read(inventory, "account_usage", ["notional_change", "all_breaches"], [7, 8, 9]) == {
        "account_id": [7, 8, 9],
        "notional_change": [1.5e6, None, None],
        "all_breaches": [1, 0, None],
    }


def test_row_corrected_by_hand_is_computed_by_the_next_run(inventory: Any) -> None:
    host = inventory.host("single1")
    correct = "UPDATE risk.account_limits SET max_notional = 2e6 WHERE (account_id, tier, breaches) = (7, 'gold', 0)"
    host.check_output(f'runuser -u postgres -- psql -At -d feast -c "{correct}"')
    host.check_output("systemctl start feature-pipeline")
    assert read(inventory, "account_usage", ["notional_change"], [7])["notional_change"] == [0.5e6]


def test_nothing_of_larders_own_features_was_created(inventory: Any) -> None:
    host = inventory.host("single1")
    tables = host.check_output(
        'runuser -u postgres -- psql -At -d feast -c "SELECT hypertable_name FROM timescaledb_information.hypertables"'
    )
    assert sorted(tables.split()) == ["account_limits", "account_usage"]
    assert "ohlcv" not in host.check_output("feast feature-views list")


def test_status_is_healthy(inventory: Any) -> None:
    result = inventory.host("single1").run("larder status")
    assert result.rc == 0, result.stdout + result.stderr
