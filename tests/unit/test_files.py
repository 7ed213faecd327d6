"""The module `files`, run as Ansible runs it: what it writes, refuses, reports and leaves alone."""

from __future__ import annotations

import grp
import json
import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PLUGIN = Path(__file__).parents[2] / "ansible/plugins/modules/files.py"
ME = {"owner": pwd.getpwuid(os.getuid()).pw_name, "group": grp.getgrgid(os.getgid()).gr_name}


def run(*files: dict[str, Any], **options: bool) -> dict[str, Any]:
    # _ansible_* are the arguments that Ansible adds to a module's own.
    arguments = {"files": [ME | each for each in files], **{f"_ansible_{name}": on for name, on in options.items()}}
    done = subprocess.run(
        [sys.executable, PLUGIN],
        input=json.dumps({"ANSIBLE_MODULE_ARGS": arguments}),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    assert done.stdout, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    before = os.umask(0o077)  # as on hardened hosts
    try:
        yield tmp_path
    finally:
        os.umask(before)


def test_files_and_directories_are_written_in_order_and_a_second_run_changes_nothing(place: Path) -> None:
    wanted = [
        {"path": str(place / "unit.d")},
        {"path": str(place / "unit.d/larder.conf"), "content": "[Unit]\n"},
        {"path": str(place / "deep/er"), "mode": "0700"},
        {"path": str(place / "secret"), "content": "ä\n", "mode": "0600"},
    ]
    assert run(*wanted)["changed_paths"] == [each["path"] for each in wanted]
    assert (place / "unit.d/larder.conf").read_text() == "[Unit]\n"
    assert (place / "secret").read_text(encoding="utf-8") == "ä\n"
    modes = [mode(place / name) for name in ("unit.d", "unit.d/larder.conf", "deep", "deep/er", "secret")]
    assert modes == [0o755, 0o644, 0o755, 0o700, 0o600]
    stamp = (place / "secret").stat().st_mtime_ns
    assert run(*wanted)["changed"] is False
    assert (place / "secret").stat().st_mtime_ns == stamp


def test_a_mode_that_somebody_changed_is_set_again(place: Path) -> None:
    wanted = {"path": str(place / "file"), "content": "x"}
    run(wanted)
    (place / "file").chmod(0o666)
    assert run(wanted)["changed_paths"] == [str(place / "file")]
    assert mode(place / "file") == 0o644


def test_check_mode_writes_nothing_and_shows_the_difference(place: Path) -> None:
    (place / "file").write_text("old\n")
    result = run(
        {"path": str(place / "file"), "content": "new\n"},
        {"path": str(place / "none/file"), "content": "x"},
        check_mode=True,
        diff=True,
    )
    assert result["changed_paths"] == [str(place / "file"), str(place / "none/file")]
    assert [(each["before"], each["after"]) for each in result["diff"]] == [("old\n", "new\n"), ("", "x")]
    assert (place / "file").read_text() == "old\n"
    assert not (place / "none").exists()


def test_the_difference_is_not_told_unless_it_is_asked_for(place: Path) -> None:
    """A task of secrets says `diff: false`."""
    assert run({"path": str(place / "file"), "content": "secret\n"})["diff"] == []


def test_what_its_validator_refuses_is_not_put_in_place(place: Path) -> None:
    (place / "file").write_text("good\n")
    result = run({"path": str(place / "file"), "content": "bad\n", "validate": "grep good %s"})
    assert result["failed"]
    assert f"{place}/file was not written, because grep refuses" in result["msg"]
    assert (place / "file").read_text() == "good\n"
    assert run({"path": str(place / "file"), "content": "good too\n", "validate": "grep good %s"})["changed"]


def test_a_fault_names_the_file_and_what_was_changed_before(place: Path) -> None:
    (place / "file").write_text("")
    result = run({"path": str(place / "first")}, {"path": str(place / "file/second"), "content": "x"})
    assert result["failed"]
    assert str(place / "file/second") in result["msg"]
    assert result["changed_paths"] == [str(place / "first")]
