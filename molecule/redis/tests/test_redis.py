"""What the role promises with its default values, asked from other hosts."""

import time

import pytest

testinfra_hosts = ["ansible://cache1"]

UNAUTHENTICATED = "AuthenticationError: Authentication required."
WRONG = "AuthenticationError: invalid username-password pair or user is disabled."
# DEBUG is switched off for everyone, before rights are looked at.
REFUSED = ("NoPermissionError: ", "ResponseError: DEBUG command not allowed.")

# No service needs any of these, and each is a way to data, code or control.
DENIED_TO_SERVICES = [
    ["CONFIG", "GET", "*"],
    ["CONFIG", "SET", "maxmemory", "1"],
    ["EVAL", "return 1", "0"],
    ["SCRIPT", "LOAD", "return 1"],
    ["FUNCTION", "LIST"],
    ["FCALL", "f", "0"],
    ["KEYS", "*"],
    ["RANDOMKEY"],
    ["FLUSHALL"],
    ["FLUSHDB"],
    ["SWAPDB", "0", "0"],
    ["DEBUG", "SLEEP", "0"],
    ["MODULE", "LIST"],
    ["SHUTDOWN"],
    ["REPLICAOF", "NO", "ONE"],
    ["SYNC"],
    ["MIGRATE", "h", "1", "k", "0", "1"],
    ["RESTORE", "k", "0", "x"],
    ["DUMP", "k"],
    ["MONITOR"],
    ["ACL", "LIST"],
    ["ACL", "SETUSER", "x"],
    ["SAVE"],
    ["BGSAVE"],
    ["CLIENT", "KILL", "ID", "1"],
    ["PUBLISH", "c", "m"],
    ["SUBSCRIBE", "c"],
    ["PFADD", "k", "e"],
    ["GET", "k"],
    ["SET", "k", "v"],
    ["HGETALL", "k"],
    ["MULTI"],
]
DENIED = {
    "serve": [
        *DENIED_TO_SERVICES,
        ["HSET", "k", "f", "v"],
        ["EXPIRE", "k", 1],
        ["DEL", "k"],
        ["HDEL", "k", "f"],
        ["SCAN", 0],
        ["INFO"],
    ],
    "push": [*DENIED_TO_SERVICES, ["DEL", "k"], ["HDEL", "k", "f"], ["SCAN", 0], ["HKEYS", "k"], ["INFO"]],
    "materialize": [*DENIED_TO_SERVICES, ["CLIENT", "LIST"]],
    "monitor": [*DENIED_TO_SERVICES, ["HMGET", "k", "f"], ["HSET", "k", "f", "v"], ["SCAN", 0], ["SLOWLOG", "RESET"]],
    "admin": [
        ["EVAL", "return 1", "0"],
        ["SCRIPT", "LOAD", "return 1"],
        ["FUNCTION", "LIST"],
        ["KEYS", "*"],
        ["FLUSHALL"],
        ["FLUSHDB"],
        ["DEBUG", "SLEEP", "0"],
        ["MODULE", "LIST"],
        ["SHUTDOWN"],
        ["REPLICAOF", "NO", "ONE"],
        ["MIGRATE", "h", "1", "k", "0", "1"],
        ["RESTORE", "k", "0", "x"],
        ["ACL", "SETUSER", "admin", "+@all"],
        ["ACL", "LOAD"],
        ["CONFIG", "REWRITE"],
        ["CONFIG", "SET", "dir", "/tmp"],
        ["CONFIG", "SET", "port", "6380"],
        ["CONFIG", "SET", "bind", "*"],
        ["CONFIG", "SET", "tls-auth-clients", "no"],
        ["CONFIG", "SET", "tls-protocols", "TLSv1.2"],
    ],
}


@pytest.fixture(scope="module")
def passwords(vault_passwords):
    return vault_passwords


@pytest.fixture(scope="module")
def ask_as(ask, login, passwords):
    def ask_as(purpose, *commands):
        return ask(*commands, user=login(purpose, passwords), password=passwords[purpose])

    return ask_as


@pytest.mark.parametrize("source", ["server1", "stranger"])
def test_unauthenticated_client_is_refused(ask, source):
    commands = [["PING"], ["HMGET", "k", "f"], ["CONFIG", "GET", "*"], ["INFO"], ["FLUSHALL"]]
    assert ask(*commands, source=source) == [UNAUTHENTICATED] * len(commands)


@pytest.mark.parametrize("source", ["server1", "stranger"])
def test_a_wrong_password_is_refused(ask, login, passwords, source):
    for user in [login("serve", passwords), login("admin", passwords), "serve", "maintenance", "default", "nobody"]:
        assert ask(["PING"], user=user, password="wrong", source=source) == [WRONG]


