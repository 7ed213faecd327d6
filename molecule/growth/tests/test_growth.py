"""Hosts join, die, move and leave while clients read. The tests build on one another, in this order."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import time
from typing import Any

import pytest

GATEWAYS = ["gateway1", "gateway2", "gateway3"]
GROWN = {"feature_server": ["server2"], "pipeline": ["server2"], "gateway": ["gateway2", "gateway3"]}
STORES = {"redis": ["server2"], "timescaledb": ["server2"]}
SERVERS = {"server1: feature-server@1", "server1: feature-server@2", "server1: push-server@1"}
UNIT = "feature-pipeline.service"


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {unit for unit, state in before.items() if after[unit] != state}


def good(found: dict[str, Any], at_least: int = 100) -> bool:
    return found["failed"] == 0 and not found["wrong"] and found["requests"] >= at_least


def test_gateways_a_feature_server_and_a_spare_join_under_load_and_nothing_restarts(
    growing: Any, clients: Any, inventory: Any, starts: Any, vip: str, holder: Any
) -> None:
    before = starts()
    growing.set(GROWN, gateway_vip=vip)
    with clients.load(inventory.address("gateway1")) as found:
        run = growing.play("site.yml")
        assert run.code == 0, run.output
    assert good(found), found
    assert starts() == before
    assert len(holder(*GATEWAYS)) == 1
    with clients.load(vip) as found:
        time.sleep(5)
    assert good(found, 50), found


def test_a_second_run_of_the_grown_stack_changes_and_restarts_nothing(growing: Any, starts: Any, holder: Any) -> None:
    before = starts(), holder(*GATEWAYS)
    run = growing.play("site.yml")
    assert run.code == 0, run.output
    assert run.changed == {}, run.output
    assert (starts(), holder(*GATEWAYS)) == before


SEND = (
    "import socket, time; s = socket.socket(socket.AF_INET, socket.SOCK_RAW, 112);"
    " [(s.sendto(bytes(20), ('{address}', 0)), time.sleep(0.1)) for _ in range(100)]"
)
RECEIVE = (
    "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_RAW, 112);"
    " print(*sorted({s.recvfrom(99)[1][0] for _ in range(6)}))"
)


def test_vrrp_of_other_hosts_is_dropped(inventory: Any, holder: Any) -> None:
    (first,) = holder(*GATEWAYS)
    backup = next(name for name in GATEWAYS if name != first)
    command = SEND.format(address=inventory.address(backup))
    with subprocess.Popen(inventory.argv("client1", shlex.join(["sudo", "python3", "-c", command]))) as stranger:
        heard = inventory.host(backup).check_output("python3 -c %s", RECEIVE).split()
        assert stranger.poll() is None
    assert heard == [inventory.address(first)]


def test_a_killed_gateway_host_is_replaced_within_3_s_and_its_return_breaks_nothing(
    machines: Any, clients: Any, vip: str, holder: Any
) -> None:
    (first,) = holder(*GATEWAYS)
    others = [name for name in GATEWAYS if name != first]
    with clients.gap(vip) as killed:
        time.sleep(2)
        machines("kill", first)
        time.sleep(6)
        (second,) = holder(*others)
    assert killed[0] <= 3
    with clients.gap(vip) as returned:
        machines("start", first)
        time.sleep(15)
    assert returned[0] < 1
    assert holder(*GATEWAYS) == [second]


def test_a_gateway_whose_haproxy_hangs_gives_the_address_away(
    inventory: Any, clients: Any, vip: str, holder: Any
) -> None:
    (first,) = holder(*GATEWAYS)
    with clients.gap(vip) as hung:
        time.sleep(1)
        inventory.host(first).check_output("systemctl kill --signal=STOP haproxy")
        time.sleep(9)
        now = holder(*GATEWAYS)
        inventory.host(first).check_output("systemctl kill --signal=CONT haproxy")
        time.sleep(5)
    assert first not in now
    assert hung[0] <= 8
    assert holder(*GATEWAYS) == now


def test_a_spare_says_so_and_neither_runs_nor_applies(inventory: Any) -> None:
    server1, server2 = inventory.host("server1"), inventory.host("server2")
    assert "runs on server1; this host is a spare" in server2.run("larder status").stdout
    assert "spare" not in server1.run("larder status").stdout
    for host, lines in ((server1, 3), (server2, 0)):
        cron = host.file("/etc/cron.d/feature-pipeline").content_string.splitlines()
        assert len([line for line in cron if not line.startswith("#")]) == lines
    assert server2.run(f"systemctl start {UNIT}").rc != 0
    assert server2.check_output(f"systemctl show {UNIT} -p ExecMainStatus") == "ExecMainStatus=6"
    assert server2.run("larder apply").rc == 6
    assert server1.run(f"systemctl start {UNIT}").rc == 0


def test_the_pipeline_moves_once_a_run_that_is_under_way_has_ended(growing: Any, inventory: Any, starts: Any) -> None:
    before, server1, server2 = starts(), inventory.host("server1"), inventory.host("server2")
    # The run waits for a lock of the first table that it needs, and goes on when that is free.
    server1.check_output(
        "systemd-run --unit=holder --uid=postgres psql -d feast"
        " -c 'BEGIN; LOCK TABLE market_data.pending_compute IN ACCESS EXCLUSIVE MODE; SELECT pg_sleep(12)'"
    )
    server1.check_output(f"sleep 1; systemctl start --no-block {UNIT}")
    began = time.monotonic()
    run = growing.play("ansible/move_pipeline.yml", "-e", "host=server2")
    assert run.code == 0, run.output
    assert time.monotonic() - began > 8
    assert server1.check_output(f"systemctl show {UNIT} -p Result") == "Result=success"
    assert server2.run(f"systemctl start {UNIT}").rc == 0
    assert server1.run(f"systemctl start {UNIT}").rc != 0
    server1.check_output(f"systemctl reset-failed {UNIT}")
    assert starts() == before


def test_the_host_that_runs_the_pipeline_may_not_leave(growing: Any) -> None:
    run = growing.play("ansible/remove_host.yml", "-e", "host=server2", "-e", "confirm=server2")
    assert run.code != 0
    assert "server2 runs the pipeline. Nothing was changed." in run.sentence
    assert "ansible/move_pipeline.yml -e host=server1" in run.sentence
    assert run.changed == {}


def test_a_host_that_cannot_be_reached_gives_the_pipeline_up_only_if_it_is_lost(
    growing: Any, inventory: Any, cut_off: Any
) -> None:
    server1, server2 = inventory.host("server1"), inventory.host("server2")
    arguments = ("-e", "host=server1", "--ssh-extra-args=-o ConnectTimeout=5 -o ControlPath=none")
    with cut_off("server2"):
        refused = growing.play("ansible/move_pipeline.yml", *arguments)
        lost = growing.play("ansible/move_pipeline.yml", *arguments, "-e", "lost=true")
    assert refused.code != 0
    assert "server2 runs the pipeline and cannot be reached" in refused.sentence, refused.output
    assert lost.code == 0, lost.output
    # The schedule of the host that was lost is on: the database refuses its runs.
    assert UNIT in server2.file("/etc/cron.d/feature-pipeline").content_string
    assert server2.run(f"systemctl start {UNIT}").rc != 0
    assert server2.check_output(f"systemctl show {UNIT} -p ExecMainStatus") == "ExecMainStatus=6"
    assert server1.run(f"systemctl start {UNIT}").rc == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["host=server1", "confirm=server1"], "server1 is the only host of timescaledb, redis: add another one first."),
        (["host=server2", "confirm=server1"], "The name that confirms it is server1, and must be the same."),
        (["host=server2"], "The name that confirms it is missing"),
        (["host=nobody", "confirm=nobody"], "host is nobody; give a host of the stack with -e host=NAME."),
        (["host=server2", "confirm=server2", "data=burn"], "data is burn and may be keep or wipe."),
    ],
)
def test_a_removal_that_would_harm_is_refused(growing: Any, arguments: list[str], sentence: str) -> None:
    run = growing.play("ansible/remove_host.yml", *(part for each in arguments for part in ("-e", each)))
    assert run.code != 0
    assert sentence in run.sentence, run.output
    assert run.changed == {}


def test_a_replica_and_a_standby_join_under_load_and_no_store_restarts(
    growing: Any, clients: Any, inventory: Any, starts: Any, vip: str
) -> None:
    before = starts()
    growing.set(GROWN | STORES, gateway_vip=vip)
    with clients.load(inventory.address("gateway1")) as found:
        run = growing.play("site.yml")
        assert run.code == 0, run.output
    assert good(found), found
    assert changed(before, starts()) == SERVERS  # one after the other: they follow the primary from now on


PUBLISH = """
set -eu
mkdir -p /opt/upgrade && cd /opt/upgrade
for package in {packages}; do
  apt-get -qq download "$package" 2> /dev/null
  dpkg-deb --raw-extract "$package"_*.deb tree
  rm "$package"_*.deb
  sed -i 's/^Version: .*/&+upgraded/; s/\\(redis-tools (= [^)]*\\)/\\1+upgraded/' tree/DEBIAN/control
  dpkg-deb -Znone --build tree "$package.deb" > /dev/null
  rm -r tree
  {{ dpkg-deb --field "$package.deb"; echo "Filename: ./$package.deb"; stat --format 'Size: %s' "$package.deb"
    echo "SHA256: $(sha256sum < "$package.deb" | cut -d ' ' -f 1)"; echo; }} >> Packages
