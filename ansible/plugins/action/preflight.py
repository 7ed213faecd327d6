"""Judge an inventory and its variables on the controller, before any host is touched.

Nothing here connects anywhere. What Jinja cannot evaluate yet, such as a fact, is unknown and is not judged. A fault is
one sentence that says where it is, which variable, what it holds and what is allowed; a secret's value never appears.
"""

from __future__ import annotations

import difflib
import fcntl
import multiprocessing
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

from ansible.constants import COLOR_ERROR
from ansible.errors import AnsibleError, AnsibleTemplateSyntaxError
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.plugins.action import ActionBase
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

sys.path.append(str(Path(__file__).parents[3] / "src"))  # the package that the hosts run

SHORTEST_SECRET = 16
# What has a certificate.
SERVICES = ("timescaledb", "redis", "feast", "gateway")
# Facts of the role larder that may differ between hosts.
PER_HOST = {"larder_address", "larder_secure_logging"}
BYTES = re.compile(r"(\d+)(b|k|kb|m|mb|g|gb)?", re.IGNORECASE)
UNITS = {"": 1, "b": 1, "k": 10**3, "kb": 2**10, "m": 10**6, "mb": 2**20, "g": 10**9, "gb": 2**30}
TYPES = {"bool": "true or false", "dict": "a dictionary", "int": "an integer", "list": "a list", "str": "text"}

Groups = Mapping[str, Sequence[str]]
Specs = Mapping[str, Mapping[str, Mapping[str, Any]]]  # role, variable, its option


class Unevaluated(Enum):
    """What stands for a value that could not be evaluated."""

    UNKNOWN = "it refers to a fact, or to something else that only a run knows"
    BROKEN = "Jinja refuses it, or it refers to a variable that no role has"


@dataclass
class Host:
    """A host's variables: ``given`` by the inventory or the command line; ``values`` has the roles' defaults too."""

    name: str
    given: Set[str]
    values: Mapping[str, Any]

    def get(self, name: str) -> Any:
        return self.values.get(name, Unevaluated.UNKNOWN)


