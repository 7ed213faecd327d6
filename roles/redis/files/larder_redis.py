#!/usr/bin/python3
"""Replication of this host's Redis: who is the primary, and whether this host follows it.

    larder-redis status           what this host's Redis and the Sentinels say, as JSON
    larder-redis apply            bring the running Redis and Sentinel to the settings and credentials of this host
    larder-redis relink           on the primary: let replicas with a former password log in anew, one by one
    larder-redis switch [--to A]  on the primary: hand over to a replica, without losing an acknowledged write
    larder-redis prefer [--off]   on a replica: be the one that the next switch takes
    larder-redis forget           let this host's Sentinel forget hosts that were removed
    larder-redis leave            on the last host: be a primary that needs no replicas
    larder-redis promote          on a replica, without Sentinels: take the place of a primary that is lost
    larder-redis start            for redis-server.service, before it starts: write how it starts, as primary or replica
    larder-redis start-sentinel   for redis-sentinel.service, before its first start: write its state file

Nothing on disk says who is the primary: the Sentinels are asked, then the other Redis servers. The passwords come from
an encrypted credential, and stand in clear in /run, which is memory, and in Sentinel's own state file, which only the
user redis can read. No argument and no output holds one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pwd
import socket
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SETTINGS = Path("/etc/redis/replication.json")
CREDENTIALS = Path("/etc/credstore.encrypted")
START = Path("/run/redis/replication.conf")
SOCKET = "/run/redis/redis.sock"
SENTINEL_SOCKET = "/run/sentinel/sentinel.sock"
SENTINEL_STATE = Path("/var/lib/redis-sentinel/state.conf")
SENTINEL_ACL = Path("/etc/redis/sentinel.acl")
SENTINEL_UNIT = "redis-sentinel.service"
# The primary that this host has known last, for a start at which nobody else answers. Ansible writes the first one.
LAST_KNOWN = Path("/var/lib/larder/redis.primary")
NAME = "larder"
# How long a start waits until more than half of the Sentinels answer, as after a power cut.
START_SECONDS = 10
ASK_SECONDS = 2.0
# How long writes wait in a switch, and how long it may take: if it fails, they go on where they were.
PAUSE_SECONDS, SWITCH_SECONDS = 15, 10


class RedisError(Exception):
    """An error that a server answered, or a state that does not allow what was asked."""


class Redis:
    """The little of Redis' protocol that is needed here, so that the host needs no client library."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._answers = connection.makefile("rb")

    @classmethod
    def local(cls, path: str, seconds: float = 30) -> Redis:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(seconds)
        connection.connect(path)
        return cls(connection)

    def __call__(self, *words: str | int) -> Any:
        """Send one command and return its answer; an error within EXEC's list is raised too."""
        encoded = [str(word).encode() for word in words]
        self._socket.sendall(b"*%d\r\n" % len(encoded) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in encoded))
        answer = self._answer()
        for item in answer if isinstance(answer, list) else [answer]:
            if isinstance(item, RedisError):
                raise item
        return answer

    def _answer(self) -> Any:
        line = self._answers.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("Redis closed the connection")
        kind, rest = line[:1], line[1:-2].decode()
        if kind == b"-":
            return RedisError(rest)
        if kind == b":":
            return int(rest)
        if kind == b"$":
            return None if rest == "-1" else self._answers.read(int(rest) + 2)[:-2].decode(errors="replace")
        if kind == b"*":
            return [] if rest == "-1" else [self._answer() for _ in range(int(rest))]
        return rest

    def pairs(self, *words: str | int) -> dict[str, str]:
        """Return an answer of names and values."""
        answer = self(*words)
        return dict(zip(answer[::2], answer[1::2], strict=True))

    def info(self, section: str) -> dict[str, str]:
        lines = [line.partition(":") for line in self("INFO", section).splitlines()]
        return {name: value for name, _, value in lines if value}

    def close(self) -> None:
        self._answers.close()
        self._socket.close()


