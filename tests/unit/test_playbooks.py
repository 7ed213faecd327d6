"""Ansible's output in tests does not depend on the caller, and Ansible starts in any locale."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import playbooks
import pytest

PLAYBOOK = """\
- name: Say something
  hosts: all
  gather_facts: false
  connection: local
  tasks:
    - name: Change something
      ansible.builtin.command: printf 'näher %s' "$LC_ALL"
      changed_when: inventory_hostname == 'one'
    - name: Print a long line
      ansible.builtin.debug:
        msg: "{{ 'words ' * 60 }}"
"""
HOSTILE = [
    {
        "ANSIBLE_FORCE_COLOR": "1",
        "FORCE_COLOR": "1",
        "PY_COLORS": "1",
        "LC_ALL": "C",
        "TERM": "xterm",
        "ANSIBLE_STDOUT_CALLBACK": "ansible.builtin.minimal",
        "ANSIBLE_VERBOSITY": "3",
    },
    {"LC_ALL": "tr_TR.UTF-8", "LANGUAGE": "tr", "COLUMNS": "20", "TERM": "dumb", "PYTHONIOENCODING": "latin-1"},
]


@pytest.fixture
def run(tmp_path: Path) -> subprocess.CompletedProcess[str]:
    (tmp_path / "hosts").write_text("one\ntwo\n")
    (tmp_path / "play.yml").write_text(PLAYBOOK)
    return playbooks.run(tmp_path / "play.yml", inventories=[tmp_path / "hosts"])


@pytest.fixture(autouse=True)
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def test_recap_tells_what_changed_on_which_host(run: subprocess.CompletedProcess[str]) -> None:
    assert run.returncode == 0, run.stdout + run.stderr
    assert playbooks.changed(run.stdout) == {"one": 1, "two": 0}


def test_only_the_recap_is_read_for_changes() -> None:
    assert playbooks.changed("one : ok=1 changed=7 \nPLAY RECAP ***\none   : ok=3    changed=2    unreachable=0\n") == {
        "one": 2
    }


@pytest.mark.parametrize("hostile", HOSTILE, ids=["colour and callback", "locale"])
def test_output_is_the_same_whatever_the_caller_has_set(
    hostile: dict[str, str], run: subprocess.CompletedProcess[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in hostile.items():
        monkeypatch.setenv(name, value)
    again = playbooks.run(tmp_path / "play.yml", inventories=[tmp_path / "hosts"])
    # Two hosts end in any order.
    assert sorted(again.stdout.splitlines()) == sorted(run.stdout.splitlines())
    assert again.stderr == run.stderr


def test_a_run_ignores_the_callers_settings_except_the_vault_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANSIBLE_ROLES_PATH", "/nowhere")
    monkeypatch.setenv("ANSIBLE_VAULT_PASSWORD_FILE", "/password")
    given = playbooks.environment(ANSIBLE_LOG_PATH="/log")
    assert {name: value for name, value in given.items() if name.startswith("ANSIBLE_")} == {
        "ANSIBLE_CONFIG": str(playbooks.ROOT / "ansible.cfg"),
        "ANSIBLE_LOG_PATH": "/log",
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_VAULT_PASSWORD_FILE": "/password",
    }


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LANG": "xx_XX.UTF-8"}, {"LC_TIME": "xx_XX"}], ids=str)
def test_ansible_starts_from_any_locale_and_without_activation(locale: dict[str, str]) -> None:
    start = "import controller_start, subprocess; subprocess.run(['ansible-config', 'dump'], check=True)"
    done = subprocess.run(
        [sys.executable, "-c", start],
        cwd=playbooks.ROOT / "ansible",
        env={"PATH": "/usr/bin:/bin", "HOME": str(Path.home())} | locale,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()


def test_a_working_locale_stays() -> None:
    code = "import controller_start, os; print(os.environ.get('LC_ALL'), os.environ['LC_CTYPE'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=playbooks.ROOT / "ansible",
        env={"PATH": os.environ["PATH"], "LC_CTYPE": "C.UTF-8"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "None C.UTF-8\n"


def test_every_test_starts_ansible_in_this_environment() -> None:
    """Molecule forces colours on, and a test that takes its environment as it is reads them in what Ansible says."""
    sources = [path for folder in ("molecule", "tests", "bench") for path in playbooks.ROOT.glob(f"{folder}/**/*.py")]
    start = re.compile(r'"ansible-(playbook|vault|inventory)"')
    starting = {str(path.relative_to(playbooks.ROOT)) for path in sources if start.search(path.read_text())}
    starting.remove("tests/shared/playbooks.py")
    assert {name for name in starting if "playbooks." not in (playbooks.ROOT / name).read_text()} == set()
    assert "molecule/rotation/tests/conftest.py" in starting


def test_every_playbook_runs_with_a_strategy_of_ansible() -> None:
    """A strategy plugin of somebody else reaches into Ansible's internals."""
    root = Path(__file__).parents[2]
    listed = subprocess.run(
        ["git", "ls-files", "*.yml", "*.cfg", "*requirements*"], cwd=root, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    named = {
        f"{name}: {line.strip()}"
        for name in listed
        for line in (root / name).read_text().splitlines()
        if re.match(r"\s*(ANSIBLE_)?strategy(_plugins)?\s*[:=](?! ansible\.builtin\.)|mitogen", line, re.IGNORECASE)
    }
    assert named == set()
