"""What the roles declare of themselves in their meta/stack.yml. docs/own-roles.md explains the keys.

Preflight, the firewall, the vault, the rotation and the list of packages derive from it, so that a new role is a new
folder. A variable's value is never in it: a port or a list of packages is the name of the variable that holds it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleError

# In a checkout the plugins are in ansible/plugins, in an installed collection in plugins.
ROLES = next(place / "roles" for place in Path(__file__).resolve().parents if (place / "roles").is_dir())


@dataclass(frozen=True)
class Port:
    """Where a service of a role listens: variables, and who reaches it."""

    open_to: Collection[str]
    port: str = ""  # a protocol other than tcp has none
    instances: str = ""  # variable with the number of ports, counted up from the first; none means one
    protocol: str = "tcp"
    if_set: str = ""  # variable without which the service is not there
    on: str = ""  # a group: no other host of the role has the service
    metrics: str = ""  # the path at which Prometheus asks it, by HTTPS with a certificate of the stack


@dataclass(frozen=True)
class Secret:
    """A variable of the vault that holds a secret for each purpose."""

    purposes: Collection[str]
    used_by: Collection[str] = ()  # groups that have to leave a former secret before it is revoked
    several: str = ""  # a group: without more than one host in it nobody needs the secret
    two: bool = False  # each may be a list: the current one, and the one that clients are leaving


@dataclass(frozen=True)
class Role:
    """A role's declaration, and its folder."""

    path: Path
    groups: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # min and max: how many hosts each may have
    every_host: bool = False
    packages: str = ""
    ports: Mapping[str, Port] = field(default_factory=dict)
    listens_at: str = ""
    certificate: bool = False
    secrets: Mapping[str, Secret] = field(default_factory=dict)
    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # larder_values has the rules

    @property
    def name(self) -> str:
        return self.path.name


def make(kind: Any, held: Mapping[str, Any], where: str, **more: Any) -> Any:
    """Return a declaration's part of one kind, or say which key is wrong."""
    known = {each.name: each.default is MISSING and each.default_factory is MISSING for each in fields(kind)}
    keys = [name for name in known if name not in more]
    if wrong := [str(name) for name in held if name not in keys]:
        raise AnsibleError(f"{where} has {', '.join(wrong)}; there are {', '.join(keys)}.")
    if missing := [name for name in keys if known[name] and name not in held]:
        raise AnsibleError(f"{where} lacks {', '.join(missing)}.")
    return kind(**held, **more)


@dataclass(frozen=True)
class Stack:
    """The declarations of all roles, by name."""

    roles: Mapping[str, Role]

    def on(self, groups: Collection[str]) -> Iterator[Role]:
        """Return the roles that run on a host of these groups."""
        return (role for role in self.roles.values() if role.every_host or {*role.groups} & {*groups})

    def groups_of(self, role: Role, port: Port) -> list[str]:
        """Return the groups whose hosts have a service."""
        return [port.on] if port.on else [*(self.groups if role.every_host else role.groups)]

    @cached_property
    def groups(self) -> dict[str, Mapping[str, int]]:
        """Return how many hosts each group has to have and may have."""
        limits: dict[str, Mapping[str, int]] = {}
        for role in self.roles.values():
            limits |= {group: {**limits.get(group, {}), **of_role} for group, of_role in role.groups.items()}
        return limits

    @cached_property
    def secrets(self) -> dict[str, Secret]:
        return {name: secret for role in self.roles.values() for name, secret in role.secrets.items()}

    def secrets_of(self, groups: Mapping[str, Collection[str]]) -> dict[str, Secret]:
        """Return the secrets of an inventory: a role that need not be there has none where its groups have no host."""
        there = {
            name
            for role in self.roles.values()
            for name in role.secrets
            if role.every_host or any(self.groups[group].get("min") or groups.get(group) for group in role.groups)
        }
        return {name: secret for name, secret in self.secrets.items() if name in there}

    @cached_property
    def values(self) -> dict[str, Mapping[str, Any]]:
        return {name: rule for role in self.roles.values() for name, rule in role.values.items()}

    @cached_property
    def consumers(self) -> list[str]:
        """Return the groups that use a secret of another role."""
        return sorted({group for secret in self.secrets.values() for group in secret.used_by})

    @cached_property
    def certificates(self) -> list[str]:
        """Return the roles whose service has a certificate."""
        return [name for name, role in self.roles.items() if role.certificate]


@cache
def read(directory: Path = ROLES) -> Stack:
    """Read the declarations of all roles in a directory."""
    roles = {}
    for path in sorted(directory.glob("*/meta/stack.yml")):
        where = str(path.relative_to(directory.parent))
        held = yaml.load(path.read_text(), yaml.CSafeLoader) or {}  # a tenth of safe_load's time
        if not isinstance(held, dict):
            raise AnsibleError(f"{where} is no dictionary.")
        for key, kind in (("ports", Port), ("secrets", Secret)):
            parts = held.get(key) or {}
            held[key] = {name: make(kind, part, f"{where}, {key}.{name},") for name, part in parts.items()}
        roles[path.parents[1].name] = make(Role, held, where, path=path.parents[1])
    return Stack(roles)