def test_a_password_opens_no_other_user(ask, login, passwords):
    for user in [login("push", passwords), login("admin", passwords), "default", "serve", "maintenance"]:
        assert ask(["PING"], user=user, password=passwords["serve"]) == [WRONG]


def test_a_client_of_the_stack_gets_an_answer(greet):
    """Without this test, the refusals below would prove nothing."""
    assert greet() == greet("stranger") == "-NOAUTH Authentication required."


def test_a_client_without_tls_gets_no_answer(greet):
    assert "NOAUTH" not in greet(tls=False)


def test_an_older_tls_is_refused(greet):
    assert "PROTOCOL_VERSION" in greet(newest="TLSv1_2")


def test_a_client_without_a_certificate_is_refused(greet):
    assert "CERTIFICATE_REQUIRED" in greet(certificate=None)


@pytest.fixture(scope="module")
def foreign(inventory):
    return inventory.run("stranger", "ls -d /etc/larder/tls/gateway/*Z", "").strip()


def test_a_certificate_of_another_ca_is_refused(greet, foreign):
    assert "UNKNOWN_CA" in greet("stranger", certificate=foreign)


def test_a_client_refuses_a_server_of_another_ca(greet, foreign):
    assert "CERTIFICATE_VERIFY_FAILED" in greet("stranger", authorities=f"{foreign}/ca.crt")


@pytest.mark.parametrize("name", ["server1", "192.0.2.7"])
def test_a_client_refuses_a_server_of_another_name(greet, name):
    assert "mismatch" in greet(name=name)


@pytest.mark.parametrize("user", DENIED)
def test_a_user_may_do_nothing_beyond_its_purpose(ask_as, user):
    answers = ask_as(user, *DENIED[user])
    refused = [str(answer).startswith(REFUSED) for answer in answers]
    assert [command for command, no in zip(DENIED[user], refused, strict=True) if not no] == []


def test_each_user_can_do_what_feast_does(ask_as):
    key, row = "AAPL\x02symbol\x01trading", ["a1b2", "v\u20ac", "_ts:daily", "t"]
    assert ask_as("materialize", ["HSET", key, *row], ["EXPIRE", key, 3600]) == [2, True]
    assert ask_as("push", ["HMGET", key, "_ts:daily"], ["HSET", key, "a1b2", "newer"], ["EXPIRE", key, 3600]) == [
        ["t"],
        0,
        True,
    ]
    assert ask_as("serve", ["PING"], ["SELECT", 0], ["HMGET", key, "a1b2", "missing"]) == [True, True, ["newer", None]]
    assert ask_as("materialize", ["SCAN", 0, "MATCH", "AAPL*", "COUNT", 1000], ["HKEYS", key])[1] == [
        "a1b2",
        "_ts:daily",
    ]
    assert ask_as("materialize", ["HDEL", key, "a1b2"], ["DEL", key]) == [1, 1]
    assert "evicted_keys" in ask_as("materialize", ["INFO", "stats"])[0]


def test_the_monitor_sees_statistics_and_no_password(ask_as, login, passwords):
    info, slow, latest, clients = ask_as(
        "monitor", ["INFO"], ["SLOWLOG", "GET"], ["LATENCY", "LATEST"], ["CLIENT", "LIST"]
    )
    assert info["maxmemory"] == 2 << 30
    assert isinstance(slow, list)
    assert isinstance(latest, list)
    assert (
        any(client["user"] == login("monitor", passwords) for client in clients)
        if isinstance(clients[0], dict)
        else f"user={login('monitor', passwords)}" in clients
    )


def test_the_documented_settings_are_live(ask_as):
    asked = {
        "maxmemory": str(2 << 30),
        "maxmemory-policy": "allkeys-lru",
        "tcp-keepalive": "300",
        "timeout": "0",
        "protected-mode": "yes",
        "port": "0",
        "tls-port": "6379",
        "tls-protocols": "TLSv1.3",
        "tls-auth-clients": "yes",
        "tls-replication": "yes",
        "appendonly": "yes",
        "save": "",
        "enable-protected-configs": "no",
        "enable-debug-command": "no",
        "enable-module-command": "no",
    }
    (answer,) = ask_as("admin", ["CONFIG", "GET", *asked])
    assert dict(zip(answer[::2], answer[1::2], strict=True)) == asked


