"""Make a host's data directory that of a standby: by a signal, by pg_rewind, or by a copy of the primary."""

from __future__ import annotations

DOCUMENTATION = r"""
module: timescaledb_standby
short_description: Make a data directory that of a standby
description:
  - Stops the server, and leaves it stopped.
  - Replication slots that the role made are removed, because only a primary keeps WAL for others.
options:
  by:
    description:
      - C(signal), so that the server starts as a standby. The data stays as it is.
      - C(rewind), what the server wrote after the primary was promoted is undone by pg_rewind. Where that is
        impossible, C(copy) is done instead, and C(why) says why.
      - C(empty), the data directory is emptied, for Patroni to fill it.
      - C(copy), everything in the data directory is replaced by a copy of the primary.
    type: str
    choices: [signal, rewind, copy, empty]
    required: true
  unit:
    description: The server's unit.
    type: str
    required: true
  data:
    description: The data directory.
    type: path
    required: true
  version:
    description: PostgreSQL's major version.
    type: str
    required: true
  configuration:
    description: The server's postgresql.conf, which pg_rewind needs to end a server's crash recovery.
    type: path
    required: true
  primary:
    description: How to reach the primary, in libpq's words and without a password. A signal needs none.
    type: str
    default: ""
  database:
    description: The database by which pg_rewind reads the primary's files.
    type: str
    default: ""
  slot:
    description: The replication slot that the primary has for this host.
    type: str
    default: ""
  marker:
    description: The file that holds the identifier of the cluster that the role set up.
    type: path
    required: true
  copying:
    description: The file that stands while the data directory is being filled.
    type: path
    required: true
author:
  - The Larder authors
"""

EXAMPLES = r"""
- name: Undo what the former primary wrote after the promotion
  timescaledb_standby:
    by: rewind
    unit: postgresql@17-main.service
    data: /var/lib/postgresql/17/main
    version: "17"
    configuration: /etc/postgresql/17/main/postgresql.conf
    primary: host=192.0.2.1 user=feast_replicate_g1f3a9c02 passfile=/etc/postgresql/17/main/larder.pgpass
    database: feast
    slot: larder_db2
    marker: /etc/larder/timescaledb.cluster
    copying: /etc/larder/timescaledb.copying
"""

RETURN = r"""
by:
  description: What was done.
  type: str
  returned: always
why:
  description: Why pg_rewind was impossible.
  type: str
  returned: when a copy replaced it
"""

import shutil  # noqa: E402 - the documentation stands first, as Ansible asks
import struct  # noqa: E402
from pathlib import Path  # noqa: E402

from ansible.module_utils.basic import AnsibleModule  # noqa: E402


class Standby:
    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.data = Path(module.params["data"])
        self.copying = Path(module.params["copying"])

    def run(self, *command: str) -> tuple[int, str]:
        code, out, err = self.module.run_command([*command], cwd="/", environ_update={"LC_ALL": "C.UTF-8"})
        return code, (err or out).strip()

    def must(self, *command: str) -> None:
        code, said = self.run(*command)
        if code != 0:
            self.module.fail_json(msg=f"{command[0]} failed: {said[-1000:]}")

    def as_postgres(self, program: str, *arguments: str) -> tuple[int, str]:
        path = f"/usr/lib/postgresql/{self.module.params['version']}/bin/{program}"
        return self.run("/usr/sbin/runuser", "-u", "postgres", "--", path, *arguments)

    def check(self) -> None:
        """End here, with everything as it was, unless the primary answers."""
        psql = ["/usr/bin/psql", "--no-psqlrc", "--no-password", "--command=IDENTIFY_SYSTEM"]
        primary = f"{self.module.params['primary']} replication=true target_session_attrs=primary"
        code, said = self.run("/usr/sbin/runuser", "-u", "postgres", "--", *psql, primary)
        if code != 0:
            self.module.fail_json(msg=f"The primary does not let this host in, so nothing was changed: {said[-1000:]}")

    def signal(self) -> None:
        """Have the server start as a standby, which keeps WAL for nobody."""
        signal = self.data / "standby.signal"
        signal.touch(mode=0o600)
        shutil.chown(signal, "postgres", "postgres")
        for slot in (self.data / "pg_replslot").glob("larder_*"):
            shutil.rmtree(slot)

    def rewind(self) -> str:
        """Undo what the primary does not have; return why that is impossible, or nothing."""
        code, said = self.as_postgres(
            "pg_rewind",
            f"--target-pgdata={self.data}",
            f"--source-server={self.module.params['primary']} dbname={self.module.params['database']}",
            f"--config-file={self.module.params['configuration']}",
        )
        return said[-1000:] if code != 0 else ""

    def empty(self) -> None:
        self.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.chown(self.data, "postgres", "postgres")
        self.data.chmod(0o700)
        for held in self.data.iterdir():
            shutil.rmtree(held) if held.is_dir() and not held.is_symlink() else held.unlink()

    def give_up(self) -> None:
        """Leave nothing, for Patroni to fill, not even that a former copy is to be replaced."""
        self.empty()
        self.copying.unlink(missing_ok=True)

    def copy(self) -> None:
        """Replace everything by a copy; the file `copying` stands until the copy is complete."""
        self.copying.touch(mode=0o644)
        self.empty()
        code, said = self.as_postgres(
            "pg_basebackup",
            f"--pgdata={self.data}",
            f"--dbname={self.module.params['primary']}",
            f"--slot={self.module.params['slot']}",
            "--wal-method=stream",
            "--checkpoint=fast",
            "--no-password",
        )
        if code != 0:
            self.module.fail_json(msg=f"The primary could not be copied: {said[-1000:]}")
        self.signal()
        with (self.data / "global/pg_control").open("rb") as control:
            identifier = struct.unpack("=Q", control.read(8))[0]
        marker = Path(self.module.params["marker"])
        marker.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        marker.write_text(f"{identifier}\n")
        marker.chmod(0o644)
        self.copying.unlink()


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "by": {"type": "str", "choices": ["signal", "rewind", "copy", "empty"], "required": True},
            "unit": {"type": "str", "required": True},
            "data": {"type": "path", "required": True},
            "version": {"type": "str", "required": True},
            "configuration": {"type": "path", "required": True},
            "primary": {"type": "str", "default": ""},
            "database": {"type": "str", "default": ""},
            "slot": {"type": "str", "default": ""},
            "marker": {"type": "path", "required": True},
            "copying": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    by, why, standby = module.params["by"], "", Standby(module)
    if not module.check_mode:
        if by != "signal":
            standby.check()
        standby.must("systemctl", "stop", module.params["unit"])
        if by == "rewind":
            why = standby.rewind()
            by = "copy" if why else by
        {"copy": standby.copy, "empty": standby.give_up}.get(by, standby.signal)()
    module.exit_json(changed=True, by=by, **({"why": why} if why else {}))


if __name__ == "__main__":
    main()
