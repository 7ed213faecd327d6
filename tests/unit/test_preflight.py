"""Preflight says what is wrong with an inventory in one sentence each, shows no secret and touches no host."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import playbooks
import pytest
import yaml
from ansible.inventory.manager import InventoryManager
from ansible.parsing.dataloader import DataLoader
from ansible.parsing.vault import VaultLib, VaultSecret
from ansible.playbook.play_context import PlayContext
from ansible.playbook.task import Task
from ansible.plugins.loader import connection_loader, init_plugin_loader
from ansible.template import Templar, trust_as_template
from ansible.vars.hostvars import HostVars
from ansible.vars.manager import VariableManager
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import larder_stack

ROOT = Path(__file__).parents[2]
PLAYBOOK = ROOT / "ansible/preflight.yml"
ARGUMENTS = yaml.safe_load(PLAYBOOK.read_text())[0]["tasks"][0]["preflight"]
STACK = larder_stack.read()

specification = importlib.util.spec_from_file_location("preflight", ROOT / "ansible/plugins/action/preflight.py")
assert specification
assert specification.loader
preflight = importlib.util.module_from_spec(specification)
sys.modules["preflight"] = preflight
specification.loader.exec_module(preflight)

init_plugin_loader()
LOADER = DataLoader()  # one for all tests: it keeps what it has read of the roles

GROUPS = {
    "timescaledb": {"db1": {"ansible_host": "192.0.2.1"}},
    "redis": {"cache1": {"ansible_host": "192.0.2.2"}},
    "feature_server": {"server1": {"ansible_host": "192.0.2.3"}, "server2": {"ansible_host": "2001:db8::4"}},
    "gateway": {"server1": {}},
    "pipeline": {"pipeline1": {"ansible_host": "pipeline1.example.com"}},
}
# The same stack on two hosts: preflight evaluates every variable for each host, so these tests take half the time.
TWO_HOSTS: dict[str, Any] = {
    **{group: {"server1": {"ansible_host": "192.0.2.3"}} for group in GROUPS},
    "redis": {"cache1": {"ansible_host": "2001:db8::2"}},
}
SECRETS = {
    variable: {purpose: f"{variable}/{purpose}/0123456789" for purpose in secret.purposes}
    for variable, secret in STACK.secrets.items()
}


def authority(days: int = 1, *, ca: bool = True) -> dict[str, str]:
    """Return a self-signed certificate and its key, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=9))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    return {"certificate": certificate.public_bytes(Encoding.PEM).decode(), "private_key": private}


AUTHORITY = authority()
LONG = "correct horse battery staple"


def with_secret(variable: str, **changed: Any) -> dict[str, Any]:
    return {variable: {**SECRETS[variable], **changed}}


def without_secret(variable: str, purpose: str) -> dict[str, Any]:
    return {variable: {name: secret for name, secret in SECRETS[variable].items() if name != purpose}}


def write_inventory(path: Path, variables: dict[str, Any], groups: dict[str, Any] | None = None) -> Path:
    """Write an inventory that is right but for what is given; a string of variables is YAML as it stands."""
    (path / "group_vars/all").mkdir(parents=True)
    hosts = {
        group: {"hosts": members} for group, members in {**GROUPS, **(groups or {})}.items() if members is not None
    }
    (path / "hosts.yml").write_text(yaml.safe_dump(hosts))
    (path / "group_vars/all/main.yml").write_text(
        yaml.safe_dump({**SECRETS, "certificate_authorities": [AUTHORITY], **variables})
    )
    return path


