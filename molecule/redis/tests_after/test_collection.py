"""A project of somebody else runs the role redis of the installed collection, on a host without Redis."""

import json
import os
import subprocess

import playbooks
import pytest

PLAYBOOK = """\
- name: Run a cache for carts
  hosts: caches
  become: true
  roles:
    - larder.stack.redis
"""
VARIABLES = {
    "redis_users": {"carts": "~cart:* resetchannels -@all +ping +get +set"},
    "redis_passwords": {"carts": "the password of the carts"},
    "redis_port": 7000,
    "redis_maxmemory": "64mb",
    "redis_settings": {"slowlog-max-len": 256},
}
WAYS = ["ansible_host", "ansible_user", "ansible_ssh_private_key_file", "ansible_ssh_common_args"]


@pytest.fixture(scope="module")
def project(inventory, tmp_path_factory):
    """Return what runs a command in a directory that has the built collection and nothing else of Larder."""
    path = tmp_path_factory.mktemp("shop")
    host = {name: value for name, value in inventory.variables("stranger").items() if name in WAYS}
    authorities = inventory.variables("stranger")["certificate_authorities"]
    (path / "hosts.yml").write_text(json.dumps({"caches": {"hosts": {"stranger": host}}}))
    (path / "site.yml").write_text(PLAYBOOK)
    (path / "group_vars").mkdir()
    (path / "group_vars/caches.json").write_text(json.dumps(VARIABLES | {"certificate_authorities": authorities}))
    env = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")} | {"LC_ALL": "C.UTF-8"}

    def run(*command, cwd=path):
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=True).stdout

    run("ansible-galaxy", "collection", "build", f"--output-path={path}", cwd=playbooks.ROOT)
    (archive,) = path.glob("larder-stack-*.tar.gz")
    run("ansible-galaxy", "collection", "install", "--no-deps", "--collections-path=collections", archive)
    return run


@pytest.fixture(scope="module")
def first(project):
    return playbooks.changed(project("ansible-playbook", "-i", "hosts.yml", "site.yml"))


def test_the_role_sets_up_redis_with_the_projects_users_and_settings(first, inventory, ask, login):
    assert first["stranger"] > 0
    passwords = VARIABLES["redis_passwords"]
    other = {"host": inventory.address("stranger"), "port": 7000}
    commands = [["SET", "cart:1", "pears"], ["GET", "cart:1"], ["GET", "till"]]
    answers = ask(*commands, user=login("carts", passwords), password=passwords["carts"], **other)
    assert answers[:2] == [True, "pears"]
    assert answers[2].startswith("NoPermissionError: ")
    assert ask(["PING"], **other) == ["AuthenticationError: Authentication required."]
    with inventory.host("stranger").sudo():
        assert "slowlog-max-len 256" in inventory.host("stranger").file("/etc/redis/redis.conf").content_string


@pytest.mark.usefixtures("first")
def test_a_second_run_of_the_project_changes_nothing(project):
    assert playbooks.changed(project("ansible-playbook", "-i", "hosts.yml", "site.yml")) == {"stranger": 0}
