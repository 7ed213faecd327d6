"""Claims about hosts after side_effect.yml: the stranger joined the pipeline, and the other values are in force."""

from __future__ import annotations

import shlex
import subprocess

import pytest


@pytest.mark.parametrize("port", [5432, 6379])
def test_a_host_that_joined_the_pipeline_is_let_in(hosts, port):
    assert hosts.reach("stranger", "store1", port)
    assert hosts.reach("client1", "store1", port)


def test_samples_of_reads_are_told_to_the_pipeline_alone(hosts):
    assert hosts.reach("stranger", "store1", 6606), "it has joined the pipeline"
    assert not hosts.reach("stranger", "store1", 6606, ipv6=True)


def test_a_connection_that_was_open_stays_open(hosts):
    assert hosts["client1"].service("open-connection").is_running


def test_a_name_among_the_extra_sources_is_let_in(hosts):
    assert hosts.reach("client1", "store1", 6566)
    assert not hosts.reach("stranger", "store1", 6566)


def test_a_network_of_ipv6_among_the_extra_sources_is_let_in(hosts):
    assert hosts.reach("stranger", "store1", 6576, ipv6=True)
    assert not hosts.reach("stranger", "store1", 6576)
    assert not hosts.reach("stranger", "store1", 6379, ipv6=True)


def test_a_firewall_that_was_turned_off_is_gone(hosts):
    with hosts["client1"].sudo():
        assert hosts["client1"].run("nft list table inet larder").rc == 1
    assert not hosts["client1"].service("larder-firewall").is_enabled


@pytest.mark.parametrize("verb", ["restart", "reload"])
def test_the_firewall_outlives_the_flush_of_debians_own(hosts, verb):
    with hosts["store1"].sudo():
        assert hosts["store1"].run(f"systemctl {verb} nftables").rc == 0
    assert not hosts.reach("stranger", "store1", 6566)
    assert hosts.reach("stranger", "store1", 6379)


def test_the_time_zone_is_the_new_one(hosts):
    assert hosts["store1"].run("date +%Z").stdout in ("EST\n", "EDT\n")


def test_the_companys_ca_is_trusted(hosts):
    assert hosts["store1"].run("openssl verify /usr/local/share/ca-certificates/company.crt").rc == 0


def test_packages_come_from_the_given_sources_and_are_checked_by_their_key(hosts):
    listing = hosts["store1"].run("apt-get indextargets --format '$(RELEASE) $(SIGNED_BY)'")
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    assert set(listing.stdout.splitlines()) == {
        f"trixie {keyring}",
        f"trixie-updates {keyring}",
        f"trixie-security {keyring}",
    }


def test_an_administrator_logs_in_by_key_and_acts_as_root(hosts):
    variables = hosts["store1"].backend.get_variables()
    command = [
        "ssh",
        *shlex.split(variables["ansible_ssh_common_args"]),
        *("-i", variables["ansible_ssh_private_key_file"], "-o", "BatchMode=yes"),
        f"jane.doe@{variables['ansible_host']}",
        "sudo -n id -un",
    ]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.stdout == "root\n", answer.stderr
