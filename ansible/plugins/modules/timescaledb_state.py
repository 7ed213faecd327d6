"""Say what a host's PostgreSQL is: primary, standby, stopped or not set up, and how far it is."""

from __future__ import annotations

DOCUMENTATION = r"""
module: timescaledb_state
short_description: Say whether a host's PostgreSQL is a primary or a standby
description:
  - The server is asked over its socket, as the system user postgres. Of a server that does not run, the data directory
    is read.
  - It changes nothing.
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
    description: A file that only the role writes.
    type: path
    required: true
  marker:
    description: The file that holds the identifier of the cluster that the role set up.
    type: path
    required: true
  copying:
    description: The file that stands while the data directory is being filled.
    type: path
    required: true
  manager:
    description: The file that stands where Patroni runs the server.
    type: path
    required: true
  patience:
    description: >-
      Seconds to wait for a standby that makes no progress, until it receives the primary's WAL. A standby that reads
      WAL of its own first is waited for as long as it gets on.
    type: int
    default: 0
author:
  - The Larder authors
"""

EXAMPLES = r"""
- name: Read the state of PostgreSQL
  timescaledb_state:
    data: /var/lib/postgresql/17/main
    version: "17"
    settings: /etc/postgresql/17/main/conf.d/larder.conf
    marker: /etc/larder/timescaledb.cluster
    copying: /etc/larder/timescaledb.copying
    manager: /etc/patroni/config.yml
"""

RETURN = r"""
server:
  description: >-
    C(managed), whether Patroni runs the server. C(state) is bare (the role has set up no cluster here), lost (its data
    directory is gone), copying (a copy was interrupted), stopped, primary or standby. Of the last three: C(signal),
    whether it would start as a standby; C(system), the cluster's identifier; C(timeline); C(position), the end of its
    WAL in bytes. Of the last two: C(streaming), C(parameters) that no standby may have lower than its primary, and
    C(slots).
  type: dict
  returned: always
"""

import json  # noqa: E402 - the documentation stands first, as Ansible asks
import re  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Mapping  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402

# The timeline of a primary is that of the WAL which it writes: pg_control has it only after the next checkpoint.
QUESTION = """
SELECT json_build_object(
    'state', CASE WHEN pg_is_in_recovery() THEN 'standby' ELSE 'primary' END,
    'system', (SELECT system_identifier::text FROM pg_control_system()),
    'timeline', CASE WHEN pg_is_in_recovery()
        THEN greatest(
            (SELECT timeline_id FROM pg_control_checkpoint()),
            (SELECT received_tli FROM pg_stat_wal_receiver WHERE status = 'streaming')
        )
        ELSE ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::int END,
    'position', CASE WHEN pg_is_in_recovery()
        THEN greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()) ELSE pg_current_wal_lsn() END - '0/0',
    'streaming', EXISTS (SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming'),
    'parameters', (
        SELECT json_object_agg(name, setting::int) FROM pg_settings
        WHERE name IN ('max_connections', 'max_worker_processes', 'max_wal_senders', 'max_prepared_transactions',
                       'max_locks_per_transaction')
    ),
    'slots', (
        SELECT coalesce(json_agg(json_build_object(
            'name', slot_name, 'active', active, 'lost', wal_status IS NOT DISTINCT FROM 'lost')), '[]')
        FROM pg_replication_slots WHERE slot_type = 'physical' AND slot_name ^@ 'larder_'
    )
)
"""


def control(text: str) -> dict[str, Any]:
    """Return what pg_controldata says of a server that does not run."""
    held = dict(re.findall(r"^([^:\n]+): +(.*)$", text, re.MULTILINE))
    high, low = held["Latest checkpoint location"].split("/")
    return {
        "system": held["Database system identifier"],
        "timeline": int(held["Latest checkpoint's TimeLineID"]),
        "position": (int(high, 16) << 32) + int(low, 16),
        "clean": held["Database cluster state"] in ("shut down", "shut down in recovery"),
    }


def look(
    paths: Mapping[str, Path], ask: Callable[[str], str | None], read_control: Callable[[], str | None]
) -> dict[str, Any]:
    """Return the state of a host's server; ``ask`` asks it at a port, ``read_control`` reads its control file."""
    data, managed = paths["data"], {"managed": paths["manager"].exists()}
    if paths["copying"].exists():
        return managed | {"state": "copying"}
    if not (paths["marker"].exists() or paths["settings"].exists()):
        return managed | {"state": "bare"}
    if not (data / "PG_VERSION").exists():
        return managed | {"state": "lost"}
    signal = managed | {"signal": (data / "standby.signal").exists()}
    running = (data / "postmaster.pid").read_text().splitlines() if (data / "postmaster.pid").exists() else []
    answer = ask(running[3]) if len(running) > 3 else None
    if answer:
        told: dict[str, Any] = json.loads(answer)
        return signal | told
    held = read_control()
    return {"state": "stopped", **signal, **control(held)} if held else managed | {"state": "lost"}


def starting(data: Path) -> bool:
    """Whether the server recovers and answers nobody yet."""
    pid = data / "postmaster.pid"
    lines = pid.read_text().splitlines() if pid.exists() else []
    return bool(lines) and lines[-1].strip() == "starting"


def follow(look: Callable[[], dict[str, Any]], data: Path, patience: float) -> dict[str, Any]:
    """Return the state as soon as the standby receives WAL, or when it has got no further for `patience` seconds."""
    server, end = look(), time.monotonic() + patience
    while not server.get("streaming") and time.monotonic() < end:
        time.sleep(1)
        before, server = server.get("position"), look()
        if starting(data) or server.get("position") != before:
            end = time.monotonic() + patience
    return server


def main() -> None:
    names = ("data", "settings", "marker", "copying", "manager")
    module = AnsibleModule(
        argument_spec={name: {"type": "path", "required": True} for name in names}
        | {"version": {"type": "str", "required": True}, "patience": {"type": "int", "default": 0}},
        supports_check_mode=True,
    )

    def run(*command: str) -> str | None:
        code, out, _err = module.run_command(
            ["/usr/sbin/runuser", "-u", "postgres", "--", *command], cwd="/", environ_update={"LC_ALL": "C.UTF-8"}
        )
        return out if code == 0 and out.strip() else None

    def ask(port: str) -> str | None:
        options = ["--no-psqlrc", "--quiet", "--tuples-only", "--no-align", f"--port={port}", "--dbname=postgres"]
        return run("/usr/bin/psql", *options, f"--command={QUESTION}")

    def read_control() -> str | None:
        program = f"/usr/lib/postgresql/{module.params['version']}/bin/pg_controldata"
        return run(program, f"--pgdata={module.params['data']}")

    paths = {name: Path(module.params[name]) for name in names}
    server = follow(lambda: look(paths, ask, read_control), paths["data"], module.params["patience"])
    module.exit_json(changed=False, server=server)


if __name__ == "__main__":
    main()
