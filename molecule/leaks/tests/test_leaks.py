"""Nothing leaks. First the scanner proves itself: what was planted is found, whatever its place and its form."""

from __future__ import annotations

from typing import Any

import pytest
from allowed import ALLOWED, Allowed
from canaries import patterns
from life import UNITS
from plants import FORMS, PLACES

FAILING = {
    "a wrong password of the vault": "Decryption failed",
    "secrets that cannot work": "redis_passwords.serve",
    "a secret that is half a template": "redis_passwords",
    "a vault that is no YAML": "vault.yml cannot be read",
    "a rotation without PostgreSQL": "failed: [single1] (item=postgresql@17-main.service)",
    "a rotation that no consumer can try": "fatal: [single1]",
}


def found(evidence: Any, name: str) -> set[str]:
    return {hit.place for hit in evidence.hits if hit.secret.kind == "planted" and hit.secret.name == name}


@pytest.mark.parametrize("form", FORMS)
def test_scanner_finds_a_secret_in_every_form(evidence: Any, form: str) -> None:
    assert found(evidence, form) == {"host: files"}


@pytest.mark.parametrize("name", PLACES)
def test_scanner_finds_a_secret_in_every_place(evidence: Any, name: str) -> None:
    assert PLACES[name] <= found(evidence, name)


def test_scanner_sees_short_lived_processes_and_files(evidence: Any) -> None:
    periods = {
        capture.place: float(capture.content) for capture in evidence.stack.captures if capture.place.endswith("period")
    }
    assert periods.keys() == {"controller: period", "host: period"}
    assert max(periods.values()) < 0.15, periods


def test_every_step_of_the_stacks_life_has_happened(evidence: Any) -> None:
    runs = evidence.stack.runs
    ends = {label: run.output[-3000:] for label, run in runs.items() if run.code and label not in FAILING}
    assert not ends, "\n".join(f"{label} has failed:\n{end}" for label, end in ends.items())
    assert [label for label in FAILING if runs[label].code == 0] == []
    assert {label for label, sentence in FAILING.items() if sentence not in runs[label].output} == set()
    assert [
        unit for unit, (before, after) in evidence.crashed.items() if "0" in {before, after} or before == after
    ] == []


def test_client_errors_are_reported(evidence: Any) -> None:
    answers = evidence.stack.answers
    assert answers["read again"] == 200
    assert answers["a token that nobody has"] == answers["a token and more"] == answers["no token"] == 401
    assert answers["a reader pushes"] == 403
    assert answers["no HTTP"] == 400
    assert answers["read without redis-server"] in {500, 502, 503, 504}


def test_nothing_leaks(evidence: Any) -> None:
    leaks = [str(hit) for hit in evidence.hits if hit.secret.kind != "planted" and not hit.allowed]
    assert not leaks, "\n".join(leaks)


# A file of some milliseconds is not seen in every run; the plants show that those of a third of a second are.
LASTING = [entry for entry in ALLOWED if "short-lived" not in entry.place]


@pytest.mark.parametrize("entry", LASTING, ids=lambda entry: f"{entry.place} {entry.path}".strip())
def test_every_allowed_place_holds_a_secret(evidence: Any, entry: Allowed) -> None:
    """Every exception is needed, and the scan sees real secrets, not only planted ones."""
    assert any(entry.covers(hit.place, hit.path, hit.owner, hit.mode, hit.secret.kind) for hit in evidence.hits)


def test_no_service_dumps_core(evidence: Any) -> None:
    assert evidence.cores == []
    # Kernels differ in where they write core files.
    limits = evidence.stack.on_host(f"systemctl show --property=Id,LimitCORE,LimitCORESoft {' '.join(UNITS)}")
    assert limits.count("LimitCORE=0\n") == limits.count("LimitCORESoft=0\n") == len(UNITS), limits


def test_secrets_are_shown_when_secure_logging_is_off(evidence: Any) -> None:
    """no_log hides the secrets, and without it the scan of a run's output finds them."""
    stack = evidence.stack
    secrets = [secret for secret in stack.secrets.values() if secret.kind in {"password", "hash", "verifier"}]
    off = "--extra-vars=larder_secure_logging=false"
    run = stack.playbook("secure logging turned off", "site.yml", "--check", "-vvv", "--tags=redis", off)
    assert run.code == 0, "check mode has failed"
    shown = {secret.name for pattern, secret in patterns(secrets).items() if pattern in run.output.encode()}
    assert shown, "nothing that could help to debug"
