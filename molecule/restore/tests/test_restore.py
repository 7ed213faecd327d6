"""What was committed can be had back, and whether it can is known beforehand. The tests build on one another."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import playbooks
import pytest

ROOT = Path(__file__).resolve().parents[3]
POSTGRES = "cd / && runuser -u postgres --"
# Some megabytes that a reader of the repository would recognise.
SECRET = "a-price-that-nobody-else-may-read"
MARKS = "CREATE TABLE market_data.marks (written timestamptz DEFAULT clock_timestamp(), text text)"
FILL = f"INSERT INTO market_data.marks (text) SELECT '{SECRET} ' || n FROM generate_series(1, 50000) AS n"


def started(on: Any, host: str) -> str:
    return on(host).check_output("systemctl show --property=ActiveEnterTimestampMonotonic,MainPID postgresql@17-main")


def between(sql: Any, host: str, before: str, after: str) -> str:
    """Return a moment between two commits, when both are archived."""
    sql(host, before)
    time.sleep(1.5)
    moment = sql(host, "SELECT to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS')")
    time.sleep(1.5)
    sql(host, after)
    segment = sql(host, "SELECT pg_walfile_name(pg_switch_wal())")
    for _ in range(60):
        if sql(host, f"SELECT last_archived_wal >= '{segment}' FROM pg_stat_archiver") == "t":
            return str(moment)
        time.sleep(1)
    raise AssertionError(f"{segment} was not archived within a minute")


@pytest.fixture(scope="module")
def moment(sql: Any) -> str:
    """The moment to which the database is restored: one row is committed before it, another one after it."""
    row = "INSERT INTO market_data.marks (text) VALUES ('%s')"
    return between(sql, "database1", row % "before", row % "after")


def test_a_stack_without_a_backup_host_has_nothing_of_it(play: Any, on: Any, sql: Any) -> None:
    run = play("site.yml", "before")
    assert run.code == 0, run.output
    assert not on("database1").package("pgbackrest").is_installed
    assert "8432" not in on("database1").check_output("nft list table inet larder")
    assert sql("database1", "SHOW archive_timeout") == "0"
    sql("database1", MARKS)
    sql("database1", FILL)


def test_preflight_asks_for_the_passphrase_when_there_is_a_backup_host(play: Any) -> None:
    run = play("ansible/preflight.yml", "with_backup")
    assert run.code != 0
    assert "backup_passphrases is unset" in run.sentence
    added = play("ansible/init_secrets.yml", "with_backup", "--tags=all")
    assert "Added to the vault: backup_passphrases.repository" in added.sentence, added.output


def test_a_backup_host_joins_without_a_restart_of_postgresql(play: Any, on: Any, sql: Any) -> None:
    before = started(on, "database1")
    run = play("site.yml", "with_backup")
    assert run.code == 0, run.output
    assert started(on, "database1") == before
    assert sql("database1", "SHOW archive_timeout") == "1min"


def test_the_first_backup_is_taken_and_proven_without_being_asked_for(
    ended: Any, held: Any, sql: Any, metric: Any
) -> None:
    assert ended("larder-backup@full.service") == "success"
    assert ended("larder-drill.service") == "success"
    assert [backup["type"] for backup in held()] == ["full"]
    proven = "SELECT backup, rows >= 50000, failure IS NULL, good_until > now() FROM larder_backup.drills"
    assert sql("database1", proven) == f"{held()[0]['label']}|t|t|t"
    assert metric("larder_backup_success") == 1
    assert metric("larder_restore_drill_success") == 1
    assert metric("larder_restore_drill_rows_compared") >= 50000


def test_the_drill_leaves_no_copy(on: Any) -> None:
    assert on("backup1").check_output("ls -A /var/lib/larder-drill") == ""
    assert on("backup1").check_output("pgrep -c postgres || true").strip() == "0"


def test_a_backup_within_the_given_bandwidth_is_taken_on_request(play: Any, held: Any, on: Any, sql: Any) -> None:
    """An incremental backup of 50 MB or more, at about 5 MB a second."""
    # What cannot be compressed: the bound is on bytes that travel.
    noise = " || ".join(["uuid_send(gen_random_uuid())"] * 10)
    sql("database1", f"CREATE TABLE market_data.bulk AS SELECT {noise} FROM generate_series(1, 300000)")
    bulk = int(sql("database1", "SELECT pg_table_size('market_data.bulk')"))
    run = play("ansible/backup.yml", "with_backup", "--extra-vars=type=incr", "--tags=all")
    assert run.code == 0, run.output
    newest = held()[-1]
    assert newest["type"] == "incr"
    assert newest["info"]["delta"] > bulk
    assert newest["timestamp"]["stop"] - newest["timestamp"]["start"] >= bulk / 7e6
    assert "larder_backup" not in on("backup1").check_output("nft list tables")


def test_the_repository_holds_no_plain_text(on: Any) -> None:
    host = on("backup1")
    files = host.check_output("find /var/lib/pgbackrest -type f -size +0").splitlines()
    assert len(files) > 5
    for known in (SECRET, "market_data", "postgres", "[backup]", "PostgreSQL"):
        assert host.run("grep --recursive --binary --quiet --fixed-strings -e %s /var/lib/pgbackrest", known).rc == 1
    # Neither is a file of zstd, by which all is compressed before.
    magic = "grep --recursive --binary --files-with-matches --perl-regexp '\\A\\x28\\xB5\\x2F\\xFD' /var/lib/pgbackrest"
    assert host.run(f"LC_ALL=C {magic}").rc == 1
    without = host.run(f"{POSTGRES} pgbackrest --stanza=larder info")
    assert "requires option: repo1-cipher-pass" in without.stdout + without.stderr
    assert on("backup1").run("runuser -u nobody -- ls /var/lib/pgbackrest").rc != 0


def test_a_certificate_of_another_service_does_not_open_the_repository(on: Any) -> None:
    """The database host's own certificate for backups does; that for PostgreSQL, of the same host and CA, does not."""
    ask = f"{POSTGRES} pgbackrest --stanza=larder --log-level-console=error"
    assert on("database1").run(f"{ask} info").rc == 0
    other = "/etc/larder/tls/timescaledb/current"
    refused = on("database1").run(
        f"{ask} --repo1-host-cert-file={other}/tls.crt --repo1-host-key-file={other}/tls.key info"
    )
    assert "access denied" in refused.stdout + refused.stderr
    assert "size" not in refused.stdout


