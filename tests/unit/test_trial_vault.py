"""The trial's vault opens by itself, and its password opens and encrypts nothing else."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import playbooks
import pytest
from ansible.parsing.vault import VaultLib, VaultSecret

Command = Callable[..., subprocess.CompletedProcess[str]]
SHOW = """\
- name: Show what the vault holds
  hosts: one
  gather_facts: false
  tasks:
    - name: Show it
      ansible.builtin.debug:
        msg: "it is {{ secret | default('not there') }}"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a checkout with two inventories, and the files from which Ansible takes its settings."""
    shutil.copy(playbooks.ROOT / "ansible.cfg", tmp_path)
    (tmp_path / "ansible/trial").mkdir(parents=True)
    shutil.copy(playbooks.ROOT / "ansible/trial/vault_password", tmp_path / "ansible/trial")
    (tmp_path / "ansible/plugins").symlink_to(playbooks.ROOT / "ansible/plugins")
    (tmp_path / "show.yml").write_text(SHOW)
    for name in ("trial", "prod"):
        (tmp_path / "inventory" / name / "group_vars/all").mkdir(parents=True)
        (tmp_path / "inventory" / name / "hosts.yml").write_text("all: {hosts: {one: {ansible_connection: local}}}\n")
    return tmp_path


@pytest.fixture
def ansible(checkout: Path) -> Command:
    def run(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = playbooks.environment(ANSIBLE_CONFIG=str(checkout / "ansible.cfg"), **environment)
        for unset in ["ANSIBLE_VAULT_PASSWORD_FILE"]:
            if unset not in environment:
                env.pop(unset, None)
        program = Path(sys.executable).with_name(name)
        return subprocess.run(
            [program, *arguments], cwd=checkout, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )

    return run


@pytest.fixture
def vault(checkout: Path) -> Callable[[str], Path]:
    """Give an inventory a vault, whose password is in .vault_password as `init_secrets.yml` writes it."""

    def make(name: str) -> Path:
        inventory = checkout / "inventory" / name
        (inventory / ".vault_password").write_text(f"password of {name}")
        path = inventory / "group_vars/all/vault.yml"
        path.write_text(f"secret: {name}'s\n")
        path.write_bytes(VaultLib([("default", VaultSecret(f"password of {name}".encode()))]).encrypt(path.read_text()))
        return path

    return make


def test_bare_commands_open_the_vault_of_the_trial(ansible: Command, vault: Callable[[str], Path]) -> None:
    path = vault("trial")
    for command in (
        ("ansible-playbook", "show.yml"),
        ("ansible", "-i", "inventory/trial", "one", "-m", "ansible.builtin.debug", "-a", "msg={{ secret }}"),
        ("ansible-vault", "view", str(path)),
    ):
        done = ansible(*command)
        assert done.returncode == 0, done.stderr
        assert "trial's" in done.stdout
        assert "WARNING" not in done.stderr


def test_the_vault_of_the_trial_can_be_edited_and_still_opens(
    ansible: Command, vault: Callable[[str], Path], checkout: Path
) -> None:
    path = vault("trial")
    editor = checkout / "editor"
    editor.write_text('#!/bin/sh\necho "more: yes" >> "$1"\n')
    editor.chmod(0o755)
    assert ansible("ansible-vault", "edit", str(path), EDITOR=str(editor)).returncode == 0
    assert ansible("ansible-vault", "view", str(path)).stdout == "secret: trial's\nmore: yes\n"
    by_file = {
        "ANSIBLE_VAULT_PASSWORD_FILE": "inventory/trial/.vault_password",
        "ANSIBLE_VAULT_IDENTITY_LIST": "x@none",
    }
    assert "more: yes" in ansible("ansible-vault", "view", str(path), **by_file).stdout


def typed(checkout: Path, answer: str, name: str, *arguments: str) -> str:
    """Return what a command prints on a terminal at which somebody answers its question for a password."""
    program = str(Path(sys.executable).with_name(name))
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(checkout)
        os.execve(program, [program, *arguments], playbooks.environment(ANSIBLE_CONFIG=str(checkout / "ansible.cfg")))
    said = b""
    # Reading from a terminal that nobody has open any more is an error.
    with suppress(OSError):
        while chunk := os.read(terminal, 4096):
            said += chunk
            if answer and b"Vault password:" in said:
                os.write(terminal, answer.encode())
                answer = ""
    os.close(terminal)
    os.waitpid(process, 0)
    return said.decode()


def test_the_vault_of_another_inventory_opens_by_its_own_password(
    ansible: Command, vault: Callable[[str], Path], checkout: Path
) -> None:
    vault("prod")
    vault("trial")
    password = "inventory/prod/.vault_password"
    show = ("-i", "inventory/prod", "show.yml")
    for done in (
        ansible("ansible-playbook", *show, ANSIBLE_VAULT_PASSWORD_FILE=password),
        ansible("ansible-playbook", *show, f"--vault-password-file={password}"),
    ):
        assert done.returncode == 0, done.stderr
        assert "prod's" in done.stdout
        assert "WARNING" not in done.stderr
    assert "Decryption failed" in ansible("ansible-playbook", *show).stderr
    assert "prod's" in typed(checkout, "password of prod\n", "ansible-playbook", "--ask-vault-pass", *show)


def test_runs_without_a_vault_need_no_password(ansible: Command) -> None:
    done = ansible("ansible-playbook", "show.yml")
    assert done.returncode == 0, done.stderr
    assert "it is not there" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("action", ["encrypt", "create", "rekey"])
def test_nothing_is_encrypted_with_the_password_of_the_trial(
    ansible: Command, vault: Callable[[str], Path], checkout: Path, action: str
) -> None:
    trial = vault("trial")
    plain = checkout / "plain.yml"
    if action == "encrypt":
        plain.write_text("a: b\n")
    before = plain.read_bytes() if plain.exists() else None, trial.read_bytes()
    done = ansible("ansible-vault", action, str(trial if action == "rekey" else plain))
    assert done.returncode != 0
    assert "$ANSIBLE_VAULT" not in done.stdout
    assert before == (plain.read_bytes() if plain.exists() else None, trial.read_bytes())


def test_another_password_encrypts_and_changes_a_vault_as_ever(
    ansible: Command, vault: Callable[[str], Path], checkout: Path
) -> None:
    vault("trial")
    plain = checkout / "plain.yml"
    plain.write_text("a: b\n")
    for name in ("old", "new"):
        (checkout / name).write_text(name)
    by_argument, by_environment = "--vault-password-file=old", {"ANSIBLE_VAULT_PASSWORD_FILE": "old"}
    assert ansible("ansible-vault", "encrypt", str(plain), by_argument).returncode == 0
    assert ansible("ansible-vault", "view", str(plain)).returncode != 0
    assert ansible("ansible-vault", "view", str(plain), **by_environment).stdout == "a: b\n"
    rekeyed = ansible("ansible-vault", "rekey", str(plain), "--new-vault-password-file=new", **by_environment)
    assert rekeyed.returncode == 0, rekeyed.stderr
    assert ansible("ansible-vault", "view", str(plain), by_argument).returncode != 0
    assert ansible("ansible-vault", "view", str(plain), "--vault-password-file=new").stdout == "a: b\n"


@pytest.mark.parametrize("password", ["missing", "empty"])
def test_a_lost_password_of_the_trial_is_said_in_one_sentence(
    ansible: Command, vault: Callable[[str], Path], checkout: Path, password: str
) -> None:
    vault("trial")
    path = checkout / "inventory/trial/.vault_password"
    path.unlink() if password == "missing" else path.write_text("")
    done = ansible("ansible-playbook", "show.yml")
    assert done.returncode != 0
    assert "its password in inventory/trial/.vault_password is missing or not readable for " in done.stderr
    assert "./larder down && ./larder up makes both anew" in done.stderr
