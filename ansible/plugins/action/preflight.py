"""Judge an inventory and its variables on the controller, before any host is touched.

The plugin opens no connection. A value that Jinja cannot evaluate yet, such as a fact, is unknown and is not judged. A
fault is one sentence: where it is, which variable, what it holds and what is allowed. Nothing from a vault appears.
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
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from ansible import context
from ansible.constants import COLOR_ERROR
from ansible.errors import AnsibleError, AnsibleTemplateSyntaxError
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.parsing.vault import EncryptedString
from ansible.plugins.action import ActionBase
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

sys.path.append(str(Path(__file__).parents[1] / "module_utils"))
sys.path.append(str(Path(__file__).parents[3] / "src"))  # the package that the hosts run

import larder_stack
import larder_values

SHORTEST_SECRET = 16
# Secrets from the vault that have no purposes.
PAIRS = ("certificate_authorities", "certificate_provided")
# Facts of the role larder that may differ between hosts.
PER_HOST = {"larder_address", "larder_secure_logging"}
TYPES = {"bool": "true or false", "dict": "a dictionary", "int": "an integer", "list": "a list", "str": "text"}
# Directories of which none may be another one, or be inside it.
# What roles note of a host for later plays of the same run; restore.yml runs preflight again after roles.
FACTS = {"base_installed_packages", "certificate_directories", "larder_ready_groups"}
DIRECTORIES = ("larder_home", "pipeline_incoming", "pipeline_metrics", "backup_path", "backup_drill_path")
WORKER_BYTES = 200 * 2**20
# Variables that Ansible itself makes, and that are large.
MAGIC = {"ansible_facts", "ansible_local", "groups", "hostvars", "vars"}

Groups = Mapping[str, Sequence[str]]
Specs = Mapping[str, Mapping[str, Mapping[str, Any]]]  # role, variable, its option


class Unevaluated(Enum):
    """Stands for a value that could not be evaluated."""

    UNKNOWN = "it refers to a fact, or to something else that only a run knows"
    BROKEN = "Jinja refuses it, or it refers to a variable that no role has"


def texts(value: Any) -> Iterator[str]:
    """Return every text in a value, its keys and its lines, and every number that is too long for a count."""
    waiting, seen = [value], set()
    while waiting:
        held = waiting.pop()
        if isinstance(held, str | bytes):
            text = held.decode(errors="replace") if isinstance(held, bytes) else str(held)
            yield text
            if "\n" in text:
                waiting += text.splitlines()
        elif isinstance(held, int) and not isinstance(held, bool) and 10**6 <= abs(held) < 10**1000:
            yield str(held)
        elif isinstance(held, Mapping | Sequence | Set) and id(held) not in seen:
            seen.add(id(held))
            waiting += [*held, *held.values()] if isinstance(held, Mapping) else held


def inline(value: Any) -> Iterator[str]:
    """Return what stands encrypted by itself in a value, by ``!vault``."""
    if isinstance(value, EncryptedString):
        yield str(value)
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from inline(item)


class Secrecy:
    """The texts that no message may hold: secrets and the values of vaults, wherever else these stand."""

    def __init__(
        self, secret: Mapping[str, Any] | None = None, values: Iterable[Any] = (), public: Iterable[str] = ()
    ) -> None:
        """Take the variables that are secret, further values that are, and words that are public all the same.

        A part of a public word, such as the key `password` of a dictionary, is no secret either: without it, no message
        could name redis_passwords.
        """
        self.names = set(secret or {})
        held = {text for value in [*(secret or {}).values(), *values] for text in texts(value) if text}
        self.held = {text for text in held if not any(text in word for word in public)}

    def hides(self, value: Any) -> bool:
        """Whether a value is, holds, or is a part of a secret; a short value: whether it is a secret."""
        return any(
            text in self.held
            or any((len(held) >= 4 and held in text) or (len(text) >= 8 and text in held) for held in self.held)
            for text in texts(value)
        )

    def show(self, name: str, value: Any) -> str:
        """Return a variable's value for a message; of a secret value, only its type."""
        if name in self.names or self.hides(value):
            if isinstance(value, str | bytes):
                return f"text of {len(value)} characters (not shown)"
            if isinstance(value, Mapping | Sequence | Set):
                kind = "a dictionary" if isinstance(value, Mapping) else "a list"
                return f"{kind} of {len(value)} (not shown)"
            return "empty" if value is None else "a value that is no text (not shown)"
        return show(value)

    def clean(self, sentence: str) -> str:
        """Return a sentence without any secret in it, such as one that stands where a name should."""
        for held in sorted((held for held in self.held if len(held) >= 8 and held in sentence), key=len, reverse=True):
            sentence = sentence.replace(held, "(not shown)")
        return sentence


