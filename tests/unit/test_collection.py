"""The repository builds as the collection larder.stack, with all that its roles need and nothing of anybody's stack."""

from __future__ import annotations

import re
import subprocess
import tarfile
import tomllib
from pathlib import Path

import playbooks
import pytest
import yaml

ROOT = playbooks.ROOT
GALAXY = yaml.safe_load((ROOT / "galaxy.yml").read_text())
OTHERS = re.compile(r"\b((?:ansible|community)\.(?!builtin|legacy)[a-z]+)\.[a-z_]+\b")


def test_the_version_is_the_packages() -> None:
    assert GALAXY["version"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_every_collection_that_a_role_uses_is_required_and_no_other() -> None:
    roles = [path for path in ROOT.glob("roles/*") if f"roles/{path.name}" not in GALAXY["build_ignore"]]
    files = [path for role in roles for path in role.rglob("*") if path.suffix in {".yml", ".j2"}]
    used = {name for path in files for name in OTHERS.findall(path.read_text())}
    required = yaml.safe_load((ROOT / "requirements.yml").read_text())["collections"]
    assert GALAXY["dependencies"].keys() == used
    assert GALAXY["dependencies"] == {each["name"]: each["version"] for each in required}


PLAYBOOK = """\
- name: Ask what the installed collection knows
  hosts: localhost
  connection: local
  vars:
    ansible_python_interpreter: "{{ ansible_playbook_python }}"
    redis_users: {carts: "+get"}
    redis_passwords: {carts: secret}
    group_names: [redis]
  tasks:
    - name: Check the variables of Redis
      ansible.builtin.include_role: {name: larder.stack.redis, tasks_from: preflight, public: true}

    - name: Show a login, the ports and the packages
      ansible.builtin.debug:
        msg: "{{ __redis_logins | first }}
          {{ (query('larder.stack.declared', 'ports') | selectattr('service', 'eq', 'redis') | first).port }}
          {{ query('larder.stack.declared', 'packages') | select('match', 'redis') | first }}"
"""


def galaxy(*arguments: str | Path, cwd: Path) -> None:
    """Run ansible-galaxy with the settings of a directory: by the checkout's, the collection is installed already."""
    env = {name: value for name, value in playbooks.environment().items() if name != "ANSIBLE_CONFIG"}
    subprocess.run(["ansible-galaxy", "collection", *arguments], cwd=cwd, env=env, check=True, capture_output=True)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("built")
    galaxy("build", f"--output-path={path}", cwd=ROOT)
    return next(path.glob("*.tar.gz"))


def test_a_project_finds_roles_and_plugins_of_the_installed_collection(archive: Path, tmp_path: Path) -> None:
    """On a host, the scenario redis runs the whole role."""
    galaxy("install", "--no-deps", "--collections-path=collections", archive, cwd=tmp_path)
    (tmp_path / "play.yml").write_text(PLAYBOOK)
    (tmp_path / "ansible.cfg").touch()
    env = playbooks.environment(ANSIBLE_CONFIG=str(tmp_path / "ansible.cfg"))
    done = playbooks.run(tmp_path / "play.yml", inventories=["localhost,"], env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"carts_g[0-9a-f]{8} 6379 redis-server", done.stdout), done.stdout


def test_the_archive_has_roles_and_plugins_and_nothing_of_a_stack(archive: Path) -> None:
    with tarfile.open(archive) as opened:
        names = set(opened.getnames())
    for name in ("roles/redis/tasks/main.yml", "roles/redis/meta/stack.yml", "ansible/plugins/modules/redis_live.py"):
        assert name in names
    top = {name.partition("/")[0] for name in names}
    assert top <= {
        *{"FILES.json", "MANIFEST.json", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "SECURITY.md"},
        *{"ansible", "docs", "feature_repo", "meta", "plugins", "pyproject.toml", "roles", "src", "templates"},
    }
    assert not [name for name in names if "vault" in name and not name.startswith("ansible/plugins/")]