done
echo 'deb [trusted=yes] file:/opt/upgrade ./' > /etc/apt/sources.list.d/upgrade.list
"""


PACKAGES = {
    **{name: ["haproxy", "keepalived"] for name in GATEWAYS},
    "server1": ["redis-tools", "redis-server", "postgresql-17"],
    "server2": ["redis-tools", "redis-server", "postgresql-17", "libffi8"],
}
PROGRAMS = {
    "libffi8": "libffi.so",
    "haproxy": "sbin/haproxy",
    "keepalived": "sbin/keepalived",
    "redis-tools": "bin/redis-check-rdb",
    "redis-server": "bin/redis-check-rdb",
    "postgresql-17": "17/bin/postgres",
}


def test_upgraded_packages_run_on_every_host_and_no_read_fails(
    growing: Any, clients: Any, inventory: Any, vip: str
) -> None:
    for name, named in PACKAGES.items():
        inventory.host(name).check_output(PUBLISH.format(packages=" ".join(named)))
    # A push waits, or fails, while the primary of Redis changes.
    with clients.load(vip, "--no-push") as found:
        run = growing.play("ansible/upgrade.yml", "--limit", ",".join(PACKAGES))
        assert run.code == 0, run.output
    assert good(found), found
    for name, named in PACKAGES.items():
        host = inventory.host(name)
        for package in named:
            assert host.package(package).version.endswith("+upgraded")
            assert PROGRAMS[package] in host.check_output("cat /proc/[0-9]*/maps")
            assert host.run(f"cat /proc/[0-9]*/maps | grep '{PROGRAMS[package]}.*(deleted)'").stdout == ""
    # The replica was upgraded first, and then took the primary's place.
    assert json.loads(inventory.host("server2").check_output("larder-redis status"))["role"] == "primary"
    assert inventory.host("server2").run("ls /var/lib/postgresql/17/main/standby.signal").rc == 0


def test_a_primary_may_not_leave(growing: Any) -> None:
    run = growing.play("ansible/remove_host.yml", "-e", "host=server2", "-e", "confirm=server2")
    assert run.code != 0
    assert "server2 is the primary of Redis. Nothing was changed." in run.sentence
    assert "ansible/switch_redis.yml -e to=server1" in run.sentence
    assert run.changed == {}


def test_hosts_leave_under_load_and_the_others_have_forgotten_them(
    growing: Any, clients: Any, inventory: Any, starts: Any, vip: str, holder: Any
) -> None:
    # The lines of gateway1 and server1 stay, so another gateway has the address.
    if holder("gateway1"):
        inventory.host("gateway1").check_output("systemctl restart keepalived && sleep 3")
    (leaving,) = holder(*GATEWAYS)
    assert leaving != "gateway1"
    staying = next(name for name in GATEWAYS if name not in ("gateway1", leaving))
    run = growing.play("ansible/switch_redis.yml", "-e", "to=server1")
    assert run.code == 0, run.output
    before = starts()
    with clients.load(vip) as found:
        first = growing.play("ansible/remove_host.yml", "-e", f"host={leaving}", "-e", f"confirm={leaving}")
        assert first.code == 0, first.output
        growing.set(GROWN | STORES | {"gateway": [staying]}, gateway_vip=vip)
        arguments = ("-e", "host=server2", "-e", "confirm=server2", "-e", "data=wipe")
        second = growing.play("ansible/remove_host.yml", *arguments)
        assert second.code == 0, second.output
    assert good(found), found
    # One Redis is left: the feature servers do not ask who the primary is any more.
    assert changed(before, starts()) == SERVERS
    growing.set({"gateway": [staying]}, gateway_vip=vip)
    run = growing.play("site.yml")
    assert run.code == 0, run.output
    assert run.changed == {}, run.output
    assert holder("gateway1", staying)

    for name in (leaving, "server2"):
        host, address = inventory.host(name), inventory.address(name)
        assert host.run("ss -Hltn | grep -E ':(8443|65[6-9][0-9]|6379|5432)'").stdout == ""
        for secret in (
            "/etc/credstore.encrypted/serve.feature_store.yaml",
            "/etc/credstore.encrypted/redis.replication",
            "/etc/redis/users.acl",
            "/etc/haproxy/tokens.map",
            "/etc/larder/tls",
        ):
            assert not host.file(secret).exists
        for other in ("server1", "gateway1", staying):
            known = inventory.host(other).run(
                "cat /etc/larder-firewall.nft /etc/haproxy/haproxy.cfg /etc/keepalived/keepalived.conf"
                " /etc/larder/gateways /etc/postgresql/17/main/pg_hba.conf /etc/redis/*"
            )
            assert address not in re.findall(r"[0-9.]+", known.stdout)
    server1, server2 = inventory.host("server1"), inventory.host("server2")
    for former in ("/opt/feast", "/var/lib/postgresql/17/main", "/var/lib/redis/appendonlydir"):
        assert not server2.file(former).exists
    users = server1.check_output("cat /etc/redis/users.acl; sudo -u postgres psql -Atc 'SELECT rolname FROM pg_roles'")
    assert not re.findall(r"replica\w*_g[0-9a-f]{8}", users)
    assert server1.check_output("sudo -u postgres psql -Atc 'SELECT slot_name FROM pg_replication_slots'") == ""


def test_two_gateways_with_an_address_are_not_made_one(growing: Any) -> None:
    run = growing.play("ansible/remove_host.yml", "-e", "host=gateway1", "-e", "confirm=gateway1")
    assert "one of two gateways, and gateway_vip needs two" in run.sentence
    assert run.changed == {}