def faults(inventory: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run the action plugin on an inventory, with Ansible's own loading and templating."""
    manager = InventoryManager(LOADER, sources=[str(inventory)])
    hostvars = HostVars(manager, VariableManager(LOADER, manager), LOADER)
    task = Task.load({"action": {"module": "preflight", **ARGUMENTS}})
    context = PlayContext()
    local = connection_loader.get("ansible.builtin.local", context)
    action = preflight.ActionModule(task, local, context, LOADER, Templar(LOADER, {}), None)
    sources = {"ansible_inventory_sources": [str(inventory)]}
    result = action.run(task_vars={"hostvars": hostvars, "groups": manager.get_groups_dict(), **sources})
    found = [line.removeprefix("- ") for line in capsys.readouterr().out.splitlines()]
    assert bool(found) == bool(result.get("failed"))
    return [re.sub(r"\x1b\[[\d;]*m", "", line).removeprefix("- ") for line in found]


def test_an_inventory_that_is_right_has_no_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert faults(write_inventory(tmp_path, {}), capsys) == []


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "typo": (
        {"redis_maxmemroy": "1gb"},
        "all hosts: redis_maxmemroy is a variable of no role (did you mean redis_maxmemory?).",
    ),
    "typo in the prefix": (
        {"reids_maxmemory": "1gb"},
        "all hosts: reids_maxmemory is a variable of no role (did you mean redis_maxmemory?).",
    ),
    "a lease that is too short": (
        {"patroni_loop_wait": 10, "patroni_retry_timeout": 10},
        "patroni_ttl is 20 and must be patroni_loop_wait + 2 * patroni_retry_timeout, 30, or more.",
    ),
    "choice": (
        {"redis_maxmemory_policy": "lru"},
        "all hosts: redis_maxmemory_policy is 'lru' and must be one of allkeys-lru",
    ),
    "type": (
        {"redis_timeout": "soon"},
        "all hosts: redis_timeout is 'soon' and must be a whole number of seconds, 0 to 86400.",
    ),
    "boolean": ({"base_firewall_enabled": "maybe"}, "base_firewall_enabled is 'maybe' and must be true or false."),
    "nested typo": (
        {"base_users": [{"nmae": "x"}]},
        "all hosts: base_users is [{'nmae': 'x'}] and must be a list (missing",
    ),
    "Jinja": ({"redis_timeout": "{{ 1 + }}"}, "all hosts: redis_timeout cannot be evaluated"),
    "reference": ({"redis_timeout": "{{ redis_tiemout }}"}, "all hosts: redis_timeout cannot be evaluated"),
    "three tokens": (
        with_secret("gateway_tokens", reader=[LONG, f"{LONG} 2", f"{LONG} 3"]),
        "gateway_tokens.reader holds 3 tokens and may hold one or two, the current one first.",
    ),
    "a short second token": (
        with_secret("gateway_tokens", reader=[LONG, "short"]),
        "gateway_tokens.reader has 5 characters and must have at least 16.",
    ),
    "two passwords": (
        with_secret("redis_passwords", serve=[LONG, f"{LONG} 2"]),
        "redis_passwords.serve is no text and must be: put it in quotes.",
    ),
    "no CA": (
        {"certificate_authorities": []},
        "all hosts: certificate_authorities must be a list of one CA or two",
    ),
    "a CA certificate that is none": (
        {"certificate_authorities": [authority(ca=False)]},
        "certificate_authorities[0].certificate is not a CA's: its basic constraints do not say CA:TRUE.",
    ),
    "a CA that ended": (
        {"certificate_authorities": [authority(days=-1)]},
        "certificate_authorities[0].certificate ended on ",
    ),
    "another CA's key": (
        {"certificate_authorities": [AUTHORITY | {"private_key": authority()["private_key"]}]},
        "certificate_authorities[0].private_key is not the one of its certificate.",
    ),
    "no key": (
        {"certificate_authorities": [AUTHORITY | {"private_key": "secret"}]},
        "certificate_authorities[0].private_key is no private key in PEM without a passphrase",
    ),
    "a CA that is a word": (
        {"certificate_authorities": ["test"]},
        "certificate_authorities[0] must hold a certificate and its private_key, both in PEM.",
    ),
    "another certificate's key": (
        {"certificate_provided": {"gateway": authority(ca=False) | {"private_key": AUTHORITY["private_key"]}}},
        "all hosts: certificate_provided.gateway.private_key is not the one of its certificate.",
    ),
    "a certificate of one's own that is none": (
        {"certificate_provided": {"gateway": {"certificate": "gateway.pem", "private_key": "gateway.key"}}},
        "certificate_provided.gateway.certificate is no certificate in PEM.",
    ),
    "a certificate of one's own that ended": (
        {"certificate_provided": {"redis": authority(days=-1, ca=False)}},
        "certificate_provided.redis.certificate ended on ",
    ),
    "a certificate for no service": (
        {"certificate_provided": {"haproxy": authority(ca=False)}},
        "certificate_provided has an entry for no service; there are backup, database_proxy, etcd, exporters, feast, ",
    ),
    "port 0": (
        {"larder_gateway_port": 0},
        "all hosts: larder_gateway_port is 0 and must be a whole number, 1 to 65535.",
    ),
    "port 70000": (
        {"larder_redis_port": 70000},
        "all hosts: larder_redis_port is 70000 and must be a whole number, 1 to 65535.",
    ),
    "port as a word": (
        {"larder_redis_port": "redis"},
        "all hosts: larder_redis_port is 'redis' and must be a whole number, 1 to 65535.",
    ),
    "last port": (
        {"larder_feature_server_port": 65535, "larder_feature_server_instances": 2},
        "larder_feature_server_port is 65535 for 2 instances; their ports count up from it and must end by 65535.",
    ),
    "two services on a port": (
        {"larder_gateway_port": 6567},
        "server1: larder_gateway_port is 6567 for 1 instances and meets larder_feature_server_port at port 6567.",
    ),
    "lineage by HTTP to another host": (
        {"pipeline_openlineage_url": "http://marquez.example.com/api/v1/lineage"},
        "must be an address such as https://marquez.example.com/api/v1/lineage, by http:// only on the host itself",
    ),
    "share of more than all": (
        {"larder_skew_sample_ratio": 5},
        "all hosts: larder_skew_sample_ratio is 5 and must be a share from 0 to 1, such as 0.01.",
    ),
    "samples on a port of health checks": (
        {"larder_skew_sample_ratio": 0.5, "larder_feature_server_sample_port": 6586},
        "server1: larder_feature_server_sample_port is 6586 for 2 instances and meets larder_feature_server_check_port",
    ),
    "SSH's port": ({"larder_redis_port": 22}, "cache1: larder_redis_port is 22 for 1 instances and meets ansible_port"),
    "project": (
        {"larder_project": "my-project"},
        "all hosts: larder_project is 'my-project' and must be letters, digits and underscores, with no underscore",
    ),
    "memory": (
        {"redis_maxmemory": "2 gigs"},
        "all hosts: redis_maxmemory is '2 gigs' and must be bytes, or a number with",
    ),
    "no secrets": ({"gateway_tokens": None}, "all hosts: gateway_tokens is no dictionary"),
    "secret unset": (
        without_secret("timescaledb_passwords", "push"),
        "all hosts: timescaledb_passwords.push is unset; it must have at least 16 characters.",
    ),
    "secret empty": (with_secret("redis_passwords", serve=""), "all hosts: redis_passwords.serve is unset"),
    "secret short": (
        with_secret("redis_passwords", serve="Tr0ub4dor&3"),
        "all hosts: redis_passwords.serve has 11 characters and must have at least 16.",
    ),
    "secret with a newline": (
        with_secret("gateway_tokens", reader=f"{LONG}\n"),
        "all hosts: gateway_tokens.reader holds a NUL or a newline; every other character is allowed.",
    ),
    "secret with a NUL": (
        with_secret("gateway_tokens", reader=f"{LONG}\0"),
        "all hosts: gateway_tokens.reader holds a NUL or a newline; every other character is allowed.",
    ),
    "secret as a number": (
        with_secret("redis_passwords", admin=12345678901234567890),
        "all hosts: redis_passwords.admin is no text and must be: put it in quotes.",
    ),
    "secret with Jinja": (
        with_secret("redis_passwords", admin=f"{{{{{LONG}"),
        "all hosts: redis_passwords.admin cannot be evaluated; a secret with {{, {% or {# in it must have !unsafe",
    ),
    "secret that refers to nothing": (
        with_secret("redis_passwords", admin="{{ vault_redis_admin }}"),
        "all hosts: redis_passwords.admin cannot be evaluated",
    ),
    "purpose": (
        with_secret("timescaledb_passwords", laod=LONG),
        "all hosts: timescaledb_passwords has an entry for no purpose of the stack (did you mean load?); there are",
    ),
    "secret used twice": (
        with_secret("redis_passwords", serve=LONG, push=LONG),
        "all hosts: redis_passwords.serve and redis_passwords.push are the same secret; each must be one of its own.",
    ),
    "token that is a password": (
        with_secret("gateway_tokens", writer=SECRETS["timescaledb_passwords"]["load"]),
        "all hosts: gateway_tokens.writer and timescaledb_passwords.load are the same secret; each must be one",
    ),
}


