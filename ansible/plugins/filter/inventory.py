"""Questions that roles ask of the inventory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def larder_group_hosts(
    group: str, groups: Mapping[str, Sequence[str]], hostvars: Mapping[str, Any], leaving: str = ""
) -> dict[str, str]:
    """Return the hosts of a group, each with its address, in the inventory's order; none where the group is missing.

    A host that leaves the stack counts as gone.

    A host's address is its ``larder_address``, else its ``ansible_host``, else its name.
    """
    return {
        host: hostvars[host].get("larder_address") or hostvars[host].get("ansible_host") or host
        for host in groups.get(group, [])
        if host != leaving
    }


def larder_group_addresses(
    group: str, groups: Mapping[str, Sequence[str]], hostvars: Mapping[str, Any], leaving: str = ""
) -> list[str]:
    """Return the addresses of ``larder_group_hosts`` alone."""
    return [*larder_group_hosts(group, groups, hostvars, leaving).values()]


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"larder_group_hosts": larder_group_hosts, "larder_group_addresses": larder_group_addresses}
