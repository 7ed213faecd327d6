"""Each vault is checked once in a run, however often Ansible asks for variables."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from ansible.errors import AnsibleParserError
from ansible.parsing.dataloader import DataLoader
from ansible.parsing.vault import VaultLib, VaultSecret
from ansible.plugins.loader import vars_loader

ROOT = Path(__file__).parents[2]


def test_a_vault_is_parsed_once_for_all_hosts_and_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = [("default", VaultSecret(b"correct horse"))]
    vault = tmp_path / "group_vars/all/vault.yml"
    vault.parent.mkdir(parents=True)
    vault.write_bytes(VaultLib(secrets).encrypt("redis_passwords: {serve: long enough}\n"))
    loader = DataLoader()
    loader.set_vault_secrets(secrets)
    vars_loader.add_directory(str(ROOT / "ansible/plugins/vars"))
    vars_loader.get("larder_vault_check").get_vars(loader, str(tmp_path), [])
    parsed = []
    monkeypatch.setattr(sys.modules["larder_vault"], "parse", parsed.append)
    for _ in range(3):
        vars_loader.get("larder_vault_check").get_vars(loader, str(tmp_path), [])
    assert parsed == []
    vars_loader.get("larder_vault_check").get_vars(loader, str(tmp_path / "group_vars/.."), [])
    assert len(parsed) == 1  # another inventory: the count can fail


def test_a_vault_that_was_refused_is_refused_again(tmp_path: Path) -> None:
    secrets = [("default", VaultSecret(b"correct horse"))]
    vault = tmp_path / "group_vars/all/vault.yml"
    vault.parent.mkdir(parents=True)
    vault.write_bytes(VaultLib(secrets).encrypt("redis_passwords: !CANARYcanary x\n"))
    loader = DataLoader()
    loader.set_vault_secrets(secrets)
    vars_loader.add_directory(str(ROOT / "ansible/plugins/vars"))
    for _ in range(2):
        with pytest.raises(AnsibleParserError, match=r"cannot be read: the value at line 1"):
            vars_loader.get("larder_vault_check").get_vars(loader, str(tmp_path), [])
