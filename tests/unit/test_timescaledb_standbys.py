"""Who the primary is, who may be promoted, and what a host's server is, by what the database hosts answer."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "ansible/plugins" / path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


verdict = load("filter/timescaledb.py").larder_timescaledb_verdict
refusals = load("filter/timescaledb.py").larder_timescaledb_refusals
state = load("modules/timescaledb_state.py")


def server(kind: str, timeline: int = 1, position: int = 100, **more: Any) -> dict[str, Any]:
    return {
        "state": kind,
        "signal": kind == "standby",
        "system": "4711",
        "timeline": timeline,
        "position": position,
        "streaming": kind == "standby",
        **more,
    }


BARE: dict[str, Any] = {"state": "bare"}
SILENT: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("servers", "primary"),
    [
        pytest.param({"a": BARE, "b": BARE}, "a", id="bare hosts: the first"),
        pytest.param({"a": BARE, "b": SILENT}, "a", id="a bare host and one out of reach"),
        pytest.param({"a": BARE, "b": server("primary")}, "b", id="a new host before the primary"),
        pytest.param({"a": server("standby"), "b": server("primary")}, "b", id="the order means nothing"),
        pytest.param({"a": SILENT, "b": server("primary", 2)}, "b", id="the former primary is lost"),
        pytest.param({"a": server("primary"), "b": server("primary", 2)}, "b", id="the former primary came back"),
        pytest.param({"a": server("stopped"), "b": server("primary", 2)}, "b", id="the former primary is stopped"),
        pytest.param({"a": server("stopped"), "b": server("standby")}, "a", id="the primary is stopped"),
        pytest.param({"a": server("primary"), "b": server("stopped", 2)}, "b", id="the promoted one is stopped"),
    ],
)
def test_the_primary_is_who_the_servers_say(servers: dict[str, Any], primary: str) -> None:
    assert verdict(servers) == {"primary": primary, "wrong": ""}


@pytest.mark.parametrize(
    ("servers", "wrong"),
    [
        (
            {"a": SILENT, "b": server("standby", position=1), "c": server("standby", position=2)},
            "no database host is the primary: a cannot be reached, and b, c wait as standbys; start the primary, or",
        ),
        ({"a": SILENT, "b": SILENT}, "a, b cannot be reached, so nobody knows which one is the primary"),
        (
            {"a": server("primary", 2), "b": server("primary", 2)},
            "a and b are primaries, and none of them was promoted",
        ),
        ({"a": server("primary", 2), "b": server("primary", system="1")}, "a and b are primaries"),
        ({"a": server("stopped"), "b": server("primary")}, "a and b are primaries"),
    ],
)
def test_no_primary_and_two_are_named(servers: dict[str, Any], wrong: str) -> None:
    found = verdict(servers)
    assert found["primary"] == ""
    assert found["wrong"].startswith(wrong)


def test_the_standby_with_the_most_wal_is_named_for_promotion() -> None:
    servers = {"a": SILENT, "b": server("standby", position=1), "c": server("standby", position=2)}
    assert verdict(servers)["wrong"].endswith("ansible/promote_standby.yml -e host=c")


def lost(**more: Any) -> dict[str, Any]:
    """Return a standby whose primary answers no more."""
    return server("standby", streaming=False, **more)


@pytest.mark.parametrize(
    ("servers", "seen"),
    [
        ({"a": SILENT, "b": lost()}, []),
        ({"a": server("stopped"), "b": lost()}, []),
        ({"a": SILENT, "b": lost(), "c": lost()}, []),
        ({"a": SILENT, "b": server("primary", 2)}, []),
    ],
)
def test_a_standby_of_a_lost_primary_is_promoted(servers: dict[str, Any], seen: list[str]) -> None:
    assert refusals(servers, "b", seen, False) == []


@pytest.mark.parametrize(
    ("servers", "seen", "why"),
    [
        ({"a": server("primary"), "b": server("standby")}, ["a"], "a runs as the primary: two primaries would take"),
        ({"a": SILENT, "b": lost()}, ["a"], "a answers b as the primary, and Ansible cannot reach it to stop it"),
        ({"a": SILENT, "b": server("standby")}, [], "b receives WAL from a primary that does not answer Ansible"),
        (
            {"a": SILENT, "b": lost(), "c": lost(position=160)},
            [],
            "c has 60 bytes of WAL more than b: promote c instead.",
        ),
        (
            {"a": server("stopped", position=160), "b": lost()},
            [],
            "a has 60 bytes of WAL more than b: promote a instead, or",
        ),
        (
            {"a": SILENT, "b": server("stopped", signal=True)},
            [],
            "b is no standby that runs: its PostgreSQL is stopped",
        ),
        ({"a": SILENT, "b": BARE}, [], "b is no standby that runs: its PostgreSQL is bare"),
        ({"a": server("primary"), "b": server("primary", 2)}, ["a"], "b is the primary already, and a answers as one"),
    ],
)
def test_a_second_primary_and_a_loss_are_refused(servers: dict[str, Any], seen: list[str], why: str) -> None:
    (refusal,) = refusals(servers, "b", seen, False)
    assert refusal.startswith(why)


def test_a_primary_that_runs_is_replaced_only_by_its_own_standby() -> None:
    running = {"a": server("primary"), "b": server("standby")}
    assert refusals(running, "b", ["a"], True) == []
    (refusal,) = refusals({"a": server("primary"), "b": lost()}, "b", ["a"], True)
    assert refusal == "b does not follow a at present: run site.yml first."


CONTROL = """\
pg_control version number:            1700
Database system identifier:           7591234567890123456
Database cluster state:               in production
Latest checkpoint location:           1/10
Latest checkpoint's TimeLineID:       3
"""


class Files:
    """The files of a host by which its server's state is known."""

    def __init__(self, directory: Path) -> None:
        names = ("data", "settings", "marker", "copying", "manager")
        self.paths = {name: directory / name for name in names}
        self.paths["data"].mkdir()

    def look(self, answer: dict[str, Any] | None = None, control: str | None = CONTROL) -> dict[str, Any]:
        said = json.dumps(answer) if answer else None
        found: dict[str, Any] = state.look(self.paths, lambda _port: said, lambda: control)
        return found

    def has(self, *names: str) -> None:
        for name in names:
            self.paths[name].touch()

    def runs(self) -> None:
        (self.paths["data"] / "PG_VERSION").touch()
        (self.paths["data"] / "postmaster.pid").write_text("1\n/data\n0\n5432\n")


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_a_cluster_that_the_role_did_not_set_up_is_none(files: Files) -> None:
    files.runs()
    assert files.look({"state": "primary"}) == {"managed": False, "state": "bare"}