def test_no_other_host_reaches_the_repository_or_the_files_of_the_database(on: Any, inventory: Any) -> None:
    for host in ("backup1", "database1"):
        assert on("app1").run(f"timeout 3 bash -c '</dev/tcp/{inventory.address(host)}/8432'").rc != 0


def test_the_drill_may_write_nothing_but_its_own_record(on: Any, inventory: Any) -> None:
    files = "sslrootcert={0}/ca.crt sslcert={0}/tls.crt sslkey={0}/tls.key".format("/etc/larder/tls/backup/current")
    login = f"host={inventory.address('database1')} dbname=feast user=backup.backup1 sslmode=verify-full {files}"
    ask = f'{POSTGRES} psql "{login}" --no-psqlrc --tuples-only --no-align --command=%s'
    assert on("backup1").check_output(ask, "SELECT count(*) FROM market_data.marks") == "50000"
    assert "permission denied" in on("backup1").run(ask, "DELETE FROM market_data.marks").stderr


def test_a_drill_of_a_damaged_backup_fails_and_is_told(on: Any, ended: Any, metric: Any, sql: Any) -> None:
    """Bytes are changed in the largest file of the newest backup, and changed back."""
    host = on("backup1")
    newest = "$(ls -d /var/lib/pgbackrest/backup/larder/20*F_* | tail -n 1)"
    path = host.check_output(f"find {newest} -type f -printf '%s %p\\n' | sort -n | tail -n 1 | cut -d' ' -f2")
    host.check_output(f"cp -p {path} /root/whole")
    host.check_output(
        f"printf 'damaged' | dd of={path} bs=1 seek=$(($(stat -c %s {path}) / 2)) conv=notrunc status=none"
    )
    host.run("systemctl start larder-drill.service")
    assert ended("larder-drill.service") == "exit-code"
    assert metric("larder_restore_drill_success") == 0
    assert metric("larder_restore_drill_last_success_timestamp_seconds") > 0
    last = "SELECT failure FROM larder_backup.drills ORDER BY began_at DESC LIMIT 1"
    assert "damaged" in sql("database1", last)
    assert host.check_output("ls -A /var/lib/larder-drill") == ""
    host.check_output(f"cp -p /root/whole {path}")


@pytest.mark.usefixtures("moment")
def test_a_new_host_does_not_begin_an_empty_database(play: Any, on: Any) -> None:
    """The lost host goes down first; its backups are not ignored."""
    on("database1").check_output("systemctl disable --now postgresql@17-main postgresql pgbackrest")
    run = play("site.yml", "new_host")
    assert run.code != 0
    assert "ansible/restore.yml restores that cluster" in run.sentence, run.output
    assert not on("database2").package("postgresql-17").is_installed


def test_a_restore_asks_for_the_hosts_name(play: Any, on: Any) -> None:
    run = play("ansible/restore.yml", "new_host")
    assert run.code != 0
    assert "Not restored: database2 was not typed" in run.sentence, run.output
    assert not on("database2").package("postgresql-17").is_installed


