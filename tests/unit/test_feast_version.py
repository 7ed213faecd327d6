"""Feast in a version that the package does not know: one sentence, wherever it is used."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from larder import feast_version

ROOT = Path(__file__).parents[2]
SENTENCE = "Feast 0.68.0 is installed, and this Larder knows 0.67: pip install 'feast==0.67.*'."


@pytest.fixture
def another(tmp_path):
    """A Feast that comes before the installed one, and has nothing that the package imports."""
    metadata = tmp_path / "feast-0.68.0.dist-info/METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: feast\nVersion: 0.68.0\n")
    (tmp_path / "feast").mkdir()
    (tmp_path / "feast/__init__.py").touch()
    return {"PYTHONPATH": f"{tmp_path}:{ROOT / 'src'}"}


@pytest.mark.parametrize(
    "module",
    [f"plugins.{name}" for name in ("offline_store", "compute_engine", "online_store")]
    + ["serving.application", "serving.gunicorn"],
)
def test_another_feast_is_refused_where_feast_or_gunicorn_imports_the_package(another, module):
    code = [sys.executable, "-c", f"import larder.{module}"]
    refused = subprocess.run(code, env=another, capture_output=True, text=True, check=False)
    assert refused.stderr.splitlines()[-1] == f"larder.errors.ConfigError: {SENTENCE}"


@pytest.mark.parametrize("command", [["apply", "--repo", str(ROOT / "feature_repo")], ["probe"]])
def test_another_feast_is_refused_by_a_command_that_needs_it(another, tmp_path, command):
    (tmp_path / "feature_store.yaml").write_text("project: x\n")
    refused = subprocess.run(
        [sys.executable, "-c", "from larder.cli import main; main()", "--credentials", str(tmp_path), *command],
        env=another,
        input='[{"purpose": "serve", "name": "feature_store.yaml", "content": "project: x"}]',
        capture_output=True,
        text=True,
        check=False,
    )
    assert (refused.returncode, refused.stderr) == (2, f"Error: {SENTENCE}\n")


def test_the_version_is_that_of_the_package_and_of_the_lock():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"feast[postgres,redis]=={feast_version.KNOWN}.*" in project["dependencies"]
    assert feast_version.checked() in (ROOT / "roles/feast/defaults/main.yml").read_text()
