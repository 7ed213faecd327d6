"""What the module timescaledb_cluster takes for a lost data directory, and what it says of it."""

import importlib.util
import os
import pwd
import struct
from pathlib import Path
from typing import NamedTuple

import pytest

PLUGIN = Path(__file__).parents[2] / "ansible/plugins/modules/timescaledb_cluster.py"
spec = importlib.util.spec_from_file_location("timescaledb_cluster", PLUGIN)
assert spec
assert spec.loader
cluster = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cluster)

VARIABLE = "timescaledb_recreate_lost_cluster"
MOUNT = "mount its volume, or restore it"


class Host(NamedTuple):
    data: Path
    marker: Path
    settings: Path

    def says(self, *, recreate: bool = False) -> str:
        found = cluster.look(self.data, "17", self.marker, self.settings)
        return str(cluster.sentence(self.data, found, VARIABLE, recreate=recreate))


def make(data: Path, number: int, version: str = "17") -> None:
    (data / "global").mkdir(parents=True, exist_ok=True)
    (data / "PG_VERSION").write_text(f"{version}\n")
    (data / "global/pg_control").write_bytes(struct.pack("=Q", number) + bytes(8000))


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host on which the role made its database in cluster 4711."""
    monkeypatch.setattr(cluster, "OWNER", pwd.getpwuid(os.getuid()).pw_name)
    host = Host(tmp_path / "main", tmp_path / "timescaledb.cluster", tmp_path / "larder.conf")
    make(host.data, 4711)
    host.marker.write_text("4711\n")
    return host


def test_a_bare_host_has_no_lost_cluster(tmp_path: Path) -> None:
    host = Host(tmp_path / "main", tmp_path / "marker", tmp_path / "larder.conf")
    assert host.says() == ""
    host.data.mkdir()
    assert host.says() == ""


def test_the_cluster_of_the_role_is_right(host: Host) -> None:
    assert host.says() == ""
    host.marker.unlink()
    host.settings.touch()  # set up by a version of the role that wrote no marker
    assert host.says() == ""


@pytest.mark.parametrize("sign", ["marker", "settings"])
@pytest.mark.parametrize(("held", "what"), [(None, "does not exist"), ([], "is empty"), (["lost+found"], "is empty")])
def test_nothing_in_the_data_directory_is_a_lost_cluster_by_either_sign(
    tmp_path: Path, sign: str, held: list[str] | None, what: str
) -> None:
    host = Host(tmp_path / "main", tmp_path / "marker", tmp_path / "larder.conf")
    getattr(host, sign).touch()
    for name in ["", *held] if held is not None else []:
        (host.data / name).mkdir()
    assert host.says() == (
        f"PostgreSQL's data directory {host.data} {what}: {MOUNT}, "
        f"or have an empty cluster made there with {VARIABLE}: true"
    )
    assert host.says(recreate=True) == ""


def test_a_link_to_a_volume_that_is_away_is_a_lost_cluster(tmp_path: Path, host: Host) -> None:
    host.data.rename(tmp_path / "volume")
    host.data.symlink_to(tmp_path / "volume")
    assert host.says() == ""
    (tmp_path / "volume").rename(tmp_path / "away")
    assert "does not exist" in host.says()


def test_existing_files_are_never_replaced(host: Host) -> None:
    make(host.data, 4711, "16")
    expected = f"PostgreSQL's data directory {host.data} holds a cluster of PostgreSQL 16, not 17: {MOUNT}"
    assert host.says() == host.says(recreate=True) == expected
    (host.data / "PG_VERSION").unlink()
    assert f"holds no PostgreSQL cluster but global: {MOUNT}" in host.says(recreate=True)
    make(host.data, 4711)
    (host.data / "global/pg_control").unlink()
    assert "holds a cluster without global/pg_control" in host.says(recreate=True)


def test_a_data_directory_of_another_user_is_named(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "OWNER", "postgres-of-elsewhere")
    assert f"belongs to {pwd.getpwuid(os.getuid()).pw_name}, not to postgres-of-elsewhere" in host.says(recreate=True)


def test_another_cluster_is_taken_only_when_asked(host: Host) -> None:
    make(host.data, 42)
    assert host.says() == (
        f"PostgreSQL's data directory {host.data} holds another cluster (42) than the one that was set up here (4711): "
        f"{MOUNT}, or take this one with {VARIABLE}: true"
    )
    assert host.says(recreate=True) == ""


def test_the_variable_is_refused_where_nothing_is_lost(host: Host, tmp_path: Path) -> None:
    assert f"nothing is lost at {host.data}: {VARIABLE} is for the one run" in host.says(recreate=True)
    bare = Host(tmp_path / "bare", tmp_path / "none", tmp_path / "none")
    assert "nothing is lost" in bare.says(recreate=True)