def test_a_moment_before_the_first_backup_is_refused(play: Any) -> None:
    run = play("ansible/restore.yml", "new_host", "--extra-vars={at: '2001-01-01 00:00', confirm: database2}")
    assert run.code != 0
    assert "has no backup from before 2001-01-01 00:00; the oldest ended at" in run.sentence, run.output


def test_a_new_host_has_the_database_of_the_moment(play: Any, sql: Any, moment: str) -> None:
    """From the repository alone: what was committed before is there, and nothing that was committed after."""
    run = play("ansible/restore.yml", "new_host", f"--extra-vars={{at: '{moment}', confirm: database2}}")
    assert run.code == 0, run.output
    assert sql("database2", f"SELECT text FROM market_data.marks WHERE text NOT LIKE '{SECRET}%'") == "before"
    assert sql("database2", f"SELECT count(*) FROM market_data.marks WHERE text LIKE '{SECRET}%'") == "50000"
    assert sql("database2", "SELECT pg_is_in_recovery()") == "f"


def test_the_restored_database_takes_the_vaults_passwords(on: Any, inventory: Any) -> None:
    held = inventory.variables("app1")["timescaledb_passwords"]
    login = on("database2").check_output(
        f"{POSTGRES} psql --no-psqlrc --tuples-only --no-align feast --command=%s",
        "SELECT rolname FROM pg_roles WHERE rolname ~ '^feast_serve_g'",
    )
    certificate = "sslrootcert={0}/ca.crt sslcert={0}/tls.crt sslkey={0}/tls.key".format(
        "/etc/larder/tls/timescaledb/current"
    )
    server = f"host=127.0.0.1 dbname=feast user={login} sslmode=verify-full {certificate}"
    ask = f"IFS= read -r PGPASSWORD; export PGPASSWORD; psql '{server}' -c 'SELECT 1'"
    assert "1 row" in inventory.run("database2", f'sudo sh -c "{ask}"', f"{held['serve']}\n")


def test_the_restored_database_is_backed_up_and_proven_again(ended: Any, held: Any, sql: Any, metric: Any) -> None:
    before = len(held())
    assert ended("larder-backup@full.service") == "success"
    assert ended("larder-drill.service") == "success"
    assert held()[-1]["type"] == "full"
    assert len(held()) >= before
    last = "SELECT backup, failure IS NULL FROM larder_backup.drills ORDER BY began_at DESC LIMIT 1"
    assert sql("database2", last) == f"{held()[-1]['label']}|t"
    assert metric("larder_restore_drill_success") == 1


def test_a_second_run_changes_nothing_and_restarts_nothing(play: Any, on: Any) -> None:
    before = started(on, "database2"), on("backup1").check_output("systemctl show --property=MainPID pgbackrest")
    run = play("site.yml", "new_host")
    assert run.code == 0, run.output
    assert set(run.changed.values()) == {0}, run.output
    assert (
        started(on, "database2"),
        on("backup1").check_output("systemctl show --property=MainPID pgbackrest"),
    ) == before


def test_the_passphrase_is_in_no_file_of_a_host(inventory: Any) -> None:
    """The playbooks above ran with it; its places are the vault and a file that the host's key opens."""
    # Asked anew: the vault had none when the tests began.
    asked = ["ansible-inventory", f"--inventory={inventory.path}", "--host=backup1"]
    told = subprocess.run(asked, check=True, capture_output=True, text=True, env=playbooks.environment())
    phrase = json.loads(told.stdout)["backup_passphrases"]["repository"]
    places = "/etc /var /usr/local /root /home /tmp"
    search = f'IFS= read -r phrase; grep -r --files-with-matches --fixed-strings -e "$phrase" {places}; echo searched'
    for host in ("backup1", "database1", "database2"):
        assert inventory.run(host, f"sudo sh -c '{search}' 2>/dev/null", f"{phrase}\n").split() == ["searched"]


def test_a_standby_copies_what_its_primary_was_restored_to(play: Any, ended: Any, sql: Any) -> None:
    """The lost host is back, and follows the one that took its database over."""
    run = play("site.yml", "with_standby")
    assert run.code == 0, run.output
    begin = "CREATE TABLE market_data.following AS SELECT 'before' AS text"
    moment = between(sql, "database2", begin, "INSERT INTO market_data.following VALUES ('after')")
    assert ended("larder-drill.service") == "success"
    restored = play("ansible/restore.yml", "with_standby", "-e", json.dumps({"at": moment}), "-e", "confirm=database2")
    assert restored.code == 0, restored.output
    for host, standby in (("database1", "t"), ("database2", "f")):
        asked = "SELECT pg_is_in_recovery(), string_agg(text, ',') FROM market_data.following"
        assert sql(host, asked) == f"{standby}|before"
    assert sql("database2", "SELECT state FROM pg_stat_replication") == "streaming"
