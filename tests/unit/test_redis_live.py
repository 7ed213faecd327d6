"""How the module redis_live reads files, how it changes settings, and whose sessions it ends or names."""

import hashlib
import importlib.util
import subprocess
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


def test_the_order_of_users_and_rules_does_not_matter() -> None:
    one = ["user a on #1 +ping +hmget -@all", "user b off"]
    assert parse_acl(one) == parse_acl(["user b off ", "user a on -@all +hmget #1 +ping", ""])


class Module:
    check_mode = False


class Server:
    """A CONFIG SET that is all or nothing, as Redis' is, and refuses some settings."""

    def __init__(self, live: dict[str, str], refused: dict[str, str]) -> None:
        self.live, self.refused = live, refused
        self.sets: list[dict[str, str]] = []

    def __call__(self, *words: str) -> list[str]:
        if words[1] == "GET":
            return [word for name in words[2:] if name in self.live for word in (name, self.live[name])]
        asked = dict(zip(words[2::2], words[3::2], strict=True))
        for name, why in self.refused.items():
            if name in asked:
                error = f"ERR CONFIG SET failed (possibly related to argument '{name}') - {why}"
                raise redis_live.RedisError(error)
        self.sets.append(asked)
        return []


def test_settings_that_changed_are_set_together() -> None:
    """A key never stands beside another's certificate."""
    server = Server({"tls-cert-file": "a", "tls-key-file": "a", "hz": "10"}, {})
    wanted = {"tls-cert-file": "b", "tls-key-file": "b", "hz": "10"}
    assert redis_live.change_settings(Module(), server, wanted) == (["tls-cert-file", "tls-key-file"], [])
    assert server.sets == [{"tls-cert-file": "b", "tls-key-file": "b"}]


def test_a_setting_that_cannot_change_live_does_not_block_the_others() -> None:
    refused = {"databases": "can't set immutable config", "dir": "can't set protected config"}
    server = Server({"databases": "16", "dir": "/", "hz": "10"}, refused)
    changed, restart = redis_live.change_settings(
        Module(), server, {"databases": "1", "dir": "/a", "hz": "20", "new": "1"}
    )
    assert server.sets == [{"hz": "20"}]
    assert changed == ["hz"]
    assert sorted(restart) == [f"{name} cannot change live" for name in ["databases", "dir", "new"]]


def test_a_value_that_redis_refuses_is_no_reason_to_restart() -> None:
    server = Server(
        {"maxmemory-policy": "noeviction"}, {"maxmemory-policy": "argument(s) must be one of the following"}
    )
    with pytest.raises(redis_live.RedisError, match="must be one of"):
        redis_live.change_settings(Module(), server, {"maxmemory-policy": "newest"})


def test_sessions_are_named_by_login_address_and_begin() -> None:
    clients = (
        "id=3 addr=10.0.0.5:40000 laddr=10.0.0.1:6379 fd=8 name= age=60 idle=1 user=serve_gaaaaaaaa lib-name=redis-py\n"
        "id=4 addr=10.0.0.5:40001 laddr=10.0.0.1:6379 fd=9 name= age=5 idle=1 user=serve_gaaaaaaaa lib-name=\n"
        "id=5 addr=[fd00::5]:40001 laddr=[fd00::1]:6379 fd=10 name= age=0 idle=0 user=push_gbbbbbbbb lib-name=\n"
        "id=6 addr=/run/redis/redis.sock:0 laddr=/run/redis/redis.sock:0 fd=11 name= age=0 idle=0 user=maintenance\n"
    )
    assert redis_live.sessions_of(["serve_gaaaaaaaa", "push_gbbbbbbbb"], clients, 86_400.0) == (
        "push_gbbbbbbbb from fd00::5 (1 since 1970-01-02 00:00:00), "
        "serve_gaaaaaaaa from 10.0.0.5 (2 since 1970-01-01 23:59:00)"
    )
    assert redis_live.sessions_of(["serve_gcccccccc"], clients, 86_400.0) == ""


def test_a_data_directory_that_was_removed_under_the_process_is_noticed(tmp_path: Path) -> None:
    data = tmp_path / "redis"
    data.mkdir()
    with subprocess.Popen(["cat"], cwd=data, stdin=subprocess.PIPE) as process:
        assert not redis_live.directory_is_gone(process.pid)
        data.rmdir()
        data.mkdir()  # as the role does before it looks
        assert redis_live.directory_is_gone(process.pid)
    assert not redis_live.directory_is_gone(0)
