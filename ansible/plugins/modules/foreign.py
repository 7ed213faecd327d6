"""Say what a host has of somebody else, before the stack would replace it or meet it on a port."""

from __future__ import annotations

DOCUMENTATION = r"""
module: foreign
short_description: Say what a host has of somebody else
description:
  - Looks for a PostgreSQL cluster, a Redis, an HAProxy, a keepalived, a user, a directory or certificates that are not
    the stack's, and for other processes on the stack's ports. It changes nothing, and names what it finds in sentences.
  - What the stack made is known by a file that only the stack writes, so that a second run is silent. What Debian's
    package brought and nobody used is nobody's.
options:
  looks:
    description: What to look for, for each service of the host.
    type: list
    elements: dict
    required: true
    suboptions:
      ports:
        description: The stack's ports by the variable that sets them.
        type: dict
        default: {}
      unit:
        description: A regular expression of the systemd units that may listen there.
        type: str
        default: ""
      given_up:
        description: Whether the stack takes over what is there; then only the ports are looked at.
        type: bool
        default: false
      variable:
        description: The variable that lets the stack take over what is there.
        type: str
        default: ""
      postgresql:
        description: The cluster that the stack would take, as C(version/name), and the stack's C(database) in it.
        type: dict
      redis:
        description: >-
          Its configuration: C(config), its Debian C(package), and two signs of the stack, for one may be lost: C(ours),
          a file that only the stack writes, and C(named), a path that only the stack's configuration names.
        type: dict
      haproxy:
        description: As for C(redis).
        type: dict
      keepalived:
        description: Its configuration, C(config), and C(named), a path that only the stack's configuration names.
        type: dict
      services:
        description: Units of Debian's packages, each with the file that is there where the stack runs it.
        type: dict
      home:
        description: "A system user and its home: C(user), C(path), and C(ours), paths that only the stack makes."
        type: dict
      firewall:
        description: >-
          The C(ports) that a firewall of the host's own must name until C(ours), a file of the stack, is there.
        type: dict
      authorities:
        description: PEM of the CAs that the stack trusts; those on the host must be among them.
        type: list
        elements: str
author:
  - The Larder authors
"""

EXAMPLES = r"""
- name: Look for a Redis of somebody else
  foreign:
    looks:
      - ports: {larder_redis_port: [6379]}
        unit: redis-server[.]service
        redis: {config: /etc/redis/redis.conf, package: redis-server, ours: /etc/credstore.encrypted/redis.maintenance,
                named: /etc/larder/tls/redis/}
        variable: redis_take_over
        given_up: "{{ redis_take_over }}"
"""

RETURN = r"""
found:
  description: Sentences; none where nothing was found.
  type: list
  elements: str
  returned: always
"""

import hashlib  # noqa: E402 - the documentation stands first, as Ansible asks
import json  # noqa: E402
import os  # noqa: E402
import pwd  # noqa: E402
import re  # noqa: E402
import shlex  # noqa: E402
import socket  # noqa: E402
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402

ROOT = Path("/")
# pg_hba.conf as Debian's package makes it, in order.
DEBIAN_RULES = {
    "local all postgres peer",
    "local all all peer",
    "host all all 127.0.0.1/32 scram-sha-256",
    "host all all ::1/128 scram-sha-256",
    "local replication all peer",
    "host replication all 127.0.0.1/32 scram-sha-256",
    "host replication all ::1/128 scram-sha-256",
}
DATABASES = "SELECT datname FROM pg_database WHERE NOT datistemplate AND datname <> 'postgres' ORDER BY datname"
LISTEN = "0A"

Run = Callable[[list[str]], tuple[int, str]]  # of a command, its return code and its output


def listed(items: Sequence[str], limit: int = 5) -> str:
    more = [f"{len(items) - limit} more"] if len(items) > limit else []
    return ", ".join([*items[:limit], *more])


def rules(text: str) -> list[str]:
    """Return the lines of a pg_hba.conf that Debian's package does not bring, with single blanks."""
    lines = (" ".join(line.partition("#")[0].split()) for line in text.splitlines())
    return [line for line in lines if line and line not in DEBIAN_RULES]


def settings(text: str) -> dict[str, list[str]]:
    """Return the words after each directive of a redis.conf; of a directive on several lines, those of the last."""
    found = {}
    for line in text.splitlines():
        name, _, rest = line.strip().partition(" ")
        if name and not name.startswith("#"):
            try:
                found[name.lower()] = shlex.split(rest)
            except ValueError:
                found[name.lower()] = [rest]
    return found


