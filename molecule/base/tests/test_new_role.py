"""A new role is its folder, a play of site.yml and a group of the inventory; the stack derives the rest from them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import playbooks
import pytest
import yaml

ROOT = playbooks.ROOT
PARTS = [
    "ansible",
    "ansible.cfg",
    "collections",
    "feature_repo",
    "pyproject.toml",
    "roles",
    "site.yml",
    "src",
    "templates",
]
PLAY = """
- name: Deploy hello
  hosts: hello
  become: true
  tags: [hello]
  roles:
    - hello
"""
# What the host's answer is, over TLS that is checked; the token may be wrong.
ASK = """
import ssl, sys, urllib.error, urllib.request
url, trusted, token = sys.argv[1:]
request = urllib.request.Request(url, headers={"Authorization": "Bearer " + token})
try:
    context = ssl.create_default_context(cadata=trusted)
    print(urllib.request.urlopen(request, timeout=5, context=context).read().decode())
except urllib.error.HTTPError as error:
    print(error.code)
"""


class Checkout:
    """A copy of the checkout and of the scenario's inventory, with the role hello for the host stranger."""

    def __init__(self, path: Path, inventory: Path) -> None:
        self.path, self.inventory = path, path / "inventory/trial"
        for part in PARTS:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, path / part, symlinks=True)
            else:
                shutil.copy(ROOT / part, path)
        shutil.copytree(inventory, self.inventory)
        # All that a new role needs:
        shutil.copytree(ROOT / "tests/roles/hello", path / "roles/hello")
        with (path / "site.yml").open("a") as site:
            site.write(PLAY)
        (self.inventory / "hello.yml").write_text("hello: {hosts: {stranger: }}\n")

    def play(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        sources = [f"--inventory={path}" for path in (ROOT / "molecule/shared/inventory", self.inventory)]
        return subprocess.run(
            ["ansible-playbook", *sources, *arguments],
            cwd=self.path,
            env=playbooks.environment(ANSIBLE_CONFIG=str(self.path / "ansible.cfg")),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def faults(self, *arguments: str) -> str:
        """Return what preflight says of an inventory with faults, for which no host is asked."""
        return self.play("ansible/preflight.yml", *arguments).stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, pytestconfig):
    return Checkout(tmp_path_factory.mktemp("larder"), Path(pytestconfig.getoption("--ansible-inventory")))


@pytest.fixture(scope="module")
def secret(checkout):
    """Return the new role's secret, which init_secrets adds to the vault."""
    assert "stranger: hello_tokens is unset; it must hold a secret each for guest." in checkout.faults()
    added = checkout.play("ansible/init_secrets.yml")
    assert "Added to the vault: hello_tokens.guest." in added.stdout, added.stdout + added.stderr
    vault = checkout.inventory / "group_vars/all/vault.yml"
    shown = subprocess.run(
        ["ansible-vault", "view", vault], env=playbooks.environment(), capture_output=True, text=True, check=True
    )
    return yaml.safe_load(shown.stdout)["hello_tokens"]["guest"]


@pytest.fixture(scope="module")
def deployed(checkout, secret):
    run = checkout.play("site.yml", "--limit=stranger", "--tags=base,hello")
    assert run.returncode == 0, run.stdout + run.stderr
    return secret


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("hello_port=many", "hello_port is 'many' and must be a whole number, 1 to 65535."),
        ("hello_port=22", "stranger: hello_port is 22 for 1 instances and meets ansible_port at port 22."),
        ("hello_prot=1", "hello_prot is a variable of no role (did you mean hello_port?)."),
        ("hello_packages=x", "hello_packages is 'x' and must be a list."),
    ],
)
@pytest.mark.usefixtures("secret")
def test_preflight_judges_the_variables_of_a_new_role(checkout, setting, sentence):
    assert sentence in checkout.faults(f"--extra-vars={setting}")


@pytest.mark.usefixtures("deployed")
def test_the_port_of_a_new_role_is_open_to_the_groups_that_it_names_and_to_no_other(hosts):
    assert hosts.reach("client1", "stranger", 8088)
    assert not hosts.reach("store1", "stranger", 8088)
    assert hosts.reach("store1", "stranger", 9999)


def test_a_new_role_has_a_certificate_of_the_stacks_ca_and_knows_its_secret(checkout, hosts, deployed):
    trusted = (checkout.inventory / "ca.crt").read_text()
    url = f"https://{hosts['stranger'].backend.get_variables()['ansible_host']}:8088"
    for token, answer in ((deployed, "Hello!"), ("another", "401")):
        assert hosts["client1"].check_output("python3 -c %s %s %s %s", ASK, url, trusted, token).strip() == answer
