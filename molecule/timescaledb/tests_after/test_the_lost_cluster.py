"""PostgreSQL's data directory is gone: a run refuses and changes nothing, until it is told to make an empty cluster.

The tests are steps of one story, in order, and the last ones of the scenario: what the others made is lost too.
"""

from __future__ import annotations

import pytest

DATA = "/var/lib/postgresql/17/main"
RECREATE = {"timescaledb_recreate_lost_cluster": True}


@pytest.fixture(scope="module", autouse=True)
def lost(store):
    """Remove the data under a server that runs, as `rm -rf` by hand does."""
    store.check_output("sudo rm -rf %s", DATA)


def sentence(result):
    assert result.returncode != 0
    assert " changed=0 " in result.stdout, result.stdout
    return " ".join(result.stdout.split())


def test_a_lost_data_directory_is_named_before_anything_is_changed(playbook, store):
    said = sentence(playbook("side_effect.yml"))
    assert (
        f"store1: PostgreSQL's data directory {DATA} does not exist: mount its volume, or restore it, or have an empty "
        "cluster made there with timescaledb_recreate_lost_cluster: true. Nothing was changed." in said
    ), said
    assert not store.run("sudo test -e %s", DATA).succeeded


def test_a_host_that_lost_its_configuration_too_is_not_taken_for_bare(playbook, store):
    store.check_output("sudo mv /etc/postgresql/17/main /root/etc")
    said = sentence(playbook("side_effect.yml"))
    store.check_output("sudo mv /root/etc /etc/postgresql/17/main")
    assert f"{DATA} does not exist: mount its volume" in said


def test_a_directory_without_its_volume_counts_as_lost(playbook, store):
    store.check_output("sudo install -d -o root -m 0755 %s/lost+found", DATA)
    assert f"{DATA} is empty: mount its volume" in sentence(playbook("side_effect.yml"))


def test_check_mode_shows_a_recreation_and_makes_none(playbook, store):
    result = playbook("side_effect.yml", "--check", **RECREATE)
    assert result.returncode == 0, result.stdout
    assert not store.run("sudo test -e %s/PG_VERSION", DATA).succeeded


def test_an_empty_cluster_is_made_when_asked_with_all_that_the_role_gives_it(playbook, store, superuser, query):
    result = playbook("side_effect.yml", **RECREATE)
    assert result.returncode == 0, result.stdout
    assert superuser("SELECT datlocprovider, datlocale FROM pg_database WHERE datname = 'feast'").strip() == "b|C.UTF-8"
    assert superuser("SHOW data_checksums").strip() == "on"
    assert superuser("SELECT count(*) FROM lab.samples").strip() == "0"
    assert query("pipeline", "SELECT current_user", password="another password").stdout.strip() == "feast_pipeline"
    identifier = superuser("SELECT system_identifier FROM pg_control_system()")
    assert store.check_output("cat /etc/larder/timescaledb.cluster").strip() == identifier.strip()


def test_the_next_run_changes_nothing(playbook):
    result = playbook("side_effect.yml")
    assert result.returncode == 0, result.stdout
    assert " changed=0 " in result.stdout


def test_the_recreate_variable_is_refused_where_nothing_is_lost(playbook):
    assert f"nothing is lost at {DATA}: timescaledb_recreate_lost_cluster" in sentence(
        playbook("side_effect.yml", **RECREATE)
    )
