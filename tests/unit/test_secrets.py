"""Any password survives every encoding: asked of Feast's own loader, SQLAlchemy, libpq, and an RFC's example."""

from __future__ import annotations

import base64
import importlib.util
import ssl
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from feast.infra.online_stores.redis import RedisOnlineStore
from feast.infra.utils.postgres.connection_utils import _get_conn_kwargs, _get_conninfo
from feast.repo_config import load_repo_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy.engine import make_url

ROOT = Path(__file__).resolve().parents[2]

HOSTILE = [
    "true", "null", "1e5", "12345", "-1", "NaN", "0x10", "~", "yes", "[]", "{}", "{{ x }}", "{% raw %}",
    'double"quote', "single'quote", "back\\slash", "\\u0041", "comma,comma", "a=b,c=d", "hash # hash", "colon: colon",
    "$HOME", "${HOME}", "$$", "%HOME%", "%(x)s", "100%", "%41", "at@host", "slash/slash", "q?a&b", "plus+plus",
    " leading", "trailing ", "in  side", "tab\ttab", "!tag", "&anchor", "*alias", "|", ">", "- item",
    "`tick`", "ünïcödé",
    "パスワード", "🔑🔑", "\u200b", "\u00a0", "x" * 128, "é" * 128,
]  # fmt: skip

passwords = st.text(st.characters(exclude_characters="\0\r\n", exclude_categories=["Cs"]), min_size=1, max_size=128)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DEFAULTS = yaml.safe_load((ROOT / "roles/feast/defaults/main.yml").read_text())
filters = load(ROOT / "ansible/plugins/filter/secrets.py")


def render(purpose: str, password: str, redis_hosts: tuple[str, ...] = ("192.0.2.2",)) -> str:
    """Render the template as Ansible does, every secret being the given one."""
    environment = Environment(
        loader=FileSystemLoader(ROOT / "templates"), undefined=StrictUndefined, trim_blocks=True, autoescape=False
    )
    environment.filters |= {f"larder.stack.{name}": use for name, use in filters.FilterModule().filters().items()}
    purposes = ("load", "pipeline", "registry", "serve", "push", "train", "monitor", "materialize")
    variables: dict[str, Any] = {
        "feast_purpose": purpose,
        "feast_registry_ttl_seconds": 60,
        "feast_offline_read_from": "standby",
        "feast_online_ttl_seconds": DEFAULTS["feast_online_ttl_seconds"],
        "larder_project": "trading",
        "larder_database": "feast",
        "larder_timescaledb_client_address": "192.0.2.1",
        "larder_timescaledb_client_port": 5432,
        "certificate_directories": {"feast": "/etc/larder/tls/feast/abc-20260101T000000Z"},
        "larder_redis_address": "192.0.2.2",
        "larder_addresses": {"redis": redis_hosts, "timescaledb": ["192.0.2.1", "192.0.2.9"]},
        "larder_redis_sentinel_port": 26379,
        "larder_redis_copies": 1 if len(redis_hosts) > 2 else 0,
        "larder_redis_port": 6379,
        "timescaledb_passwords": dict.fromkeys(purposes, password),
        "redis_passwords": dict.fromkeys(purposes, password),
    }
    return environment.get_template("feature_store.yaml.j2").render(variables)


# Whose login each of Feast's clients uses.
LOGINS = {
    "serve": {"registry": "serve", "offline store": "serve", "online store": "serve"},
    "push": {"registry": "push", "offline store": "push", "online store": "push"},
    "pipeline": {"registry": "registry", "offline store": "pipeline", "online store": "materialize"},
    "train": {"registry": "train", "offline store": "train", "online store": "serve"},
}


def clients(purpose: str, password: str, directory: Path) -> dict[str, dict[str, Any]]:
    """Return how each of Feast's clients would log in: user, password, and what it asks of TLS."""
    path = directory / "feature_store.yaml"
    path.write_text(render(purpose, password), encoding="utf-8")
    config = load_repo_config(directory, path)
    offline = config.offline_store
    url = make_url(config.registry.path)
    libpq = conninfo_to_dict(config.registry.path.replace("+psycopg", ""))
    _, redis = RedisOnlineStore._parse_connection_string(config.online_store.connection_string)
    assert (url.username, url.password) == (libpq["user"], libpq["password"])
    return {
        "registry": libpq,
        "offline store": conninfo_to_dict(_get_conninfo(offline), **_get_conn_kwargs(offline)),
        "online store": redis | {"user": redis["username"]},
    }


def test_who_looks_at_the_registry_has_no_login_of_the_online_store(tmp_path: Path) -> None:
    path = tmp_path / "feature_store.yaml"
    path.write_text(render("browse", "secret"), encoding="utf-8")
    config = load_repo_config(tmp_path, path)
    assert config.online_store is None
    assert make_url(config.registry.path).username.startswith("feast_serve_")
    assert config.registry.schema_mode == "verify"


