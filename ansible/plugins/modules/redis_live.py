"""Bring a running Redis to what its files say."""

from __future__ import annotations

DOCUMENTATION = r"""
module: redis_live
short_description: Bring a running Redis to what its files say, without a restart where one is not needed
description:
  - Compares the running server with its configuration file and ACL file, and changes it live where it differs,
    by one C(CONFIG SET), so that a key never stands beside another's certificate, and C(ACL LOAD). What cannot change
    live is reported as a reason to restart.
  - Sessions of a user who lost a password, which Redis would keep, are ended in the same transaction that loads the
    ACL file. So no run that is killed can leave them behind, and no session that came with the new password is hit.
    Redis itself ends the sessions of users who are removed. All other sessions stay.
  - Enters by the Unix socket that the configuration file names. Nothing secret is in the arguments or in the result.
options:
  config:
    description: The configuration file. It names C(unixsocket) and C(aclfile).
    type: path
    required: true
  unit:
    description: >-
      The systemd unit. Files of it that are newer than the process are a reason to restart, and so is a data directory
      that was removed under the process, for nothing that it writes there would be found again.
    type: str
    required: true
  user:
    description: Redis user that may CONFIG GET and SET, ACL LIST and LOAD, CLIENT LIST and KILL, MULTI and EXEC.
    type: str
    required: true
  credential:
    description: The user's password, as a systemd encrypted credential that is named as its file.
    type: path
    required: true
  at_start:
    description: Files of the unit that concern its start alone, so that newer ones are no reason to restart.
    type: list
    elements: path
  left:
    description: Change nothing; fail while one of these users has a session.
    type: list
    elements: str
author:
  - The Larder authors
"""

EXAMPLES = r"""
- name: Apply the files to the running Redis
  redis_live:
    config: /etc/redis/redis.conf
    unit: redis-server.service
    user: maintenance
    credential: /etc/credstore.encrypted/redis.maintenance
  notify: Restart Redis

- name: Wait until no session uses the old password
  redis_live:
    config: /etc/redis/redis.conf
    unit: redis-server.service
    user: maintenance
    credential: /etc/credstore.encrypted/redis.maintenance
    left: [serve_g1f3a9c02]
"""

RETURN = r"""
settings:
  description: Settings that were changed live.
  type: list
  returned: always
users:
  description: Users that were added, changed or removed.
  type: list
  returned: always
sessions_ended:
  description: How many sessions of users who lost a password were ended.
  type: int
  returned: always
restart:
  description: Why the server must be restarted; empty where it need not be.
  type: list
  returned: always
"""

import datetime as dt  # noqa: E402 - the documentation stands first, as Ansible asks
import re  # noqa: E402
import shlex  # noqa: E402
import socket  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402

UNITS = {"": 1, "b": 1, "k": 1000, "kb": 1 << 10, "m": 1000**2, "mb": 1 << 20, "g": 1000**3, "gb": 1 << 30}


class RedisError(Exception):
    """An error that the server answered."""


class Redis:
    """The little of Redis' protocol that is needed here, so that the host needs no client library."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30)
        self._socket.connect(path)
        self._answers = self._socket.makefile("rb")

    def __call__(self, *words: str) -> Any:
        """Send one command and return its answer; an error within EXEC's list is raised too."""
        encoded = [word.encode() for word in words]
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
            return None if rest == "-1" else self._answers.read(int(rest) + 2)[:-2].decode()
        if kind == b"*":
            return [self._answer() for _ in range(int(rest))]
        return rest


def parse_config(text: str) -> dict[str, str]:
    """Return the settings of a configuration file as CONFIG GET writes them.

    A directive that stands on several lines is one setting; 2gb is 2147483648; the class ``replica`` of
    client-output-buffer-limit is still ``slave``.
    """
    settings: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            name, *values = shlex.split(line)
            if name == "include":  # a running server does not tell what it has read from there
                continue
            settings.setdefault(name.lower(), []).extend(values)
    return {name: " ".join(map(_live_value, values)) for name, values in settings.items()}


def _live_value(value: str) -> str:
    number = re.fullmatch(r"(\d+)([kmg]?b?)", value.lower())
    if number:
        return str(int(number[1]) * UNITS[number[2]])
    return "slave" if value == "replica" else value


def parse_acl(lines: list[str]) -> dict[str, tuple[str, ...]]:
    """Return each user's rules, sorted, from the lines of an ACL file or of ACL LIST."""
    users = (line.split() for line in lines if line.strip())
    return {name: tuple(sorted(rules)) for _, name, *rules in users}


def users_without_a_former_password(before: dict[str, tuple[str, ...]], after: dict[str, tuple[str, ...]]) -> list[str]:
    """Return the users who may have a session that they could not open any more."""

    def passwords(rules: tuple[str, ...]) -> set[str]:
        return {rule for rule in rules if rule.startswith("#") or rule == "nopass"}

    return sorted(
        name
        for name, rules in before.items()
        if name in after and (passwords(rules) - passwords(after[name]) or ("on" in rules and "off" in after[name]))
    )


def newer_unit_files(module: AnsibleModule, unit: str) -> list[str]:
    """Return the files of the unit that were changed after its process started, and concern more than its start."""
    names = "FragmentPath,DropInPaths,ExecMainStartTimestampMonotonic"
    _, out, _ = module.run_command(["systemctl", "show", f"--property={names}", unit], check_rc=True)
    shown = dict(line.split("=", 1) for line in out.splitlines())
    age = time.clock_gettime(time.CLOCK_MONOTONIC) - int(shown["ExecMainStartTimestampMonotonic"]) / 1e6
    files = {Path(shown["FragmentPath"]), *map(Path, shown["DropInPaths"].split())}
    files -= {Path(file) for file in module.params["at_start"] or []}
    return [str(file) for file in sorted(files) if file.exists() and file.stat().st_mtime > time.time() - age]


