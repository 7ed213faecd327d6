"""How the module redis_live reads files, and whose sessions it ends."""

import hashlib
import importlib.util
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

PLUGIN = Path(__file__).parents[2] / "ansible/plugins/modules/redis_live.py"
spec = importlib.util.spec_from_file_location("redis_live", PLUGIN)
assert spec
assert spec.loader
redis_live = importlib.util.module_from_spec(spec)
spec.loader.exec_module(redis_live)
parse_acl, parse_config = redis_live.parse_acl, redis_live.parse_config
users_without_a_former_password = redis_live.users_without_a_former_password


@pytest.mark.parametrize(
    ("text", "live"),
    [
        ("maxmemory 2gb", {"maxmemory": "2147483648"}),
        ("maxmemory 2G", {"maxmemory": "2000000000"}),
        ("maxmemory-clients 10%", {"maxmemory-clients": "10%"}),
        ('save ""', {"save": ""}),
        ("save 3600 1\nsave 300 100", {"save": "3600 1 300 100"}),
        ("# a comment\n\nbind 127.0.0.1 -::1 10.0.0.5", {"bind": "127.0.0.1 -::1 10.0.0.5"}),
        (
            "client-output-buffer-limit normal 1mb 0 0\nclient-output-buffer-limit replica 1kb 2 60",
            {"client-output-buffer-limit": "normal 1048576 0 0 slave 1024 2 60"},
        ),
    ],
)
def test_a_file_is_read_as_config_get_writes(text: str, live: dict[str, str]) -> None:
    assert parse_config(text) == live


def user(*passwords: str, state: str = "on") -> tuple[str, ...]:
    hashes = " ".join("#" + hashlib.sha256(password.encode()).hexdigest() for password in passwords)
    return parse_acl([f"user serve {state} sanitize-payload {hashes} ~* resetchannels -@all +hmget"])["serve"]


@given(st.sets(st.text()), st.sets(st.text()))
def test_sessions_end_where_a_password_was_removed_and_only_there(before: set[str], after: set[str]) -> None:
    ended = users_without_a_former_password({"serve": user(*before)}, {"serve": user(*after)})
    assert ended == (["serve"] if before - after else [])


def test_sessions_of_a_user_who_was_switched_off_end() -> None:
    assert users_without_a_former_password({"serve": user("a")}, {"serve": user("a", state="off")}) == ["serve"]


def test_the_order_of_users_and_rules_means_nothing() -> None:
    one = ["user a on #1 +ping +hmget -@all", "user b off"]
    assert parse_acl(one) == parse_acl(["user b off ", "user a on -@all +hmget #1 +ping", ""])