@pytest.mark.parametrize(("variables", "sentence"), WRONG.values(), ids=WRONG)
def test_a_wrong_variable_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], variables: dict[str, Any], sentence: str
) -> None:
    found = faults(write_inventory(tmp_path, variables, TWO_HOSTS), capsys)
    assert [fault for fault in found if sentence in fault], found
    assert len(found) == 1, found
    held = [secret for name in SECRETS for secret in (variables.get(name) or {}).values()]
    assert [secret for secret in held if secret and str(secret).strip() in found[0]] == []


WRONG_HOSTS: dict[str, tuple[dict[str, Any], str]] = {
    "two etcd hosts": (
        {"timescaledb": {"db1": {}, "db2": {"ansible_host": "192.0.2.9"}}, "etcd": {"db1": {}, "db2": {}}},
        "group etcd: it has 2 hosts (db1, db2) and needs at least 3, of which one may be lost; or none, without",
    ),
    "etcd without a standby": (
        {"etcd": {"db1": {}, "cache1": {}, "pipeline1": {}}},
        "group etcd: it has hosts, and group timescaledb has db1 alone; failover needs a second database host.",
    ),
    "a web interface without tokens": (
        {"feast_ui": {"server1": {}}},
        "group feast_ui: it has a host, and group monitoring has none, whose tokens (viewer) let people in.",
    ),
    "no group": ({"pipeline": None}, "group pipeline: it has no host in the inventory and needs at least 1."),
    "empty group": ({"gateway": {}}, "group gateway: it has no host in the inventory and needs at least 1."),
    "misspelt group": (
        {"gateway": None, "gateways": {"server1": {}}},
        "group gateway: it has no host in the inventory and needs at least 1 (did you mean gateways?).",
    ),
    "backups on the database's host": (
        {"backup": {"db1": {}}},
        "db1: it is in the groups backup and timescaledb; backups must be on another host than the database.",
    ),
    "the same address": (
        {"redis": {"cache1": {"ansible_host": "192.0.2.1"}}},
        "cache1, db1: larder_address (by default ansible_host, else the name) is 192.0.2.1 for each, and must differ",
    ),
    "one of several Redis hosts by its name": (
        {"redis": {"cache1": {"ansible_host": "192.0.2.2"}, "cache2": {"ansible_host": "cache2.example.com"}}},
        "cache2: larder_address is 'cache2.example.com' and must be an IP address, as there are several Redis hosts",
    ),
    "a port that only one host knows": (
        {"redis": {"cache1": {"larder_redis_port": 6380}}},
        "all hosts: larder_redis_port is '6380' on cache1 and '6379' on db1, pipeline1, server1, server2, and must",
    ),
}


@pytest.mark.parametrize(("groups", "sentence"), WRONG_HOSTS.values(), ids=WRONG_HOSTS)
def test_a_wrong_host_or_group_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], groups: dict[str, Any], sentence: str
) -> None:
    found = faults(write_inventory(tmp_path, {}, groups), capsys)
    assert [fault for fault in found if fault.startswith(sentence)], found


