"""Every variable of every role has a rule for what it means, and no rule accepts nonsense or fails on a value."""

from __future__ import annotations

import shutil
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import larder_stack
import larder_values

ROOT = Path(__file__).parents[2]
ROLES = sorted(path.parents[1] for path in ROOT.glob("roles/*/meta/argument_specs.yml"))


def options(role: Path) -> dict[str, dict[str, Any]]:
    entries = yaml.safe_load((role / "meta/argument_specs.yml").read_text())["argument_specs"]
    return {name: option for entry in entries.values() for name, option in entry.get("options", {}).items()}


OPTIONS = {name: option for role in ROLES for name, option in options(role).items()}
DEFAULTS = {
    name: value
    for role in ROLES
    for name, value in (yaml.safe_load((role / "defaults/main.yml").read_text()) or {}).items()
}
STACK = larder_stack.read()
RULES = STACK.values
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=40)
    | st.binary(max_size=8)
    | st.dates()
    | st.datetimes()
    | st.sampled_from([10**400, "9" * 5000, "0 " * 5000, "1h " * 5000, "\ud800"])
)
# Whatever YAML may make of a file, keys that are no text included.
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(SCALARS, inner, max_size=4) | st.tuples(inner, inner),
    max_leaves=10,
)


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_every_variable_has_a_rule_or_a_reason_why_none(role: Path) -> None:
    declared = STACK.roles[role.name]
    rules = {**declared.values, **declared.secrets}
    known = options(role)
    assert rules.keys() - known.keys() == set()
    needless = {
        name
        for name, option in known.items()
        if option["type"] == "bool" or ("choices" in option and option["type"] == "str")
    }
    assert known.keys() - needless - rules.keys() == set()


def test_every_rule_is_valid() -> None:
    def check(rule: Any) -> None:
        kinds = [kind for kind in ("form", "each", "keys", "fields", "any") if kind in rule]
        assert len(kinds) == 1, rule
        if "any" in rule:
            assert isinstance(rule["any"], str)
        elif "form" in rule:
            arguments = {name: value for name, value in rule.items() if name not in {"form", "also"}}
            larder_values.FORMS[rule["form"]](None, **arguments)
        for inner in ("each", "keys", "values"):
            if inner in rule:
                check(rule[inner])
        for inner in rule.get("fields", {}).values():
            check(inner)

    for rule in RULES.values():
        check(rule)


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_rule_and_the_type_of_its_variable_agree(name: str) -> None:
    rule, kind = RULES[name], OPTIONS[name]["type"]
    if "form" in rule:
        forms = {"int": {"number"}, "path": {"directory", "file"}}
        assert rule["form"] in forms.get(kind, larder_values.FORMS.keys() - {"number", "directory", "file"})
    elif "any" not in rule:
        assert kind == ("list" if "each" in rule else "dict")


@pytest.mark.parametrize(
    "name", sorted(name for name, value in DEFAULTS.items() if name in RULES and "{{" not in str(value))
)
def test_a_default_keeps_its_own_rule(name: str) -> None:
    assert [*larder_values.faults(name, DEFAULTS[name], RULES[name])] == []


@settings(max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(RULES)), ANYTHING)
def test_no_rule_fails_on_a_value(name: str, value: Any) -> None:
    for where, _, allowed in larder_values.faults(name, value, RULES[name]):
        assert where
        assert allowed


@pytest.mark.parametrize("name", sorted(RULES))
def test_no_rule_fails_on_a_number_that_python_cannot_print(name: str) -> None:
    for value in (10**5000, [10**5000], {10**5000: 10**5000}):
        [*larder_values.faults(name, value, RULES[name])]


NUMBERS = sorted(name for name, rule in RULES.items() if rule.get("form") == "number")


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_has_a_least_and_a_most(name: str) -> None:
    rule = RULES[name]
    wrong = [rule["least"] - 1, rule["most"] + 1, -1, 10**18, 10**5000, 1.5, float(rule["least"]), True, None, [], {}]
    words = [
        "two",
        "",
        " ",
        "1e3",
        "0x10",
        "1_000",
        "+5",
        "007",
        "\u0663",
        "5\n",
        "5s",
        "1,000",
        "infinity",
        "unlimited",
        "-0.0",
        "nan",
    ]
    assert [value for value in (*wrong, *words) if not larder_values.number(value, **arguments(rule))] == []
    assert [
        value
        for value in (rule["least"], rule["most"], str(rule["most"]))
        if larder_values.number(value, **arguments(rule))
    ] == []


