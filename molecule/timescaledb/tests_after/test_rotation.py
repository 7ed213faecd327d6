"""A new password from the vault to the last session of the old one, asked from other hosts.

The tests are steps of one story, in order. The run with other values left `pipeline` with the old and a new password.
"""

from __future__ import annotations

import time

import playbooks
import pytest

OLD, NEW = "пароль ½ ﬁ 🔑 with a soft\u00adhyphen", "another password"
READY = {"larder_ready_groups": ["pipeline", "feature_server"]}
# A login that was dropped belongs to no purpose, so no line of pg_hba.conf allows it.
REFUSED = ("password authentication failed", "no pg_hba.conf entry")


@pytest.fixture(scope="module")
def run(playbook, passwords):
    """Run parts of the role on a vault that has the new password of `pipeline`, and what else is changed."""

    def rotate(*parts, changed=None, **variables):
        held = passwords | {"pipeline": NEW} | (changed or {})
        return playbook("part.yml", parts=parts, timescaledb_passwords=held, larder_drain_seconds=2, **variables)

    return rotate


@pytest.fixture(scope="module", autouse=True)
def nothing_restarts(superuser):
    started = "SELECT pg_postmaster_start_time()"
    before = superuser(started)
    yield
    assert superuser(started) == before


@pytest.fixture
def held(query, login, superuser):
    """Hold a session of `pipeline` with a password; tell whether it is still there."""

    def sessions(user):
        return int(superuser(f"SELECT count(*) FROM pg_stat_activity WHERE usename = '{user}'"))

    def hold(password):
        user = login("pipeline", password)
        query("pipeline", "SELECT pg_sleep(600)", password=password, background=True)
        deadline = time.monotonic() + 30
        while not sessions(user):
            assert time.monotonic() < deadline
        return lambda: bool(sessions(user))

    yield hold
    superuser("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename ^@ 'feast_pipeline_g'")


def works(query, password, purpose="pipeline"):
    result = query(purpose, "SELECT current_user", password=password)
    assert result.stdout.strip() == f"feast_{purpose}" or any(words in result.stderr for words in REFUSED), result
    return result.rc == 0


def logins(superuser):
    return set(superuser("SELECT rolname FROM pg_roles WHERE rolname ^@ 'feast_' AND rolcanlogin").split())


def test_the_new_password_works_beside_the_old_one(query):
    assert works(query, OLD)
    assert works(query, NEW)


def test_nothing_is_revoked_while_a_consumer_may_need_it(run, query):
    result = run("secrets", "retire", larder_ready_groups=["feature_server"])
    assert result.returncode != 0
    assert "Nothing was revoked: client1 did not end this run on the vault's secrets" in " ".join(result.stdout.split())
    assert works(query, OLD)


def test_a_session_of_the_old_password_is_waited_for_and_named(run, query, login, held, client_address):
    is_there = held(OLD)
    result = run("secrets", "retire", **READY)
    assert result.returncode != 0
    said = " ".join(result.stdout.split())
    whose = f"{login('pipeline', OLD)} from {client_address} since 20"
    assert f"after 2 seconds (larder_drain_seconds) there is still {whose}" in said, said
    assert is_there()
    assert works(query, OLD)


def test_the_old_password_is_refused_once_nobody_uses_it(run, query, login, superuser):
    result = run("secrets", "retire", **READY)
    assert result.returncode == 0, result.stdout
    assert not works(query, OLD)
    assert works(query, NEW)
    assert login("pipeline", OLD) not in superuser("SELECT rolname FROM pg_roles")
    assert len(logins(superuser)) == 7


def test_a_second_rotation_run_changes_nothing(run):
    # No consumer has recorded that it is ready: the role asks only when there is a login to retire.
    result = run("secrets", "retire")
    assert result.returncode == 0, result.stdout
    assert playbooks.changed(result.stdout)["store1"] == 0


def test_putting_the_old_vault_back_undoes_a_rotation(run, query, superuser):
    assert run("secrets", changed={"pipeline": "a password thought better of"}).returncode == 0
    assert works(query, "a password thought better of")
    assert works(query, NEW)
    assert run("secrets", "retire", **READY).returncode == 0
    assert works(query, NEW)
    assert not works(query, "a password thought better of")
    assert len(logins(superuser)) == 7


def test_three_rotations_leave_one_generation(run, query, login, superuser, passwords):
    for number in range(3):
        changed = {purpose: f'{purpose} {number}: it\'s "one" \\ of $HOME' for purpose in passwords}
        result = run("secrets", "retire", changed=changed, **READY)
        assert result.returncode == 0, result.stdout
        assert logins(superuser) == {login(purpose, password) for purpose, password in changed.items()}
        assert works(query, changed["serve"], "serve")
    assert run("secrets", "retire", **READY).returncode == 0


def test_an_emergency_revokes_at_once(run, query, held):
    is_there = held(NEW)
    result = run("secrets", changed={"pipeline": "after the leak"}, larder_revoke_now=True)
    assert result.returncode == 0, result.stdout
    assert not is_there()
    assert not works(query, NEW)
    assert works(query, "after the leak")


def test_a_new_certificate_is_served_without_a_restart(run, store, query, held):
    address = store.ansible.get_variables()["ansible_host"]
    after_leak = {"pipeline": "after the leak"}

    def shown():
        client = "openssl s_client -starttls postgres -connect %s:5432 < /dev/null 2> /dev/null"
        return store.check_output(f"{client} | openssl x509 -noout -serial", address)

    def directories():
        return store.check_output("ls -d /etc/larder/tls/timescaledb/*Z").split()

    before, is_there = shown(), held("after the leak")
    assert run("secrets", changed=after_leak, certificate_generation=2).returncode == 0
    assert shown() != before
    assert len(directories()) == 2
    assert run("secrets", "retire", changed=after_leak, certificate_generation=2, **READY).returncode == 0
    assert len(directories()) == 1
    assert is_there()
    assert works(query, "after the leak")
