"""Keep the map of tokens that HAProxy knows, on disk and in its processes, without a reload."""

from __future__ import annotations

DOCUMENTATION = r"""
module: haproxy_tokens
short_description: Keep the map of tokens that HAProxy knows
description:
  - Keeps a map file of SHA-256 to role, and the same map in every running HAProxy process; one that a reload has left
    behind and that still serves open connections is told as well. No process is reloaded.
  - A token that is no longer wanted is removed last, and only when no client has used it for a while.
options:
  path:
    description: The map file.
    type: path
    required: true
  master:
    description: Socket of HAProxy's master process. Where it does not exist, nothing runs that could be told.
    type: path
    required: true
  table:
    description: Stick table with a key C(<SHA-256>@<client address>) for every use; it forgets them by itself.
    type: str
    required: true
  tokens:
    description: Role of each token, by the token's SHA-256 in lower case hexadecimal digits.
    type: dict
    required: true
  group:
    description: Group that may read the file.
    type: str
    required: true
  quiet_seconds:
    description: Seconds after which the table forgets a use, and which this module waits for that; 0 removes at once.
    type: int
    required: true
author:
  - The Larder authors
"""

EXAMPLES = r"""
- name: Write the vault's tokens
  haproxy_tokens:
    path: /etc/haproxy/tokens.map
    master: /run/haproxy/master.sock
    table: token_use
    tokens: {5e884898da28047151d0e56f8dc6292773603d0d6aabbd62a11ef721d1542d8: reader}
    group: haproxy
    quiet_seconds: 60
"""

RETURN = r"""
in_use:
  description: Who still uses tokens that are not wanted; these stay valid. One text per role and client address.
  type: list
  elements: str
  returned: always
"""

import socket  # noqa: E402 - the documentation stands first, as Ansible asks
import time  # noqa: E402
from collections.abc import Iterable, Mapping  # noqa: E402
from pathlib import Path  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402

Tokens = dict[str, str]


class NotRunningError(Exception):
    """The process has ended, or none runs."""


class HAProxy:
    """All processes of one HAProxy, asked through its master."""

    def __init__(self, master: str) -> None:
        self.master = master

    def ask(self, command: str) -> str:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(30)
            try:
                client.connect(self.master)
            except (FileNotFoundError, ConnectionRefusedError) as error:
                raise NotRunningError from error
            client.sendall(f"{command}\n".encode())
            # The master keeps the connection to a worker open until no more commands can come.
            client.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: client.recv(65536), b"")).decode()

    def ask_worker(self, pid: int, command: str) -> str:
        answer = self.ask(f"@!{pid} {command}")
        if answer.startswith("Can't find the target"):
            raise NotRunningError
        return answer

    def workers(self) -> list[int]:
        try:
            return parse_workers(self.ask("show proc"))
        except NotRunningError:
            return []

    def tell(self, pid: int, path: str, wanted: Mapping[str, str], *, check: bool) -> bool:
        """Make a process's map equal to the wanted one; return whether it differed."""
        present = parse_map(self.ask_worker(pid, f"show map {path}"))
        commands = [f"add map {path} {key} {role}" for key, role in wanted.items() if key not in present]
        commands += [f"set map {path} {k} {role}" for k, role in wanted.items() if present.get(k, role) != role]
        commands += [f"del map {path} {key}" for key in present.keys() - wanted.keys()]
        for command in () if check else commands:
            if answer := self.ask_worker(pid, command).strip():
                raise RuntimeError(answer)
        return bool(commands)


def parse_workers(text: str) -> list[int]:
    """Return the process ids of all workers, leaving ones too, from the answer to ``show proc``."""
    rows = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [int(row[0]) for row in rows if row[1] == "worker"]


def parse_map(text: str) -> Tokens:
    """Read a map: ``key value`` in a file, with an address before them in the answer to ``show map``."""
    rows = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return {row[-2]: row[-1] for row in rows}


def parse_uses(text: str) -> list[tuple[str, str]]:
    """Return (token's SHA-256, client address) of each entry in the answer to ``show table``."""
    keys = [word.removeprefix("key=") for line in text.splitlines() for word in line.split() if word.startswith("key=")]
    return [(token, address.removeprefix("::ffff:")) for token, _, address in (key.partition("@") for key in keys)]