def hint(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    close = difflib.get_close_matches(name, sorted(known), 1, cutoff)
    return f" (did you mean {close[0]}?)" if close else ""


def show(value: object) -> str:
    text = f"'{value}'" if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def group_faults(groups: Groups, wanted: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """Every group has as many hosts as the stack supports."""
    for group, limits in wanted.items():
        hosts, least, most = groups.get(group, ()), limits.get("min", 0), limits.get("max")
        if len(hosts) < least:
            meant = "" if group in groups else hint(group, groups.keys() - wanted.keys())
            number = f"{'exactly' if least == most else 'at least'} {least}"
            yield f"group {group}: it has no host in the inventory and needs {number}{meant}"
        elif most is not None and len(hosts) > most:
            yield f"group {group}: it has {len(hosts)} hosts ({', '.join(hosts)}) and may have {most}"


def address_faults(hosts: Iterable[Host]) -> Iterator[str]:
    """No two hosts have the same address."""
    found = defaultdict(list)
    for host in hosts:
        if isinstance(address := host.get("larder_address"), str):
            found[address].append(host.name)
    for address, names in found.items():
        if len(names) > 1:
            where = f"{', '.join(names)}: larder_address (by default ansible_host, else the name)"
            yield f"{where} is {address} for each, and must differ; one host may be in several groups"


def shared_faults(hosts: Iterable[Host], shared: Iterable[str]) -> Iterator[str]:
    """The hosts agree on what the role larder says of the whole stack."""
    for name in shared:
        held = defaultdict(list)
        for host in hosts:
            if not isinstance(value := host.get(name), Unevaluated):
                held[show(str(value))].append(host.name)
        if len(held) > 1:
            values = " and ".join(f"{value} on {', '.join(names)}" for value, names in held.items())
            yield f"all hosts: {name} is {values}, and must be the same everywhere: set it in group_vars/all"


def name_faults(host: Host, specs: Specs) -> Iterator[str]:
    """Every variable that has a role's prefix, or almost a role's variable's name, is one of a role's."""
    known = {name for options in specs.values() for name in options}
    for name in sorted(host.given - known):
        prefixed = name.startswith(tuple(f"{role}_" for role in specs))
        meant = hint(name, known, 0.6 if prefixed else 0.9)
        if prefixed or (meant and not name.startswith("_")):
            yield f"{name} is a variable of no role{meant}"


def type_faults(host: Host, specs: Specs, secrets: Iterable[str]) -> Iterator[str]:
    """Every variable that is given has the type and is among the choices that its role's specification says."""
    options = {name: option for role in specs.values() for name, option in role.items() if name not in secrets}
    for name in sorted(host.given & options.keys()):
        value, option = host.get(name), options[name]
        if value is Unevaluated.BROKEN:
            yield f"{name} cannot be evaluated: its Jinja is wrong, or it refers to a variable that no role has"
        if isinstance(value, Unevaluated):
            continue
        errors = ArgumentSpecValidator({name: option}).validate({name: value}).error_messages
        if errors and "choices" in option:
            yield f"{name} is {show(value)} and must be one of {', '.join(map(str, option['choices']))}"
        elif errors:
            kind = option.get("type", "str")
            detail = f" ({'; '.join(errors)})" if kind in {"dict", "list"} else ""
            yield f"{name} is {show(value)} and must be {TYPES.get(kind, f'a {kind}')}{detail}"


def project_faults(host: Host) -> Iterator[str]:
    """The project has a name that Feast takes."""
    project = host.get("larder_project")
    if isinstance(project, str) and not re.fullmatch(r"[A-Za-z0-9]\w*", project, re.ASCII):
        yield f"larder_project is {show(project)} and must be letters, digits and underscores, with no underscore first"


def port_faults(host: Host, groups: Groups) -> Iterator[str]:
    """Every port exists, and no two services of a host share one."""
    services, ssh = host.get("base_firewall_services"), str(host.get("ansible_port"))
    used = {int(ssh) if ssh.isdecimal() else 22: "ansible_port"}
    for service in services if isinstance(services, list) else ():
        try:
            name = f"larder_{service['service']}_port"
            port, instances, group = int(service["port"]), int(service.get("instances", 1)), service["group"]
        except (AttributeError, KeyError, TypeError, ValueError):
            continue  # type_faults says so
        if not 1 <= port <= 65535:
            yield f"{name} is {port} and must be 1 to 65535"
        elif not 0 <= instances <= 65536 - port:
            yield f"{name} is {port} for {instances} instances; their ports count up from it and must end by 65535"
        elif host.name in groups.get(group, ()):
            taken = sorted(used.keys() & set(range(port, port + instances)))
            if taken:
                yield f"{name} is {port} for {instances} instances and meets {used[taken[0]]} at port {taken[0]}"
            used |= {number: used.get(number, name) for number in range(port, port + instances)}


def secret_fault(secret: object) -> str | None:
    """Return why a value cannot be a secret, without showing it."""
    if secret in (None, ""):
        return f"is unset; it must have at least {SHORTEST_SECRET} characters"
    if isinstance(secret, Unevaluated):
        return "cannot be evaluated; a secret with {{, {% or {# in it must have !unsafe before it"
    if not isinstance(secret, str):
        return "is no text and must be: put it in quotes"
    if set(secret) & {"\0", "\n"}:
        return "holds a NUL or a newline; every other character is allowed"
    if len(secret) < SHORTEST_SECRET:
        return f"has {len(secret)} characters and must have at least {SHORTEST_SECRET}"
    return None


def pair_faults(where: str, entry: Any, *, signs: bool = False, key: bool = True) -> Iterator[str]:
    """A certificate is one, has not ended, and has its own private key beside it."""
    if not isinstance(entry, Mapping):
        yield f"{where} must hold a certificate and its private_key, both in PEM"
        return
    try:
        certificate = x509.load_pem_x509_certificate(str(entry.get("certificate", "")).encode())
    except ValueError:
        yield f"{where}.certificate is no certificate in PEM"
        return
    if signs and not is_authority(certificate):
        yield f"{where}.certificate is no authority's: its basic constraints do not say CA:TRUE"
    if certificate.not_valid_after_utc < datetime.now(UTC):
        yield f"{where}.certificate ended on {certificate.not_valid_after_utc:%Y-%m-%d}"
    if key:
        try:
            private = load_pem_private_key(str(entry.get("private_key", "")).encode(), None)
        except (TypeError, ValueError):
            yield f"{where}.private_key is no private key in PEM without a passphrase"
        else:
            if private.public_key() != certificate.public_key():
                yield f"{where}.private_key is not the one of its certificate"


def is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (ValueError, x509.ExtensionNotFound):
        return False


def certificate_faults(host: Host) -> Iterator[str]:
    """The authorities can sign what the stack makes, and certificates of one's own can be used."""
    name, entries = "certificate_authorities", host.get("certificate_authorities")
    if name not in host.given:
        yield f"{name} is unset; ansible/init_secrets.yml writes a vault with one"
    elif not isinstance(entries, list) or not entries:
        yield f"{name} must be a list of one authority or two, each with certificate and private_key"
    else:
        for number, entry in enumerate(entries):
            # The first signs; of another one, the certificate is enough.
            yield from pair_faults(f"{name}[{number}]", entry, signs=True, key=number == 0)
    provided = host.get("certificate_provided")
    for service, entry in provided.items() if isinstance(provided, Mapping) else ():
        if service not in SERVICES:
            meant = hint(str(service), SERVICES)
            yield f"certificate_provided.{service} is for no service{meant}; there are {', '.join(SERVICES)}"
        else:
            yield from pair_faults(f"certificate_provided.{service}", entry)


def secret_faults(host: Host, groups: Groups, wanted: Mapping[str, Mapping[str, Sequence[str]]]) -> Iterator[str]:
    """Every secret is there, is text that can be sent, is long enough, and serves one purpose alone."""
    uses = defaultdict(list)
    for variable, rule in wanted.items():
        purposes, secrets = rule["purposes"], host.get(variable)
        if variable not in host.given:
            if any(host.name in groups.get(group, ()) for group in rule["groups"]):
                yield f"{variable} is unset; it must hold a secret each for {', '.join(purposes)}"
            continue
        if not isinstance(secrets, Mapping):
            why = "cannot be evaluated" if isinstance(secrets, Unevaluated) else "is no dictionary"
            yield f"{variable} {why}; it must hold a secret each for {', '.join(purposes)}"
            continue
        for purpose in {**dict.fromkeys(purposes), **secrets}:
            name, secret = f"{variable}.{purpose}", secrets.get(purpose)
            several = secret if rule.get("two") and isinstance(secret, list) else [secret]
            if purpose not in purposes:
                meant = hint(str(purpose), purposes)
                yield f"{name} is for no purpose of the stack{meant}; there are {', '.join(purposes)}"
            elif not 1 <= len(several) <= 2:
                yield f"{name} holds {len(several)} tokens and may hold one or two, the current one first"
            for single in several:
                if purpose in purposes and (fault := secret_fault(single)):
                    yield f"{name} {fault}"
                if isinstance(single, str) and single:
                    uses[single].append(name)
    for names in uses.values():
        if len(names) > 1:
            yield f"{' and '.join(names)} are the same secret; each must be one of its own"


def memory_faults(host: Host, groups: Groups) -> Iterator[str]:
    """The memory that Redis and PostgreSQL are to have is there, on a host whose memory is known."""
    given, facts, share = host.get("redis_maxmemory"), host.get("ansible_facts"), host.get("timescaledb_memory_mb")
    if isinstance(given, Unevaluated):
        return
    match = BYTES.fullmatch(str(given).strip())
    if not match:
        units = ", ".join(list(UNITS)[1:])
        yield f"redis_maxmemory is {show(given)} and must be bytes, or a number with one of {units}"
        return
    memory = facts.get("memtotal_mb") if isinstance(facts, Mapping) else None
    if memory is None or host.name not in groups.get("redis", ()):
        return
    redis = int(match[1]) * UNITS[(match[2] or "").lower()] / 2**20
    if redis > memory:
        yield f"redis_maxmemory is {show(given)} and must be less than the host's memory, {memory} MiB"
    elif host.name in groups.get("timescaledb", ()) and str(share).isdecimal() and redis + int(share) / 4 > memory:
        # A quarter of what PostgreSQL may count on is its own, its shared_buffers; the rest is the page cache's.
        both = f"redis_maxmemory is {show(given)} and timescaledb_memory_mb is {share}"
        yield f"{both}; the first and a quarter of the second must be less than the host's memory, {memory} MiB"


def release_faults(host: Host, releases: Sequence[str]) -> Iterator[str]:
    """A host whose facts are known runs a Debian that the stack supports."""
    facts = host.get("ansible_facts")
    if isinstance(facts, Mapping) and "distribution" in facts:
        runs = f"{facts['distribution']} {facts.get('distribution_major_version')}"
        if runs not in {f"Debian {release}" for release in releases}:
            yield f"it runs {runs} and must run Debian {' or '.join(releases)}"


def file_faults(host: Host) -> Iterator[str]:
    """What the inventory says of files of bars is what the pipeline's own code takes."""
    from larder import files
    from larder.errors import ConfigError

    held = {key: host.get(f"pipeline_{key}") for key in files.KEYS if f"pipeline_{key}" in host.given}
    for key, value in held.items():  # one by one: each fault is told
        try:
            files.judge({} if isinstance(value, Unevaluated) else {key: value})
        except ConfigError as error:
            yield error.message.rstrip(".")


def judge(hosts: Sequence[Host], groups: Groups, specs: Specs, rules: Mapping[str, Any]) -> list[str]:
    """Return every fault once, with the hosts that have it, or the name of their group."""
    found: dict[str, list[str]] = defaultdict(list)
    for host in hosts:
        for fault in (
            *name_faults(host, specs),
            *type_faults(host, specs, {*rules["secrets"], "certificate_authorities", "certificate_provided"}),
            *project_faults(host),
            *file_faults(host),
            *port_faults(host, groups),
            *secret_faults(host, groups, rules["secrets"]),
            *certificate_faults(host),
            *memory_faults(host, groups),
            *release_faults(host, rules["releases"]),
        ):
            found[fault].append(host.name)
    sets = {frozenset(groups.get(group, ())): f"group {group}" for group in rules["groups"]}
    sets[frozenset(host.name for host in hosts)] = "all hosts"

    def where(names: list[str]) -> str:
        return sets.get(frozenset(names), ", ".join(names)) if len(names) > 1 else names[0]

    return [
        *group_faults(groups, rules["groups"]),
        *address_faults(hosts),
        *shared_faults(hosts, sorted(specs["larder"].keys() - PER_HOST)),
        *(f"{where(names)}: {fault}" for fault, names in found.items()),
    ]


def process(number: int) -> str:
    """Return what names a process for as long as it lives: another that gets its number later started later."""
    stat = Path(f"/proc/{number}/stat")
    return f"{number} {stat.read_text().rpartition(')')[2].split()[19]}" if stat.exists() else f"{number}"


def controller() -> int:
    """Return the process of ansible-playbook itself, which lives as long as the run; a plugin runs in a child of it.

    Where it was killed a moment ago, os.getppid() would be 1, which lives for ever.
    """
    parent = multiprocessing.parent_process()
    return parent.pid if parent and parent.pid else os.getpid()


def lock_fault(path: Path, me: int) -> str | None:
    """Take the lock of an inventory for a process; say who holds it where another one that still lives does.

    The file names its holder, so a run that was killed leaves nothing that could be in the way.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        holder = file.read().strip()
        if holder and holder != process(me):
            number = int(holder.split()[0])
            if Path(f"/proc/{number}").exists() and process(number) == holder:
                return f"another run works on this inventory: process {number} of this machine; wait for its end"
        file.seek(0)
        file.truncate()
        file.write(process(me))
    return None


class ActionModule(ActionBase):  # type: ignore[misc] # ansible-core has no types
    """Takes ``groups`` (group: min, max), ``secrets`` (variable: groups, purposes) and ``releases`` of Debian."""

    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        variables = task_vars or {}
        super().run(tmp, variables)
        rules, groups, hostvars = self._task.args, variables["groups"], variables["hostvars"]
        specs, defaults = self._roles(Path(__file__).parents[3] / "roles")
        stack = {host for group in rules["groups"] for host in groups.get(group, ())}
        hosts = [self._host(name, hostvars, specs, defaults, rules["secrets"]) for name in sorted(stack)]
        faults = judge(hosts, groups, specs, rules)
        if not faults and not self._task.check_mode:
            fault = lock_fault(self._inventory(variables) / ".lock", controller())
            faults = [fault] if fault else []
        if not faults:
            return {"changed": False}
        # Not in the result, which the default callback would print twice.
        self._display.display("\n".join(f"- {fault}." for fault in faults), color=COLOR_ERROR)
        return {"failed": True, "msg": f"Preflight found what is listed above ({len(faults)}). No host was changed."}

    def _inventory(self, variables: Mapping[str, Any]) -> Path:
        source = Path(variables["ansible_inventory_sources"][-1])
        return source if source.is_dir() else source.parent

    def _roles(self, directory: Path) -> tuple[Specs, dict[str, Any]]:
        """Read what every role's variables may be, and what they are by default."""
        specs: dict[str, dict[str, Any]] = {}
        defaults: dict[str, Any] = {}
        for path in sorted(directory.glob("*/meta/argument_specs.yml")):
            role = path.parents[1]
            entries = self._loader.load_from_file(str(path))["argument_specs"].values()
            specs[role.name] = {name: option for entry in entries for name, option in entry.get("options", {}).items()}
            for file in (role / "defaults/main.yml", role / "vars/main.yml"):
                if file.is_file():
                    defaults |= self._loader.load_from_file(str(file), trusted_as_template=True) or {}
        return specs, defaults

    def _host(
        self, name: str, hostvars: Any, specs: Specs, defaults: Mapping[str, Any], secrets: Iterable[str]
    ) -> Host:
        given = hostvars.raw_get(name)
        variables = {**defaults, **given, "hostvars": hostvars}
        templar = self._templar.copy_with_new_env(available_variables=variables)
        ours = tuple(f"{role}_" for role in specs)

        def evaluate(value: Any) -> Any:
            try:
                return templar.template(value)
            except AnsibleTemplateSyntaxError:
                return Unevaluated.BROKEN
            except AnsibleError as error:
                missing = re.search(r"'(\w+)' is undefined", str(error))
                wrong = missing and missing[1].startswith(ours) and missing[1] not in variables
                return Unevaluated.BROKEN if wrong else Unevaluated.UNKNOWN

        names = {name for options in specs.values() for name in options} | {"ansible_facts", "ansible_port"}
        values = {name: evaluate(variables[name]) for name in names if name in variables}
        for variable in secrets:
            if isinstance(held := variables.get(variable), Mapping):
                # One by one: a secret that Jinja refuses is named, and says nothing of the others.
                values[variable] = {purpose: evaluate(secret) for purpose, secret in held.items()}
        return Host(name, given.keys(), values)
