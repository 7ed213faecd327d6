"""What timescaledb_roles would change, by what the server has; that it works is molecule/timescaledb's."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "ansible/plugins/modules/timescaledb_roles.py"
spec = importlib.util.spec_from_file_location("timescaledb_roles", SOURCE)
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)

WANTED = {
    "feast_serve": {
        "login": "feast_serve_g1",
        "connections": 5,
        "settings": {"statement_timeout": "30s", "jit": False},
        "member_of": ["pg_monitor"],
        "temporary": False,
    }
}
ORDINARY = dict.fromkeys(module.ATTRIBUTES, False) | {"rolinherit": True, "rolconnlimit": -1, "expires": None}
PRESENT = {
    "feast_serve": ORDINARY | {"rolpassword": None, "settings": [], "member_of": ["pg_monitor"]},
    "feast_serve_g1": ORDINARY
    | {
        "rolcanlogin": True,
        "rolconnlimit": 5,
        "rolpassword": "verifier",
        "settings": ["jit=off", "role=feast_serve", "statement_timeout=30s"],
        "member_of": ["feast_serve"],
    },
}
RIGHTS = {("feast", "feast_serve", "CONNECT")}


def plan(actual=PRESENT, rights=RIGHTS, verifier="verifier"):
    return module.plan(WANTED, {"feast_serve": verifier}, "feast", actual, rights)


def test_declared_roles_are_left_alone():
    assert plan() == ([], {})


def test_a_new_password_makes_one_login_and_touches_nothing_else():
    actual = {"feast_serve": PRESENT["feast_serve"]}
    statements, verifiers = plan(actual)
    assert statements[0].startswith('CREATE ROLE "feast_serve_g1" LOGIN INHERIT NOSUPERUSER NOCREATEDB NOCREATEROLE')
    assert all('"feast_serve_g1"' in statement for statement in statements)
    assert """ALTER ROLE "feast_serve_g1" SET role = 'feast_serve'""" in statements
    assert verifiers == {"feast_serve_g1": "verifier"}


def test_a_verifier_never_stands_among_the_statements():
    statements, _verifiers = plan({}, set(), verifier="canary")
    assert "canary" not in "".join(statements)


@pytest.mark.parametrize(
    ("role", "found", "statement"),
    [
        ("feast_serve", {"rolcanlogin": True}, 'ALTER ROLE "feast_serve" NOLOGIN'),
        ("feast_serve", {"rolpassword": "SCRAM"}, 'ALTER ROLE "feast_serve" PASSWORD NULL'),
        ("feast_serve", {"rolcreaterole": True}, 'ALTER ROLE "feast_serve" NOLOGIN INHERIT NOSUPERUSER'),
        ("feast_serve", {"member_of": ["pg_monitor", "postgres"]}, 'REVOKE "postgres" FROM "feast_serve"'),
        ("feast_serve", {"settings": ["work_mem=1GB"]}, 'ALTER ROLE "feast_serve" RESET ALL'),
        ("feast_serve_g1", {"rolconnlimit": -1}, 'ALTER ROLE "feast_serve_g1" LOGIN'),
        ("feast_serve_g1", {"expires": True}, """ALTER ROLE "feast_serve_g1" VALID UNTIL 'infinity'"""),
        ("feast_serve_g1", {"member_of": ["feast_serve", "feast_load"]}, 'REVOKE "feast_load" FROM "feast_serve_g1"'),
    ],
)
def test_changes_by_hand_are_undone(role, found, statement):
    statements, verifiers = plan(PRESENT | {role: PRESENT[role] | found})
    assert statements[0].startswith(statement)
    assert verifiers == {}


def test_rights_on_databases_are_those_declared():
    rights = {("feast", "feast_serve", "TEMPORARY"), ("postgres", "PUBLIC", "CONNECT"), ("feast", "another", "CONNECT")}
    assert plan(rights=rights)[0] == [
        'GRANT CONNECT ON DATABASE "feast" TO "feast_serve"',
        'REVOKE TEMPORARY ON DATABASE "feast" FROM "feast_serve"',
        'REVOKE ALL ON DATABASE "postgres" FROM PUBLIC',
    ]