def test_a_data_directory_that_is_gone_or_incomplete_is_no_server(files: Files) -> None:
    files.has("marker")
    assert files.look()["state"] == "lost"
    files.has("copying")
    files.runs()
    assert files.look({"state": "standby"})["state"] == "copying"


def test_a_server_that_answers_says_what_it_is(files: Files) -> None:
    files.has("settings", "manager")
    files.runs()
    assert files.look({"state": "primary"}) == {"state": "primary", "signal": False, "managed": True}


def test_of_a_stopped_server_the_control_file_is_read(files: Files) -> None:
    files.has("marker")
    files.runs()
    (files.paths["data"] / "standby.signal").touch()
    found = files.look()
    assert (found["state"], found["signal"], found["timeline"], found["clean"]) == ("stopped", True, 3, False)
    assert (found["system"], found["position"]) == ("7591234567890123456", 2**32 + 16)


def test_a_standby_is_waited_for_as_long_as_it_gets_on(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(state.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(state.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    data = files.paths["data"]
    assert state.follow(lambda: {"position": min(now[0], 100), "streaming": now[0] > 120}, data, 30)["streaming"]
    now[0] = 0.0
    assert not state.follow(lambda: {"position": min(now[0], 100), "streaming": now[0] > 140}, data, 30)["streaming"]
    assert 125 < now[0] < 140


def test_what_patroni_fills_anew_is_empty_and_not_marked_as_being_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restore leaves the mark on every standby; where it stays, the host is never seen as a server again."""
    standby = load("modules/timescaledb_standby.py")
    monkeypatch.setattr(standby.shutil, "chown", lambda *_: None)
    data, copying = tmp_path / "main", tmp_path / "copying"
    (data / "base").mkdir(parents=True)
    (data / "PG_VERSION").write_text("17\n")
    copying.touch()

    module = SimpleNamespace(params={"data": str(data), "copying": str(copying)})
    for _ in range(2):  # a host that a former run has emptied, and one without the mark
        standby.Standby(module).give_up()
        assert [*data.iterdir()] == []
        assert not copying.exists()
