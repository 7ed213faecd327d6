"""Who is the primary of PostgreSQL, by what each database host answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PROMOTE = "ansible-playbook ansible/promote_standby.yml -e host="


def larder_timescaledb_verdict(servers: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return the ``primary``, and what is ``wrong`` where there is none, or more than one.

    ``servers`` holds what the module timescaledb_state says of each host, in the inventory's order; nothing of a host
    that cannot be reached. A server that is stopped, and would start as a primary, counts as one. Of two primaries the
    one with the newer timeline was promoted; the other one is to become a standby.
    """
    silent = [host for host, server in servers.items() if not server]
    leaders = {
        host: server
        for host, server in servers.items()
        if server.get("state") == "primary" or (server.get("state") == "stopped" and not server["signal"])
    }
    if not leaders:
        standbys = [host for host, server in servers.items() if server.get("state") in ("standby", "stopped")]
        if standbys:
            best = max(standbys, key=lambda host: int(servers[host]["position"]))
            why = f"{', '.join(silent)} cannot be reached, and " if silent else ""
            return {
                "primary": "",
                "wrong": f"no database host is the primary: {why}{', '.join(standbys)} wait as standbys; start the "
                f"primary, or promote one: {PROMOTE}{best}",
            }
        if len(silent) == len(servers):
            return {
                "primary": "",
                "wrong": f"{', '.join(silent)} cannot be reached, so nobody knows which one is the primary: make one "
                "reachable",
            }
        return {"primary": next(iter(servers)), "wrong": ""}
    newest = max(int(server["timeline"]) for server in leaders.values())
    first = [host for host, server in leaders.items() if server["timeline"] == newest]
    if len(first) > 1 or len({server["system"] for server in leaders.values()}) > 1:
        names = " and ".join(leaders)
        return {
            "primary": "",
            "wrong": f"{names} are primaries, and none of them was promoted after the others: take those away whose "
            "data is not wanted, with /etc/larder/timescaledb.cluster and PostgreSQL's data directory",
        }
    return {"primary": first[0], "wrong": ""}


def larder_timescaledb_refusals(
    servers: Mapping[str, Mapping[str, Any]], host: str, seen: Sequence[str], stop_primary: bool
) -> list[str]:
    """Return why a host must not be promoted, a sentence each; nothing where it may be, or is the primary already.

    ``servers`` is as above; ``seen`` are the hosts that answer ``host`` as the primary over the network, which may be
    out of Ansible's reach.
    """
    own = servers[host]
    others = {name: server for name, server in servers.items() if name != host}
    running = [name for name, server in others.items() if server.get("state") == "primary"]
    hidden = [name for name in seen if not others.get(name)]
    if own.get("state") == "primary":
        return [
            f"{host} is the primary already, and {name} answers as one, too: site.yml makes {name} its standby."
            for name in dict.fromkeys([*running, *hidden])
        ]
    if own.get("state") != "standby":
        return [f"{host} is no standby that runs: its PostgreSQL is {own.get('state', 'out of reach')}."]
    refusals = [
        f"{name} answers {host} as the primary, and Ansible cannot reach it to stop it: two primaries would take "
        "writes. Stop its PostgreSQL, or its host, first."
        for name in hidden
    ]
    if own["streaming"] and not running and not hidden:
        refusals.append(f"{host} receives WAL from a primary that does not answer Ansible: stop that one first.")
    if running and not stop_primary:
        refusals.append(
            f"{' and '.join(running)} runs as the primary: two primaries would take writes. To have it stopped first, "
            "give -e stop_primary=true."
        )
    if running and stop_primary and not own["streaming"]:
        refusals.append(f"{host} does not follow {' and '.join(running)} at present: run site.yml first.")
    ahead = [
        name
        for name, server in others.items()
        if server.get("state") in ("standby", "stopped")
        and not running
        and (server["timeline"], server["position"]) > (own["timeline"], own["position"])
    ]
    refusals += [
        f"{name} has {servers[name]['position'] - own['position']} bytes of WAL more than {host}: promote {name} "
        "instead" + (", or start it again as the primary." if not servers[name]["signal"] else ".")
        for name in ahead
    ]
    return refusals


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {
            "larder_timescaledb_verdict": larder_timescaledb_verdict,
            "larder_timescaledb_refusals": larder_timescaledb_refusals,
        }
