"""The clients of this scenario's hosts, and the raw bars."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import testinfra
from clients import Gateway, Trainer
from oracle import Bars, read_bars
from testinfra.host import Host

BARS = Path(__file__).parents[3] / ".larder/trial/bars"

Hosts = Callable[[str], Host]


@pytest.fixture(scope="session")
def host_named(pytestconfig: pytest.Config) -> Hosts:
    inventory = pytestconfig.getoption("--ansible-inventory")
    return lambda name: testinfra.get_host(f"ansible://{name}", ansible_inventory=inventory)


@pytest.fixture(scope="session")
def gateway(host_named: Hosts, pytestconfig: pytest.Config) -> Gateway:
    variables = host_named("server1").ansible.get_variables()
    trusted = Path(pytestconfig.getoption("--ansible-inventory")) / "ca.crt"
    return Gateway(f"https://{variables['ansible_host']}:8443", variables["gateway_tokens"], trusted)


@pytest.fixture(scope="session")
def trainer(host_named: Hosts) -> Trainer:
    return Trainer(host_named("pipeline1"))


@pytest.fixture(scope="session")
def bars() -> dict[str, Bars]:
    """The raw bars by symbol, from the files that the pipeline was given."""
    return {path.stem: read_bars(path) for path in BARS.glob("*.csv")}
