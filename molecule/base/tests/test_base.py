"""Claims about hosts that have the role's defaults, asked by real connections from other hosts."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("port", [5432, 6379])
def test_stores_are_open_to_the_pipeline(hosts, port):
    assert hosts.reach("client1", "store1", port)


@pytest.mark.parametrize("port", [6566, 6567, 6576])
def test_feature_servers_are_closed_to_the_pipeline(hosts, port):
    assert not hosts.reach("client1", "store1", port)


@pytest.mark.parametrize("port", [5432, 6379, 6566, 6567, 6576])
def test_a_host_outside_the_stack_reaches_no_service(hosts, port):
    assert not hosts.reach("stranger", "store1", port)


@pytest.mark.parametrize("port", [5432, 6379, 6566, 6567, 6576])
def test_an_ipv6_address_that_the_inventory_does_not_know_reaches_no_service(hosts, port):
    assert not hosts.reach("client1", "store1", port, ipv6=True)


@pytest.mark.parametrize("ipv6", [False, True])
@pytest.mark.parametrize("port", [22, 6568, 8443, 9999])
def test_ssh_the_gateway_and_other_ports_are_open_to_everybody(hosts, port, ipv6):
    assert hosts.reach("stranger", "store1", port, ipv6)


@pytest.mark.parametrize("port", [5432, 6379, 6566, 6576])
def test_a_host_reaches_its_own_services(hosts, port):
    assert hosts.reach("store1", "store1", port)


@pytest.mark.parametrize("port", [5432, 6379, 6566, 8443])
def test_a_host_in_no_group_drops_nothing(hosts, port):
    assert hosts.reach("client1", "stranger", port)


def test_a_connection_that_was_open_stays_open(hosts):
    assert hosts["client1"].service("open-connection").is_running


def test_other_tables_are_left_alone(hosts):
    # Docker's own tables, by which a container resolves names.
    with hosts["store1"].sudo():
        assert hosts["store1"].run("nft list table ip nat").rc == 0


def test_the_firewall_is_loaded_before_the_network_at_boot(hosts):
    unit = hosts["store1"].run("systemctl show larder-firewall --property=Before,UnitFileState")
    assert "UnitFileState=enabled" in unit.stdout
    assert "network-pre.target" in unit.stdout


def test_the_schedule_is_in_utc(hosts):
    assert hosts["store1"].run("date +%Z").stdout == "UTC\n"


def test_systemd_knows_a_time_service(hosts):
    assert hosts["store1"].run("timedatectl show --property=CanNTP --value").stdout == "yes\n"


@pytest.mark.parametrize(
    ("package", "there"), [("nftables", True), ("openssl", True), ("haproxy", False), ("redis-server", False)]
)
def test_the_packages_of_the_base_are_installed_and_no_other_roles(hosts, package, there):
    assert hosts["store1"].package(package).is_installed == there
