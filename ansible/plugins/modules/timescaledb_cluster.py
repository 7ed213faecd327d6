"""Check that a host's PostgreSQL cluster is still the one that the role set up, and remember that one."""

from __future__ import annotations

DOCUMENTATION = r"""
module: timescaledb_cluster
short_description: Say whether PostgreSQL's data directory still holds the cluster that the role set up
description:
  - Looks at the data directory without a server, so that a volume that is not mounted, or a removed directory, is never
    taken for a fresh host and filled with an empty cluster.
  - A host on which the role ran before is known by C(marker), which holds the cluster's identifier, or by C(settings).
  - It changes nothing, unless C(remember) is true; then it writes the marker.
options:
  data:
    description: The data directory.
    type: path
    required: true
  version:
    description: PostgreSQL's major version.
    type: str
    required: true
  settings:
    description: A file that only the role writes, from an earlier version of the role too.
    type: path
    required: true
  marker:
    description: The file that holds the identifier of the cluster in which the role made its database.
    type: path
    required: true
  recreate:
    description: Whether a lost cluster is to be made again.
    type: bool
    default: false
  restoring:
    description: Whether a backup is about to take the place of whatever is there.
    type: bool
    default: false
  variable:
    description: The variable that says so.
    type: str
    default: ""
  remember:
    description: Whether the cluster that is there is the role's from now on.
    type: bool
    default: false
author:
  - The Larder authors
"""

EXAMPLES = r"""
- name: Look for a lost data directory
  timescaledb_cluster:
    data: /var/lib/postgresql/17/main
    version: "17"
    settings: /etc/postgresql/17/main/conf.d/larder.conf
    marker: /etc/larder/timescaledb.cluster
    recreate: "{{ timescaledb_recreate_lost_cluster }}"
    variable: timescaledb_recreate_lost_cluster
  register: cluster
"""

RETURN = r"""
lost:
  description: Whether the role ran before and nothing is in the data directory.
  type: bool
  returned: always
configured:
  description: Whether the role's settings are there.
  type: bool
  returned: always
remembered:
  description: Whether the marker names the cluster that is there.
  type: bool
  returned: always
ansible_facts:
  description: >-
    C(larder_foreign_timescaledb_cluster), which holds the sentence of what is wrong, or nothing; ansible/preflight.yml
    shows it with what others have on the hosts.
  type: dict
  returned: always
"""

import pwd  # noqa: E402 - the documentation stands first, as Ansible asks
import struct  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import NamedTuple  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402

OWNER = "postgres"


class Found(NamedTuple):
    """What is wrong, if anything; whether the directory is empty; whether its cluster may replace the lost one."""

    wrong: str = ""
    lost: bool = False
    usable: bool = False


def identifier(data: Path) -> str:
    """Return the cluster's system identifier, with which pg_control begins; empty where there is none."""
    try:
        with (data / "global/pg_control").open("rb") as control:
            return str(struct.unpack("=Q", control.read(8))[0])
    except (OSError, struct.error):
        return ""


def owner(path: Path) -> str:
    number = path.stat().st_uid
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"the user {number}"


def look(data: Path, version: str, marker: Path, settings: Path) -> Found:
    """Judge the data directory of a host on which the role ran before; on any other host all is right."""
    if not (marker.exists() or settings.exists()):
        return Found()
    if not data.exists():
        return Found("does not exist", lost=True)
    if not data.is_dir():
        return Found("is no directory")
    held = sorted(entry.name for entry in data.iterdir() if entry.name != "lost+found")
    if not held:
        return Found("is empty", lost=True)
    number = data / "PG_VERSION"
    has = number.read_text().strip() if number.exists() else ""
    if not has:
        return Found(f"holds no PostgreSQL cluster but {', '.join(held[:5])}")
    if has != version:
        return Found(f"holds a cluster of PostgreSQL {has}, not {version}")
    if owner(data) != OWNER:
        return Found(f"belongs to {owner(data)}, not to {OWNER}")
    known, present = marker.read_text().strip() if marker.exists() else "", identifier(data)
    if not present:
        return Found("holds a cluster without global/pg_control")
    if known and known != present:
        return Found(f"holds another cluster ({present}) than the one that was set up here ({known})", usable=True)
    return Found()


def sentence(data: Path, found: Found, variable: str, *, recreate: bool) -> str:
    """Return what is wrong, where, and what to do; empty where the run may go on."""
    if found.wrong and recreate and (found.lost or found.usable):
        return ""
    if found.wrong:
        also = f", or have an empty cluster made there with {variable}: true" if found.lost else ""
        also = f", or take this one with {variable}: true" if found.usable else also
        return f"PostgreSQL's data directory {data} {found.wrong}: mount its volume, or restore it{also}"
    if recreate:
        return (
            f"nothing is lost at {data}: {variable} is for the one run that makes a lost cluster again, so take it away"
        )
    return ""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "data": {"type": "path", "required": True},
            "version": {"type": "str", "required": True},
            "settings": {"type": "path", "required": True},
            "marker": {"type": "path", "required": True},
            "recreate": {"type": "bool", "default": False},
            "restoring": {"type": "bool", "default": False},
            "variable": {"type": "str", "default": ""},
            "remember": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    data, marker, settings = (Path(module.params[name]) for name in ("data", "marker", "settings"))
    present = identifier(data)
    remembered = bool(present) and marker.exists() and marker.read_text().strip() == present
    if module.params["remember"]:
        changed = bool(present) and not remembered
        if changed and not module.check_mode:
            marker.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            marker.write_text(f"{present}\n")
            marker.chmod(0o644)
        module.exit_json(changed=changed)
    found = look(data, module.params["version"], marker, settings)
    said = sentence(data, found, module.params["variable"], recreate=module.params["recreate"])
    said = "" if module.params["restoring"] else said
    facts = {"larder_foreign_timescaledb_cluster": [said] if said else []}
    module.exit_json(
        changed=False, lost=found.lost, configured=settings.exists(), remembered=remembered, ansible_facts=facts
    )


if __name__ == "__main__":
    main()
