"""Passwords and certificates change while clients are at work: the role's part of a rotation.

The tests build on each other.
"""

import base64
import json
import re
import time
from pathlib import Path

import jinja2
import playbooks
import pytest
import yaml

testinfra_hosts = ["ansible://cache1"]

OTHER = yaml.safe_load((Path(__file__).parent.parent / "vars" / "other_values.yml").read_text())
HOSTILE = {purpose: jinja2.Template(text).render() for purpose, text in OTHER["other_passwords"].items()}
WRONG = ["AuthenticationError: invalid username-password pair or user is disabled."]


@pytest.fixture(scope="module")
def first(vault_passwords):
    return vault_passwords


@pytest.fixture(scope="module")
def second(vault_passwords):
    """The passwords that the side effect brought: all are new but the monitor's."""
    return vault_passwords | HOSTILE


def fresh(passwords, name):
    return {purpose: f"{name} of {purpose}" for purpose in passwords}


@pytest.fixture(scope="module")
def opens(ask, login):
    """Tell by purpose whether a vault's passwords open Redis."""

    def opens(passwords):
        answers = {p: ask(["PING"], user=login(p, passwords), password=passwords[p]) for p in passwords}
        assert all(answer in ([True], WRONG) for answer in answers.values()), answers
        return {purpose: answer == [True] for purpose, answer in answers.items()}

    return opens


@pytest.fixture(scope="module")
def rotate(playbook):
    def rotate(passwords, *steps, confirmed=True, **variables):
        # Braces in a variable would be a template.
        encoded = {purpose: base64.b64encode(text.encode()).decode() for purpose, text in passwords.items()}
        templates = {purpose: f"{{{{ '{text}' | b64decode }}}}" for purpose, text in encoded.items()}
        variables = {"larder_drain_seconds": 30} | variables
        return playbook("rotation.yml", redis_passwords=templates, steps=steps, confirmed=confirmed, **variables)

    return rotate


@pytest.fixture(scope="module")
def alive(inventory):
    def alive(name):
        """Tell which of the held sessions live, once the holder has asked each of them again."""
        asked = time.time()
        for _ in range(60):
            held = json.loads(inventory.run("server1", f"cat /tmp/{name}.json || echo '{{\"time\": 0}}'", ""))
            # The state is of a round that began after this question, or the last session has ended.
            if held["time"] > asked + 1 or (held["time"] and not any(held["alive"].values())):
                return held["alive"]
            time.sleep(0.5)
        pytest.fail(f"the holder of {name} does not answer: {held}")

    return alive


@pytest.fixture(scope="module")
def process(host):
    def process():
        return host.check_output("systemctl show --property=MainPID --value redis-server")

    return process


@pytest.fixture(scope="module", autouse=True)
def one_process(process):
    """Whatever the tests of this module do, the server is never restarted."""
    before = process()
    yield
    assert process() == before


@pytest.fixture(scope="module", autouse=True)
def unchanged(hold, login, first, alive):
    """A session of the monitor, whose password stays, lives through the first rotation."""
    hold("unchanged", {"monitor": (login("monitor", first), first["monitor"])})
    return lambda: alive("unchanged") == {"monitor": True}


def done(result):
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def everyone(passwords):
    return dict.fromkeys(passwords, True)


def nobody(passwords):
    return dict.fromkeys(passwords, False)


def test_old_and_new_passwords_are_accepted(opens, first, second):
    assert opens(first) == everyone(first)
    assert opens(second) == everyone(second)


def test_nothing_is_revoked_before_every_consumer_has_the_new_password(rotate, opens, first, second):
    result = rotate(second, "retire", confirmed=False)
    assert result.returncode != 0
    assert "Nothing was revoked: server1 did not end this run" in " ".join(result.stdout.split())
    assert opens(first) == everyone(first)