VIP: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a name": (
        {"gateway_vip": "gateway.example.com"},
        {},
        "all hosts: gateway_vip is 'gateway.example.com' and must be an IPv4 address, or ''.",
    ),
    "IPv6": ({"gateway_vip": "2001:db8::9"}, {}, "all hosts: gateway_vip is '2001:db8::9' and must be an IPv4 address"),
    "a host's own": (
        {"gateway_vip": "192.0.2.1"},
        {},
        "db1: gateway_vip is '192.0.2.1', which is the host's own address, and must be one that no host has.",
    ),
    "one gateway": (
        {"gateway_vip": "192.0.2.9"},
        {"gateway": {"server1": {}}},
        "server1: gateway_vip is '192.0.2.9' and needs two gateways or more: add one, or leave gateway_vip empty.",
    ),
    "a gateway by name": (
        {"gateway_vip": "192.0.2.9"},
        {"gateway": {"server1": {}, "gateway2": {"ansible_host": "gateway2.example.com"}}},
        "gateway2: larder_address is 'gateway2.example.com' and must be an IPv4 address where gateway_vip is set.",
    ),
    "one address alone": (
        {"gateway_vip": "192.0.2.9"},
        {"gateway": {"server1": {"gateway_bind_address": "192.0.2.3"}, "gateway2": {"ansible_host": "192.0.2.8"}}},
        "server1: gateway_bind_address is '192.0.2.3' and must be * where gateway_vip is set.",
    ),
    "two virtual addresses": (
        {},
        {"gateway": {"server1": {"gateway_vip": "192.0.2.9"}, "db1": {"gateway_vip": "192.0.2.10"}}},
        "all hosts: gateway_vip is '192.0.2.10' on db1 and '192.0.2.9' on server1, and must be the same everywhere",
    ),
}
TWO_GATEWAYS: dict[str, Any] = {"gateway": {"server1": {}, "gateway2": {"ansible_host": "192.0.2.8"}}}


@pytest.mark.parametrize(("variables", "groups", "sentence"), VIP.values(), ids=VIP)
def test_a_virtual_address_that_cannot_work_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], variables: dict[str, Any], groups: dict[str, Any], sentence: str
) -> None:
    found = faults(write_inventory(tmp_path, variables, {**TWO_GATEWAYS, **groups}), capsys)
    assert [fault for fault in found if fault.startswith(sentence)], found
    assert len(found) == 1, found


def test_two_gateways_may_share_an_address_and_a_pipeline_may_have_a_spare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = {**TWO_GATEWAYS, "pipeline": {"pipeline1": {"ansible_host": "192.0.2.6"}, "db1": {}}}
    assert faults(write_inventory(tmp_path, {"gateway_vip": "192.0.2.9"}, groups), capsys) == []


@pytest.mark.parametrize("name", ["example", "example_small", "example_large"])
def test_the_inventories_to_copy_have_no_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    copy = shutil.copytree(ROOT / "inventory" / name, tmp_path / "prod")
    (copy / "group_vars/all/vault.yml").write_text(yaml.safe_dump({**SECRETS, "certificate_authorities": [AUTHORITY]}))
    assert faults(copy, capsys) == []


def test_all_faults_are_shown_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variables = {"redis_maxmemroy": "1gb", "redis_timeout": "soon", "larder_project": "my-project"}
    assert len(faults(write_inventory(tmp_path, variables, {"gateway": None}), capsys)) == 4


@pytest.mark.parametrize(
    "variables",
    [
        {"redis_bind": ["{{ ansible_facts['default_ipv4']['address'] }}"]},
        {"timescaledb_memory_mb": "{{ ansible_facts['memtotal_mb'] // 2 }}"},
        {"redis_maxmemory": "{{ ansible_memtotal_mb // 4 }}mb"},
        {"larder_address": "{{ ansible_facts.eth1.ipv4.address }}"},
        {"larder_gateway_port": "443"},
        {"my_own_variable": "x", "my_redis_host": "y"},
    ],
    ids=str,
)
def test_unknown_facts_and_foreign_variables_are_no_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], variables: dict[str, Any]
) -> None:
    assert faults(write_inventory(tmp_path, variables), capsys) == []


@pytest.mark.parametrize(
    ("maxmemory", "fault"),
    [("1023mb", False), ("1gb", True), ("1025mb", True), ("2gb", True), ("1100000000", True), ("1g", False)],
)
def test_redis_gets_no_more_than_the_host_has(maxmemory: str, fault: bool) -> None:
    values = {"redis_maxmemory": maxmemory, "ansible_facts": {"memtotal_mb": 1024}}
    host = preflight.Host("cache1", set(), values, groups={"redis"})
    assert bool([*preflight.memory_faults(host)]) is fault


@pytest.mark.parametrize(("share", "fault"), [(1024, False), (2048, False), (2052, True), ("8192", True)])
def test_redis_and_postgresql_on_one_host_get_no_more_than_it_has(share: int | str, fault: bool) -> None:
    values = {"redis_maxmemory": "512mb", "timescaledb_memory_mb": share, "ansible_facts": {"memtotal_mb": 1024}}
    host = preflight.Host("one", set(), values, groups={"redis", "timescaledb"})
    assert bool([*preflight.memory_faults(host)]) is fault