def arguments(rule: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in rule.items() if name not in {"form", "also"}}


NONSENSE: dict[str, list[Any]] = {
    "pipeline_schedule": [
        "99 2 * * *",
        "0 24 * * *",
        "0 2 31 2 *",
        "0 2 30 2 *",
        "0 2 31 4,6,9,11 *",
        "0 2 0 * *",
        "0 2 * 13 *",
        "0 2 * * 8",
        "0 2 * * monday",
        "0 2 * * fri-mon",
        "0 2 * * 5-0",
        "30-10 2 * * *",
        "5/2 2 * * *",
        "*/0 * * * *",
        "*/60 * * * *",
        "0,,30 2 * * *",
        "~ 2 * * *",
        "0 2 ? * *",
        "0 2 L * *",
        "0 2 * *",
        "0 2 * * * *",
        "0 2 * * * root",
        "0 2 * * *\n",
        "0 2 * * *\n* * * * * root reboot",
        "0 2 * * %",
        "# 2 * * *",
        "@reboot",
        "@yearly",
        "@Daily",
        "@every 5m",
        "2:00",
        "daily",
        "",
        2,
        None,
    ],
    "pipeline_deadline": [
        "2 hours?",
        "1G5",
        "infinity",
        "0",
        "-1h",
        "2 H",
        "10ms",
        "1 2",
        "",
        "two hours",
        "2h\n",
        "1 year",
        "59s",
        "8d",
        7.5,
    ],
    "pipeline_memory_max": [
        "1G5",
        "infinity",
        "1GB",
        "2 G",
        "0",
        "0%",
        "101%",
        "-1",
        "2g",
        "100",
        "2T",
        "1.5G",
        "",
        True,
    ],
    "redis_maxmemory": ["0", "1mb", "-1", "2 gigs", "2gib", "2.5gb", "50%", "9000gb", "", "2gb\n", "2t", False],
    "larder_home": [
        "opt/feast",
        "/opt/../etc",
        "/",
        "/opt",
        "/etc/feast",
        "/home/feast",
        "/tmp/feast",
        "/opt/feast\n",
        '/opt/"feast',
        "/opt/fe ast",
        "/opt//feast",
        "/var/lib",
        "~/feast",
    ],
    "pipeline_incoming": [
        "incoming",
        "/root/incoming",
        "/var/lib/larder/../x",
        "/var/lib/larder/$HOME",
        "/usr/share/larder",
        "/var/lib/la'rder",
        "%h/x",
    ],
    "larder_user": [
        "root",
        "Feast",
        "fe ast",
        "feast:feast",
        "0feast",
        "-feast",
        "x" * 33,
        "postgres",
        "",
        "feast\n",
        7,
    ],
    "larder_project": ["my-project", "_trading", "tra ding", "", "trading\n"],
    "larder_database": ["postgres", "template1", "Feast", "my-db", "feast;", "feast?x=1", "x" * 64, ""],
    "larder_address": [
        "0.0.0.0",
        "::",
        "10.0.0.0/8",
        "10.0.0.256",
        "10.0.0",
        "1.2.3.04",
        "224.0.0.1",
        "a b",
        "host:22",
        "",
        "fe80::1%eth0",
        "-x",
    ],
    "gateway_bind_address": ["0.0.0.0", "::", "10.0.0.0/8", "300.0.0.1", "*:8443", "a,b", ""],
    "gateway_vip": [
        "gateway.example.com",
        "2001:db8::9",
        "0.0.0.0",
        "127.0.0.1",
        "192.0.2.0/24",
        "192.0.2.300",
        None,
        1,
    ],
    "gateway_vip_interface": ["eth 0", "a" * 16, "eth0\n", "{eth0}", None],
    "timescaledb_listen_addresses": [
        [],
        "127.0.0.1",
        ["*"],
        ["0.0.0.0"],
        ["::"],
        ["10.0.0.0/24"],
        ["127.0.0.1", ""],
        [None],
    ],
    "redis_bind": [[], ["*"], ["-*"], ["0.0.0.0"], ["-::"], "127.0.0.1", ["127.0.0.1 ::1"]],
    "timescaledb_extra_clients": [
        [{"purpose": "train", "address": address}]
        for address in (
            "0.0.0.0/0",
            "::/0",
            "192.0.2.17/24",
            "192.0.2.17",
            "192.0.2.0/33",
            "192.0.2.0/255.0.0.255",
            "host/32",
            "",
            None,
        )
    ],
    "base_firewall_extra": [
        {"redis": [address]}
        for address in ("0.0.0.0/0", "0.0.0.0", "::/0", "192.0.2.17/24", "192.0.2.300", "a b", "}; flush", None)
    ]
    + [{"redis": "192.0.2.1"}, {"re dis": []}, []],
    "base_users": [[{"name": name}] for name in ("root", "Al ice", "alice:x", "", None, "x" * 40, "ALL", "al\nice")]
    + [
        [{"name": "alice", "keys": [key]}]
        for key in ("ssh-ed25519", "AAAA", "ssh-rsa AAAA\nssh-rsa AAAB", "-----BEGIN OPENSSH PRIVATE KEY-----", None)
    ]
    + [[{"name": "alice", "keys": "ssh-ed25519 AAAAx"}]],
    "base_timezone": ["Zurich", "Europe/Nowhere", "../../etc/passwd", "UTC+1 ", "", "Etc/UTC\n"],
    "base_packages": [["acl; reboot"], ["-acl"], ["acl ca"], "acl", [None], ["Acl"]],
    "base_ca_certificates": [
        ["/nowhere.crt"],
        ["company.crt"],
        [str(Path(__file__))],
        ["/etc"],
        [""],
        [None],
        "/etc/ssl/x.crt",
    ],
    "base_apt_sources": [
        [{"uris": ["https://a b"], "suites": ["trixie"]}],
        [{"uris": [], "suites": ["trixie"]}],
        [{"uris": ["https://x"], "suites": ["a\nb"]}],
    ],
    "feast_index_url": ["pypi.example.com", "ftp://x", "https://x y", "https://x\n", 'https://x"', "https://"],
    "feast_download_environment": [{"A B": "x"}, {"A": "x\ny"}, {"": "x"}, {1.5: "x"}, {"A": None}, {"A": True}],
    "feast_repository": ["feature_repo", "/nowhere", "", str(Path(__file__)), "/\n"],
    "timescaledb_tables_file": ["tables.yml", "/nowhere/tables.yml", "/etc"],
    "timescaledb_retention_schedule": [
        "",
        "25:00",
        "*-02-30 01:00",
        "2020-01-01",
        "*-*-* 01:15 Nowhere/City",
        "Someday 01:00",
        "at 2",
        "0 2 * * *",
        "*-*-* 01:15:00 UTC\n",
    ],
    "timescaledb_roles": [
        {"train": {"connections": 0}},
        {"train": {"connections": "many"}},
        {"tr ain": {}},
        {"train": None},
        {"train": {"member_of": ["postgres"]}},
    ],
    "timescaledb_settings": [{"shared buffers": 1}, {"x = y\n": 1}],
    "certificate_names": [["a b"], [""], ["x\ny"], [None]],
    "certificate_trusted": [["company.crt"], ["-----BEGIN CERTIFICATE-----"], [None]],
    "pipeline_stages": [[], ["load", "train"], "load", ["Load"]],
    "redis_packages": [[], "redis-server", ["redis server"], ["Redis"], [None]],
    "timescaledb_allow_lossy": [["table"], ["a b.c"], "a.b"],
    "container_host_set": ["a b", "", "A", "../x"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in NONSENSE.items() for value in values], ids=repr
)
def test_a_wrong_value_is_refused(name: str, value: Any) -> None:
    assert [*larder_values.faults(name, value, RULES[name])]


