"""What the units of the role backup run: take a backup, prove one by a restore, report metrics; and recover a copy.

backup.py backup full|diff|incr    a backup, by pgBackRest
backup.py drill                    restore the newest backup to a scratch cluster, compare it with the live database
backup.py report backup|drill      write the metrics of what has just ended (systemd says how in the environment)
backup.py recover DIRECTORY        replay the WAL of a restored data directory up to its target, and stop there

It needs no package but psycopg. The settings are in /etc/pgbackrest/larder.json, the passphrase of the repository in
the unit's credentials.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

SETTINGS = Path("/etc/pgbackrest/larder.json")
METRICS = Path("/var/lib/larder/metrics")
PGBACKREST = "/usr/bin/pgbackrest"
# What PostgreSQL says where the archive ends before the moment that is asked for.
TOO_EARLY = "recovery ended before configured recovery target was reached"
REACHED = re.compile(r"recovery stopping (?:before|after) (?:commit|abort) of transaction \d+, time (.+)")
LAST = re.compile(r"last completed transaction was at log time (.+)")
# The same text for the same row in both clusters, whatever their settings.
SESSION = (
    "SET TimeZone = 'UTC'; SET DateStyle = 'ISO'; SET IntervalStyle = 'postgres'; SET extra_float_digits = 1; "
    "SET bytea_output = 'hex'; SET max_parallel_workers_per_gather = 0; SET search_path = pg_catalog"
)
TABLES = """
SELECT nspname, relname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
WHERE relkind IN ('r', 'p') AND relpersistence = 'p' AND NOT relispartition
  AND nspname !~ '^(pg_|_?timescaledb|information_schema$|larder_backup$)'
ORDER BY nspname, relname
"""
BEGIN = "INSERT INTO larder_backup.drills (id) VALUES (gen_random_uuid()) RETURNING id, pg_current_xact_id()::text"
END = """
UPDATE larder_backup.drills SET (ended_at, failure, backup, backup_ended_at, rows, good_until)
    = (clock_timestamp(), %(failure)s, %(backup)s, to_timestamp(%(stopped)s), %(rows)s,
       to_timestamp(%(stopped)s) + %(days)s * interval '1 day')
WHERE id = %(id)s
"""


class Failure(Exception):  # noqa: N818 - it is told as one sentence
    """What went wrong, in one sentence."""


class Figures(NamedTuple):
    """A table's rows, of how many the sample is, and the sum of the sample's hashes."""

    rows: int
    sampled: int
    checksum: str


Tables = Mapping[str, Figures]


def say(text: str) -> None:
    print(text, flush=True)


def run(*command: str) -> None:
    """Run a program whose output goes to the journal."""
    code = subprocess.run(command, check=False).returncode
    if code:
        what = " ".join([Path(command[0]).name, *(word for word in command[1:] if not word.startswith("-"))])
        raise Failure(f"{what} failed with exit code {code}; the lines above say why")


def pgbackrest(settings: Mapping[str, Any], *arguments: str) -> list[str]:
    """Return a command of pgBackRest, with the file that holds the passphrase."""
    secrets = f"--config-include-path={os.environ['CREDENTIALS_DIRECTORY']}"
    return [PGBACKREST, f"--stanza={settings['stanza']}", secrets, *arguments]


def backups(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what the repository holds, the newest last."""
    command = pgbackrest(settings, "--output=json", "--log-level-console=off", "info")
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [each for stanza in json.loads(told) for each in stanza["backup"] if not each.get("error")]


def note(settings: Mapping[str, Any], name: str, **held: Any) -> None:
    """Keep what `report` makes metrics of."""
    path = Path(settings["state"], f"{name}.json")
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(held, file)
    Path(file.name).replace(path)


def noted(settings: Mapping[str, Any], name: str) -> dict[str, float]:
    """Return what was kept; the file is another user's, so that numbers alone are taken from it."""
    try:
        held = json.loads(Path(settings["state"], f"{name}.json").read_text())
    except (OSError, ValueError):
        return {}
    return {key: float(value) for key, value in held.items() if isinstance(value, int | float)}


