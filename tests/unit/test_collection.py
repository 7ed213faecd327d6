"""The repository builds as the collection larder.stack, with all that its roles need and nothing of anybody's stack."""

from __future__ import annotations

import re
import subprocess
import tarfile
import tomllib
from pathlib import Path

import playbooks
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


def test_the_archive_has_roles_and_plugins_and_nothing_of_a_stack(tmp_path: Path) -> None:
    command = ["ansible-galaxy", "collection", "build", f"--output-path={tmp_path}"]
    subprocess.run(command, cwd=ROOT, env=playbooks.environment(), check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = set(archive.getnames())
    for name in ("roles/redis/tasks/main.yml", "roles/redis/meta/stack.yml", "ansible/plugins/modules/redis_live.py"):
        assert name in names
    top = {name.partition("/")[0] for name in names}
    assert top <= {
        *{"FILES.json", "MANIFEST.json", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "SECURITY.md"},
        *{"ansible", "docs", "feature_repo", "meta", "plugins", "pyproject.toml", "roles", "src", "templates"},
    }
    assert not [name for name in names if "vault" in name and not name.startswith("ansible/plugins/")]