@pytest.mark.parametrize(
    ("facts", "fault"),
    [
        ({"distribution": "Debian", "distribution_major_version": "13"}, []),
        ({"distribution": "Debian", "distribution_major_version": "11"}, ["it runs Debian 11 and must run Debian 13"]),
        ({"distribution": "Fedora", "distribution_major_version": "13"}, ["it runs Fedora 13 and must run Debian 13"]),
        ({}, []),
    ],
)
def test_a_release_that_is_not_supported_is_named(facts: dict[str, str], fault: list[str]) -> None:
    assert [*preflight.release_faults(preflight.Host("db1", set(), {"ansible_facts": facts}), ["13"])] == fault


@given(st.text(st.characters(exclude_characters="\0\n", exclude_categories=["Cs"]), min_size=16))
def test_any_text_without_nul_and_newline_is_a_secret(secret: str) -> None:
    values = {**SECRETS, **with_secret("redis_passwords", serve=secret)}
    host = preflight.Host("db1", values.keys(), values, groups={"redis"})
    assert [*preflight.secret_faults(host, STACK, {})] == []


@pytest.mark.parametrize(
    ("group", "variable", "purposes"),
    [
        ("redis", "redis_replication_passwords", "replica, sentinel"),
        ("timescaledb", "timescaledb_replication_passwords", "replicate"),
    ],
)
def test_passwords_of_replication_are_asked_for_where_a_store_has_several_hosts(
    group: str, variable: str, purposes: str
) -> None:
    values = {name: secret for name, secret in SECRETS.items() if name != variable}
    host = preflight.Host("store1", values.keys(), values, groups={group})
    assert [*preflight.secret_faults(host, STACK, {group: ["store1"]})] == []
    assert [*preflight.secret_faults(host, STACK, {group: ["store1", "store2"]})] == [
        f"{variable} is unset; it must hold a secret each for {purposes}"
    ]


def test_hostile_secrets_pass_through_ansible(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inventory = write_inventory(tmp_path, {"redis_passwords": None})
    hostile = [
        "'\"\\ $HOME ${PATH} %s",
        "a,b#c@d:e/f?g&h=i",
        "{{ 1 / 0 }} {% if %}{#",
        "Passwörter, 密码 🔑🔑🔑🔑🔑",
        "x" * 128,
    ]
    secrets = "".join(
        f"  {purpose}: !unsafe {json.dumps(secret, ensure_ascii=False)}\n"
        for purpose, secret in zip(SECRETS["redis_passwords"], hostile, strict=True)
    )
    (inventory / "group_vars/all/vault.yml").write_text(f"redis_passwords:\n{secrets}")
    assert faults(inventory, capsys) == []


@pytest.mark.parametrize("groups", [{}, {"backup": ["backup1"]}, {"monitoring": ["monitor1"]}])
def test_the_vault_that_init_secrets_writes_holds_what_preflight_asks_for(groups: dict[str, list[str]]) -> None:
    """A role that need not be there has a secret only where it is there."""
    template = trust_as_template((ROOT / "ansible/templates/vault.yml.j2").read_text())
    variables = {"certificate_authority_fresh": AUTHORITY, "groups": groups}
    written = yaml.safe_load(Templar(LOADER, variables).template(template))
    purposes = {name: [*values] for name, values in written.items() if isinstance(values, dict)}
    wanted = {name: [*secret.purposes] for name, secret in STACK.secrets.items()}
    only = {"backup_passphrases": "backup", "monitoring_tokens": "monitoring"}
    assert purposes == {name: held for name, held in wanted.items() if name not in only or only[name] in groups}
    assert list(written["certificate_authorities"][0]) == ["certificate", "private_key"]


SPECS = {
    path.parents[1].name: {
        name: option
        for entry in yaml.safe_load(path.read_text())["argument_specs"].values()
        for name, option in entry.get("options", {}).items()
    }
    for path in ROOT.glob("roles/*/meta/argument_specs.yml")
}
NAMES = sorted(name for options in SPECS.values() for name in options)
CANARY = "CANARYcanary0123456789canary"
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=8)
    | st.dates()
    | st.sampled_from(
        [CANARY, f"x{CANARY}", f"/{CANARY}", f"{CANARY}:22", f"{CANARY}\n", CANARY[:12], CANARY.encode(), 10**400]
    )
    | st.sampled_from([preflight.Unevaluated.UNKNOWN, preflight.Unevaluated.BROKEN])
)
# Words that open a way into what judges more closely.
WORDS = st.sampled_from(
    [
        *["name", "keys", "address", "purpose", "service", "group", "port", "open_to", "retention", "serve", "reader"],
        *["connections", "settings", "groups", "certificate", "private_key", "state", "gateway", CANARY, CANARY[:12]],
    ]
)
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.integers() | st.none(), inner, max_size=3),
    max_leaves=8,
)