def parse_uptime(text: str) -> int:
    """Return the seconds since a process started from the answer to ``show info``."""
    return next(int(line.split(":")[1]) for line in text.splitlines() if line.startswith("Uptime_sec:"))


def render(tokens: Mapping[str, str]) -> str:
    return "".join(f"{key} {role}\n" for key, role in tokens.items())


class Gateway:
    """The map's file and the processes that have read it."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.path = Path(module.params["path"])
        self.haproxy = HAProxy(module.params["master"])
        self.changed = False

    def present(self) -> Tokens:
        return parse_map(self.path.read_text(encoding="ascii")) if self.path.exists() else {}

    def keep(self, tokens: Tokens) -> None:
        """Write the file, then tell every process; a process that starts in between reads the file."""
        check = self.module.check_mode
        if not self.path.exists() or self.path.read_text(encoding="ascii") != render(tokens):
            self.changed = True
            if not check:
                temporary = Path(self.module.tmpdir, "tokens.map")
                temporary.touch(mode=0o600)
                temporary.write_text(render(tokens), encoding="ascii")
                self.module.atomic_move(str(temporary), str(self.path))
        if not check or self.path.exists():
            attributes = {"path": str(self.path), "owner": "root", "group": self.module.params["group"], "mode": "0640"}
            arguments = self.module.load_file_common_arguments({**self.module.params, **attributes})
            self.changed = self.module.set_fs_attributes_if_different(arguments, self.changed)
        for pid in self.haproxy.workers():
            try:
                self.changed = self.haproxy.tell(pid, str(self.path), tokens, check=check) or self.changed
            except NotRunningError:
                continue

    def uses(self, tokens: Iterable[str]) -> set[tuple[str, str]]:
        """Return who has used these tokens lately, as the processes remember."""
        unwanted, found = set(tokens), set()
        for pid in self.haproxy.workers():
            try:
                found |= set(parse_uses(self.haproxy.ask_worker(pid, f"show table {self.module.params['table']}")))
            except NotRunningError:
                continue
        return {use for use in found if use[0] in unwanted}

    def uptime(self) -> float:
        """Return the seconds for which the newest process has remembered uses; without a process, nobody was served."""
        up = []
        for pid in self.haproxy.workers():
            try:
                up.append(parse_uptime(self.haproxy.ask_worker(pid, "show info")))
            except NotRunningError:
                continue
        return min(up, default=float("inf"))

    def wait_until_unused(self, tokens: Iterable[str], seconds: int) -> set[tuple[str, str]]:
        """Wait until nobody has used the tokens for so many seconds, at most about as long; return who still has."""
        end = time.monotonic() + seconds + 2
        while True:
            uses, known = self.uses(tokens), self.uptime() >= seconds
            if time.monotonic() >= end or (known and not uses):
                return uses
            time.sleep(0.5)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "master": {"type": "path", "required": True},
            "table": {"type": "str", "required": True},
            "tokens": {"type": "dict", "required": True, "no_log": False},
            "group": {"type": "str", "required": True},
            "quiet_seconds": {"type": "int", "required": True},
        },
        supports_check_mode=True,
    )
    wanted: Tokens = dict(sorted(module.params["tokens"].items()))
    gateway = Gateway(module)
    try:
        unwanted = {key: role for key, role in gateway.present().items() if key not in wanted}
        in_use: set[tuple[str, str]] = set()
        if unwanted and module.params["quiet_seconds"] and not module.check_mode:
            gateway.keep(wanted | unwanted)
            in_use = gateway.wait_until_unused(unwanted, module.params["quiet_seconds"])
        gateway.keep(wanted | {key: unwanted[key] for key, _ in in_use})
    except RuntimeError as error:
        module.fail_json(msg=f"HAProxy did not take the map: {error}")
    module.exit_json(
        changed=gateway.changed,
        in_use=sorted(f"{unwanted[key]}, used from {address}" for key, address in in_use),
    )


if __name__ == "__main__":
    main()
