"""Which hosts the roles know, with their addresses: larder_hosts, also while a host leaves the stack."""

from __future__ import annotations

from typing import Any

import playbooks
import pytest
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import init_plugin_loader
from ansible.template import Templar, trust_as_template

LARDER = playbooks.ROOT / "roles/larder"
LOADER = DataLoader()
HOSTS: dict[str, dict[str, str]] = {
    "zoe": {"larder_address": "192.0.2.1", "ansible_host": "198.51.100.1"},
    "ann": {"ansible_host": "192.0.2.2"},
    "bob": {},
}

init_plugin_loader()


def evaluate(expression: str, **variables: Any) -> Any:
    """Return an expression's value by the defaults and variables of the role larder."""
    held: dict[str, Any] = {}
    for name in ("defaults", "vars"):
        held |= LOADER.load_from_file(str(LARDER / name / "main.yml"), trusted_as_template=True)
    groups = {"timescaledb": ["zoe", "ann", "bob"], "redis": ["bob", "zoe"]}
    templar = Templar(LOADER, held | {"groups": groups, "hostvars": HOSTS} | variables)
    return templar.evaluate_expression(trust_as_template(expression))


def test_every_host_of_a_group_has_its_own_address_in_the_inventorys_order() -> None:
    assert [*evaluate("larder_hosts.timescaledb").items()] == [
        ("zoe", "192.0.2.1"),
        ("ann", "192.0.2.2"),
        ("bob", "bob"),
    ]
    assert evaluate("larder_addresses.redis") == ["bob", "192.0.2.1"]


def test_a_group_that_the_inventory_lacks_is_empty() -> None:
    assert evaluate("larder_hosts.etcd") == {}
    assert evaluate("larder_addresses.etcd") == []


@pytest.mark.parametrize("leaving", HOSTS)
def test_a_host_that_leaves_is_gone_and_the_others_keep_their_addresses(leaving: str) -> None:
    whole, left = evaluate("larder_hosts"), evaluate("larder_hosts", larder_leaving=leaving)
    for group, hosts in whole.items():
        assert left[group] == {name: address for name, address in hosts.items() if name != leaving}
        assert evaluate(f"larder_addresses.{group}", larder_leaving=leaving) == [*left[group].values()]


def test_the_primarys_address_stays_while_a_host_before_it_leaves() -> None:
    named = {"larder_leaving": "zoe", "larder_timescaledb_primary": "bob"}
    assert evaluate("larder_timescaledb_address", **named) == "bob"
    assert evaluate("larder_timescaledb_primary", larder_leaving="zoe") == "ann"