@dataclass(frozen=True)
class Host:
    """The settings of this host, and how it logs in at the others."""

    address: str
    port: int
    peers: Sequence[str]  # the other hosts
    sentinel_port: int  # 0: there are no Sentinels
    min_replicas: int
    failover_seconds: int
    certificates: str
    logins: Mapping[str, Sequence[str]]  # user and password by purpose: replica, sentinel

    @classmethod
    def read(cls) -> Host:
        return cls(**json.loads(SETTINGS.read_text()), logins=json.loads(credential("redis.replication")))

    @property
    def hosts(self) -> list[str]:
        return [self.address, *self.peers]

    @property
    def quorum(self) -> int:
        return len(self.hosts) // 2 + 1

    def connect(self, host: str, port: int, purpose: str) -> Redis:
        """Log in at a server, with TLS 1.3 and the host's certificate."""
        tls = ssl.create_default_context(cafile=f"{self.certificates}/ca.crt")
        tls.minimum_version = ssl.TLSVersion.TLSv1_3
        tls.load_cert_chain(f"{self.certificates}/tls.crt", f"{self.certificates}/tls.key")
        plain = socket.create_connection((host, port), timeout=ASK_SECONDS)
        redis = Redis(tls.wrap_socket(plain, server_hostname=host))
        redis("AUTH", *self.logins[purpose])
        return redis

    def ask(self, hosts: Sequence[str], question: Callable[[str], Any]) -> list[Any]:
        """Ask hosts at the same time; return what those say that answer."""

        def one(host: str) -> Any:
            try:
                return question(host)
            except (OSError, RedisError, ValueError, KeyError):
                return None

        with ThreadPoolExecutor(len(hosts) or 1) as pool:
            return [answer for answer in pool.map(one, hosts) if answer is not None]


