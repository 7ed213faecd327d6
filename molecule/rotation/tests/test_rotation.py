"""Secrets rotate without a failed request: the tests build on one another, in this order, under one load."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from conftest import Load, Operator, Run, Stores

Starts = Callable[[], dict[str, str]]
# `./larder test soak` runs all of these tests.
SOAK = "LARDER_SOAK" in os.environ
soak = pytest.mark.skipif(not SOAK, reason="part of ./larder test soak")

ROTATIONS = 3 if SOAK else 1
# The plays of a rotation, in their order; a run is killed where one of them begins.
STEPS = [
    "TASK [Gather facts from every host]",
    "PLAY [Add the vault's secrets to the offline store",
    "PLAY [Add the vault's secrets to the online store",
    "PLAY [Change the pipeline to the vault's secrets",
    "PLAY [Change the feature servers to the vault's secrets",
    "PLAY [Revoke former secrets in the offline store",
    "PLAY [Revoke former secrets in the online store",
    "PLAY [Change the gateway to the vault's tokens",
]


def finished(run: Run) -> None:
    assert run.code == 0, run.output[-6000:]


@pytest.mark.usefixtures("at_first", "first_tokens")
def test_all_secrets_rotate(operator: Operator, stores: Stores, load: Load) -> None:
    load.phase("steady", seconds=60 if SOAK else 5)
    for number in range(ROTATIONS):
        before = operator.renew()
        load.phase(f"rotation {number + 1}")
        load.materialize()
        finished(operator.rotate())
        load.use(operator.secrets()["gateway_tokens"])
        now = operator.secrets()
        assert not any(stores.logins(before).values())
        assert all(stores.logins(now).values())
    assert len(stores.generations()) == len(stores.logins(now))
    for tokens in now["gateway_tokens"].values():
        assert [load.status(token) for token in tokens] == [200, 200]


def test_second_run_changes_nothing_and_restarts_nothing(operator: Operator, starts: Starts) -> None:
    before = starts()
    again = operator.rotate()
    finished(again)
    assert again.changed == 0, again.output
    assert starts() == before


def test_no_store_and_no_gateway_was_restarted(starts: Starts, at_first: dict[str, str]) -> None:
    assert {unit: start for unit, start in starts().items() if unit.startswith("store1")} == at_first


def test_nothing_is_revoked_by_a_run_that_is_killed_or_leaves_a_consumer_out(
    operator: Operator, stores: Stores, load: Load
) -> None:
    load.phase("killed")
    before = operator.renew()
    assert operator.rotate(kill_at=STEPS[4]).code is None
    # Between two runs, the consumers go on.
    load.steady(seconds=2)
    run = operator.rotate("--limit", "!server2")
    assert run.code != 0
    assert "Nothing was revoked: server2 did not end this run on the vault's secrets" in run.sentence
    assert all(stores.logins(before).values())
    load.steady(seconds=2)
    for step in STEPS if SOAK else ():
        assert operator.rotate(kill_at=step).code is None, step
        load.steady(seconds=2)
    # The whole rotation succeeds, although the first consumer had changed in another run.
    finished(operator.rotate())
    load.use(operator.secrets()["gateway_tokens"])
    assert not any(stores.logins(before).values())
    assert len(stores.generations()) == len(stores.logins(operator.secrets()))
    assert all(stores.logins(operator.secrets()).values())


@soak
@pytest.mark.parametrize("step", STEPS)
def test_a_rotation_killed_at_any_step_is_finished_by_the_next_run(
    operator: Operator, stores: Stores, load: Load, step: str
) -> None:
    before = operator.renew()
    assert operator.rotate(kill_at=step).code is None
    finished(operator.rotate())
    load.use(operator.secrets()["gateway_tokens"])
    assert not any(stores.logins(before).values())
    assert all(stores.logins(operator.secrets()).values())


def test_putting_the_old_vault_back_undoes_a_rotation(operator: Operator, stores: Stores, load: Load) -> None:
    load.phase("back")
    before = operator.renew()
    abandoned = operator.secrets()
    assert operator.rotate(kill_at=STEPS[-3]).code is None
    assert all(stores.logins(before).values())
    operator.undo()
    finished(operator.rotate())
    assert all(stores.logins(before).values())
    assert not any(stores.logins(abandoned).values())


def test_two_tokens_of_a_role_are_valid_and_no_older_one(
    operator: Operator, load: Load, first_tokens: dict[str, str]
) -> None:
    assert {role: load.status(token) for role, token in first_tokens.items()} == dict.fromkeys(first_tokens, 401)
    for tokens in operator.secrets()["gateway_tokens"].values():
        assert [load.status(token) for token in tokens] == [200, 200]


@soak
def test_a_certificate_that_will_end_is_renewed(operator: Operator, load: Load) -> None:
    load.phase("renewal")
    before = load.certificate()
    # Each certificate has fewer days left than 500.
    finished(operator.rotate("-e", "certificate_days=600", "-e", "certificate_renew_days=500"))
    assert load.certificate() != before


@soak
@pytest.mark.parametrize("step", ["trusted", "signs", "alone"])
def test_the_ca_changes_in_three_steps(operator: Operator, load: Load, step: str) -> None:
    load.phase("authority")
    finished(operator.play("ansible/new_secrets.yml", "-e", "secrets=certificate_authorities"))
    load.trust(operator.inventory / "ca.crt")
    finished(operator.rotate())
    assert len(operator.secrets()["certificate_authorities"]) == {"trusted": 2, "signs": 2, "alone": 1}[step]


def test_no_request_failed_and_no_value_was_wrong(load: Load) -> None:
    result = load.end()
    assert result["requests"] >= 5_000
    assert result["failures"] == []
    assert result["wrong"] == []


@soak
def test_the_slow_reads_of_a_rotation_are_hardly_slower(load: Load) -> None:
    """The ratio of two phases of one run, on a machine that does nothing else; each run prints the figures."""
    steady, *rotations = load.slow_reads("steady", *(f"rotation {number + 1}" for number in range(ROTATIONS)))
    assert sorted(rotations)[ROTATIONS // 2] <= 2 * steady


@soak
def test_a_leaked_secret_is_revoked_at_once(operator: Operator, stores: Stores) -> None:
    leaked = operator.renew()
    run = operator.rotate("--limit", "!server2", "-e", "revoke_now=true")
    finished(run)
    assert not any(stores.logins(leaked).values())
    finished(operator.rotate())
