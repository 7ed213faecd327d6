"""Passwords and certificate rotate while features are read: no read fails, and former passwords are refused."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import playbooks
import pytest

ROOT = Path(__file__).resolve().parents[3]
PORTS = {"feature-server@1": 6566, "feature-server@2": 6567, "push-server@1": 6576, "push-server@2": 6577}
PURPOSES = {
    "timescaledb_passwords": ("load", "pipeline", "registry", "serve", "push", "train", "monitor"),
    "redis_passwords": ("serve", "push", "materialize", "monitor", "admin"),
}
UNTIL = "/run/load.end"


@pytest.fixture(scope="module")
def playbook(pytestconfig: pytest.Config) -> Any:
    inventories = [ROOT / "molecule/shared/inventory", pytestconfig.getoption("--ansible-inventory")]

    def playbook(name: str, *options: str) -> subprocess.CompletedProcess[str]:
        return playbooks.run(name, *options, inventories=inventories)

    return playbook


def secrets_file(directory: Path, variables: dict[str, Any]) -> str:
    path = directory / "secrets.json"
    path.write_text(json.dumps(variables))
    return f"--extra-vars=@{path}"


def main_processes(server: Any) -> dict[str, str]:
    show = "systemctl show --value --property=MainPID"
    return {unit: server.host.check_output(f"{show} {unit}") for unit in PORTS}


def credentials(server: Any) -> str:
    return str(server.host.check_output("sha256sum /etc/credstore.encrypted/*"))


def under_load(server: Any, work: Any) -> tuple[dict[str, Any], Any]:
    """Return the report of a load of reads, and the result of the work that was done meanwhile."""
    assert server.push(6576, "ROTATION", 12.5).status == 200
    server.host.check_output(f"rm -f {UNTIL}")
    request = {
        "address": server.address,
        "ports": [6566, 6567],
        "watched": [6576, 6577],
        "certificate": server.certificate,
        "symbol": "ROTATION",
        "value": 12.5,
        "until": UNTIL,
    }
    server.begin("load.py", request)
    try:
        done = work()
    finally:
        server.host.check_output(f"touch {UNTIL}")
    said = "systemctl is-active --quiet load && exit 1 || cat /run/load.out"
    deadline = time.monotonic() + 60
    while (result := server.host.run(said)).rc != 0:
        assert time.monotonic() < deadline
        time.sleep(1)
    return json.loads(result.stdout), done


def redis_logins(server: Any) -> set[str]:
    return set(
        re.findall(
            r"^user ((?:serve|push|materialize)\S*) ",
            server.host.file("/etc/redis/users.acl").content_string,
            re.MULTILINE,
        )
    )


def postgresql_logins(server: Any) -> set[str]:
    query = "SELECT rolname FROM pg_roles WHERE rolcanlogin AND rolname LIKE 'feast%'"
    return set(server.host.check_output(f'runuser -u postgres -- psql -At -d feast -c "{query}"').split())


@pytest.mark.parametrize("new", [True, False], ids=["to new secrets", "back to the vault"])
def test_everything_rotates_while_features_are_read(server: Any, playbook: Any, tmp_path: Path, new: bool) -> None:
    before = main_processes(server), redis_logins(server), postgresql_logins(server)
    own = server.host.check_output("ls -d /etc/larder/tls/feast/*Z")
    options = []
    if new:
        passwords = {kind: {p: f"new {kind} {p}" for p in purposes} for kind, purposes in PURPOSES.items()}
        options.append(secrets_file(tmp_path, passwords | {"certificate_generation": 2}))
    said, run = under_load(server, lambda: playbook("molecule/feature_server/rotation.yml", *options))
    assert run.returncode == 0, run.stdout[-4000:]
    assert said["wrong"] == []
    assert said["reads"] > 500
    after = main_processes(server), redis_logins(server), postgresql_logins(server)
    assert not set(before[0].values()) & set(after[0].values()), "every instance was replaced"
    assert [len(names) for names in after[1:]] == [3, len(PURPOSES["timescaledb_passwords"])]
    assert not before[1] & after[1]
    assert not before[2] & after[2]
    now = server.host.check_output("ls -d /etc/larder/tls/feast/*Z")
    assert (len(now.split()), now == own) == (1, False)

    if new:
        again = playbook("molecule/feature_server/rotation.yml", *options)
        assert again.returncode == 0
        assert playbooks.changed(again.stdout)["server1"] == 0, again.stdout[-1000:]
        assert main_processes(server) == after[0]


@pytest.mark.parametrize(
    ("kind", "purpose", "says"),
    [
        ("redis_passwords", "serve", "serve at the online store"),
        ("timescaledb_passwords", "serve", "serve at the registry"),
        ("timescaledb_passwords", "push", "push at the registry"),
    ],
)
def test_a_password_that_a_store_does_not_know_stops_before_anything_changed(
    server: Any, playbook: Any, tmp_path: Path, kind: str, purpose: str, says: str
) -> None:
    before = credentials(server), main_processes(server)
    wrong = "a password that nobody knows"
    file = secrets_file(tmp_path, {kind: server.variables[kind] | {purpose: wrong}})
    run = playbook("molecule/feature_server/secrets.yml", file)
    assert run.returncode != 0
    sentence = next(line for line in run.stdout.splitlines() if "Nothing was changed:" in line)
    assert says in sentence
    assert wrong not in run.stdout + run.stderr
    assert (credentials(server), main_processes(server)) == before


@pytest.mark.parametrize("purpose", ["serve", "push"])
def test_a_login_with_too_many_rights_is_refused(server: Any, purpose: str) -> None:
    """The password is the purpose's own, but the login has the rights of another purpose's role."""
    grant = f"GRANT CREATE ON SCHEMA feast_registry TO feast_{purpose}"
    server.host.check_output(f'runuser -u postgres -- psql -d feast -c "{grant}"')
    try:
        path = f"/etc/credstore.encrypted/{purpose}.feature_store.yaml"
        probe = (
            "import json, subprocess, sys;"
            f"decrypt = ['systemd-creds', 'decrypt', '--name=feature_store.yaml', '{path}', '-'];"
            "content = subprocess.check_output(decrypt, text=True);"
            f"tried = [dict(purpose='{purpose}', name='feature_store.yaml', content=content)];"
            "run = ['systemd-run', '--quiet', '--wait', '--collect', '--pipe', '--unit=feast-probe-test',"
            " '/opt/feast/current/bin/larder', 'probe'];"
            "sys.exit(subprocess.run(run, input=json.dumps(tried), text=True).returncode)"
        )
        result = server.host.run("python3 -c %s", probe)
        assert result.rc == 1
        assert f"The login of {purpose} at the registry may do: CREATE TABLE" in result.stderr
    finally:
        revoke = grant.replace("GRANT", "REVOKE").replace(" TO ", " FROM ")
        server.host.check_output(f'runuser -u postgres -- psql -d feast -c "{revoke}"')