def credential(name: str) -> str:
    """Return the content of a host's encrypted credential."""
    command = ["systemd-creds", "decrypt", f"--name={name}", str(CREDENTIALS / name), "-"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def local(path: str = SOCKET) -> Redis:
    """Log in at this host's own server, as the user of the role."""
    redis = Redis.local(path)
    redis("AUTH", "maintenance", credential("redis.maintenance"))
    return redis


# Who is the primary


@dataclass(frozen=True)
class Sentinel:
    """What a Sentinel says: the primary, and the number of the failover that made it one."""

    primary: str
    failover: int
    # For half a minute after its host hung, a Sentinel does not trust its clock (TILT), and takes part in no failover.
    votes: bool = True


@dataclass(frozen=True)
class Server:
    """What a Redis server says: the primary (itself, or whom it follows), how many follow it, and how far it is."""

    address: str
    primary: str
    replicas: int
    offset: int


def sentinels(host: Host) -> list[Sentinel]:
    def question(address: str) -> Sentinel:
        with contextlib.closing(host.connect(address, host.sentinel_port, "sentinel")) as redis:
            said = redis.pairs("SENTINEL", "MASTER", NAME)
            return Sentinel(said["ip"], int(said["config-epoch"]), redis.info("sentinel")["sentinel_tilt"] == "0")

    return host.ask(host.hosts, question) if host.sentinel_port else []


def servers(host: Host, asked: Sequence[str]) -> list[Server]:
    def question(address: str) -> Server:
        with contextlib.closing(host.connect(address, host.port, "replica")) as redis:
            return server(address, redis("ROLE"))

    return host.ask(asked, question)


def server(address: str, role: Sequence[Any]) -> Server:
    if role[0] == "master":
        return Server(address, address, len(role[2]), int(role[1]))
    return Server(address, str(role[1]), 0, int(role[4]))


def by_sentinels(answers: Sequence[Sentinel], hosts: int, *, majority: bool) -> str:
    """Return the primary that more than half of the Sentinels name, or else that of the newest failover."""
    for primary, votes in Counter(answer.primary for answer in answers).items():
        if votes > hosts // 2:
            return primary
    return max(answers, key=lambda answer: answer.failover).primary if answers and not majority else ""


def by_servers(answers: Sequence[Server]) -> str:
    """Return the server that says that it is the primary, else whom others follow."""
    masters = [answer for answer in answers if answer.primary == answer.address]
    if masters:
        return max(masters, key=lambda answer: (answer.replicas, answer.offset)).address
    followed = Counter(answer.primary for answer in answers)
    return max(followed, key=lambda primary: followed[primary]) if followed else ""


def primary(host: Host, seconds: float = 0) -> str:
    """Ask who the primary is: the Sentinels, the other servers, what this host has known last."""
    end = time.monotonic() + seconds
    while True:
        answers = sentinels(host)
        over = time.monotonic() >= end
        if found := by_sentinels(answers, len(host.hosts), majority=not over):
            break
        if over:
            # A server that stands alone is the primary of nobody: this host's own Redis is not asked.
            found = by_servers(servers(host, host.peers))
            break
        time.sleep(0.5)
    if not found and LAST_KNOWN.exists():
        found = LAST_KNOWN.read_text().strip()
    if not found:
        raise RedisError("no other host says who the primary is: run site.yml with --limit redis")
    return found


def remember(address: str) -> None:
    """Note who the primary is, for a start at which nobody answers."""
    if not LAST_KNOWN.exists() or LAST_KNOWN.read_text().strip() != address:
        new = LAST_KNOWN.with_suffix(".new")
        new.write_text(f"{address}\n")
        new.replace(LAST_KNOWN)


# Starts


def write_for_redis(path: Path, lines: Sequence[str]) -> None:
    """Write a file that only the user redis reads."""
    user = pwd.getpwnam("redis")
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.writelines(f"{line}\n" for line in lines)
    os.chown(new, user.pw_uid, user.pw_gid)
    new.replace(path)


def start() -> None:
    """Write what Redis starts with; it starts as a replica where another host is the primary."""
    host = Host.read()
    # At this host's first start there is no Sentinel to wait for.
    found = primary(host, START_SECONDS if SENTINEL_STATE.exists() else 0)
    remember(found)
    user, password = host.logins["replica"]
    lines = [f"masteruser {user}", f"masterauth {password}", f"min-replicas-to-write {host.min_replicas}"]
    if found != host.address:
        lines.append(f"replicaof {found} {host.port}")
    write_for_redis(START, lines)
    print(f"{found} is the primary", file=sys.stderr)


def start_sentinel() -> None:
    """Write Sentinel's state file if there is none: afterwards the file is Sentinel's own."""
    if SENTINEL_STATE.exists() and "sentinel monitor" in SENTINEL_STATE.read_text():
        return
    host = Host.read()
    user, password = host.logins["sentinel"]
    found = primary(host)
    lines = [
        f"sentinel monitor {NAME} {found} {host.port} {host.quorum}",
        f"sentinel down-after-milliseconds {NAME} {host.failover_seconds * 1000}",
        f"sentinel failover-timeout {NAME} 10000",
        f"sentinel parallel-syncs {NAME} 1",
        f"sentinel auth-user {NAME} {user}",
        f"sentinel auth-pass {NAME} {password}",
        f"sentinel sentinel-user {user}",
        f"sentinel sentinel-pass {password}",
    ]
    write_for_redis(SENTINEL_STATE, lines)


# The running servers


class Changes:
    """What was changed; in check mode, what would be."""

    def __init__(self, *, check: bool) -> None:
        self.check, self.done = check, list[str]()
        self.restart_sentinel = self.strangers = self.former_replicas = False

    def __call__(self, what: str, change: Callable[[], Any]) -> None:
        self.done.append(what)
        if not self.check:
            change()


def until(condition: Callable[[], bool], seconds: float, otherwise: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise RedisError(otherwise)
        time.sleep(0.2)


def online(redis: Redis) -> list[dict[str, str]]:
    """Return the replicas that are connected and have all the data."""
    info = redis.info("replication")
    found = [
        dict(part.split("=", 1) for part in value.split(","))
        for name, value in info.items()
        if name.startswith("slave") and "state=" in value
    ]
    return [replica for replica in found if replica["state"] == "online"]


def apply(changes: Changes, seconds: float) -> None:
    host = Host.read()
    with contextlib.closing(local()) as redis:
        apply_logins(host, redis, changes)
        apply_role(host, redis, changes)
    if host.sentinel_port:
        apply_sentinel(host, changes)
    if changes.check:
        return
    with contextlib.closing(local()) as redis:
        wait_for_replication(host, redis, seconds)
        if host.sentinel_port:
            wait_for_sentinels(host, seconds)
        if int(redis.pairs("CONFIG", "GET", "min-replicas-to-write")["min-replicas-to-write"]) != host.min_replicas:
            changes("min-replicas-to-write", lambda: redis("CONFIG", "SET", "min-replicas-to-write", host.min_replicas))
        changes.former_replicas = bool(former_replicas(redis, host))


def apply_logins(host: Host, redis: Redis, changes: Changes) -> None:
    user, password = host.logins["replica"]
    wanted = {"masteruser": user, "masterauth": password}
    if redis.pairs("CONFIG", "GET", *wanted) != wanted:
        words = [word for pair in wanted.items() for word in pair]
        changes("masteruser", lambda: redis("CONFIG", "SET", *words))


def apply_role(host: Host, redis: Redis, changes: Changes) -> None:
    """Let a server without data follow the primary; Sentinels, and a switch, do all else."""
    here = server(host.address, redis("ROLE"))
    found = primary(host)
    if here.primary == here.address and not here.replicas and found != host.address:
        if keys := redis("DBSIZE"):
            raise RedisError(
                f"this host's Redis has {keys} keys and is a primary of its own, but {found} is the primary: "
                f"take the host out of the group, or remove its data (systemctl stop redis-server; "
                f"rm -r /var/lib/redis/*)"
            )
        changes("replicaof", lambda: redis("REPLICAOF", found, host.port))
    elif here.primary not in (host.address, found) and not host.sentinel_port:
        changes("replicaof", lambda: redis("REPLICAOF", found, host.port))
    if not changes.check:
        remember(found)


def wait_for_replication(host: Host, redis: Redis, seconds: float) -> None:
    """Wait until this replica has the primary's data, or until this primary has the replicas that its writes need."""
    if redis("ROLE")[0] == "master":
        until(
            lambda: len(online(redis)) >= host.min_replicas,
            seconds,
            f"fewer than {host.min_replicas} replicas have the primary's data: see journalctl -u redis-server",
        )
    else:
        until(
            lambda: redis("ROLE")[3] == "connected",
            seconds,
            "this host's Redis does not get the primary's data: see journalctl -u redis-server",
        )


def wait_for_sentinels(host: Host, seconds: float) -> None:
    """Wait until this Sentinel knows the others, and the replicas of which it may make one the primary."""

    def known(redis: Redis) -> bool:
        said = redis.pairs("SENTINEL", "MASTER", NAME)
        return (
            said["flags"] == "master"
            and int(said["num-other-sentinels"]) >= host.quorum - 1
            and int(said["num-slaves"]) >= 1
        )

    with contextlib.closing(local(SENTINEL_SOCKET)) as redis:
        until(
            lambda: known(redis),
            seconds,
            "this host's Sentinel does not know the others, or no replica: see journalctl -u redis-sentinel",
        )


def former_replicas(redis: Redis, host: Host) -> list[dict[str, str]]:
    """Return the sessions of replicas that have logged in with a former password."""
    clients = [
        dict(word.split("=", 1) for word in line.split())
        for line in redis("CLIENT", "LIST", "TYPE", "replica").splitlines()
    ]
    return [client for client in clients if client["user"] != host.logins["replica"][0]]


def relink(seconds: float) -> None:
    """Let replicas log in anew, one after the other, so that never all are away at once; they know the new password."""
    host = Host.read()
    with contextlib.closing(local()) as redis:
        for client in former_replicas(redis, host):
            before = len(online(redis))
            redis("CLIENT", "KILL", "ID", client["id"])
            until(
                lambda before=before: len(online(redis)) >= before,
                seconds,
                "a replica does not come back with the new password",
            )
        if former := former_replicas(redis, host):
            raise RedisError(f"{former[0]['addr']} follows with a former password: run site.yml on that host, too")


def acl(lines: Sequence[str]) -> dict[str, tuple[str, ...]]:
    users = (line.split() for line in lines if line.strip())
    return {name: tuple(sorted(rules)) for _, name, *rules in users}


def state() -> dict[str, str]:
    """Return what Sentinel's state file says, such as `auth-user larder`."""
    found = {}
    for line in SENTINEL_STATE.read_text().splitlines():
        if line.startswith("sentinel "):
            _, *name, value = line.split()
            found[" ".join(name)] = value.strip('"')
    return found


def apply_sentinel(host: Host, changes: Changes) -> None:
    user, password = host.logins["sentinel"]
    wanted = {
        "quorum": host.quorum,
        "down-after-milliseconds": host.failover_seconds * 1000,
    }
    with contextlib.closing(local(SENTINEL_SOCKET)) as redis:
        if acl(redis("ACL", "LIST")) != acl(SENTINEL_ACL.read_text().splitlines()):
            changes("Sentinel's users", lambda: redis("ACL", "LOAD"))
        said, held = redis.pairs("SENTINEL", "MASTER", NAME), state()
        for name, value in wanted.items():
            if said[name] != str(value):
                changes(
                    f"Sentinel's {name}", lambda name=name, value=value: redis("SENTINEL", "SET", NAME, name, value)
                )
        # A Sentinel that Redis did not know when it logged in does not log in again by itself.
        refused = "s_down" in said["flags"]
        if refused or (held.get(f"auth-user {NAME}"), held.get(f"auth-pass {NAME}")) != (user, password):
            words = ("auth-user", user, "auth-pass", password)
            changes("Sentinel's login at Redis", lambda: redis("SENTINEL", "SET", NAME, *words))
        if (held.get("sentinel-user"), held.get("sentinel-pass")) != (user, password):
            words = ("sentinel-user", user, "sentinel-pass", password)
            changes("Sentinel's login at the others", lambda: redis("SENTINEL", "CONFIG", "SET", *words))
        changes.strangers = bool(strangers(host, redis))
    changes.restart_sentinel = sentinel_is_older(host)


def strangers(host: Host, sentinel: Redis) -> set[str]:
    """Return the addresses that a Sentinel knows and that are no host's: as a Sentinel, one counts for a majority."""
    known = (each for what in ("SENTINELS", "REPLICAS") for each in sentinel("SENTINEL", what, NAME))
    return {dict(zip(each[::2], each[1::2], strict=True))["ip"] for each in known} - {*host.hosts}


def forget(seconds: float) -> None:
    """Let this host's Sentinel ask anew who there is; the others go on meanwhile."""
    host = Host.read()
    with contextlib.closing(local(SENTINEL_SOCKET)) as redis:
        redis("SENTINEL", "RESET", NAME)
    wait_for_sentinels(host, seconds)


def sentinel_is_older(host: Host) -> bool:
    """Return whether a file that Sentinel reads at its start is newer than its process."""
    names = "FragmentPath,DropInPaths,ExecMainStartTimestampMonotonic"
    command = ["systemctl", "show", f"--property={names}", SENTINEL_UNIT]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    unit = dict(line.split("=", 1) for line in shown.splitlines())
    age = time.clock_gettime(time.CLOCK_MONOTONIC) - int(unit["ExecMainStartTimestampMonotonic"]) / 1e6
    files = [Path(unit["FragmentPath"]), *map(Path, unit["DropInPaths"].split()), Path("/etc/redis/sentinel.conf")]
    files.append(Path(host.certificates).resolve() / "tls.crt")
    return any(file.exists() and file.stat().st_mtime > time.time() - age for file in files)


# Another primary, as planned


@contextlib.contextmanager
def writes_paused(redis: Redis) -> Iterator[None]:
    redis("CLIENT", "PAUSE", PAUSE_SECONDS * 1000, "WRITE")
    try:
        yield
    finally:
        redis("CLIENT", "UNPAUSE")


def switch(to: str) -> str:
    """Hand over to a replica, and return which. Clients' writes wait meanwhile, and go on at the new primary."""
    host = Host.read()
    with contextlib.closing(local()) as redis:
        if redis("ROLE")[0] != "master":
            raise RedisError(f"{host.address} is not the primary: {primary(host)} is")
        replicas = {replica["ip"] for replica in online(redis)}
        if not replicas:
            raise RedisError("no replica has all the data")
        if to and to not in replicas:
            raise RedisError(f"{to} is no replica that has all the data; there are {', '.join(sorted(replicas))}")
        new = by_failover(host, redis, to) if host.sentinel_port else by_handover(host, redis, to or min(replicas))
    remember(new)
    return new


def by_failover(host: Host, redis: Redis, to: str) -> str:
    """Let the Sentinels make a replica the primary, which alone would lose writes for some ten seconds."""
    with contextlib.closing(local(SENTINEL_SOCKET)) as sentinel:
        if to:
            until(lambda: preferred(sentinel, to), 15, f"the Sentinels do not know that {to} is preferred")
        with writes_paused(redis):
            offset = int(redis.info("replication")["master_repl_offset"])
            until(
                lambda: all(int(replica["offset"]) >= offset for replica in online(redis)),
                3,
                "a replica does not keep up with the primary: nothing was changed",
            )
            sentinel("SENTINEL", "FAILOVER", NAME)
            # Clients that are cut before more than half of the Sentinels know the new primary would not find it.
            until(
                lambda: by_sentinels(sentinels(host), len(host.hosts), majority=True) not in ("", host.address),
                SWITCH_SECONDS,
                "the Sentinels did not finish the failover: see journalctl -u redis-sentinel",
            )
            new = by_sentinels(sentinels(host), len(host.hosts), majority=False)
            redis("REPLICAOF", new, host.port)
            redis("CLIENT", "KILL", "TYPE", "normal")
    return new


def preferred(sentinel: Redis, address: str) -> bool:
    found = (dict(zip(each[::2], each[1::2], strict=True)) for each in sentinel("SENTINEL", "REPLICAS", NAME))
    return any(each["ip"] == address and each["slave-priority"] == "1" for each in found)


def by_handover(host: Host, redis: Redis, to: str) -> str:
    """Let the two servers change places: Redis pauses writes until the replica has them all."""
    redis("FAILOVER", "TO", to, host.port, "TIMEOUT", SWITCH_SECONDS * 1000)
    # This server says that it is a replica before the other one says that it is the primary: clients that are cut in
    # between would find no primary. Redis' own time limit ends where the other server is to take over.
    until(
        lambda: not failing_over(redis),
        SWITCH_SECONDS + 2,
        f"{to} was told to take over and does not answer: Redis goes on when it does. If that host is lost, run "
        f"switch_redis.yml with primary_is_lost=true and to={host.address}",
    )
    if redis("ROLE")[0] == "master":
        raise RedisError(f"{to} did not take over in {SWITCH_SECONDS} s: nothing was changed")
    redis("CLIENT", "KILL", "TYPE", "normal")
    return to


def failing_over(redis: Redis) -> bool:
    return redis.info("replication")["master_failover_state"] != "no-failover"


def prefer(*, off: bool) -> None:
    with contextlib.closing(local()) as redis:
        redis("CONFIG", "SET", "replica-priority", 100 if off else 1)


def promote() -> str:
    """Make this host's Redis the primary, where the former one is lost and no Sentinels do it."""
    host = Host.read()
    if host.sentinel_port:
        raise RedisError("the Sentinels choose the primary here: larder-redis status says which")
    there = [each for each in servers(host, host.peers) if each.primary == each.address]
    if there:
        raise RedisError(f"{there[0].address} is the primary and answers: larder-redis switch, on it, hands over")
    with contextlib.closing(local()) as redis:
        # A switch whose other host was lost in the middle.
        if failing_over(redis):
            redis("FAILOVER", "ABORT")
        redis("REPLICAOF", "NO", "ONE")
    remember(host.address)
    return host.address


def leave() -> None:
    with contextlib.closing(local()) as redis:
        if redis("ROLE")[0] != "master":
            raise RedisError("this host's Redis is a replica: its primary has to stay, or to hand over first")
        redis("CONFIG", "SET", "min-replicas-to-write", 0)


def status() -> dict[str, Any]:
    host = Host.read()
    said: dict[str, Any] = {"address": host.address, "primary": primary(host)}
    with contextlib.closing(local()) as redis:
        role = redis("ROLE")
        said["role"] = "primary" if role[0] == "master" else "replica"
        if role[0] == "master":
            said["replicas"] = sorted(replica["ip"] for replica in online(redis))
        else:
            said["link"] = role[3]
    if host.sentinel_port:
        said["sentinels"] = sum(sentinel.votes for sentinel in sentinels(host))
    return said


def main() -> None:
    parser = argparse.ArgumentParser(prog="larder-redis", description="Replication of this host's Redis.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("status", "forget", "leave", "promote", "start", "start-sentinel"):
        commands.add_parser(name)
    applying = commands.add_parser("apply")
    applying.add_argument("--check", action="store_true", help="say what would be changed, and change nothing")
    applying.add_argument("--seconds", type=float, default=600, help="how long to wait for the data of the primary")
    relinking = commands.add_parser("relink")
    relinking.add_argument("--seconds", type=float, default=600, help="how long to wait for a replica")
    commands.add_parser("switch").add_argument("--to", default="", help="address of the host that is to be the primary")
    commands.add_parser("prefer").add_argument("--off", action="store_true")
    given = parser.parse_args()
    try:
        if given.command == "start":
            start()
        elif given.command == "start-sentinel":
            start_sentinel()
        elif given.command == "prefer":
            prefer(off=given.off)
        elif given.command == "forget":
            forget(120)
        elif given.command == "leave":
            leave()
        elif given.command == "relink":
            relink(given.seconds)
        elif given.command == "status":
            print(json.dumps(status()))
        elif given.command == "apply":
            changes = Changes(check=given.check)
            apply(changes, given.seconds)
            todo = ("restart_sentinel", "strangers", "former_replicas")
            print(json.dumps({name: getattr(changes, name) for name in todo} | {"changed": changes.done}))
        else:
            print(json.dumps({"primary": switch(given.to) if given.command == "switch" else promote()}))
    except (OSError, RedisError, subprocess.CalledProcessError) as error:
        sys.exit(f"larder-redis {given.command}: {error}")


if __name__ == "__main__":
    main()