@pytest.mark.parametrize("purpose", ["pipeline", "push"])
def test_what_is_written_online_lives_for_a_year(purpose: str, tmp_path: Path) -> None:
    path = tmp_path / "feature_store.yaml"
    path.write_text(render(purpose, "secret"), encoding="utf-8")
    assert load_repo_config(tmp_path, path).online_store.key_ttl_seconds == 365 * 24 * 60 * 60


@pytest.mark.parametrize(("hosts", "kind", "port"), [(2, "redis", 6379), (3, "redis_sentinel", 26379)])
def test_of_several_redis_hosts_clients_follow_the_primary(hosts: int, kind: str, port: int, tmp_path: Path) -> None:
    addresses = tuple(f"192.0.2.{number + 2}" for number in range(hosts))
    path = tmp_path / "feature_store.yaml"
    path.write_text(render("pipeline", "a,b=$HOME", addresses), encoding="utf-8")
    store = load_repo_config(tmp_path, path).online_store
    nodes, options = RedisOnlineStore._parse_connection_string(store.connection_string)
    assert type(store).__name__ == "RedisPrimaryOnlineStoreConfig"
    assert (store.redis_type, store.skip_dedup, store.retry_seconds) == (kind, True, 15)
    assert store.wait_replicas == (1 if hosts > 2 else 0)
    assert nodes == [{"host": address, "port": str(port)} for address in addresses]
    assert options["password"] == "a,b=$HOME"


@pytest.mark.parametrize(("purpose", "standbys"), [("train", ("192.0.2.1", "192.0.2.9")), ("pipeline", ())])
def test_training_reads_from_a_standby_where_it_is_told_to(
    purpose: str, standbys: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "feature_store.yaml"
    path.write_text(render(purpose, "p"), encoding="utf-8")
    assert load_repo_config(tmp_path, path).offline_store.standbys == standbys


def logins(purpose: str, password: str, directory: Path) -> dict[str, tuple[str, str]]:
    return {name: (c["user"], c["password"]) for name, c in clients(purpose, password, directory).items()}


def expected(purpose: str, password: str) -> dict[str, tuple[str, str]]:
    generation = filters.larder_login("x", {"x": password}).removeprefix("x_")
    return {
        name: (f"{'' if name == 'online store' else 'feast_'}{login}_{generation}", password)
        for name, login in LOGINS[purpose].items()
    }


@pytest.mark.parametrize("password", HOSTILE)
@pytest.mark.parametrize("purpose", LOGINS)
def test_hostile_password_reaches_every_client_unchanged(purpose: str, password: str, tmp_path: Path) -> None:
    assert logins(purpose, password, tmp_path) == expected(purpose, password)


@given(password=passwords)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_password_reaches_every_client_unchanged(password: str, tmp_path: Path) -> None:
    assert logins("pipeline", password, tmp_path) == expected("pipeline", password)


@pytest.mark.parametrize("purpose", LOGINS)
def test_every_client_shows_a_certificate_and_checks_the_servers(purpose: str, tmp_path: Path) -> None:
    directory = "/etc/larder/tls/feast/abc-20260101T000000Z"
    using = clients(purpose, "x", tmp_path)
    for store in ("registry", "offline store"):
        assert (
            using[store].items()
            >= {
                "sslmode": "verify-full",
                "sslrootcert": f"{directory}/ca.crt",
                "sslcert": f"{directory}/tls.crt",
                "sslkey": f"{directory}/tls.key",
            }.items()
        )
    assert (
        using["online store"].items()
        >= {
            "ssl": True,
            "ssl_min_version": ssl.TLSVersion.TLSv1_3,
            "ssl_check_hostname": True,
            "ssl_ca_certs": f"{directory}/ca.crt",
            "ssl_certfile": f"{directory}/tls.crt",
            "ssl_keyfile": f"{directory}/tls.key",
        }.items()
    )


@given(password=passwords)
def test_encoded_text_holds_nothing_that_expands(password: str) -> None:
    for encode in (filters.feast_redis_string, filters.feast_yaml_string):
        assert not set(encode(password)[1:-1]) & set("$%,#'\"{}")


def test_verifier_is_that_of_rfc_7677() -> None:
    verifier = filters.scram_sha_256_verifier("pencil", base64.b64decode("W22ZaJ0SNY7soEsUEjb6gQ=="), 4096)
    assert verifier == (
        "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$"
        "WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU="
    )


@pytest.mark.parametrize(
    ("password", "same_as"),
    [("I\u00adX", "IX"), ("\u00aa", "a"), ("\u2168", "IX"), ("a\u00a0b", "a b")],
    ids=["soft hyphen", "ordinal", "roman numeral", "no-break space"],
)
def test_verifier_normalises_as_saslprep_does(password: str, same_as: str) -> None:
    assert filters.scram_sha_256_verifier(password, "salt") == filters.scram_sha_256_verifier(same_as, "salt")