@contextmanager
def alone() -> Iterator[None]:
    """Wait for a backup or a drill that is under way: a drill must not lose the WAL that it replays."""
    with SETTINGS.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def backup(settings: Mapping[str, Any], kind: str) -> None:
    began = time.time()
    with alone():
        run(*pgbackrest(settings, f"--type={kind}", "backup"))
        newest = backups(settings)[-1]
    note(
        settings,
        "backup",
        last_success_timestamp_seconds=newest["timestamp"]["stop"],
        duration_seconds=time.time() - began,
        database_bytes=newest["info"]["size"],
        repository_bytes=newest["info"]["repository"].get("size", newest["info"]["repository"]["delta"]),
    )


def connect(**options: Any) -> Any:
    """Return a connection that commits each statement."""
    connection = psycopg.connect(application_name="larder drill", autocommit=True, **options)
    connection.execute(SESSION)
    return connection


def live(settings: Mapping[str, Any]) -> Any:
    """Connect to the primary; the certificate of this host is the login."""
    directory = settings["certificate"]
    return connect(
        host=",".join(settings["hosts"]),
        port=settings["port"],
        dbname=settings["database"],
        user=settings["login"],
        target_session_attrs="read-write",
        connect_timeout=10,
        sslmode="verify-full",
        sslrootcert=f"{directory}/ca.crt",
        sslcert=f"{directory}/tls.crt",
        sslkey=f"{directory}/tls.key",
    )


def figures(connection: Any, shares: dict[str, int], sample_rows: int) -> dict[str, Figures]:
    """Count every table and hash a sample of it, all at one moment.

    The sample of a table is one in so many places of rows; `shares` has the number, or gets it. A restored copy has
    each row at the place that the original has.
    """
    found = {}
    with connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        for schema, table in connection.execute(TABLES).fetchall():
            name, source = f"{schema}.{table}", sql.Identifier(schema, table)
            if name not in shares:
                (count,) = connection.execute(sql.SQL("SELECT count(*) FROM {}").format(source)).fetchone()
                shares[name] = max(1, count // sample_rows)
            query = sql.SQL(
                "SELECT count(*), count(*) FILTER (WHERE chosen), "
                "coalesce(sum(hashtextextended(held::text, 0)) FILTER (WHERE chosen), 0)::text "
                "FROM (SELECT held, hashtid(held.ctid) % {} = 0 AS chosen FROM {} AS held) AS rows"
            ).format(sql.Literal(shares[name]), source)
            found[name] = Figures(*connection.execute(query).fetchone())
    return found


def compare(before: Tables, after: Tables, copy: Tables) -> list[str]:
    """Return what is wrong with a copy of a moment between `before` and `after`.

    A table that is the same before and after must be the same in the copy. One that changed meanwhile is counted alone,
    and may differ by a tenth.
    """
    wrong = []
    for name in sorted(before.keys() & after.keys()):
        first, last, held = before[name], after[name], copy.get(name)
        if held is None:
            wrong.append(f"{name} is not in the copy")
        elif first == last:
            if held.rows != first.rows:
                wrong.append(f"{name} has {held.rows:,} rows in the copy and {first.rows:,} in the live database")
            elif held != first:
                wrong.append(f"{name} has other values in the copy than in the live database")
        elif not min(first.rows, last.rows) * 0.9 <= held.rows <= max(first.rows, last.rows) * 1.1:
            wrong.append(f"{name} has {held.rows:,} rows in the copy and {last.rows:,} in the live database")
    return wrong


class Server:
    """A PostgreSQL server on a data directory, with a socket of its own and nothing else."""

    def __init__(self, binaries: str, data: Path, sockets: Path, config: str, options: Mapping[str, str]) -> None:
        self.data, self.sockets, self.log = data, sockets, data.parent / f"{data.name}.log"
        settings = {
            "config_file": config,
            "data_directory": str(data),
            "unix_socket_directories": str(sockets),
            "external_pid_file": "",
            **options,
        }
        self._command = [f"{binaries}/postgres", "-D", str(data)]
        for name, value in settings.items():
            self._command += ["-c", f"{name}={value}"]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, port: int, database: str) -> str:
        """Start the server, and wait until recovery has ended; return what it said where it ends before."""
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log)
        while True:
            if self.process.poll() is not None:
                return self.said()
            with suppress(psycopg.OperationalError), self.connect(port, database) as connection:
                if connection.execute("SELECT NOT pg_is_in_recovery()").fetchone()[0]:
                    return ""
            time.sleep(0.5)

    def connect(self, port: int, database: str) -> Any:
        return connect(host=str(self.sockets), port=port, dbname=database)

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)  # what is under way is rolled back, and the server ends cleanly
            self.process.wait()

    def last_lines(self) -> str:
        lines = [line for line in self.said().splitlines() if re.search("FATAL|PANIC|ERROR", line)]
        return "; ".join(lines[-3:]) or "it gave no reason"


