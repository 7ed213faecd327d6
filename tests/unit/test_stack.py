"""What roles declare in meta/stack.yml is complete, is read as it is meant, and a mistake in it is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import playbooks
import pytest
import yaml
from ansible.errors import AnsibleError
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import init_plugin_loader, lookup_loader
from ansible.template import Templar

import larder_stack

ROOT = playbooks.ROOT
STACK = larder_stack.read()
LOADER = DataLoader()
MONITORED = {
    "larder_exporters": "1",
    "larder_node_exporter_port": "9100",
    "larder_postgres_exporter_port": "9187",
    "larder_redis_exporter_port": "9121",
    "larder_gateway_metrics_port": "8405",
    "larder_feast_uis": "0",
}

init_plugin_loader()


def ask(term: str, variables: dict[str, Any], **options: Any) -> list[Any]:
    templar = Templar(LOADER, variables)
    found: list[Any] = lookup_loader.get("larder.stack.declared", loader=LOADER, templar=templar).run(
        [term], variables, **options
    )
    return found


def declare(directory: Path, role: str, declaration: str) -> Path:
    (directory / role / "meta").mkdir(parents=True)
    (directory / role / "meta/stack.yml").write_text(declaration)
    return directory


def test_every_role_declares_itself() -> None:
    assert STACK.roles.keys() == {path.parents[1].name for path in ROOT.glob("roles/*/meta/main.yml")}


@pytest.mark.parametrize("role", STACK.roles.values(), ids=lambda role: role.name)
def test_a_declaration_names_only_what_is_there(role: larder_stack.Role) -> None:
    """Groups are those of the stack; ports, packages and addresses are variables of a role."""
    known = {
        name
        for path in ROOT.glob("roles/*/meta/argument_specs.yml")
        for entry in yaml.safe_load(path.read_text())["argument_specs"].values()
        for name in entry.get("options", {})
    }
    named = [role.packages, role.listens_at, *role.secrets]
    named += [name for port in role.ports.values() for name in (port.port, port.instances, port.if_set)]
    assert {port.on for port in role.ports.values()} - {""} <= STACK.groups.keys()
    assert {*named} - {""} <= known
    opened = {group for port in role.ports.values() for group in port.open_to}
    used = {group for secret in role.secrets.values() for group in secret.used_by}
    assert opened - {"everybody"} <= STACK.groups.keys()
    assert used <= STACK.groups.keys()


def test_service_names_are_unique() -> None:
    services = [service for role in STACK.roles.values() for service in role.ports]
    assert len(services) == len({*services})


def test_a_role_that_gives_itself_a_certificate_declares_it() -> None:
    given = {
        task["vars"]["certificate_service"]
        for path in ROOT.glob("roles/*/tasks/*.yml")
        for task in yaml.safe_load(path.read_text()) or []
        if task.get("ansible.builtin.include_role", {}).get("name") == "certificate"
    }
    assert given == {*STACK.certificates}


@pytest.mark.parametrize(
    ("declaration", "sentence"),
    [
        ("port: 1\n", "roles/hello/meta/stack.yml has port; there are groups, every_host, packages, ports,"),
        (
            "ports: {hello: {port: hello_port, open: [x]}}\n",
            "roles/hello/meta/stack.yml, ports.hello, has open; there are open_to, port, instances, protocol,",
        ),
        ("ports: {hello: {port: hello_port}}\n", "roles/hello/meta/stack.yml, ports.hello, lacks open_to."),
        ("secrets: {hello_tokens: {used_by: [x]}}\n", "secrets.hello_tokens, lacks purposes."),
        ("- hello\n", "roles/hello/meta/stack.yml is no dictionary."),
    ],
)
def test_a_mistake_in_a_declaration_is_named(tmp_path: Path, declaration: str, sentence: str) -> None:
    with pytest.raises(AnsibleError) as error:
        larder_stack.read(declare(tmp_path / "roles", "hello", declaration))
    assert sentence in str(error.value)


def test_a_group_of_several_roles_has_the_limits_that_any_of_them_gives(tmp_path: Path) -> None:
    declare(tmp_path, "one", "groups: {a: {min: 1}, b: {}}\n")
    declare(tmp_path, "two", "groups: {a: {max: 2}}\n")
    assert larder_stack.read(tmp_path).groups == {"a": {"min": 1, "max": 2}, "b": {}}


def test_a_host_has_the_ports_and_packages_of_its_roles_alone() -> None:
    here = {"group_names": ["redis"], "redis_packages": ["redis-server=5:8.0"], "larder_redis_port": "6380"}
    here |= {"larder_redis_sentinel_port": "26379", "larder_redis_sentinels": "0"} | MONITORED
    open_to = ["redis", "feature_server", "pipeline"]
    exporter: dict[str, Any] = {"protocol": "tcp", "instances": 1, "open_to": ["monitoring"]}
    assert ask("ports", here) == [
        {"service": "node_exporter", "port": 9100} | exporter,
        {"service": "redis_exporter", "port": 9121} | exporter,
        {"service": "redis", "protocol": "tcp", "port": 6380, "instances": 1, "open_to": open_to},
        {"service": "sentinel", "protocol": "tcp", "port": 26379, "instances": 0, "open_to": open_to},
    ]
    packages = ask("packages", here)
    assert "redis-server=5:8.0" in packages
    assert "nftables" in packages
    assert not {"haproxy", "postgresql-17"} & {*packages}
    assert "haproxy" in ask("packages", here, groups=["gateway"])


def test_samples_of_reads_have_a_port_for_the_pipeline_only_where_they_are_kept() -> None:
    defaults = LOADER.load_from_file(str(ROOT / "roles/larder/defaults/main.yml"), trusted_as_template=True)
    here = defaults | MONITORED | {"group_names": ["feature_server"]}
    for ratio, instances in (("0", 0), ("0.01", 2), ("1e-05", 2)):
        (sample,) = [
            port
            for port in ask("ports", here | {"larder_skew_sample_ratio": ratio})
            if port["service"] == "feature_server_sample"
        ]
        assert (sample["instances"], sample["open_to"]) == (instances, ["pipeline"])


def test_a_service_is_there_only_where_its_variable_is_set() -> None:
    def services(**variables: str) -> list[str]:
        here = {"group_names": ["gateway"], "larder_gateway_port": "8443", **MONITORED, **variables}
        return [
            port["service"]
            for port in ask("ports", here)
            if port["service"] not in ("node_exporter", "gateway_metrics", "gateway_feast_ui")
        ]

    assert services() == services(gateway_vip="") == ["gateway"]
    assert services(gateway_vip="192.0.2.9") == ["gateway", "gateway_vrrp"]


def test_a_file_of_a_role_is_found_on_its_hosts() -> None:
    assert ask("tasks/foreign.yml", {"group_names": ["redis"]}) == ["base", "certificate", "exporters", "redis"]
    assert ask("tasks/foreign.yml", {"group_names": []}) == ["base", "certificate", "exporters"]


def test_what_prometheus_asks_follows_from_the_declarations() -> None:
    variables = MONITORED | {"larder_feature_server_check_port": "6586", "larder_feature_server_instances": "3"}
    variables |= {
        "larder_push_server_check_port": "6596",
        "larder_push_server_instances": "2",
        "patroni_instances": "0",
    }
    variables |= {"larder_patroni_port": "8008", "larder_etcd_metrics_port": "2381", "larder_prometheus_port": "9090"}
    asked = {service.pop("service"): service for service in ask("metrics", variables)}
    check = {"port": 6586, "instances": 3, "path": "/metrics", "groups": ["feature_server"]}
    assert asked["feature_server_check"] == check
    assert asked["redis_exporter"]["groups"] == ["redis"]
    assert {*asked["node_exporter"]["groups"]} == {*STACK.groups}
    assert asked["patroni"]["instances"] == 0


def test_what_prometheus_asks_is_open_to_it() -> None:
    ports = {name: port for role in STACK.roles.values() for name, port in role.ports.items() if port.metrics}
    assert [name for name, port in ports.items() if "monitoring" not in port.open_to] == ["prometheus"]  # its own