def main_process(module: AnsibleModule, unit: str) -> int:
    """Return the process of a unit; 0 where none runs."""
    _, pid, _ = module.run_command(["systemctl", "show", "--property=MainPID", "--value", unit], check_rc=True)
    return int(pid)


def directory_is_gone(process: int) -> bool:
    """Whether a process' working directory was removed, even if there is a new one of the same name."""
    try:
        return str(Path(f"/proc/{process}/cwd").readlink()).endswith(" (deleted)")
    except OSError:
        return False  # no process


def log_in(module: AnsibleModule, path: str) -> Redis:
    credential = Path(module.params["credential"])
    _, password, _ = module.run_command(
        ["systemd-creds", "decrypt", f"--name={credential.name}", str(credential), "-"], check_rc=True
    )
    redis = Redis(path)
    redis("AUTH", module.params["user"], password)
    return redis


def change_settings(module: AnsibleModule, redis: Redis, wanted: dict[str, str]) -> tuple[list[str], list[str]]:
    """Return the settings that were (in check mode: would be) changed live, and the reasons to restart."""
    answer = redis("CONFIG", "GET", *wanted)
    live = dict(zip(answer[::2], answer[1::2], strict=True))
    changed = {name: value for name, value in wanted.items() if live.get(name, value) != value}
    # A setting that the server does not report is unknown to the running version.
    restart = [name for name in wanted if name not in live]
    while changed and not module.check_mode:
        try:
            redis("CONFIG", "SET", *(word for setting in changed.items() for word in setting))
            break
        except RedisError as error:
            # CONFIG SET changes all settings or none, so leave out the refused one and try again.
            refused = re.search(r"argument '([^']+)'\) - can't set (?:immutable|protected)", str(error))
            if not refused:
                raise
            del changed[refused[1]]
            restart.append(refused[1])
    return list(changed), [f"{name} cannot change live" for name in restart]


def change_users(module: AnsibleModule, redis: Redis, wanted: dict[str, tuple[str, ...]]) -> tuple[list[str], int]:
    """Return the users that were (in check mode: would be) changed, and the number of sessions that were ended."""
    live = parse_acl(redis("ACL", "LIST"))
    changed = sorted(name for name in live.keys() | wanted.keys() if live.get(name) != wanted.get(name))
    if not changed or module.check_mode:
        return changed, 0
    redis("MULTI")
    redis("ACL", "LOAD")
    for user in users_without_a_former_password(live, wanted):
        redis("CLIENT", "KILL", "USER", user)
    _, *ended = redis("EXEC")
    if parse_acl(redis("ACL", "LIST")) != wanted:
        raise RedisError("the users that were loaded are others than those of the file")
    return changed, sum(ended)


def sessions_of(users: list[str], clients: str, now: float) -> str:
    """Return the users' sessions from CLIENT LIST: login, address, how many and since when (UTC)."""
    ages: dict[tuple[str, str], list[int]] = {}
    for line in clients.splitlines():
        client = dict(word.split("=", 1) for word in line.split())
        if client.get("user") in users:
            address = client["addr"].rpartition(":")[0].strip("[]")
            ages.setdefault((client["user"], address), []).append(int(client["age"]))

    def begin(times: list[int]) -> str:
        return f"{dt.datetime.fromtimestamp(now - max(times), dt.UTC):%F %T}"

    return ", ".join(
        f"{user} from {address} ({len(times)} since {begin(times)})" for (user, address), times in sorted(ages.items())
    )


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "config": {"type": "path", "required": True},
            "unit": {"type": "str", "required": True},
            "user": {"type": "str", "required": True},
            "credential": {"type": "path", "required": True, "no_log": False},
            "at_start": {"type": "list", "elements": "path"},
            "left": {"type": "list", "elements": "str"},
        },
        supports_check_mode=True,
    )
    config = parse_config(Path(module.params["config"]).read_text(encoding="utf-8"))
    if module.params["left"] is not None:
        try:
            clients = log_in(module, config["unixsocket"])("CLIENT", "LIST")
        except (OSError, RedisError) as error:
            module.fail_json(msg=f"Redis does not tell who is there: {error}")
        if present := sessions_of(module.params["left"], clients, time.time()):
            module.fail_json(msg=f"Redis still serves sessions of passwords that the vault no longer holds: {present}.")
        module.exit_json(changed=False, settings=[], users=[], sessions_ended=0, restart=[])
    acl = parse_acl(Path(config["aclfile"]).read_text(encoding="utf-8").splitlines())

    settings: list[str] = []
    users: list[str] = []
    ended = 0
    restart = [f"{file} is newer than the process" for file in newer_unit_files(module, module.params["unit"])]
    if directory_is_gone(main_process(module, module.params["unit"])):
        restart.append("its data directory was removed")
    try:
        redis = log_in(module, config["unixsocket"])
    except (OSError, RedisError):
        restart.append(f"the running server has no socket, or does not know the user {module.params['user']}")
    else:
        try:
            settings, immutable = change_settings(module, redis, config)
            users, ended = change_users(module, redis, acl)
        except (OSError, RedisError) as error:
            module.fail_json(msg=f"Redis refuses what {module.params['config']} or {config['aclfile']} says: {error}")
        restart += immutable
    module.exit_json(
        changed=bool(settings or users or restart),
        settings=settings,
        users=users,
        sessions_ended=ended,
        restart=restart,
    )


if __name__ == "__main__":
    main()