def drill(settings: Mapping[str, Any]) -> None:
    """Restore the newest backup beside the repository, and compare it with the live database."""
    began = time.time()
    result: dict[str, Any] = {"failure": None, "backup": None, "stopped": None, "rows": None}
    result["days"] = settings["good_days"]
    with alone():
        with live(settings) as connection:
            shares: dict[str, int] = {}
            before = figures(connection, shares, settings["sample_rows"])
            result["id"], transaction = connection.execute(BEGIN).fetchone()
            after = figures(connection, shares, settings["sample_rows"])
        try:
            prove(settings, result, str(transaction), (before, after, shares))
        except (Failure, OSError, psycopg.Error, subprocess.SubprocessError) as error:
            result["failure"] = (str(error).splitlines() or [type(error).__name__])[0]
            raise
        except SystemExit:
            result["failure"] = "it was ended before it was done"
            raise
        finally:
            with live(settings) as connection:
                connection.execute(END, result)
    say(f"{result['backup']} is proven: {result['rows']:,} rows")
    note(
        settings,
        "drill",
        last_success_timestamp_seconds=time.time(),
        proven_backup_timestamp_seconds=result["stopped"],
        duration_seconds=time.time() - began,
        rows_compared=result["rows"],
    )


def prove(
    settings: Mapping[str, Any], result: dict[str, Any], transaction: str, asked: tuple[Tables, Tables, dict[str, int]]
) -> None:
    before, after, shares = asked
    data, sockets = Path(settings["drill_path"], "data"), Path("/run/larder-drill")
    try:
        newest = backups(settings)[-1]
    except IndexError:
        raise Failure("the repository holds no backup") from None
    result["backup"], size = newest["label"], newest["info"]["size"]
    shutil.rmtree(data, ignore_errors=True)
    free = shutil.disk_usage(data.parent).free
    if free < size * 1.1 + 2**29:
        need = f"{size * 1.1 / 1e9 + 0.6:.1f} GB"
        raise Failure(f"{data.parent} has {free / 1e9:.1f} GB free, and the copy of {newest['label']} needs {need}")
    # All that was committed before the mark is in the archive when this has ended.
    run(*pgbackrest(settings, "check"))
    verify(settings)
    data.mkdir(mode=0o700)
    restored = [f"--config={SETTINGS.parent}/drill.conf", "--archive-mode=off", "--type=xid", f"--target={transaction}"]
    run(*pgbackrest(settings, *restored, "--target-action=promote", "restore"))
    server = Server(settings["bin"], data, sockets, f"{SETTINGS.parent}/drill-postgresql.conf", {})
    try:
        if server.start(settings["port"], settings["database"]):
            raise Failure(f"the copy of {newest['label']} does not start: {server.last_lines()}")
        with server.connect(settings["port"], settings["database"]) as connection:
            marked = "SELECT FROM larder_backup.drills WHERE id = %s"
            if connection.execute(marked, [result["id"]]).fetchone() is None:
                raise Failure("what was written just before the drill is not in the archive")
            copy = figures(connection, shares, settings["sample_rows"])
        if wrong := compare(before, after, copy):
            raise Failure("; ".join(wrong))
        amcheck = [f"--host={sockets}", f"--port={settings['port']}", "--install-missing", settings["database"]]
        run(f"{settings['bin']}/pg_amcheck", *amcheck)
    finally:
        server.stop()
        server.log.unlink(missing_ok=True)
    result |= {"rows": sum(held.rows for held in copy.values()), "stopped": newest["timestamp"]["stop"]}