@example({"pipeline_max_rejected": 10**400}, False)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    st.dictionaries(st.sampled_from(NAMES) | st.just(f"redis_{CANARY}"), ANYTHING, min_size=1, max_size=4),
    st.booleans(),
)
@example({"pipeline_formats": f"{'x' * 60}{CANARY}"}, True)  # a message that shows 80 characters cuts the secret
def test_no_value_of_a_vault_is_in_any_message_and_no_value_stops_preflight(given: dict[str, Any], own: bool) -> None:
    """Whatever stands in a variable: one of the vault itself, or one of another file that holds what the vault does."""
    values = {**SECRETS, "certificate_authorities": [AUTHORITY], "ansible_facts": {"memtotal_mb": 1024}, **given}
    secret = given if own else {name: given[name] for name in {*SECRETS, *preflight.PAIRS} & given.keys()}
    secrecy = preflight.Secrecy(secret, [CANARY])
    hosts = [
        preflight.Host("db1", values.keys(), values, secrecy, {"timescaledb"}),
        preflight.Host("server1", values.keys(), values, secrecy, {"feature_server", "gateway"}),
    ]
    groups = {group: list(members) for group, members in GROUPS.items()}
    for sentence in preflight.judge(hosts, groups, SPECS, STACK, ARGUMENTS["releases"]):
        assert CANARY[:12] not in sentence
        assert "\n" not in sentence


def vault_of(path: Path, text: str) -> None:
    """Write an encrypted file that the loader of these tests can open."""
    secret = VaultSecret(b"correct horse")
    LOADER.set_vault_secrets([("default", secret)])
    path.write_bytes(VaultLib([("default", secret)]).encrypt(text, secret))


MISTAKES = {
    "a lost line": "certificate_generation:\n  reader: CANARY1\n  writer: CANARY2\n",
    "tokens for a number": "redis_hz: [CANARY1, CANARY2]\n",
    "tokens for a password": "redis_passwords: {serve: [CANARY1, CANARY2], push: CANARY3}\n",
    "a secret for a purpose": "redis_passwords: {CANARY1: CANARY2}\n",
    "a secret for a variable": "redis_CANARY1: CANARY2\n",
    "a secret for a service": "certificate_provided: {CANARY1: {certificate: CANARY2, private_key: CANARY3}}\n",
    "a secret for a certificate": "certificate_authorities: [{certificate: CANARY1, CANARY2: x}]\n",
    "a secret for a user": "base_users: [{name: 'CANARY1 x', CANARY2: y, state: CANARY3}]\n",
    "a secret for a state": "base_users: [{name: alice, state: CANARY3}]\n",
    "a secret for an address": "larder_address: 'CANARY1/x'\n",
    "a secret for a switch": "base_firewall_enabled: CANARY1\n",
    "a secret for a choice": "redis_maxmemory_policy: CANARY1\n",
    "secrets in Jinja": "redis_passwords: {serve: '{{ CANARY1 ', push: '{{ CANARY2 }}', admin: '{{ 1 | CANARY3 }}'}\n",
    "a long number": "redis_hz: 123456789012345678\n",
    "what two hosts disagree on": "larder_project: CANARY1\n",
}


@pytest.mark.parametrize("text", MISTAKES.values(), ids=MISTAKES)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_no_mistake_in_a_vault_shows_what_it_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, elsewhere: bool
) -> None:
    text = re.sub(r"CANARY(\d)", lambda match: f"c4n4ryC4n4ry{match[1]}x7Kq", text)
    inventory = write_inventory(tmp_path, {}, {**TWO_HOSTS, "redis": {"cache1": {"larder_project": "another"}}})
    secrets = re.findall(r"c4n4ryC4n4ry\dx7Kq|\d{18}", text)
    # The mistake is in the vault, or in a file beside it that is not encrypted.
    vault_of(inventory / "group_vars/all/vault.yml", yaml.safe_dump({"mine": secrets}) if elsewhere else text)
    if elsewhere:
        (inventory / "group_vars/all/z.yml").write_text(text)
    found = faults(inventory, capsys)
    assert found
    assert [sentence for sentence in found if "c4n4ry" in sentence or "123456789012345678" in sentence] == []


def test_a_value_that_is_no_secret_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inventory = write_inventory(tmp_path, {"gateway_max_body": -1})
    vault_of(inventory / "group_vars/all/vault.yml", "mine: {a: x, b: '-', c: 1, d: true}\n")
    sentence = "all hosts: gateway_max_body is -1 and must be a whole number of bytes, 1024 to 104857600."
    assert faults(inventory, capsys) == [sentence]


RELATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a window shorter than the schedule's gap": (
        {"pipeline_schedule": "0 2 1 * *"},
        "pipeline_schedule is '0 2 1 * *', which leaves up to 31 days between two runs, and pipeline_window_days",
    ),
    "a TTL shorter than the window": (
        {"feast_online_ttl_seconds": 86400},
        "feast_online_ttl_seconds is 86400 and must be 604800 or more",
    ),
    "renewal before issue": (
        {"certificate_days": 60},
        "certificate_renew_days is 60 and must be less than certificate_days, 60.",
    ),
    "more connections of one than of all": (
        {"gateway_max_connections": 100},
        "gateway_client_connections is 500 and must be gateway_max_connections, 100, or less.",
    ),
    "workers without memory": (
        {"feature_server_workers": 6},
        "feature_server_memory_max is '1G' and must be 1200M or more: each of feature_server_workers, 6, needs 200M.",
    ),
    "metrics among the bars": (
        {"pipeline_metrics": "/var/lib/larder/incoming/metrics"},
        "pipeline_metrics is '/var/lib/larder/incoming/metrics' and must not be in pipeline_incoming, or the same.",
    ),
    "one directory for both": (
        {"pipeline_metrics": "/var/lib/larder/incoming"},
        "pipeline_metrics is '/var/lib/larder/incoming' and must not be in pipeline_incoming, or the same.",
    ),
    "a user twice": (
        {"base_users": [{"name": "alice"}, {"name": "alice"}]},
        "base_users has 'alice' twice, and must have it once.",
    ),
    "a person with the service's account": (
        {"base_users": [{"name": "feast"}]},
        "base_users has 'feast', which is larder_user; people need an account of their own.",
    ),
    "a service that is none": (
        {"base_firewall_extra": {"gatway": ["192.0.2.64"]}},
        "base_firewall_extra has 'gatway', which is no service (did you mean gateway?).",
    ),
    "users that services need": (
        {"redis_users": {"serve": "~* -@all +hmget", "push": "~* -@all", "monitor": "-@all", "admin": "-@all"}},
        "redis_users has no materialize, which services of the stack log in as.",
    ),
    "a client's purpose": (
        {"timescaledb_extra_clients": [{"purpose": "trian", "address": "192.0.2.64/32"}]},
        "timescaledb_extra_clients has the purpose 'trian'; there are load, pipeline, ",
    ),
    "a retention shorter than the window": (
        {"timescaledb_tables": [{"name": "a.b", "columns": [], "retention": "3 days"}]},
        "timescaledb_tables has the retention '3 days' and must keep at least pipeline_window_days, 7 days",
    ),
    "nothing": ({"redis_maxmemory": None}, "redis_maxmemory is empty; leave the line out for the default."),
}


@pytest.mark.parametrize(("variables", "sentence"), RELATIONS.values(), ids=RELATIONS)
def test_values_that_do_not_fit_each_other_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], variables: dict[str, Any], sentence: str
) -> None:
    found = faults(write_inventory(tmp_path, variables, TWO_HOSTS), capsys)
    assert len(found) == 1, found
    assert sentence in found[0]


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (
            {"gateway_bind_address": "192.0.2.9"},
            "gateway_bind_address has '192.0.2.9', which is no address of the host",
        ),
        (
            {"redis_bind": ["127.0.0.1", "-::1", "192.0.2.9"]},
            "redis_bind has '192.0.2.9', which is no address of the host",
        ),
        ({"timescaledb_listen_addresses": ["2001:db8::9"]}, "timescaledb_listen_addresses has '2001:db8::9', which is"),
        ({"gateway_bind_address": "*"}, None),
        ({"redis_bind": ["127.0.0.1", "-::1", "192.0.2.1", "-192.0.2.8"]}, None),
        ({"timescaledb_listen_addresses": ["2001:DB8:0::1"]}, None),
    ],
)
def test_services_listen_at_addresses_that_their_host_has(variables: dict[str, Any], sentence: str | None) -> None:
    facts = {"all_ipv4_addresses": ["192.0.2.1"], "all_ipv6_addresses": ["2001:db8::1"]}
    host = preflight.Host("one", variables.keys(), {**variables, "ansible_facts": facts}, groups=GROUPS.keys())
    found = [*preflight.listener_faults(host, STACK)]
    assert [sentence in fault for fault in found] == ([True] if sentence else [])
    other = preflight.Host("other", variables.keys(), host.values)
    assert [*preflight.listener_faults(other, STACK)] == []


def orphan(answer: Connection, parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.01)
    answer.send(preflight.controller())


def run_that_is_killed(answer: Connection) -> None:
    multiprocessing.get_context("fork").Process(target=orphan, args=[answer, os.getpid()]).start()
    answer.send("started")
    time.sleep(60)


def test_a_killed_run_does_not_hold_the_lock_for_ever() -> None:
    answer, to_tell = multiprocessing.Pipe()
    run = multiprocessing.get_context("fork").Process(target=run_that_is_killed, args=[to_tell])
    run.start()
    assert answer.recv() == "started"
    run.kill()
    run.join()
    assert answer.recv() == run.pid


def test_a_second_run_on_an_inventory_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with subprocess.Popen(["sleep", "60"]) as other:
        assert preflight.lock_fault(lock, other.pid) is None
        assert preflight.lock_fault(lock, other.pid) is None
        assert f"process {other.pid} of this machine" in preflight.lock_fault(lock, os.getpid())
        other.kill()
    # Killed, it left its name behind, and is in nobody's way.
    assert preflight.lock_fault(lock, os.getpid()) is None