def test_a_session_of_an_old_password_is_waited_for_and_named(
    inventory, rotate, opens, hold, alive, login, first, second
):
    user = login("serve", first)
    release = hold("old", {"serve": (user, first["serve"])})
    result = rotate(second, "retire", larder_drain_seconds=5)
    assert result.returncode != 0
    said = " ".join(result.stdout.split())
    assert re.search(rf"{user} from {inventory.address('server1')} \(1 since 20..-..-.. ..:..:..\)", said), said
    assert alive("old") == {"serve": True}
    assert opens(first) == everyone(first)
    release()


def test_the_old_passwords_are_refused_after_their_last_session(rotate, opens, unchanged, first, second):
    done(rotate(second, "retire"))
    assert opens(first) == {purpose: purpose not in HOSTILE for purpose in first}
    assert opens(second) == everyone(second)
    assert unchanged()


def test_another_run_changes_nothing(rotate, second):
    assert playbooks.changed(done(rotate(second, "secrets", "retire")).stdout)["cache1"] == 0


def test_putting_the_old_vault_back_undoes_a_rotation(rotate, opens, hold, alive, login, second):
    """No session with an old password ends."""
    third = fresh(second, "third")
    release = hold("back", {purpose: (login(purpose, second), second[purpose]) for purpose in second})
    done(rotate(third, "secrets"))
    assert opens(third) == everyone(third)
    done(rotate(second, "secrets", "retire"))
    assert opens(third) == nobody(third)
    assert opens(second) == everyone(second)
    assert alive("back") == everyone(second)
    release()


def test_a_run_that_was_killed_while_it_revoked_is_completed(rotate, opens, second):
    third = fresh(second, "third")
    done(rotate(third, "secrets"))
    done(rotate(third, "users", __redis_kept=[]))  # the file is written, and the server has not loaded it
    assert opens(second) == everyone(second)
    done(rotate(third, "secrets", "retire"))
    assert opens(second) == nobody(second)
    assert opens(third) == everyone(third)


def test_in_an_emergency_sessions_end_at_once(rotate, opens, hold, alive, login, second):
    third, fourth = fresh(second, "third"), fresh(second, "fourth")
    release = hold("emergency", {purpose: (login(purpose, third), third[purpose]) for purpose in third})
    done(rotate(fourth, "secrets", confirmed=False, revoke_now=True))
    assert alive("emergency") == nobody(third)
    assert opens(third) == nobody(third)
    assert opens(fourth) == everyone(fourth)
    release()


def test_three_rotations_leave_one_generation(rotate, opens, ask, login, second):
    vaults = [fresh(second, name) for name in ["fourth", "fifth", "sixth", "seventh"]]
    for vault in vaults[1:]:
        done(rotate(vault, "secrets"))
    assert [opens(vault) for vault in vaults] == [everyone(second)] * 4
    done(rotate(vaults[-1], "retire"))
    assert [opens(vault) for vault in vaults] == [nobody(second)] * 3 + [everyone(second)]
    (users,) = ask(["ACL", "USERS"], user=login("admin", vaults[-1]), password=vaults[-1]["admin"])
    assert sorted(users) == sorted(["default", "maintenance", *(login(purpose, vaults[-1]) for purpose in second)])


def test_a_new_certificate_is_served_and_sessions_stay(host, rotate, greet, hold, alive, login, second):
    current = fresh(second, "seventh")
    release = hold("renewal", {"serve": (login("serve", current), current["serve"])})
    before = greet(show="certificate")
    done(rotate(current, "secrets", "retire", certificate_generation=2))
    assert greet() == "-NOAUTH Authentication required."
    assert greet(show="certificate") != before
    assert alive("renewal") == {"serve": True}
    assert len(host.check_output("ls -d /etc/larder/tls/redis/*Z").split()) == 1
    again = done(rotate(current, "secrets", "retire", certificate_generation=2))
    assert playbooks.changed(again.stdout)["cache1"] == 0
    release()
