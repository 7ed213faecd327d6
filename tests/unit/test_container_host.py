"""The container hosts find every package of the stack downloaded, and where there is no Docker the run says so."""

from __future__ import annotations

from pathlib import Path

import playbooks
import pytest
import yaml

ROLE = playbooks.ROOT / "roles/container_host"
PLAY = f"""\
- name: Read which packages are downloaded
  hosts: localhost
  gather_facts: false
  vars_files: [{ROLE}/defaults/main.yml, {ROLE}/vars/main.yml]
  vars:
    role_path: {ROLE}
  tasks:
    - name: Print them
      ansible.builtin.debug:
        msg: "{{{{ container_host_archives | sort | join(' ') }}}}"
"""


def test_every_package_that_a_role_of_the_stack_installs_is_downloaded(tmp_path: Path) -> None:
    (tmp_path / "play.yml").write_text(PLAY)
    shown = playbooks.run(tmp_path / "play.yml", inventories=["localhost,"])
    assert shown.returncode == 0, shown.stdout + shown.stderr
    defaults = {
        path.parents[1].name: yaml.safe_load(path.read_text()) for path in ROLE.parent.glob("*/defaults/main.yml")
    }
    lists = [of_role.get(f"{role}_packages", []) for role, of_role in defaults.items() if role != ROLE.name]
    wanted = {package for packages in lists for package in packages}
    assert {"haproxy", "postgresql-17", "acl"} <= wanted
    assert f"msg: {' '.join(sorted(wanted))}" in " ".join(shown.stdout.split())


@pytest.mark.parametrize("playbook", ["ansible/trial/hosts.yml", "ansible/trial/remove.yml"])
def test_a_machine_without_docker_is_told_what_to_do(playbook: str, tmp_path: Path) -> None:
    (tmp_path / "hosts.yml").write_text("all: {hosts: {store1: {}}}\n")
    env = playbooks.environment(DOCKER_HOST=f"unix://{tmp_path}/docker.sock")
    run = playbooks.run(playbook, inventories=[tmp_path], env=env, one_stream=True)
    assert run.returncode != 0
    assert "No Docker answers on this machine" in " ".join(run.stdout.split())
    assert "Connection aborted" not in run.stdout
    assert playbooks.changed(run.stdout)["localhost"] == 0
