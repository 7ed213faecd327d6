"""A checkout in a path with blanks, quotes and umlauts: what is quoted everywhere, and what is refused at once."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_task_on_the_controller_quotes_its_python() -> None:
    """Ansible gives ansible_python_interpreter to a shell as it stands."""
    listed = subprocess.run(["git", "ls-files", "*.yml"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    lines = {
        line.strip()
        for name in listed.split()
        for line in (ROOT / name).read_text().splitlines()
        if "ansible_python_interpreter:" in line
    }
    assert lines == {'ansible_python_interpreter: "{{ ansible_playbook_python | quote }}"'}


@pytest.mark.parametrize("name", ["trading desk", "désk's & co (1); a=b@c #1", "long-" * 30])
def test_a_path_that_can_be_quoted_is_taken(tmp_path: Path, name: str) -> None:
    assert larder(tmp_path / name).returncode == 0


@pytest.mark.parametrize("character", list(':,%"\\${\n'))
def test_a_path_that_cannot_be_quoted_is_refused_in_one_sentence(tmp_path: Path, character: str) -> None:
    refused = larder(tmp_path / f"trading{character}desk")
    assert refused.returncode == 1
    assert refused.stderr.startswith("larder: the path of this checkout is ")
    assert refused.stdout == ""


def larder(directory: Path) -> subprocess.CompletedProcess[str]:
    directory.mkdir()
    shutil.copy(ROOT / "larder", directory)
    return subprocess.run([directory / "larder", "help"], capture_output=True, text=True, check=False)