def test_redis_listens_at_named_addresses_only(host, inventory, address):
    """A second address of the host reaches sshd, which listens everywhere, and not Redis."""
    other = "192.0.2.7"
    probe = f"timeout 3 bash -c '</dev/tcp/{other}/%d' && echo open || echo closed"
    with host.sudo():
        host.check_output(f"ip address replace {other}/32 dev lo")
    inventory.run("stranger", f"sudo ip route replace {other} via {address}", "")
    try:
        assert inventory.run("stranger", probe % 22, "").strip() == "open"
        assert inventory.run("stranger", probe % 6379, "").strip() == "closed"
    finally:
        inventory.run("stranger", f"sudo ip route delete {other}", "")
        with host.sudo():
            host.check_output(f"ip address delete {other}/32 dev lo")


def run_id(ask_as):
    """Return the identity of the running process, waiting up to ten seconds for one that answers."""
    for _ in range(40):
        (info,) = ask_as("monitor", ["INFO", "server"])
        if isinstance(info, dict):
            return info["run_id"]
        time.sleep(0.25)
    pytest.fail(f"Redis does not answer: {info}")


@pytest.mark.parametrize(
    "death", ["kill -9 $(systemctl show --property=MainPID --value redis-server)", "systemctl restart redis-server"]
)
def test_redis_comes_back_with_its_data(host, ask_as, death):
    before = run_id(ask_as)
    value = str(time.time())
    ask_as("materialize", ["HSET", "survivor", "f", value])
    with host.sudo():
        host.check_output(death)
    assert run_id(ask_as) != before
    assert ask_as("serve", ["HMGET", "survivor", "f"]) == [[value]]
    ask_as("materialize", ["DEL", "survivor"])


def test_the_unit_is_sandboxed(host):
    with host.sudo():
        result = host.run("systemd-analyze security --no-pager --threshold=15 redis-server.service")
        assert result.rc == 0, result.stdout.splitlines()[-1]
        pid = host.check_output("systemctl show --property=MainPID --value redis-server")
        status = host.check_output(f"cat /proc/{pid}/status")
        assert "NoNewPrivs:\t1" in status
        assert "CapEff:\t0000000000000000" in status
        assert "Seccomp:\t2" in status
        assert host.run(f"grep -E 'Max core file size +0 +0 ' /proc/{pid}/limits").rc == 0
        # What the process itself sees and may write.
        inside = f"/proc/{pid}/root"
        host.check_output(f"touch {inside}/var/lib/redis/writable && rm {inside}/var/lib/redis/writable")
        for path in ["/etc/redis/redis.conf", "/etc/redis/users.acl", "/usr/bin/env"]:
            assert "Read-only file system" in host.run(f"touch {inside}{path}").stderr
        assert host.run(f"ls -A {inside}/home {inside}/root").stdout.split() == [f"{inside}/home:", f"{inside}/root:"]


def test_a_local_user_reads_no_hash_and_opens_no_socket(host):
    for path in [
        "/etc/redis/users.acl",
        "/etc/redis/redis.conf",
        "/run/redis/redis.sock",
        "/etc/credstore.encrypted/redis.maintenance",
        *host.check_output("ls /etc/larder/tls/redis/*Z/tls.key").split(),
    ]:
        with host.sudo("nobody"):
            assert host.run(f"test -r {path} || test -w {path}").rc == 1
        with host.sudo():
            assert host.run(f"test -e {path}").rc == 0


def test_no_password_is_stored_in_clear_text(inventory, passwords):
    """The scan is also given a word that is in each of the places, to prove that it finds words there."""
    scan = """sudo bash -c '
        umask 077; mkdir /run/scan; trap "rm -r /run/scan" EXIT
        credential=/etc/credstore.encrypted/redis.maintenance
        { cat; systemd-creds decrypt --name=redis.maintenance $credential - 2> /dev/null; } > /run/scan/words
        journalctl --no-pager > /run/scan/journal
        grep -rohFf /run/scan/words /etc /var/lib/redis /var/log /var/tmp /run/scan/journal /home /root | sort -u'
    """
    control = ["allkeys-lru", "redis-server"]
    found = inventory.run("cache1", scan, "\n".join([*passwords.values(), *control]) + "\n")
    assert found.splitlines() == control


def test_former_settings_and_data_are_kept_and_not_served(host):
    with host.sudo():
        assert "\ndatabases 5\n" in host.file("/etc/redis/redis.conf.before-larder").content_string
        # A snapshot holds short strings as they are.
        assert b"cart:17" in host.file("/var/lib/redis/dump.rdb.before-larder").content
        assert host.run("grep -rl cart:17 /var/lib/redis/appendonlydir").stdout == ""