def verify(settings: Mapping[str, Any]) -> None:
    """Read the whole repository; the exit code says nothing of what was found, and the verdict comes with --verbose."""
    command = pgbackrest(settings, "--output=text", "--verbose", "--log-level-console=off", "verify")
    told = subprocess.run(command, check=False, capture_output=True, text=True)
    if told.returncode or "status: ok" not in told.stdout:
        say(told.stdout + told.stderr)
        raise Failure("the repository is damaged; the lines above, and larder-backup verify, say where")


def recover(settings: Mapping[str, Any], data: Path) -> None:
    """Replay WAL up to the target, as the server with its settings does, without a client; print what was reached.

    If the archive ends before the moment that was asked for, all that was committed until then is there: recovery goes
    on without a target, to the end.
    """
    archive = f"{PGBACKREST} --stanza={settings['stanza']} --pg1-path={data} archive-push %p"
    options = {
        "listen_addresses": "",
        "hot_standby": "off",
        "shared_buffers": "128MB",
        "timescaledb.max_background_workers": "0",
        "archive_command": archive,
        "log_destination": "stderr",
        "logging_collector": "off",
    }
    sockets = Path(os.environ["RUNTIME_DIRECTORY"])
    server = Server(settings["bin"], data, sockets, settings["config"], options)
    try:
        said = server.start(settings["port"], settings["database"])
        if TOO_EARLY in said:
            forget(data, lambda line: line.startswith("recovery_target"))
            said = server.start(settings["port"], settings["database"])
        if said:
            raise Failure(f"the restored copy does not start: {server.last_lines()}")
        told = server.said()
        forget(data, lambda line: line.startswith(("restore_command", "recovery_target", "# Recovery settings")))
    finally:
        server.stop()
    found = [*REACHED.findall(told), *LAST.findall(told)]
    server.log.unlink(missing_ok=True)
    say(json.dumps({"last_commit": LAST.findall(told)[-1:], "stopped_at": found[:1]}))


def forget(data: Path, unwanted: Callable[[str], bool]) -> None:
    """Take lines out of what pgBackRest has written for the recovery."""
    path = data / "postgresql.auto.conf"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if not unwanted(line)))


def report(settings: Mapping[str, Any], name: str) -> None:
    """Write the metrics of what has just ended, whole or not at all: a scrape never sees half of the file."""
    success = os.environ.get("SERVICE_RESULT") == "success"
    prefix = {"backup": "larder_backup", "drill": "larder_restore_drill"}[name]
    lines = []
    samples = {"success": float(success), "last_run_timestamp_seconds": time.time(), **noted(settings, name)}
    for metric, value in samples.items():
        lines += [f"# TYPE {prefix}_{metric} gauge", f"{prefix}_{metric} {value:.17g}"]
    METRICS.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=METRICS, prefix=f".{prefix}", delete=False) as file:
        file.write("\n".join([*lines, ""]))
    Path(file.name).chmod(0o644)  # the node exporter is another user
    Path(file.name).replace(METRICS / f"{prefix}.prom")


def main(arguments: Sequence[str]) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that an ended drill is told
    settings = json.loads(SETTINGS.read_text())
    action, *rest = arguments
    try:
        if action == "backup":
            backup(settings, rest[0])
        elif action == "drill":
            drill(settings)
        elif action == "recover":
            recover(settings, Path(rest[0]))
        else:
            report(settings, rest[0])
    except (Failure, psycopg.Error, subprocess.SubprocessError) as error:
        say(f"{action} failed: {error}.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
