"""Feast on one host: the lock is what is installed, the repository is what is registered, and no secret lies about."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import playbooks
import pytest
from testinfra.host import Host

ROOT = Path(__file__).resolve().parents[3]
CURRENT = "/opt/feast/current"


@pytest.fixture(scope="module")
def host(inventory: Any) -> Host:
    return inventory.host("feast1")


@pytest.fixture(scope="module")
def secrets(inventory: Any) -> list[str]:
    variables = inventory.variables("feast1")
    return [secret for name in ("timescaledb_passwords", "redis_passwords") for secret in variables[name].values()]


def test_environment_holds_what_the_lock_names_and_nothing_else(host: Host) -> None:
    lock = (ROOT / "roles/feast/files/requirements-0.67.0.txt").read_text()
    # Python 3.13 on Linux: lines for other interpreters do not count.
    locked = {
        name.lower()
        for name, marker in re.findall(r"^([\w.-]+==[\w.]+)(?: ; (.*?))? \\$", lock, re.MULTILINE)
        if not re.search(r"python_full_version < '3\.1[12]|sys_platform == 'win32'", marker)
    }
    frozen = host.check_output(f"/opt/feast/uv/bin/uv pip freeze --python {CURRENT}/bin/python").lower().split("\n")
    assert {line for line in frozen if not line.startswith("larder @")} == locked


def test_environment_belongs_to_root(host: Host) -> None:
    assert host.check_output(f"find -L {CURRENT} -not -user root -o -perm -o+w -not -type l | head") == ""


def test_services_find_their_bytecode(host: Host) -> None:
    # Without bytecode an import takes four times as long. Units and commands run with PYTHONOPTIMIZE=1, as -O does.
    script = (
        "import feast.feature_server, sys, os;"
        "cached = [getattr(module, '__cached__', None) or '' for module in sys.modules.values()];"
        "print([c for c in cached if '/opt/feast/' in c and not os.path.exists(c)])"
    )
    assert host.check_output(f'{CURRENT}/bin/python -O -B -c "{script}"').splitlines()[-1] == "[]"


def test_registry_holds_what_the_repository_declares(host: Host) -> None:
    listed = host.check_output("feast feature-views list")
    for view in ("ohlcv_features", "technical_indicators_ma", "price_action", "market_features", "price_change"):
        assert re.search(rf"^{view}\s", listed, re.MULTILINE)
    assert "trading_signals" in host.check_output("feast feature-services list")


def test_unchanged_repository_is_not_applied_again(host: Host) -> None:
    assert host.check_output("larder apply").splitlines()[-1] == "unchanged"


def test_four_applies_at_once_lose_nothing(host: Host) -> None:
    before = sorted(line.split()[0] for line in host.check_output("feast feature-views list").splitlines()[1:])
    result = host.run(
        'for i in 1 2 3 4; do larder apply --force & pids="$pids $!"; done; for p in $pids; do wait $p || exit 1; done'
    )
    assert result.rc == 0, result.stderr
    after = sorted(line.split()[0] for line in host.check_output("feast feature-views list").splitlines()[1:])
    assert after == before


def files_that_hold(inventory: Any, secrets: list[str], places: str) -> list[str]:
    scan = f"sudo grep -rlF -f - --exclude-dir=venvs {places} || test $? -eq 1"
    return inventory.run("feast1", scan, "\n".join(secrets)).split()


def test_no_secret_is_on_disk_in_clear(inventory: Any, secrets: list[str]) -> None:
    assert files_that_hold(inventory, secrets, "/etc /opt /var/lib /var/log /usr/local /home /root /tmp") == []


def test_scan_would_find_a_secret(inventory: Any, secrets: list[str]) -> None:
    inventory.run("feast1", "cat > /tmp/planted", secrets[0])
    assert files_that_hold(inventory, secrets, "/tmp") == ["/tmp/planted"]
    inventory.run("feast1", "rm /tmp/planted", "")


def test_credential_is_bound_to_its_name_and_host(host: Host) -> None:
    path = "/etc/credstore.encrypted/pipeline.feature_store.yaml"
    file = host.file(path)
    assert (file.user, file.mode) == ("root", 0o600)
    assert host.run(f"systemd-creds decrypt --name=feature_store.yaml {path} -").rc == 0
    assert host.run(f"systemd-creds decrypt --name=other {path} -").rc != 0


def test_the_user_of_feast_cannot_log_in_and_reads_no_credential(host: Host) -> None:
    assert host.user("feast").shell == "/usr/sbin/nologin"
    assert host.run("runuser -u feast -- cat /etc/credstore.encrypted/load_url").rc != 0


def test_a_command_runs_in_a_sandbox(host: Host) -> None:
    host.check_output("sh -c '(sleep 30 | larder probe) > /dev/null 2>&1 &'")
    units = "systemctl list-units --plain --no-legend 'feast-larder-*' | cut -d ' ' -f 1"
    deadline = time.monotonic() + 20
    while not (unit := host.check_output(units)) and time.monotonic() < deadline:
        time.sleep(0.2)
    try:
        result = host.run(f"systemd-analyze security --no-pager --threshold=15 {unit}")
        assert result.rc == 0, result.stdout
        assert host.check_output(f"systemctl show --value --property=User {unit}") == "feast"
    finally:
        host.check_output(f"systemctl stop {unit}")


def playbook(pytestconfig: pytest.Config, name: str, *options: str) -> subprocess.CompletedProcess[str]:
    inventories = [ROOT / "molecule/shared/inventory", pytestconfig.getoption("--ansible-inventory")]
    return playbooks.run(name, *options, inventories=inventories)


@pytest.mark.parametrize("purpose", ["train", "serve"])
def test_a_client_outside_the_inventory_logs_in_with_its_written_configuration(
    inventory: Any, host: Host, pytestconfig: pytest.Config, tmp_path: Path, purpose: str
) -> None:
    """The files of client_config.yml are copied to a host, and log in from there."""
    config = tmp_path / "feature_store.yaml"
    variables = f"--extra-vars={json.dumps({'client_path': str(config), 'client_purpose': purpose})}"
    written = playbook(pytestconfig, "ansible/client_config.yml", variables)
    assert written.returncode == 0, written.stdout
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()}
    assert modes == {"feature_store.yaml": "0o600", "tls.key": "0o600", "tls.crt": "0o644", "ca.crt": "0o644"}
    host.check_output(f"mkdir -p {tmp_path}")
    for name in ("ca.crt", "tls.crt", "tls.key"):
        inventory.run("feast1", f"sudo install -m 0600 /dev/stdin {tmp_path}/{name}", (tmp_path / name).read_text())
    tried = [{"purpose": purpose, "name": "feature_store.yaml", "content": config.read_text()}]
    # As root: no other user can read root's key.
    inventory.run("feast1", f"sudo {CURRENT}/bin/larder probe", json.dumps(tried))
    key = host.run(f"runuser -u feast -- cat {tmp_path}/tls.key")
    assert key.rc != 0


def test_a_secret_that_a_store_does_not_know_changes_nothing(
    host: Host, inventory: Any, pytestconfig: pytest.Config, tmp_path: Path
) -> None:
    state = "sha256sum /etc/credstore.encrypted/*"
    before = host.check_output(state)
    for kind, purpose, says in (
        ("timescaledb_passwords", "load", "load at the database"),
        ("timescaledb_passwords", "registry", "pipeline at the registry"),
        ("timescaledb_passwords", "pipeline", "pipeline at the offline store"),
        ("redis_passwords", "materialize", "pipeline at the online store"),
    ):
        secrets = {kind: inventory.variables("feast1")[kind] | {purpose: "nobody-knows-this"}}
        file = tmp_path / "secrets.json"
        file.write_text(json.dumps(secrets))
        result = playbook(pytestconfig, "molecule/feast/secrets.yml", f"--extra-vars=@{file}")
        assert result.returncode != 0
        sentence = next(line for line in result.stdout.splitlines() if "Nothing was changed:" in line)
        assert says in sentence
        assert "nobody-knows-this" not in result.stdout
        assert host.check_output(state) == before


def test_a_run_waits_for_units_with_former_secrets(host: Host, pytestconfig: pytest.Config) -> None:
    host.check_output(
        "systemd-run --unit=began-before --uid=feast"
        " -p LoadCredentialEncrypted=pipeline_url:/etc/credstore.encrypted/pipeline_url sleep 600"
    )
    unchanged = playbook(pytestconfig, "molecule/feast/secrets.yml")
    assert unchanged.returncode == 0, "it began with the present ones"
    host.check_output("touch /etc/credstore.encrypted/load_url")
    try:
        waited = playbook(pytestconfig, "molecule/feast/secrets.yml", "--extra-vars=larder_drain_seconds=5")
        assert waited.returncode != 0
        assert "began-before.service on feast1 began with former secrets" in " ".join(waited.stdout.split())
    finally:
        host.check_output("systemctl stop began-before")
    assert playbook(pytestconfig, "molecule/feast/secrets.yml").returncode == 0


def test_status_is_machine_readable(host: Host) -> None:
    result = host.run("larder status --json")
    assert result.rc == 5  # nothing was materialized yet, so the status is not healthy
    status = json.loads(result.stdout)
    assert {view["name"] for view in status["views"]} >= {"ohlcv_features", "market_features"}
    assert any("Never materialized" in problem for problem in status["problems"])


def test_altered_lock_is_refused_before_the_environment_changes(
    host: Host, pytestconfig: pytest.Config, tmp_path: Path
) -> None:
    before = host.check_output(f"readlink {CURRENT}")
    lock = (ROOT / "roles/feast/files/requirements-0.67.0.txt").read_text()
    altered = tmp_path / "requirements.txt"
    # Feast has one wheel and one source archive: alter both hashes.
    section = re.search(r"^feast==.*?(?=^\w)", lock, re.DOTALL | re.MULTILINE)
    assert section
    altered.write_text(lock.replace(section[0], re.sub(r"sha256:[0-9a-f]{8}", "sha256:00000000", section[0])))
    variables = f"--extra-vars={json.dumps({'__feast_lock': str(altered)})}"
    result = playbook(pytestconfig, "molecule/feast/converge.yml", variables)
    assert result.returncode != 0
    assert "hash mismatch" in result.stdout.lower()
    assert host.check_output(f"readlink {CURRENT}") == before
    assert "trading_signals" in host.check_output("feast feature-services list")
