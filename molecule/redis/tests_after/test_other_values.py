"""What changed live: other values, without a restart, although a run was killed on the way."""

import time
from pathlib import Path

import jinja2
import pytest
import yaml

testinfra_hosts = ["ansible://cache1"]

OTHER = yaml.safe_load((Path(__file__).parent.parent / "vars" / "other_values.yml").read_text())
CHANGED = {user: jinja2.Template(text).render() for user, text in OTHER["other_passwords"].items()}


@pytest.fixture(scope="module")
def ask_as(ask, login, vault_passwords):
    passwords = vault_passwords | CHANGED

    def ask_as(purpose, *commands):
        return ask(*commands, user=login(purpose, passwords), password=passwords[purpose])

    return ask_as


def test_the_new_values_are_live_and_in_the_file(host, ask_as):
    wanted = {"maxmemory": str(12 << 20), "maxmemory-policy": "volatile-lru", "maxclients": "500", "hz": "20"}
    wanted |= {"slowlog-max-len": "256", "maxmemory-clients": "20%", "save": "3600 1000000 300 100000000"}
    (answer,) = ask_as("admin", ["CONFIG", "GET", *wanted])
    assert dict(zip(answer[::2], answer[1::2], strict=True)) == wanted
    with host.sudo():
        lines = host.file("/etc/redis/redis.conf").content_string.splitlines()
    assert {"maxmemory 12mb", "maxmemory-policy volatile-lru", "maxclients 500", "hz 20"} <= set(lines)


def test_the_least_recently_used_rows_are_evicted(ask_as):
    """More is written than the memory holds: no write fails, and rows that were read lately stay.

    Redis samples keys and counts idleness in seconds, so a few may go out of turn.
    """

    def write(keys, value):
        commands = [command for key in keys for command in (["HSET", key, "f", value], ["EXPIRE", key, 3600])]
        assert ask_as("materialize", *commands) == [1, True] * len(keys)

    read, unread = [f"read:{n}" for n in range(20)], [f"unread:{n}" for n in range(900)]
    reads = [["HMGET", key, "f"] for key in read]
    write(read, "v")
    write(unread, "x" * 10_000)
    time.sleep(3)
    ask_as("serve", *reads)
    write([f"new:{n}" for n in range(500)], "x" * 10_000)
    (info,) = ask_as("monitor", ["INFO"])
    assert info["evicted_keys"] > 200
    assert info["used_memory"] < 1.1 * (12 << 20)
    assert ask_as("serve", *reads).count(["v"]) >= 18
