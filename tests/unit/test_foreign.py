"""What the module foreign takes for somebody else's, and what it leaves unmentioned."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

PLUGIN = Path(__file__).parents[2] / "ansible/plugins/modules/foreign.py"
spec = importlib.util.spec_from_file_location("foreign", PLUGIN)
assert spec
assert spec.loader
foreign = importlib.util.module_from_spec(spec)
spec.loader.exec_module(foreign)

NONE = {
    "ports": {},
    "unit": "",
    "given_up": False,
    "variable": "x_take_over",
    "postgresql": None,
    "redis": None,
    "haproxy": None,
    "keepalived": None,
    "services": None,
    "home": None,
    "firewall": None,
    "authorities": None,
}
GIVE_UP = "; use another host, or let Larder take it over with x_take_over: true"
DEBIAN_HBA = """# PostgreSQL Client Authentication Configuration File
local   all             postgres                                peer
# TYPE  DATABASE        USER            ADDRESS                 METHOD
local   all             all                                     peer
host    all             all             127.0.0.1/32            scram-sha-256
host    all             all             ::1/128                 scram-sha-256
local   replication     all                                     peer
"""


def sentences(code: int = 1, output: str = "", **parameters: Any) -> list[str]:
    return list(foreign.sentences(NONE | parameters, lambda _: (code, output)))


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(foreign, "ROOT", tmp_path)
    return tmp_path


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def cluster(root: Path, hba: str = DEBIAN_HBA, *, runs: bool = True) -> Path:
    etc = root / "etc/postgresql/17/main"
    write(etc / "pg_hba.conf", hba)
    if runs:
        write(root / "var/lib/postgresql/17/main/postmaster.pid", "1\n/data\n1\n5432\n/var/run/postgresql\n")
    return etc


POSTGRESQL = {"cluster": "17/main", "database": "feast"}


def test_an_unused_cluster_is_not_reported(root: Path) -> None:
    cluster(root)
    assert sentences(0, "", postgresql=POSTGRESQL) == []
    assert sentences(0, "feast\n", postgresql=POSTGRESQL) == []


def test_databases_rules_and_settings_are_named_with_the_variable(root: Path) -> None:
    etc = cluster(root, DEBIAN_HBA + "host shop  shop 0.0.0.0/0 scram-sha-256 # web\n")
    write(etc / "conf.d/shop.conf", "")
    (sentence,) = sentences(0, "crm\nfeast\nshop\n", postgresql=POSTGRESQL)
    assert sentence == (
        "it has the PostgreSQL cluster 17/main of somebody else: databases crm, shop; "
        "pg_hba.conf has «host shop shop 0.0.0.0/0 scram-sha-256»; conf.d has shop.conf" + GIVE_UP
    )
    assert sentences(0, "shop\n", postgresql=POSTGRESQL, given_up=True) == []


@pytest.mark.parametrize("runs", [False, True])
def test_a_cluster_that_does_not_answer_is_not_taken_for_unused(root: Path, runs: bool) -> None:
    cluster(root, runs=runs)
    assert "its databases are not known" in sentences(1, postgresql=POSTGRESQL)[0]


@pytest.mark.parametrize(
    "ours", ["etc/postgresql/17/main/conf.d/larder.conf", "etc/postgresql-common/createcluster.d/larder.conf"]
)
def test_the_stacks_own_cluster_is_not_foreign(root: Path, ours: str) -> None:
    cluster(root, "host shop shop 0.0.0.0/0 scram-sha-256\n")
    write(root / ours, "")
    assert sentences(0, "shop\n", postgresql=POSTGRESQL) == []


REDIS = {
    "config": "/etc/redis/redis.conf",
    "package": "redis-server",
    "ours": "/etc/ours",
    "named": "/etc/larder/tls/redis/",
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_an_unused_redis_is_not_reported(root: Path) -> None:
    path = write(root / "etc/redis/redis.conf", f"port {free_port()}\ndir {root}\n")
    digest = foreign.hashlib.md5(path.read_bytes()).hexdigest()
    assert sentences(0, f"\n {path} {digest}\n", redis=REDIS) == []


def test_a_redis_with_settings_and_data_is_named(root: Path) -> None:
    path = write(root / "etc/redis/redis.conf", f"port {free_port()}\ndir {root}\nrequirepass x\n")
    write(root / "dump.rdb", "x" * 300)
    (sentence,) = sentences(0, "", redis=REDIS)
    assert sentence == f"it has a Redis of somebody else: {path} is not Debian's; data in {root}/dump.rdb{GIVE_UP}"
    write(root / "etc/ours", "")
    assert sentences(0, "", redis=REDIS) == []


def test_the_stacks_own_configuration_is_known_when_the_file_beside_it_is_lost(root: Path) -> None:
    path = write(root / "etc/redis/redis.conf", f"port {free_port()}\ntls-key-file /etc/larder/tls/redis/1/tls.key\n")
    assert sentences(0, "", redis=REDIS) == []
    path.write_text(path.read_text().replace("larder", "shop"))
    assert len(sentences(0, "", redis=REDIS)) == 1


@pytest.mark.parametrize("password", ["", "hunter2hunter2"])
def test_the_keys_of_a_redis_that_runs_are_counted_or_said_to_be_unknown(root: Path, password: str) -> None:
    port = free_port()
    options = ["--port", str(port), "--save", "", "--daemonize", "no", "--dir", str(root)]
    if password:
        options += ["--requirepass", password]
    binary = shutil.which("redis-server") or shutil.which("redis-check-rdb")  # the same program
    server = subprocess.Popen(["redis-server", *options], executable=binary, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        assert any("Ready to accept connections" in line for line in server.stdout)
        client = ["redis-cli", "-p", str(port)]
        env = os.environ | {"REDISCLI_AUTH": password}
        subprocess.run([*client, "-n", "3", "set", "cart", "pears"], check=True, env=env, capture_output=True)
        write(root / "etc/redis/redis.conf", f"port {port}\ndir {root}\nrequirepass {password}\n")
        (sentence,) = sentences(0, "", redis=REDIS)
    finally:
        server.kill()
        server.wait()
    said = "does not say how many keys it has (NOAUTH" if password else "has 1 keys"
    assert f"it listens on port {port} and {said}" in sentence
    assert "hunter2" not in sentence


def test_the_instances_of_a_keepalived_are_named_and_the_stacks_own_is_none(root: Path) -> None:
    path = write(root / "etc/keepalived/keepalived.conf", "vrrp_instance shop {\n    state MASTER\n}\n")
    look = {"config": "/etc/keepalived/keepalived.conf", "named": "/etc/keepalived/check_haproxy.py"}
    (sentence,) = sentences(0, "", keepalived=look)
    assert sentence.startswith(f"it has a keepalived of somebody else: {path} has vrrp_instance shop; use another host")
    path.write_text((Path(__file__).parents[2] / "roles/gateway/templates/keepalived.conf.j2").read_text())
    assert sentences(0, "", keepalived=look) == []


def test_an_exporter_that_runs_is_named_and_the_stacks_own_or_a_stopped_one_is_none(root: Path) -> None:
    drop_in = "/etc/systemd/system/prometheus-node-exporter.service.d/larder.conf"
    look = {"prometheus-node-exporter": drop_in}
    (sentence,) = sentences(0, "", services=look, variable="exporters_take_over")
    assert sentence == (
        "it has a prometheus-node-exporter of somebody else, which runs; use another host, or let Larder take it over "
        "with exporters_take_over: true"
    )
    assert sentences(0, "", services=look, variable="")[0].endswith("of somebody else, which runs; use another host")
    assert sentences(3, "", services=look) == []
    write(root / drop_in.lstrip("/"), "")
    assert sentences(0, "", services=look) == []


def test_the_frontends_of_an_haproxy_are_named(root: Path) -> None:
    text = "global\n  log x\nfrontend shop\n  bind *:443 ssl\n  bind :80\nbackend b\n  bind x\nlisten stats # x\n"
    path = write(root / "etc/haproxy/haproxy.cfg", text)
    look = {"config": "/etc/haproxy/haproxy.cfg", "package": "haproxy"}
    look |= {"ours": "/etc/haproxy/tokens.map", "named": "/etc/larder/tls/gateway/"}
    (sentence,) = sentences(0, "", haproxy=look)
    assert sentence == (
        f"it has an HAProxy of somebody else: {path} is not Debian's and has frontend shop at *:443 :80, listen stats"
        + GIVE_UP
    )
    write(root / "etc/haproxy/tokens.map", "")
    assert sentences(0, "", haproxy=look) == []


def test_a_directory_and_a_user_of_somebody_else_are_named(tmp_path: Path) -> None:
    home = tmp_path / "feast"
    look = {"user": "nobody-of-this-name", "path": str(home), "ours": [str(home / "venvs"), str(home / "current")]}
    assert sentences(home=look) == []
    home.mkdir()
    assert sentences(home=look) == []
    (home / "photos").mkdir()
    assert "is somebody else's (it holds photos)" in sentences(home=look)[0]
    (home / "venvs").mkdir()
    assert sentences(home=look) == []
    (home / "venvs").rmdir()
    (home / "current").symlink_to(home / "venvs")
    assert sentences(home=look) == []
    assert "it has a user root of somebody else (home /root, shell" in sentences(home=look | {"user": "root"})[0]


RULESET = {
    "nftables": [
        {
            "chain": {
                "family": "inet",
                "table": "filter",
                "name": "input",
                "hook": "input",
                "policy": "drop",
                "handle": 8443,
            }
        },
        {"set": {"family": "inet", "table": "filter", "name": "open", "elem": [{"range": [6566, 6570]}, 9100]}},
        {
            "rule": {
                "family": "inet",
                "table": "filter",
                "handle": 8443,
                "expr": [
                    {
                        "match": {
                            "op": "==",
                            "left": {"payload": {"protocol": "tcp", "field": "dport"}},
                            "right": {"set": [22, 6379]},
                        }
                    },
                    {"accept": None},
                ],
            }
        },
        {"rule": {"family": "ip", "table": "other", "expr": [{"match": {"op": "==", "left": "x", "right": 8443}}]}},
    ]
}


def test_a_firewall_that_drops_the_stacks_ports_is_named_before_the_first_run(root: Path) -> None:
    text = json.dumps(RULESET)
    look = {"ports": [6379, 6566, "8443"], "ours": "/etc/larder-firewall.nft"}
    (sentence,) = sentences(0, text, firewall=look)
    assert sentence.startswith("its firewall (inet filter input) drops by default and has no rule for the ports 8443")
    assert sentences(0, text, firewall=look | {"ports": [6379, 6568]}) == []
    assert sentences(0, text.replace('"drop"', '"accept"'), firewall=look) == []
    assert sentences(1, firewall=look) == []
    assert sentences(0, text, firewall=look, given_up=True) == []
    write(root / "etc/larder-firewall.nft", "")
    assert sentences(0, text, firewall=look) == []


def pem(body: str) -> str:
    return f"-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n"


def test_a_host_of_another_larder_is_named_and_one_in_the_middle_of_a_rotation_is_not(root: Path) -> None:
    write(root / "etc/larder/tls/redis/current/ca.crt", pem("old\nCA") + pem("other"))
    assert sentences(authorities=[pem("new"), pem("oldCA")]) == []
    (sentence,) = sentences(authorities=[pem("new")])
    assert "it belongs to another Larder: the CA that it trusts for redis" in sentence
    assert sentences(authorities=[pem("new")], given_up=True) == []


def test_another_process_on_a_port_is_named_and_the_stacks_own_unit_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "ROOT", Path("/"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (sentence,) = sentences(ports={"larder_redis_port": [port]}, unit="redis-server[.]service")
        assert sentence.startswith(f"port {port} (larder_redis_port) is taken by ")
        assert sentences(ports={"larder_redis_port": [port]}, unit=".*") == []
    assert sentences(ports={"larder_redis_port": [port]}) == []


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        ("0::/system.slice/redis-server.service\n", "redis-server.service"),
        ("0::/system.slice/system-postgresql.slice/postgresql@17-main.service\n", "postgresql@17-main.service"),
        ("12:pids:/x\n0::/user.slice/user-0.slice/session-1.scope\n", "session-1.scope"),
        ("0::/\n", ""),
        ("", ""),
    ],
)
def test_the_unit_of_a_process_is_known(cgroup: str, unit: str) -> None:
    assert foreign.unit_of(cgroup) == unit