SENSE: dict[str, list[Any]] = {
    "gateway_vip": ["", "192.0.2.9"],
    "gateway_vip_interface": ["", "eth0", "ens3.100", "br-lan"],
    "pipeline_schedule": [
        "0 2 * * *",
        "*/15 8-18 * * mon-fri",
        "0 22 * * 1-5",
        "0 2 * * 7",
        "0 2 * * SUN",
        "0 2 1,15 * *",
        "0 2 29 2 *",
        "0  2\t* * *",
        "@daily",
        "5 4 * jan-mar *",
        "0-30/10 2 * * *",
        "00 02 * * *",
    ],
    "pipeline_deadline": ["2h", "90s", "1h 30min", "1h30min", "7200", 7200, "1.5h", "2 hours", "7d", "1 week"],
    "pipeline_memory_max": ["2G", "1500M", "80%", 2147483648, "1T"],
    "redis_maxmemory": ["12mb", "2gb", "2GB", 134217728, "128mb", "1g"],
    "larder_address": [
        "192.0.2.1",
        "2001:db8::1",
        "db1",
        "db1.example.com",
        "db_1",
        "localhost",
        "127.0.0.1",
        "1host.example",
    ],
    "redis_bind": [["127.0.0.1", "-::1", "192.0.2.1"]],
    "base_firewall_extra": [{"redis": ["192.0.2.17", "2001:db8:7::/64", "workstation.example.com"]}],
    "base_users": [
        [
            {
                "name": "alice",
                "keys": [
                    "ssh-ed25519 AAAAC3Nza alice",
                    "sk-ssh-ed25519@openssh.com AAAAC3= a",
                    'from="10.0.0.1" ssh-rsa AAAAB3Nza==',
                ],
                "sudo": True,
            }
        ],
        [{"name": "a.b", "state": "absent"}],
    ],
    "timescaledb_extra_clients": [
        [{"purpose": "train", "address": "192.0.2.17/32"}, {"purpose": "train", "address": "2001:db8::/64"}]
    ],
    "timescaledb_retention_schedule": [
        "daily",
        "Sun *-*-* 03:00:00",
        "Mon..Fri 22:30",
        "*-*-* 01:15:00 Europe/Zurich",
        "*:0/15",
    ],
    "pipeline_metrics": ["/var/lib/prometheus/node-exporter", "/srv/metrics", "/opt/larder/metrics.d"],
    "feast_index_url": ["https://pypi.example.com/simple", "http://10.0.0.1:3141/root/pypi/+simple/", ""],
    "certificate_names": [["features.example.com", "*.example.com", "192.0.2.9", "2001:db8::9"]],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in SENSE.items() for value in values], ids=repr
)
def test_a_right_value_is_accepted(name: str, value: Any) -> None:
    assert [*larder_values.faults(name, value, RULES[name])] == []