def proxies(text: str) -> list[str]:
    """Return the frontends and listen sections of a haproxy.cfg, each with the addresses that it binds."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if words and not line[0].isspace():
            section = " ".join(words[:2]) if words[0] in ("frontend", "listen") else ""
            found |= {section: []} if section else {}
        elif section and len(words) > 1 and words[0] == "bind":
            found[section].append(words[1])
    return [f"{section} at {' '.join(binds)}" if binds else section for section, binds in found.items()]


def inodes(table: str, ports: Iterable[int]) -> dict[str, int]:
    """Return the sockets that listen on any of the ports, from the text of /proc/net/tcp or tcp6: inode to port."""
    wanted = set(ports)
    found = {}
    for line in table.splitlines()[1:]:
        words = line.split()
        port = int(words[1].rpartition(":")[2], 16)
        if words[3] == LISTEN and port in wanted:
            found[words[9]] = port
    return found


def unit_of(cgroup: str) -> str:
    """Return the unit or scope of a process, from the text of its /proc/PID/cgroup."""
    parts = cgroup.strip().splitlines()[-1].rpartition(":")[2].split("/") if cgroup.strip() else []
    return next((part for part in reversed(parts) if part.endswith((".service", ".scope"))), "")


def certificates(text: str) -> set[str]:
    """Return the certificates of a PEM text, each without its line breaks."""
    found = re.findall(r"-----BEGIN CERTIFICATE-----(.*?)-----END CERTIFICATE-----", text, re.DOTALL)
    return {"".join(body.split()) for body in found}


def listeners(ports: Iterable[int]) -> Iterator[tuple[int, str, str]]:
    """Yield (port, process, unit) of whatever listens on the ports."""
    sockets: dict[str, int] = {}
    for name in ("tcp", "tcp6"):
        table = ROOT / "proc/net" / name
        sockets |= inodes(table.read_text(), ports) if table.exists() else {}
    seen = set()
    for process in (ROOT / "proc").glob("[0-9]*") if sockets else ():
        held = {sockets[inode] for inode in open_sockets(process) if inode in sockets}
        try:
            name, unit = (process / "comm").read_text().strip(), unit_of((process / "cgroup").read_text())
        except OSError:
            continue  # the process has ended
        for port in held:
            if (port, unit or name) not in seen:
                seen.add((port, unit or name))
                yield port, name, unit


def open_sockets(process: Path) -> Iterator[str]:
    """Yield the inodes of a process' sockets, without those that it closes meanwhile."""
    try:
        descriptors = list((process / "fd").iterdir())
    except OSError:
        return
    for descriptor in descriptors:
        try:
            target = str(descriptor.readlink())
        except OSError:
            continue
        if target.startswith("socket:["):
            yield target[8:-1]


def port_sentences(ports: Mapping[str, Sequence[int]], unit: str) -> Iterator[str]:
    variables = {int(port): variable for variable, numbers in ports.items() for port in numbers}
    for port, process, owner in sorted(listeners(variables)):
        if not re.fullmatch(unit, owner):
            whose = f"{process} of {owner}" if owner else process
            yield f"port {port} ({variables[port]}) is taken by {whose}: stop that, or give the stack another port"


def untouched(config: Path, package: str, run: Run) -> bool:
    """Whether a configuration file is as Debian's package brought it, or is not there."""
    if not config.exists():
        return True
    _, shown = run(["dpkg-query", "--show", "--showformat=${Conffiles}", package])
    digest = hashlib.md5(config.read_bytes(), usedforsecurity=False).hexdigest()
    return f" {config} {digest}" in shown.splitlines()


def databases(data: Path, run: Run) -> list[str] | None:
    """Return the databases of a cluster that are not PostgreSQL's own; None where the server does not answer."""
    try:
        started = (data / "postmaster.pid").read_text().splitlines()
        port, directory = started[3], started[4]
    except (OSError, IndexError):
        return None
    psql = ["psql", "-XAtq", "-h", directory, "-p", port, "-c", DATABASES, "postgres"]
    code, names = run(["runuser", "-u", "postgres", "--", *psql])
    return names.splitlines() if code == 0 else None


