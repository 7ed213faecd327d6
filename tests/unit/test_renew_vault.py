"""ansible/new_secrets.yml changes the chosen values of a vault and not a byte beside them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import playbooks
import pytest
import yaml
from ansible.parsing.vault import VaultLib, VaultSecret
from cryptography import x509

PASSWORD = "correct horse"
OPENED = VaultLib([("default", VaultSecret(PASSWORD.encode()))])
VAULT = """\
---
# Ours: call Anna before you change the first of these.
redis_passwords:   # read by everybody
  serve: old-serve
  push: "old # push"        # quoted
  admin: !unsafe 'old {{ admin }} it''s'
  monitor: |
    old-monitor

  # and the last
  materialize: old-materialize

gateway_tokens: {reader: old-reader, writer: [old-writer, older-writer]}   # in one line
certificate_generation: 7
certificate_authorities:
  - certificate: |
      CERTIFICATE
    private_key: KEY
# The end.
other: stays
"""


@pytest.fixture
def vault(tmp_path: Path) -> Path:
    """Return an encrypted vault, with a first CA."""
    path = tmp_path / "inventory/group_vars/all/vault.yml"
    path.parent.mkdir(parents=True)
    (tmp_path / "inventory/hosts.yml").write_text("all: {}\n")
    (tmp_path / "password").write_text(PASSWORD)
    return path


def play(playbook: str, vault: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a playbook on the vault's inventory; errors and warnings are part of what it says."""
    inventory = vault.parents[2]
    env = playbooks.environment(ANSIBLE_VAULT_PASSWORD_FILE=str(inventory.parent / "password"))
    return playbooks.run(playbook, *arguments, inventories=[inventory], env=env, one_stream=True)


def write(vault: Path, text: str) -> None:
    vault.write_bytes(OPENED.encrypt(text))


def read(vault: Path) -> str:
    text: str = OPENED.decrypt(vault.read_bytes()).decode()
    return text


def renew(vault: Path, secrets: str = "", *more: str) -> subprocess.CompletedProcess[str]:
    chosen = ["-e", f"secrets={secrets}"] if secrets else []
    return play("ansible/new_secrets.yml", vault, *chosen, *more)


def load(text: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(text.replace("!unsafe ", ""))
    return loaded


def test_all_secrets_get_fresh_values_and_nothing_else_changes(vault: Path) -> None:
    write(vault, VAULT)
    done = renew(vault)
    assert done.returncode == 0, done.stdout
    new = read(vault)
    # With the fresh values blotted out on one side and the old ones on the other, the two are equal.
    fresh = r"[A-Za-z0-9]{40}"
    blotted = re.sub(fresh, "*", new)
    expected = VAULT.replace("old-serve", "*").replace("old # push", "*").replace("|\n    old-monitor", "*")
    expected = expected.replace("!unsafe 'old {{ admin }} it''s'", "'*'").replace("old-materialize", "*")
    expected = expected.replace("old-reader", "[*, 'old-reader']").replace(
        "[old-writer, older-writer]", "[*, 'old-writer']"
    )
    assert blotted == expected.replace("certificate_generation: 7", "certificate_generation: 8")
    values = re.findall(fresh, new)
    assert len(values) == len(set(values)) == 7
    assert not any(value in done.stdout for value in values)
    assert read(vault.with_name("vault.yml.former")) == VAULT


def test_only_the_chosen_secrets_change(vault: Path) -> None:
    write(vault, VAULT)
    assert renew(vault, "redis_passwords.serve,gateway_tokens").returncode == 0
    before, after = load(VAULT), load(read(vault))
    assert after["redis_passwords"].pop("serve") != before["redis_passwords"].pop("serve")
    assert after["redis_passwords"] == before["redis_passwords"]
    assert after["gateway_tokens"]["reader"][1] == "old-reader"
    assert after["certificate_generation"] == 7


def test_a_new_ca_is_trusted_then_signs_and_then_the_old_one_goes(vault: Path) -> None:
    (vault.parents[2] / "hosts.yml").write_text("all: {}\n")
    (vault.parents[2] / ".vault_password").write_text(PASSWORD)
    made = init(vault)
    assert made.returncode == 0, made.stdout

    def authorities() -> list[str]:
        return [entry["certificate"] for entry in load(read(vault))["certificate_authorities"]]

    (first,) = authorities()
    for step in ("trusted", "signs", "alone"):
        assert renew(vault, "certificate_authorities").returncode == 0
        known = authorities()
        second = next(certificate for certificate in known if certificate != first)
        assert known == {"trusted": [first, second], "signs": [second, first], "alone": [second]}[step]
        assert x509.load_pem_x509_certificate(second.encode())
        assert (vault.parents[2] / "ca.crt").read_text() == "\n".join(map(str.strip, known)) + "\n"


def test_an_impossible_request_is_reported_and_changes_nothing(vault: Path) -> None:
    write(vault, VAULT)
    before = vault.read_bytes()
    done = renew(vault, "redis_pasword")
    assert done.returncode != 0
    assert "secrets has a name that is none of the vault's; it has " in " ".join(done.stdout.split())
    assert vault.read_bytes() == before
    assert not vault.with_name("vault.yml.former").exists()


def test_a_vault_in_clear_text_is_refused(vault: Path) -> None:
    vault.write_text("other: stays\n")
    done = renew(vault)
    assert done.returncode != 0
    assert "is not encrypted as a whole" in " ".join(done.stdout.split())


def test_check_mode_writes_nothing(vault: Path) -> None:
    write(vault, VAULT)
    before = vault.read_bytes()
    assert renew(vault, "", "--check").returncode == 0
    assert vault.read_bytes() == before


def init(vault: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return play("ansible/init_secrets.yml", vault, *more)


def test_a_vault_that_exists_is_completed_and_nothing_of_it_changes_or_is_shown(vault: Path) -> None:
    (vault.parents[2] / ".vault_password").write_text(PASSWORD)
    write(vault, "# ours\nredis_passwords:\n  serve: OldOldOldOldOldOldOld\nbackup_passphrase: x\n")
    done = init(vault, "-vvv", "--diff")
    assert done.returncode == 0, done.stdout
    text = read(vault)
    held = load(text)
    assert held["redis_passwords"]["serve"] == "OldOldOldOldOldOldOld"
    assert held["backup_passphrase"] == "x"
    assert text.startswith("# ours\nredis_passwords:\n")
    assert "PRIVATE KEY" not in done.stdout
    names = ("redis_passwords", "timescaledb_passwords", "gateway_tokens")
    secrets = [secret for name in names for secret in held[name].values()]
    assert len(secrets) == 14
    assert [secret for secret in secrets if secret in done.stdout] == []
    before = vault.read_bytes()
    again = init(vault)
    assert "changed=0 " in again.stdout
    assert vault.read_bytes() == before


@pytest.mark.parametrize("playbook", ["preflight", "new_secrets", "init_secrets"])
def test_a_vault_that_cannot_be_read_is_named_and_not_quoted(vault: Path, playbook: str) -> None:
    (vault.parents[2] / "hosts.yml").write_text("redis: {hosts: {cache1: {}}}\n")
    write(vault, "redis_passwords:\n  serve: !CANARYcanary x\n")
    before = vault.read_bytes()
    done = play(f"ansible/{playbook}.yml", vault, "-vvv")
    assert done.returncode != 0
    assert "cannot be read: the value at line 2, column 10" in " ".join(done.stdout.split())
    assert "CANARY" not in done.stdout
    assert vault.read_bytes() == before