def test_a_later_process_of_the_same_number_does_not_hold_the_lock(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text(f"{os.getppid()} 1")
    assert preflight.lock_fault(tmp_path / ".lock", os.getpid()) is None


class TestPlaybook:
    """The whole command, with an SSH client that writes down that it was called."""

    @pytest.fixture
    def run(self, tmp_path: Path) -> Any:
        ssh = tmp_path / "ssh"
        ssh.write_text(f"#!/bin/sh\ntouch {tmp_path}/contacted\nexit 255\n")
        ssh.chmod(0o755)
        environment = playbooks.environment(ANSIBLE_SSH_EXECUTABLE=str(ssh))

        def run(*arguments: str | Path) -> tuple[int, str, bool]:
            command = [Path(sys.executable).with_name("ansible-playbook"), PLAYBOOK, *arguments]
            done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
            return done.returncode, done.stdout + done.stderr, (tmp_path / "contacted").exists()

        return run

    @pytest.mark.parametrize("options", [[], ["--check"], ["--limit", "cache1"], ["--tags", "redis"]], ids=str)
    def test_a_fault_ends_the_run_before_any_host_is_contacted(
        self, tmp_path: Path, run: Any, options: list[str]
    ) -> None:
        inventory = write_inventory(tmp_path / "inventory", {"redis_timeout": "soon"}, {"pipeline": None})
        code, output, contacted = run("-i", inventory, *options)
        assert code == 2
        assert "- group pipeline: it has no host in the inventory and needs at least 1.\n" in output
        assert "- all hosts: redis_timeout is 'soon' and must be a whole number of seconds, 0 to 86400.\n" in output
        assert not contacted

    def test_a_wrong_formula_ends_the_run_before_any_host_is_contacted(self, tmp_path: Path, run: Any) -> None:
        repository = shutil.copytree(ROOT / "feature_repo", tmp_path / "repository")
        views = repository / "computed_views.yml"
        views.write_text(views.read_text().replace("talib.SMA(close, 5)", "talib.SMA(closs, 5)"))
        variables = {"feast_repository": str(repository), "timescaledb_tables_file": str(repository / "tables.yml")}
        code, output, contacted = run("-i", write_inventory(tmp_path / "inventory", variables))
        assert code == 2
        assert "sma_5 has the formula 'talib.SMA(closs, 5)', and closs is no column" in output
        assert not contacted

    def test_an_inventory_without_hosts_is_a_fault(self, tmp_path: Path, run: Any) -> None:
        (tmp_path / "hosts.yml").write_text("all: {}\n")
        code, output, contacted = run("-i", tmp_path / "hosts.yml")
        assert code == 2
        assert "- group timescaledb: it has no host in the inventory" in output
        assert not contacted

    def test_a_host_that_does_not_answer_ends_the_run_for_those_that_do(self, tmp_path: Path, run: Any) -> None:
        here = {"ansible_host": "192.0.2.1", "ansible_connection": "local", "ansible_become": False}
        inventory = write_inventory(tmp_path / "inventory", {}, {"timescaledb": {"db1": here}})
        code, output, contacted = run("-i", inventory)
        assert contacted
        assert code == 2
        assert "ok: [db1]" in output
        assert "fatal: [cache1]: UNREACHABLE!" in output
        assert re.search(r"cache1: .* No host was changed\.", " ".join(output.split()))
        assert "TASK [Check the facts of the hosts]" not in output

    def test_memory_is_asked_of_the_host(self, tmp_path: Path, run: Any) -> None:
        inventory = write_inventory(tmp_path / "inventory", {"redis_maxmemory": "4000gb"})
        code, output, contacted = run("-i", inventory, "-e", "ansible_connection=local", "-e", "ansible_become=false")
        assert code == 2
        assert "- cache1: redis_maxmemory is '4000gb' and must be less than the host's memory, " in output
        assert not contacted

    def test_a_wrong_vault_password_ends_the_run_in_one_sentence(self, tmp_path: Path, run: Any) -> None:
        inventory = write_inventory(tmp_path / "inventory", {})
        for name, password in {"right": "one", "wrong": "two"}.items():
            (tmp_path / name).write_text(password)
        vault = inventory / "group_vars/all/main.yml"
        encrypt: list[str | Path] = [Path(sys.executable).with_name("ansible-vault"), "encrypt", vault]
        encrypt += ["--vault-password-file", tmp_path / "right"]
        subprocess.run(encrypt, cwd=ROOT, check=True, capture_output=True)
        code, output, contacted = run("-i", inventory, "--vault-password-file", tmp_path / "wrong")
        assert code != 0
        assert "Decryption failed (no vault secrets were found that could decrypt)" in output
        assert not contacted


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("formats", [{"name": "ours", "files": ["broker/*"], "zone": "Europe/Athens", "resample": True}], ""),
        ("formats", [{"nme": "ours"}], "pipeline_formats: Entry 1 of the formats is {'nme': 'ours'}"),
        ("formats", [{"name": "ours", "zone": "Europe/Pariss"}], "zone is 'Europe/Pariss'; it may be an IANA zone"),
        ("formats", [{"name": "ours", "headr": ["a"]}], "has the unknown key 'headr'; there are columns, "),
        ("formats", [{"name": "yahoo"}], "The name of the format 'yahoo' is taken"),
        ("max_rejected", 0, ""),
        ("max_rejected", 5, "pipeline_max_rejected is 5 and must be a share from 0 to 1, such as 0.05"),
        ("max_rejected", float("nan"), "pipeline_max_rejected is nan"),
        ("first_bar_date", "1970-01-01", ""),
        ("first_bar_date", "1/1/1970", "pipeline_first_bar_date is '1/1/1970' and must be a day of the past"),
        ("first_bar_date", "2970-01-01", "must be a day of the past"),
    ],
)
def test_settings_for_files_of_bars_are_checked_by_the_pipelines_own_code(name: str, value: Any, says: str) -> None:
    host = preflight.Host("pipeline1", {f"pipeline_{name}"}, {f"pipeline_{name}": value})
    found = [*preflight.file_faults(host)]
    assert len(found) == bool(says)
    assert says in " ".join(found)