def postgresql(run: Run, cluster: str, database: str) -> Iterator[str]:
    etc = ROOT / "etc/postgresql" / cluster
    # The second file exists before the stack's own cluster is made.
    ours = (etc / "conf.d/larder.conf", ROOT / "etc/postgresql-common/createcluster.d/larder.conf")
    if not etc.exists() or any(path.exists() for path in ours):
        return
    data = ROOT / "var/lib/postgresql" / cluster
    found = databases(data, run)
    parts = []
    if found is None:
        parts.append("its databases are not known, for it does not answer")
    elif others := [name for name in found if name != database]:
        parts.append(f"databases {listed(others)}")
    hba = etc / "pg_hba.conf"
    if added := rules(hba.read_text(errors="replace") if hba.exists() else ""):
        parts.append(f"pg_hba.conf has {listed([f'«{rule}»' for rule in added])}")
    if files := sorted(path.name for path in (etc / "conf.d").glob("*.conf")):
        parts.append(f"conf.d has {listed(files)}")
    if parts:
        yield f"it has the PostgreSQL cluster {cluster} of somebody else: {'; '.join(parts)}"


def keys(config: Mapping[str, Sequence[str]]) -> str:
    """Return what a Redis that runs says of its keys."""
    port = int((config.get("port") or ["6379"])[0])
    path = (config.get("unixsocket") or [""])[0]
    try:
        if port:
            connection = socket.create_connection(("127.0.0.1", port), 5)
        else:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(5)
            connection.connect(path)
        with connection, connection.makefile("rb") as answers:
            connection.sendall(b"INFO keyspace\r\nQUIT\r\n")
            answer = answers.read().decode(errors="replace")
    except OSError:
        return ""
    if answer.startswith("-"):
        return f"it listens on port {port} and does not say how many keys it has ({answer.splitlines()[0][1:40]})"
    number = sum(map(int, re.findall(r"^db\d+:keys=(\d+)", answer, re.MULTILINE)))
    return f"it listens on port {port} and has {number} keys" if number else ""


def is_ours(path: Path, ours: str, named: str) -> bool:
    """Whether the stack wrote a configuration, by either of its signs."""
    return (ROOT / ours.lstrip("/")).exists() or (path.exists() and named in path.read_text(errors="replace"))


def redis(run: Run, config: str, package: str, ours: str, named: str) -> Iterator[str]:
    path = ROOT / config.lstrip("/")
    if is_ours(path, ours, named):
        return
    parts = []
    held = settings(path.read_text(errors="replace")) if path.exists() else {}
    if not untouched(path, package, run):
        parts.append(f"{path} is not Debian's")
    if said := keys(held):
        parts.append(said)
    data = Path((held.get("dir") or ["/var/lib/redis"])[0])
    # An empty snapshot is some 90 bytes; the log's directory may hold anything.
    files = [
        str(file) for file in (data / "dump.rdb", data / "appendonlydir") if file.exists() and file.stat().st_size > 200
    ]
    if files:
        parts.append(f"data in {listed(files)}")
    if parts:
        yield f"it has a Redis of somebody else: {'; '.join(parts)}"


def haproxy(run: Run, config: str, package: str, ours: str, named: str) -> Iterator[str]:
    path = ROOT / config.lstrip("/")
    if not is_ours(path, ours, named) and not untouched(path, package, run):
        has = listed(proxies(path.read_text(errors="replace"))) or "no frontend"
        yield f"it has an HAProxy of somebody else: {path} is not Debian's and has {has}"


def keepalived(_run: Run, config: str, named: str) -> Iterator[str]:
    path = ROOT / config.lstrip("/")
    if path.exists() and named not in (text := path.read_text(errors="replace")):
        has = listed(re.findall(r"^\s*(?:vrrp_instance|virtual_server)\s+[^{\n]+", text, re.MULTILINE)) or "no instance"
        yield f"it has a keepalived of somebody else: {path} has {' '.join(has.split())}"


def services(run: Run, **ours: str) -> Iterator[str]:
    """Units of Debian's packages that run without the stack's file."""
    for unit, path in ours.items():
        if not (ROOT / path.lstrip("/")).exists() and run(["systemctl", "is-active", "--quiet", unit])[0] == 0:
            yield f"it has a {unit} of somebody else, which runs"


def home(user: str, path: str, ours: Sequence[str]) -> Iterator[str]:
    try:
        account = pwd.getpwnam(user)
    except KeyError:
        pass
    else:
        if account.pw_dir != path:
            where = f"home {account.pw_dir}, shell {account.pw_shell}"
            yield f"it has a user {user} of somebody else ({where}): give the stack's user another name, larder_user"
    directory = Path(path)
    if directory.exists() and not any(os.path.lexists(own) for own in ours):
        if not directory.is_dir():
            yield f"{path} is no directory: give the stack another one, larder_home"
        elif held := sorted(entry.name for entry in directory.iterdir()):
            yield f"{path} is somebody else's (it holds {listed(held)}): give the stack another one, larder_home"


