"""ansible/client_token.yml hands out one token, and nothing else of the vault."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import playbooks
import pytest

INVENTORY = """\
gateway:
  hosts:
    gateway1: {ansible_host: 192.0.2.15}
  vars:
    ansible_connection: local
all:
  vars:
    larder_gateway_port: 9443
    gateway_tokens: {reader: [the-reader, the-former-reader], writer: the-writer}
"""
BOARD = INVENTORY + "    monitoring_tokens: {viewer: [the-viewer, the-former-viewer]}\n"


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def write(folder: Path, *arguments: str, inventory: str = INVENTORY) -> subprocess.CompletedProcess[str]:
    (folder / "hosts.yml").write_text(inventory)
    return playbooks.run(
        "ansible/client_token.yml",
        *(f"--extra-vars={argument}" for argument in arguments),
        "-vvv",
        inventories=[folder / "hosts.yml"],
    )


@pytest.mark.parametrize(("role", "token"), [("reader", "the-reader"), ("writer", "the-writer")])
def test_one_token_is_written_for_its_owner_alone_and_shown_to_nobody(tmp_path: Path, role: str, token: str) -> None:
    path = tmp_path / "a token.header"
    done = write(tmp_path, f"token_role={role}", f"token_path='{path}'")
    assert done.returncode == 0, done.stdout + done.stderr
    assert path.read_text().strip() == f"Authorization: Bearer {token}"
    assert path.stat().st_mode & 0o777 == 0o600
    assert "the-" not in done.stdout + done.stderr
    shown = done.stdout.partition("curl ")[2].partition("/ready")[0]
    assert (
        shown.replace("\\\n", "").split() == f"--cacert {tmp_path}/ca.crt -H @'{path}' https://192.0.2.15:9443".split()
    )


def test_what_is_missing_or_wrong_is_named(tmp_path: Path) -> None:
    done = write(tmp_path, "token_role=admin")
    assert done.returncode != 0
    assert "token_path is missing" in done.stdout
    assert "token_role is admin and may be reader, writer or viewer" in done.stdout


def test_a_viewers_token_is_written_as_the_password_of_the_board(tmp_path: Path) -> None:
    path = tmp_path / "board.password"
    arguments = "token_role=viewer", f"token_path={path}"
    without = write(tmp_path, *arguments)
    assert without.returncode != 0
    assert "there is no board" in " ".join(without.stdout.split())
    assert not path.exists()
    done = write(tmp_path, *arguments, inventory=BOARD)
    assert done.returncode == 0, done.stdout + done.stderr
    assert path.read_text() == "the-viewer\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert "the-" not in done.stdout + done.stderr
    assert f"https://192.0.2.15:9443/board/ in a browser that trusts {tmp_path}/ca.crt" in " ".join(done.stdout.split())