@pytest.mark.parametrize(
    ("line", "days"),
    [
        ("0 2 * * *", 1),
        ("0 2 * * mon-fri", 3),
        ("0 2 * * 0", 7),
        ("0 2 * * 7", 7),
        ("0 2 1 * *", 31),
        ("0 2 1 * mon", 7),  # either day is enough
        ("0 2 */2 * mon", 21),  # cron takes */2 as not given: both must be
        ("0 2 29 2 *", 1461),
        ("0 2 31 * *", 61),
    ],
)
def test_the_longest_gap_of_a_schedule_is_known(line: str, days: int) -> None:
    assert larder_values.longest_gap(line) == days


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="asks systemd")
@pytest.mark.parametrize("form", ["calendar", "span"])
def test_systemd_understands_what_is_accepted(form: str) -> None:
    words = "* *-*-* Mon Mon..Fri sat 01:15 01:15:00 UTC *-02-29 *-1..3-1,15 0/2:00 daily 90 1h 30 min 2 days s : - /"
    pieces = st.sampled_from(words.split())

    @given(st.lists(pieces, min_size=1, max_size=4), st.sampled_from(["", " "]))
    def compare(words: list[str], blank: str) -> None:
        text = blank.join(words)
        accepted = (
            larder_values.calendar_event(text) is None
            if form == "calendar"
            else larder_values.seconds(text) is not None
        )
        if accepted:
            command = "calendar" if form == "calendar" else "timespan"
            done = subprocess.run(["systemd-analyze", command, text], capture_output=True, text=True, check=False)
            assert done.returncode == 0, text
            assert "never" not in done.stdout, text

    compare()


def test_yaml_makes_other_things_of_values_that_look_right() -> None:
    written = yaml.safe_load("{a: 1:30, b: on, c: 2026-01-01, d: 0o17, e: 1e3}")
    assert [type(value) for value in written.values()] == [int, bool, date, str, str]
    assert larder_values.span(True, least="1min", most="7days")
    assert larder_values.zone(written["c"])


def test_a_feature_repository_holds_text_alone(tmp_path: Path) -> None:
    for name in ("features.py", "__pycache__/features.pyc", "data/old.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"PAR1\xff\x00" if name.startswith("data") else "# für Aktien".encode())
    (tmp_path / "__pycache__/features.pyc").write_bytes(b"\xcb\r\r\n\xff")
    rule = RULES["feast_repository"]
    [(_, _, allowed)] = larder_values.faults("feast_repository", str(tmp_path), rule)
    assert "data/old.parquet in it is none" in allowed
    (tmp_path / "data/old.parquet").unlink()
    assert [*larder_values.faults("feast_repository", str(tmp_path), rule)] == []