def authorities(trusted: Sequence[str]) -> Iterator[str]:
    """The host belongs to this stack: the vault knows the CAs of the certificates on the host."""
    ours = {body for text in trusted for body in certificates(text)}
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "etc/larder/tls").glob("*/current/ca.crt")):
        found[path.parts[-3]] = certificates(path.read_text(errors="replace"))
    theirs = [service for service, held in found.items() if held and not held & ours]
    if theirs:
        yield (
            f"it belongs to another Larder: the CA that it trusts for {listed(theirs)} is not in this vault. "
            "Remove the host from the inventory, use the vault of its own stack"
        )


def passes(rule: Any, port: int) -> bool:
    """Whether a rule's expression, or a set's elements, from nft's JSON name a port."""
    if isinstance(rule, dict):
        low, high = rule.get("range") or (0, 0)
        if isinstance(low, int) and isinstance(high, int) and low <= port <= high:
            return True
        return any(passes(part, port) for part in rule.values())
    return any(passes(part, port) for part in rule) if isinstance(rule, list) else rule == port


def firewall(run: Run, ports: Sequence[int], ours: str) -> Iterator[str]:
    """Chains that drop by default name the stack's ports: what one of them drops, no other table can let in."""
    code, text = run(["nft", "--json", "list", "ruleset"])
    if (ROOT / ours.lstrip("/")).exists() or code != 0:
        return
    objects = json.loads(text)["nftables"]
    for chain in [entry["chain"] for entry in objects if "chain" in entry]:
        if (chain.get("hook"), chain.get("policy")) != ("input", "drop"):
            continue
        rules = [entry[kind] for entry in objects for kind in ("rule", "set") if kind in entry]
        table = [
            rule.get("expr", rule.get("elem"))
            for rule in rules
            if (rule["family"], rule["table"]) == (chain["family"], chain["table"])
        ]
        missing = [str(port) for port in map(int, ports) if not passes(table, port)]
        if missing:
            name = f"{chain['family']} {chain['table']} {chain['name']}"
            yield f"its firewall ({name}) drops by default and has no rule for the ports {', '.join(missing)}"


def sentences(parameters: Mapping[str, Any], run: Run) -> Iterator[str]:
    variable = parameters["variable"]
    kept = "; use another host" + (f", or let Larder take it over with {variable}: true" if variable else "")
    for look in (postgresql, redis, haproxy, keepalived, services):
        if (arguments := parameters[look.__name__]) and not parameters["given_up"]:
            for sentence in look(run, **arguments):
                yield sentence + kept
    if parameters["firewall"] and not parameters["given_up"]:
        for sentence in firewall(run, **parameters["firewall"]):
            yield f"{sentence}: add rules that let them in or, if other rules do so already, set {variable}: true"
    if parameters["home"]:
        yield from home(**parameters["home"])
    if parameters["authorities"] and not parameters["given_up"]:
        for sentence in authorities(parameters["authorities"]):
            yield f"{sentence}, or let this stack take it over with {variable}: true"
    yield from port_sentences(parameters["ports"], parameters["unit"])


def main() -> None:
    nested: dict[str, Any] = {"type": "dict"}
    look = {
        "ports": {"type": "dict", "default": {}},
        "unit": {"type": "str", "default": ""},
        "given_up": {"type": "bool", "default": False},
        "variable": {"type": "str", "default": ""},
        "postgresql": nested,
        "redis": nested,
        "haproxy": nested,
        "keepalived": nested,
        "services": nested,
        "home": nested,
        "firewall": nested,
        "authorities": {"type": "list", "elements": "str"},
    }
    looks = {"type": "list", "elements": "dict", "required": True, "options": look}
    module = AnsibleModule(argument_spec={"looks": looks}, supports_check_mode=True)

    def run(command: list[str]) -> tuple[int, str]:
        # A bare host has neither nft nor psql.
        if module.get_bin_path(command[0]) is None:
            return 127, ""
        code, out, _ = module.run_command(command, cwd="/")
        return code, out

    module.exit_json(
        changed=False, found=[sentence for one in module.params["looks"] for sentence in sentences(one, run)]
    )


if __name__ == "__main__":
    main()
