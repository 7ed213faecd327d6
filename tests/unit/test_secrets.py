"""Any password survives every encoding: asked of Feast's own loader, SQLAlchemy, libpq, and an RFC's example."""

from __future__ import annotations

import base64
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from feast.infra.online_stores.redis import RedisOnlineStore
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


filters = load(ROOT / "ansible/plugins/filter/secrets.py")


def render(purpose: str, password: str) -> str:
    """Render the template as Ansible does, every secret being the given one."""
    environment = Environment(
        loader=FileSystemLoader(ROOT / "templates"), undefined=StrictUndefined, trim_blocks=True, autoescape=False
    )
    environment.filters |= filters.FilterModule().filters()
    purposes = ("load", "pipeline", "registry", "serve", "push", "train", "monitor", "materialize")
    variables: dict[str, Any] = {
        "feast_purpose": purpose,
        "feast_registry_ttl_seconds": 60,
        "feast_online_ttl_seconds": 3600,
        "larder_project": "trading",
        "larder_database": "feast",
        "larder_timescaledb_address": "192.0.2.1",
        "larder_timescaledb_port": 5432,
        "larder_timescaledb_sslmode": "require",
        "larder_redis_address": "192.0.2.2",
        "larder_redis_port": 6379,
        "timescaledb_passwords": dict.fromkeys(purposes, password),
        "redis_passwords": dict.fromkeys(purposes, password),
    }
    return environment.get_template("feature_store.yaml.j2").render(variables)


def passwords_that_feast_uses(purpose: str, password: str, directory: Path) -> dict[str, str]:
    """Return the password that each of Feast's three clients would log in with."""
    path = directory / "feature_store.yaml"
    path.write_text(render(purpose, password), encoding="utf-8")
    config = load_repo_config(directory, path)
    _, redis = RedisOnlineStore._parse_connection_string(config.online_store.connection_string)
    return {
        "registry": make_url(config.registry.path).password,
        "registry, by libpq": conninfo_to_dict(config.registry.path.replace("+psycopg", ""))["password"],
        "offline store": config.offline_store.password,
        "online store": redis["password"],
    }


@pytest.mark.parametrize("password", HOSTILE)
@pytest.mark.parametrize("purpose", ["serve", "push", "pipeline", "train"])
def test_hostile_password_reaches_every_client_unchanged(purpose: str, password: str, tmp_path: Path) -> None:
    assert set(passwords_that_feast_uses(purpose, password, tmp_path).values()) == {password}


@given(password=passwords)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_password_reaches_every_client_unchanged(password: str, tmp_path: Path) -> None:
    assert set(passwords_that_feast_uses("pipeline", password, tmp_path).values()) == {password}


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
