"""What the roles declare in their meta/stack.yml, for playbooks and for other roles."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ansible.plugins.lookup import LookupBase

sys.path.append(str(Path(__file__).parents[1] / "module_utils"))

import larder_stack

DOCUMENTATION = """
name: declared
author: The Larder authors
short_description: What the roles declare in their meta/stack.yml
description: A variable that the inventory does not set has its role's default.
options:
  _terms:
    description:
      - C(groups), the names of all groups; C(consumers), those that use a secret of another role.
      - C(secrets), a list of C(name) and C(purposes), of the roles that the inventory has.
      - Of the roles on this host, C(packages), and C(ports), each with C(service), C(protocol), C(port), C(instances),
        C(open_to).
      - C(metrics), of the roles of all hosts what Prometheus asks, each with C(service), C(port), C(instances), C(path)
        and C(groups), those whose hosts have it.
      - A file such as C(tasks/foreign.yml), the names of the roles on this host that have it.
    required: true
  groups:
    description: Groups of the host; this host's by default.
    type: list
"""


class LookupModule(LookupBase):  # type: ignore[misc] # ansible-core has no types
    def run(self, terms: Sequence[str], variables: Mapping[str, Any] | None = None, **options: Any) -> list[Any]:
        variables = variables or {}
        stack = larder_stack.read()
        here = [*stack.on(options.get("groups", variables.get("group_names", ())))]
        (term,) = terms
        if term in {"groups", "consumers"}:
            return [*getattr(stack, term)]
        if term == "secrets":
            return [
                {"name": name, "purposes": [*secret.purposes]}
                for name, secret in stack.secrets_of(variables.get("groups", {})).items()
            ]
        if term == "packages":
            named = [self._value(role, role.packages, variables) for role in here if role.packages]
            return [*dict.fromkeys(package for packages in named for package in packages)]
        if term == "ports":
            names = options.get("groups", variables.get("group_names", ()))
            return [
                {
                    "service": service,
                    "protocol": port.protocol,
                    **self._numbers(role, port, variables),
                    "open_to": [*port.open_to],
                }
                for role in here
                for service, port in role.ports.items()
                if (not port.on or port.on in names) and (not port.if_set or self._value(role, port.if_set, variables))
            ]
        if term == "metrics":
            return [
                {
                    "service": service,
                    **self._numbers(role, port, variables),
                    "path": port.metrics,
                    "groups": stack.groups_of(role, port),
                }
                for role in stack.roles.values()
                for service, port in role.ports.items()
                if port.metrics and (not port.if_set or self._value(role, port.if_set, variables))
            ]
        return [role.name for role in here if (role.path / term).exists()]

    def _numbers(
        self, role: larder_stack.Role, port: larder_stack.Port, variables: Mapping[str, Any]
    ) -> dict[str, int]:
        """Return a service's first port, 0 where it has none, and how many it has."""
        return {
            "port": int(self._value(role, port.port, variables)) if port.port else 0,
            "instances": int(self._value(role, port.instances, variables)) if port.instances else 1,
        }

    def _value(self, role: larder_stack.Role, name: str, variables: Mapping[str, Any]) -> Any:
        """Return a variable of a role that may not run in this play: the inventory's, else the role's default."""
        if name not in variables:
            defaults = self._loader.load_from_file(str(role.path / "defaults/main.yml"), trusted_as_template=True)
            variables = {**defaults, **variables}
        return self._templar.copy_with_new_env(available_variables=variables).template(variables[name])