@dataclass
class Host:
    """A host's variables: ``given`` by the inventory or the command line; ``values`` has the roles' defaults too."""

    name: str
    given: Set[str]
    values: Mapping[str, Any]
    secrecy: Secrecy = field(default_factory=Secrecy)
    groups: Set[str] = frozenset()

    def get(self, name: str) -> Any:
        return self.values.get(name, Unevaluated.UNKNOWN)

    def show(self, name: str) -> str:
        return f"{name} is {self.secrecy.show(name, self.get(name))}"


def hint(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    close = difflib.get_close_matches(name, sorted(known), 1, cutoff)
    return f" (did you mean {close[0]}?)" if close else ""


def show(value: object) -> str:
    try:
        text = f"'{value}'" if isinstance(value, str) else repr(value)
    except ValueError:  # Python prints no number of more than 4300 digits
        return "a number of very many digits"
    text = text.replace("\n", "\\n").replace("\r", "\\r").replace("\0", "\\0")
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


def apart_faults(groups: Groups) -> Iterator[str]:
    """A backup is not on the host whose loss it is for."""
    for host in sorted({*groups.get("backup", ())} & {*groups.get("timescaledb", ())}):
        yield f"{host}: it is in the groups backup and timescaledb; backups must be on another host than the database"


def login_faults(groups: Groups) -> Iterator[str]:
    """Whoever sees Feast's web interface logs in with a token of the monitoring."""
    if groups.get("feast_ui") and not groups.get("monitoring"):
        yield "group feast_ui: it has a host, and group monitoring has none, whose tokens (viewer) let people in"


def failover_faults(groups: Groups) -> Iterator[str]:
    """Where etcd decides who the primary is, a majority of it survives a host, and there is somebody to promote."""
    members, databases = groups.get("etcd", ()), groups.get("timescaledb", ())
    if members and len(members) < 3:
        held = f"{len(members)} {'host' if len(members) == 1 else 'hosts'} ({', '.join(members)})"
        yield f"group etcd: it has {held} and needs at least 3, of which one may be lost; or none, without failover"
    if members and len(databases) == 1:
        yield (
            f"group etcd: it has hosts, and group timescaledb has {databases[0]} alone; failover needs a second "
            "database host"
        )


def address_faults(hosts: Iterable[Host]) -> Iterator[str]:
    """No two hosts have the same address."""
    found = defaultdict(list)
    for host in hosts:
        if isinstance(address := host.get("larder_address"), str):
            found[address if not host.secrecy.hides(address) else host.show("larder_address")].append(host.name)
    for address, names in found.items():
        if len(names) > 1:
            where = f"{', '.join(names)}: larder_address (by default ansible_host, else the name)"
            yield f"{where} is {address} for each, and must differ; one host may be in several groups"


def replica_faults(groups: Groups, hosts: Iterable[Host]) -> Iterator[str]:
    """Several Redis hosts know each other by addresses: Sentinel and replicas know no names."""
    several = groups.get("redis", ())
    for host in hosts if len(several) > 1 else ():
        address = host.get("larder_address")
        if host.name in several and isinstance(address, str):
            try:
                ip_address(address)
            except ValueError:
                said = host.show("larder_address")
                yield f"{host.name}: {said} and must be an IP address, as there are several Redis hosts"


def shared_faults(hosts: Iterable[Host], shared: Iterable[str]) -> Iterator[str]:
    """The hosts agree on what the role larder says of the whole stack."""
    for name in shared:
        held = defaultdict(list)
        for host in hosts:
            if not isinstance(value := host.get(name), Unevaluated):
                held[host.secrecy.show(name, larder_values.scalar(value) or value)].append(host.name)
        if len(held) > 1:
            values = " and ".join(f"{value} on {', '.join(names)}" for value, names in held.items())
            yield f"all hosts: {name} is {values}, and must be the same everywhere: set it in group_vars/all"


def name_faults(host: Host, specs: Specs) -> Iterator[str]:
    """Every variable that has a role's prefix, or almost a role's variable's name, is one of a role's."""
    known = {name for options in specs.values() for name in options} | FACTS
    for name in sorted(name for name in host.given - known if isinstance(name, str)):
        prefixed = name.startswith(tuple(f"{role}_" for role in specs))
        meant = hint(name, known, 0.6 if prefixed else 0.9)
        if prefixed or (meant and not name.startswith("_")):
            secret = name in host.secrecy.names or host.secrecy.hides(name)
            what = f"a name of {len(name)} characters in a vault" if secret else name
            yield f"{what} is a variable of no role{meant}"


def value_faults(host: Host, specs: Specs, stack: larder_stack.Stack) -> Iterator[str]:
    """Every variable has the type, the choice and the meaning that its role's specification and declaration say."""
    options = {name: option for role in specs.values() for name, option in role.items()}
    # A computed default is not judged: what it is computed from is, such as ansible_host or another variable.
    given = {*host.given, "larder_address"} & options.keys() - {*PAIRS} - stack.secrets.keys()
    for name in sorted(given):
        value, option, rule = host.get(name), options[name], stack.values.get(name, {})
        if value is Unevaluated.BROKEN:
            yield f"{name} cannot be evaluated: its Jinja is wrong, or it refers to a variable that no role has"
        if isinstance(value, Unevaluated):
            continue
        kind = option.get("type", "str")
        if value is None:
            yield f"{name} is empty; leave the line out for the default"
        elif "choices" in option and kind == "str":
            if not isinstance(value, str) or value not in option["choices"]:
                yield f"{host.show(name)} and must be one of {', '.join(map(str, option['choices']))}"
        elif kind == "bool" or "any" in rule:
            yield from type_faults(host, name, option)
        elif kind in {"dict", "list"} and not isinstance(value, Mapping if kind == "dict" else list | tuple):
            yield f"{host.show(name)} and must be {TYPES[kind]}"
        elif wrong := [*larder_values.faults(name, value, rule)]:
            for where, held, allowed in wrong:
                shown = host.secrecy.show(name, held)
                yield f"{where} is {shown} and must be {allowed}"
        else:
            yield from type_faults(host, name, option)


def type_faults(host: Host, name: str, option: Mapping[str, Any]) -> Iterator[str]:
    """A variable passes Ansible's own check of the role's arguments."""
    value, kind = host.get(name), option.get("type", "str")
    try:
        errors = ArgumentSpecValidator({name: option}).validate({name: value}).error_messages
    except (TypeError, ValueError):  # it sorts a dictionary's keys, of which one is no text
        errors = ["a name in it is no text"]
    except OverflowError:
        errors = ["the number is too large"]
    if errors:
        told = kind in {"dict", "list"} and name not in host.secrecy.names and not host.secrecy.hides(value)
        detail = f" ({'; '.join(errors)})" if told else ""
        yield f"{host.show(name)} and must be {TYPES.get(kind, f'a {kind}')}{detail}"


def port_faults(host: Host, stack: larder_stack.Stack) -> Iterator[str]:
    """Every port exists, and no two services of a host share one."""
    ssh = str(host.get("ansible_port"))
    used = {int(ssh) if ssh.isdecimal() else 22: "ansible_port"}
    for role in stack.on(host.groups):
        here = [port for port in role.ports.values() if port.port and (not port.on or port.on in host.groups)]
        for name, several in ((port.port, port.instances) for port in here):
            port, instances = count(host, name), count(host, several) if several else 1
            if port is None or instances is None or not 1 <= port <= 65535 or instances > 64:
                continue  # value_faults says so
            if instances > 65536 - port:
                yield f"{name} is {port} for {instances} instances; their ports count up from it and must end by 65535"
                continue
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
        yield f"{where}.certificate is not a CA's: its basic constraints do not say CA:TRUE"
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


def certificate_faults(host: Host, services: Sequence[str]) -> Iterator[str]:
    """The CAs can sign what the stack makes, and the user's own certificates can be used."""
    name, entries = "certificate_authorities", host.get("certificate_authorities")
    if name not in host.given:
        yield f"{name} is unset; ansible/init_secrets.yml writes a vault with one"
    elif not isinstance(entries, list) or not entries:
        yield f"{name} must be a list of one CA or two, each with certificate and private_key"
    else:
        for number, entry in enumerate(entries):
            # The first CA signs, so it needs its private key; of another one the certificate is enough.
            yield from pair_faults(f"{name}[{number}]", entry, signs=True, key=number == 0)
    provided = host.get("certificate_provided")
    if not isinstance(provided, Mapping | Unevaluated):
        yield "certificate_provided is no dictionary; it must hold a certificate and its private_key by service"
    for service, entry in provided.items() if isinstance(provided, Mapping) else ():
        if service not in services:
            meant = hint(service, services) if isinstance(service, str) else ""
            yield f"certificate_provided has an entry for no service{meant}; there are {', '.join(services)}"
        else:
            yield from pair_faults(f"certificate_provided.{service}", entry)


def secret_faults(host: Host, stack: larder_stack.Stack, groups: Groups) -> Iterator[str]:
    """Every secret is there, is text that can be sent, is long enough, and serves one purpose alone."""
    uses = defaultdict(list)
    own = {variable for role in stack.on(host.groups) for variable in role.secrets}
    for variable, declared in stack.secrets.items():
        purposes, secrets = declared.purposes, host.get(variable)
        if variable not in host.given:
            needed = not declared.several or len(groups.get(declared.several, ())) > 1
            if needed and (variable in own or host.groups & {*declared.used_by}):
                yield f"{variable} is unset; it must hold a secret each for {', '.join(purposes)}"
            continue
        if not isinstance(secrets, Mapping):
            why = "cannot be evaluated" if isinstance(secrets, Unevaluated) else "is no dictionary"
            yield f"{variable} {why}; it must hold a secret each for {', '.join(purposes)}"
            continue
        for other in secrets:
            if other not in purposes:
                # The message does not show the name: where a line was lost, the name may be a secret.
                meant = hint(other, purposes) if isinstance(other, str) else ""
                yield f"{variable} has an entry for no purpose of the stack{meant}; there are {', '.join(purposes)}"
        for purpose in purposes:
            name, secret = f"{variable}.{purpose}", secrets.get(purpose)
            several = secret if declared.two and isinstance(secret, list) else [secret]
            if not 1 <= len(several) <= 2:
                yield f"{name} holds {len(several)} tokens and may hold one or two, the current one first"
            for single in several:
                if fault := secret_fault(single):
                    yield f"{name} {fault}"
                if isinstance(single, str) and single:
                    uses[single].append(name)
    for names in uses.values():
        if len(names) > 1:
            yield f"{' and '.join(names)} are the same secret; each must be one of its own"


def memory_faults(host: Host) -> Iterator[str]:
    """The memory that Redis and PostgreSQL are to have is there, on a host whose memory is known."""
    given, facts, share = host.get("redis_maxmemory"), host.get("ansible_facts"), count(host, "timescaledb_memory_mb")
    memory = facts.get("memtotal_mb") if isinstance(facts, Mapping) else None
    wanted = None if isinstance(given, Unevaluated) else larder_values.redis_bytes(given)
    if memory is None or wanted is None or "redis" not in host.groups:
        return
    redis = wanted / 2**20
    if redis >= memory:
        yield f"{host.show('redis_maxmemory')} and must be less than the host's memory, {memory} MiB"
    elif "timescaledb" in host.groups and share and redis + share / 4 > memory:
        # PostgreSQL itself takes a quarter of its share, as shared_buffers; the rest is the page cache's.
        both = f"{host.show('redis_maxmemory')} and {host.show('timescaledb_memory_mb')}"
        yield f"{both}; the first and a quarter of the second must be less than the host's memory, {memory} MiB"


def count(host: Host, name: str) -> int | None:
    """Return a variable as a whole number; None where value_faults reports that it is none."""
    value = host.get(name)
    held = None if isinstance(value, Unevaluated) else larder_values.scalar(value)
    return int(held) if held and re.fullmatch(r"[0-9]{1,18}", held) else None


def time_faults(host: Host) -> Iterator[str]:
    """Every run of the pipeline reaches back to the one before, and what it wrote lives until the next."""
    schedule, days = host.get("pipeline_schedule"), count(host, "pipeline_window_days")
    gap = (
        larder_values.longest_gap(schedule) if isinstance(schedule, str) and not larder_values.cron(schedule) else None
    )
    if gap and days and gap > days:
        yield (
            f"{host.show('pipeline_schedule')}, which leaves up to {gap} days between two runs, and "
            f"{host.show('pipeline_window_days')}; a run must reach back to the one before"
        )
    ttl = count(host, "feast_online_ttl_seconds")
    if ttl and days and 86400 <= ttl < max(gap or 0, days) * 86400:
        least = max(gap or 0, days) * 86400
        yield (
            f"{host.show('feast_online_ttl_seconds')} and must be {least} or more: pipeline_window_days, or the days "
            "between two runs; features would be gone before they are written again"
        )
    life, renewal = count(host, "certificate_days"), count(host, "certificate_renew_days")
    if life and renewal and renewal >= life:
        yield f"{host.show('certificate_renew_days')} and must be less than certificate_days, {life}"
    loop, retry, lease = (count(host, f"patroni_{name}") for name in ("loop_wait", "retry_timeout", "ttl"))
    if loop and retry and lease and loop + 2 * retry > lease:
        allowed = f"patroni_loop_wait + 2 * patroni_retry_timeout, {loop + 2 * retry}, or more"
        yield f"{host.show('patroni_ttl')} and must be {allowed}"
    tables = host.get("timescaledb_tables")
    for table in tables if isinstance(tables, list) else ():
        kept = larder_values.seconds(table.get("retention")) if isinstance(table, Mapping) else None
        if kept is not None and days and kept < days * 86400:
            shown = host.secrecy.show("timescaledb_tables", table["retention"])
            yield (
                f"timescaledb_tables has the retention {shown} and must keep at least pipeline_window_days, {days} "
                "days: what was not materialized yet would be gone"
            )


def size_faults(host: Host) -> Iterator[str]:
    """No part is larger than its whole, and each service has the memory that it needs."""
    some, all_of_them = count(host, "gateway_client_connections"), count(host, "gateway_max_connections")
    if some and all_of_them and some > all_of_them:
        yield f"{host.show('gateway_client_connections')} and must be gateway_max_connections, {all_of_them}, or less"
    workers, memory = (
        count(host, "feature_server_workers"),
        larder_values.size_bytes(host.get("feature_server_memory_max")),
    )
    if workers and memory is not None and memory < workers * WORKER_BYTES:
        yield (
            f"{host.show('feature_server_memory_max')} and must be {workers * WORKER_BYTES // 2**20}M or more: each of "
            f"feature_server_workers, {workers}, needs 200M"
        )
    paths = {name: f"{host.get(name)}/" for name in DIRECTORIES if isinstance(host.get(name), str)}
    for name, path in paths.items():
        for other, parent in paths.items():
            if name != other and path.startswith(parent) and (path != parent or name > other):
                yield f"{host.show(name)} and must not be in {other}, or the same"


def listener_faults(host: Host, stack: larder_stack.Stack) -> Iterator[str]:
    """Services listen at addresses that their hosts have, as far as facts say which."""
    facts = host.get("ansible_facts")
    present = [
        address
        for family in ("all_ipv4_addresses", "all_ipv6_addresses")
        for address in (facts.get(family) if isinstance(facts, Mapping) else None) or ()
    ]
    for name in (role.listens_at for role in stack.on(host.groups) if role.listens_at):
        held = host.get(name)
        for single in held if isinstance(held, list) else [held]:
            try:
                address = ip_address(single if isinstance(single, str) else "")
            except ValueError:
                continue  # a name, all addresses, or an optional one; or value_faults reports it
            known = {ip_address(each.partition("%")[0]) for each in present}
            if present and not address.is_loopback and address not in known:
                shown = host.secrecy.show(name, str(single))
                yield f"{name} has {shown}, which is no address of the host; it has {', '.join(present)}"


def vip_faults(hosts: Sequence[Host]) -> Iterator[str]:
    """The virtual address is one that no host has, and the gateways can pass it to each other."""
    gateways = [host for host in hosts if "gateway" in host.groups and host.get("gateway_vip")]
    if not gateways:
        return
    yield from shared_faults([host for host in hosts if "gateway" in host.groups], ["gateway_vip"])
    shown = gateways[0].show("gateway_vip")
    try:
        address = ip_address(str(gateways[0].get("gateway_vip")))
    except ValueError:
        return  # value_faults says so
    if len(gateways) == 1:
        yield f"{gateways[0].name}: {shown} and needs two gateways or more: add one, or leave gateway_vip empty"
    for host in hosts:
        if str(address) in {str(host.get("larder_address")), str(host.get("ansible_host"))}:
            yield f"{host.name}: {shown}, which is the host's own address, and must be one that no host has"
    for host in gateways:
        own = host.get("larder_address")
        if not isinstance(own, Unevaluated) and larder_values.address(own, of="several hosts"):
            yield f"{host.name}: {host.show('larder_address')} and must be an IPv4 address where gateway_vip is set"
        if host.get("gateway_bind_address") != "*":
            yield f"{host.name}: {host.show('gateway_bind_address')} and must be * where gateway_vip is set"


def member_faults(host: Host, stack: larder_stack.Stack) -> Iterator[str]:
    """Names that refer to something exist, and no list has one twice."""
    services, extra = {name for role in stack.roles.values() for name in role.ports}, host.get("base_firewall_extra")
    for service in extra if isinstance(extra, Mapping) else ():
        if isinstance(service, str) and service not in services:
            shown = host.secrecy.show("base_firewall_extra", service)
            yield f"base_firewall_extra has {shown}, which is no service{hint(service, services)}"
    users = host.get("base_users")
    if isinstance(users, list):
        named = [each.get("name") for each in users if isinstance(each, Mapping)]
        if (user := host.get("larder_user")) in named:
            shown = host.secrecy.show("base_users", user)
            yield f"base_users has {shown}, which is larder_user; people need an account of their own"
        for twice in {each for each in named if isinstance(each, str) and named.count(each) > 1}:
            yield f"base_users has {host.secrecy.show('base_users', twice)} twice, and must have it once"
    for name, passwords in (("redis_users", "redis_passwords"), ("timescaledb_roles", "timescaledb_passwords")):
        purposes, held = stack.secrets[passwords].purposes, host.get(name)
        if isinstance(held, Mapping):
            for purpose in held.keys() - {*purposes}:
                shown = host.secrecy.show(name, purpose)
                yield f"{name} has {shown}, which is no purpose of the stack; there are {', '.join(purposes)}"
            if missing := [purpose for purpose in purposes if purpose not in held]:
                yield f"{name} has no {', '.join(missing)}, which services of the stack log in as"
    clients = host.get("timescaledb_extra_clients")
    for client in clients if isinstance(clients, list) else ():
        purpose = client.get("purpose") if isinstance(client, Mapping) else None
        if isinstance(purpose, str) and purpose not in purposes:
            shown = host.secrecy.show("timescaledb_extra_clients", purpose)
            yield f"timescaledb_extra_clients has the purpose {shown}; there are {', '.join(purposes)}"


def release_faults(host: Host, releases: Sequence[str]) -> Iterator[str]:
    """A host whose facts are known runs a Debian that the stack supports."""
    facts = host.get("ansible_facts")
    if isinstance(facts, Mapping) and "distribution" in facts:
        runs = f"{facts['distribution']} {facts.get('distribution_major_version')}"
        if runs not in {f"Debian {release}" for release in releases}:
            yield f"it runs {runs} and must run Debian {' or '.join(releases)}"


def file_faults(host: Host) -> Iterator[str]:
    """The pipeline's own code accepts the inventory's settings for files of bars."""
    from larder.bars import settings
    from larder.errors import ConfigError

    held = {key: host.get(f"pipeline_{key}") for key in settings.KEYS if f"pipeline_{key}" in host.given}
    for key, value in held.items():  # one by one, so that each fault is reported
        try:
            settings.judge({} if isinstance(value, Unevaluated) else {key: value})
        except ConfigError as error:
            # The error's message may show a value cut short: no check recognises the part of a secret in it.
            hidden = host.secrecy.hides(value) or f"pipeline_{key}" in host.secrecy.names
            yield (
                f"{host.show(f'pipeline_{key}')} and must be as docs/formats.md describes it"
                if hidden
                else error.message.rstrip(".")
            )


def judge(
    hosts: Sequence[Host], groups: Groups, specs: Specs, stack: larder_stack.Stack, releases: Sequence[str]
) -> list[str]:
    """Return every fault once, with the hosts that have it, or the name of their group."""
    found: dict[str, list[str]] = defaultdict(list)
    for host in hosts:
        for fault in (
            *name_faults(host, specs),
            *value_faults(host, specs, stack),
            *file_faults(host),
            *port_faults(host, stack),
            *secret_faults(host, stack, groups),
            *certificate_faults(host, stack.certificates),
            *memory_faults(host),
            *time_faults(host),
            *size_faults(host),
            *listener_faults(host, stack),
            *member_faults(host, stack),
            *release_faults(host, releases),
        ):
            found[host.secrecy.clean(" ".join(fault.splitlines()))].append(host.name)
    sets = {frozenset(groups.get(group, ())): f"group {group}" for group in stack.groups}
    sets[frozenset(host.name for host in hosts)] = "all hosts"

    def where(names: list[str]) -> str:
        return sets.get(frozenset(names), ", ".join(names)) if len(names) > 1 else names[0]

    return [
        *group_faults(groups, stack.groups),
        *apart_faults(groups),
        *login_faults(groups),
        *failover_faults(groups),
        *address_faults(hosts),
        *replica_faults(groups, hosts),
        *vip_faults(hosts),
        *shared_faults(hosts, sorted(specs["larder"].keys() - PER_HOST)),
        *(f"{where(names)}: {fault}" for fault, names in found.items()),
    ]


def process(number: int) -> str:
    """Return what names a process for as long as it lives: another that gets its number later started later."""
    stat = Path(f"/proc/{number}/stat")
    return f"{number} {stat.read_text().rpartition(')')[2].split()[19]}" if stat.exists() else f"{number}"


def controller() -> int:
    """Return the process of ansible-playbook itself, which lives as long as the run; a plugin runs in its child.

    os.getppid() is not used: after a kill of ansible-playbook it would return 1, a process that never ends.
    """
    parent = multiprocessing.parent_process()
    return parent.pid if parent and parent.pid else os.getpid()


def lock_fault(path: Path, me: int) -> str | None:
    """Take the lock of an inventory for a process; if another live process holds it, say which one.

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
    """Takes ``releases`` of Debian; the roles say what their variables may be and which hosts they need."""

    _requires_connection = False
    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        variables = task_vars or {}
        super().run(tmp, variables)
        groups, stack = variables["groups"], larder_stack.read()
        specs, defaults = self._roles(stack)
        names = sorted({host for group in stack.groups for host in groups.get(group, ())})
        vaults = self._vaults(variables)
        public = {*specs, *groups, *names, *stack.certificates, "certificate", "private_key"}
        public |= {
            word
            for options in specs.values()
            for name, option in options.items()
            for word in (name, *option.get("options", {}))
        }
        public |= {purpose for secret in stack.secrets.values() for purpose in secret.purposes}
        hosts = [self._host(name, variables, specs, defaults, stack, vaults, public) for name in names]
        faults = judge(hosts, groups, specs, stack, self._task.args["releases"])
        if not faults and not self._task.check_mode:
            fault = lock_fault(self._inventory(variables) / ".lock", controller())
            faults = [fault] if fault else []
        if not faults:
            return {"changed": False}
        # The faults are displayed here: in the result, the default callback would print them twice.
        self._display.display("\n".join(f"- {fault}." for fault in faults), color=COLOR_ERROR)
        return {"failed": True, "msg": f"Preflight found what is listed above ({len(faults)}). No host was changed."}

    def _inventory(self, variables: Mapping[str, Any]) -> Path:
        source = Path(variables["ansible_inventory_sources"][-1])
        return source if source.is_dir() else source.parent

    def _roles(self, stack: larder_stack.Stack) -> tuple[Specs, dict[str, Any]]:
        """Read how every role's variables are specified, and what they are by default."""
        specs: dict[str, dict[str, Any]] = {}
        defaults: dict[str, Any] = {}
        for name, role in stack.roles.items():
            entries = self._loader.load_from_file(str(role.path / "meta/argument_specs.yml"))["argument_specs"].values()
            specs[name] = {name: option for entry in entries for name, option in entry.get("options", {}).items()}
            for file in (role.path / "defaults/main.yml", role.path / "vars/main.yml"):
                if file.is_file():
                    defaults |= self._loader.load_from_file(str(file), trusted_as_template=True) or {}
        return specs, defaults

    def _vaults(self, variables: Mapping[str, Any]) -> list[Any]:
        """Return what is in each encrypted file that may have given a variable, and in each that was one before."""
        places = [Path(source) for source in variables["ansible_inventory_sources"]]
        places += [Path(variables[place]) for place in ("playbook_dir",) if place in variables]
        files = {Path(value[1:]) for value in context.CLIARGS.get("extra_vars", ()) if str(value).startswith("@")}
        for place in {place if place.is_dir() else place.parent for place in places}:
            files |= {*place.glob("*"), *place.glob("group_vars/**/*"), *place.glob("host_vars/**/*")}
        found = []
        for file in sorted(files):
            try:
                with file.open("rb") as opened:
                    if opened.read(15) == b"$ANSIBLE_VAULT;":
                        found.append(self._loader.load_from_file(str(file)))
            except (AnsibleError, OSError):
                continue  # Ansible cannot read the file either, so no variable has anything of it
        return found

    def _host(
        self,
        name: str,
        task_vars: Mapping[str, Any],
        specs: Specs,
        defaults: Mapping[str, Any],
        stack: larder_stack.Stack,
        vaults: Sequence[Any],
        public: Set[str],
    ) -> Host:
        groups, hostvars = task_vars["groups"], task_vars["hostvars"]
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
        for variable in stack.secrets:
            if isinstance(held := variables.get(variable), Mapping):
                # Secrets are evaluated one by one, so that one which Jinja refuses is named and hides no other
                # fault.
                values[variable] = {purpose: evaluate(secret) for purpose, secret in held.items()}
        # A vault's variables are secret even where another file overrides them, so their names count.
        encrypted = {variable: held for variable in given.keys() - MAGIC if (held := [*inline(given[variable])])}
        hidden = {name for vault in vaults if isinstance(vault, Mapping) for name in vault} | {*stack.secrets, *PAIRS}
        held = {name: [given[name], values.get(name)] for name in hidden & given.keys() if name not in MAGIC}
        own = {group for group, members in groups.items() if name in members}
        return Host(name, given.keys(), values, Secrecy({**held, **encrypted}, vaults, public), own)
