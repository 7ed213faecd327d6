"""After a run with other values: the registry follows the repository, the configuration the variables."""

from __future__ import annotations

from typing import Any

import pytest
from testinfra.host import Host


@pytest.fixture(scope="module")
def host(inventory: Any) -> Host:
    return inventory.host("feast1")


def test_an_object_removed_from_the_repository_leaves_the_registry(host: Host) -> None:
    assert "trading_signals" not in host.check_output("feast feature-services list")
    assert not host.file("/opt/feast/feature_repo/feature_services.py").exists
    assert "ohlcv_features" in host.check_output("feast feature-views list")


def test_configuration_follows_the_variables(host: Host) -> None:
    path = "/etc/credstore.encrypted/pipeline.feature_store.yaml"
    config = host.check_output(f"systemd-creds decrypt --name=feature_store.yaml {path} - | grep ttl")
    assert "cache_ttl_seconds: 5" in config
    assert "key_ttl_seconds: 1000000" in config


def test_one_environment_is_left_and_in_use(host: Host) -> None:
    environments = host.check_output("ls /opt/feast/venvs").split()
    assert [f"/opt/feast/venvs/{name}" for name in environments] == [host.check_output("readlink /opt/feast/current")]
