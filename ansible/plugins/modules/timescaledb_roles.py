#!/usr/bin/python
# Copyright: The Larder authors
# SPDX-License-Identifier: Apache-2.0
"""Bring roles, their logins and the rights on databases to their declared state in one transaction."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ansible.module_utils.basic import AnsibleModule, missing_required_lib

try:
    import psycopg

    HAS_PSYCOPG = True
except ImportError:
    HAS_PSYCOPG = False

DOCUMENTATION = r"""
---
module: timescaledb_roles
short_description: Bring roles, their logins and the rights on databases to their declared state
description:
  - Every role of O(roles) holds rights and cannot log in. Its login is a member of it, holds nothing, and acts as the
    role from the first statement on, so what it makes belongs to the role.
  - A role may have several logins. This module makes and mends the one that is named and leaves the others alone.
  - The server gets a verifier instead of a password, and neither logs it nor shows it among its activities.
  - C(PUBLIC) loses every right on databases and may create nothing in the schema C(public).
author: The Larder authors
options:
  login_db:
    description: Database that the roles are for; connected to over the local socket and as the operating system's user.
    type: str
    required: true
  login_port:
    description: Port of the server; it names the socket too.
    type: int
    default: 5432
  roles:
    description: Roles by name.
    type: dict
    required: true
    suboptions:
      login:
        description: Name of the login.
        type: str
        required: true
      connections:
        description: Sessions that the login may have at a time.
        type: int
        required: true
      settings:
        description: Parameters of the login's sessions.
        type: dict
        default: {}
      member_of:
        description: Roles of which the role is a member; its membership in any other ends.
        type: list
        elements: str
        default: []
      temporary:
        description: Whether the role may create temporary tables.
        type: bool
        default: false
      replication:
        description: Whether its login may copy the server's files and WAL, as standbys and pg_rewind do.
        type: bool
        default: false
  verifiers:
    description: SCRAM-SHA-256 verifier of the password of each role's login.
    type: dict
    required: true
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
"""

EXAMPLES = r"""
- name: Make logins with the vault's passwords
  timescaledb_roles:
    login_db: feast
    roles:
      feast_serve:
        login: feast_serve_g1f3a9c02
        connections: 10
        settings: {statement_timeout: 30s}
    verifiers:
      feast_serve: "{{ password | scram_sha_256_verifier('salt') }}"
  become: true
  become_user: postgres
"""

RETURN = r"""
statements:
  description: SQL that was run, or in check mode would be, without verifiers.
  returned: success
  type: list
  elements: str
  sample: ['CREATE ROLE "feast_serve" NOLOGIN']
"""

ATTRIBUTES = {
    "rolcanlogin": "LOGIN",
    "rolinherit": "INHERIT",
    "rolsuper": "SUPERUSER",
    "rolcreatedb": "CREATEDB",
    "rolcreaterole": "CREATEROLE",
    "rolreplication": "REPLICATION",
    "rolbypassrls": "BYPASSRLS",
}
# A verifier is a secret: keep it out of the log, the audit, and the views of activities and statistics.
QUIET = {
    "log_statement": "none",
    "log_min_error_statement": "panic",
    "log_min_duration_statement": "-1",
    "log_duration": "off",
    "track_activities": "off",
    "pgaudit.log": "none",
    "pg_stat_statements.track_utility": "off",
}
ROLES = """
SELECT rolname::text, rolcanlogin, rolinherit, rolsuper, rolcreatedb, rolcreaterole, rolreplication, rolbypassrls,
       rolconnlimit, rolpassword, rolvaliduntil < 'infinity' AS expires,
       ARRAY(SELECT setting FROM pg_db_role_setting, unnest(setconfig) AS setting
             WHERE setrole = pg_authid.oid AND setdatabase = 0) AS settings,
       ARRAY(SELECT granted.rolname::text FROM pg_auth_members JOIN pg_authid AS granted ON granted.oid = roleid
             WHERE member = pg_authid.oid AND inherit_option AND set_option) AS member_of
FROM pg_authid WHERE rolname = ANY (%s)
"""
DATABASE_RIGHTS = """
SELECT datname::text, coalesce(rolname::text, 'PUBLIC'), privilege_type
FROM pg_database CROSS JOIN aclexplode(coalesce(datacl, acldefault('d', datdba)))
LEFT JOIN pg_roles ON pg_roles.oid = grantee
WHERE datallowconn
"""
# What pg_rewind calls on the server that it reads from, by its documentation.
REWIND = (
    "pg_ls_dir(text, boolean, boolean)",
    "pg_stat_file(text, boolean)",
    "pg_read_binary_file(text)",
    "pg_read_binary_file(text, bigint, bigint, boolean)",
)
MAY_REWIND = """
SELECT rolname::text, function FROM pg_roles CROSS JOIN unnest(%s::text[]) AS function
WHERE rolname = ANY (%s) AND has_function_privilege(pg_roles.oid, 'pg_catalog.' || function, 'EXECUTE')
"""
PUBLIC_MAY_CREATE = """
SELECT EXISTS (
    SELECT FROM pg_namespace CROSS JOIN aclexplode(nspacl)
    WHERE nspname = 'public' AND grantee = 0 AND privilege_type = 'CREATE'
)
"""


def identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def setting(name: str, value: object) -> str:
    """Return a parameter as the server keeps it in a role."""
    return f"{name}={('on' if value else 'off') if isinstance(value, bool) else value}"


def plan_role(
    name: str,
    actual: Mapping[str, Any],
    *,
    login: bool,
    connections: int,
    member_of: list[str],
    settings: list[str],
    replication: bool = False,
) -> list[str]:
    """Return the statements that make one role what it is to be."""
    statements = []
    target = identifier(name)
    wanted = dict.fromkeys(ATTRIBUTES, False) | {
        "rolcanlogin": login,
        "rolinherit": True,
        "rolreplication": replication,
    }
    if any(actual.get(attribute) != value for attribute, value in wanted.items()) or (
        actual.get("rolconnlimit") != connections
    ):
        clauses = [("" if wanted[attribute] else "NO") + keyword for attribute, keyword in ATTRIBUTES.items()]
        verb = "ALTER" if actual else "CREATE"
        statements.append(f"{verb} ROLE {target} {' '.join(clauses)} CONNECTION LIMIT {connections}")
    if actual.get("expires"):
        statements.append(f"ALTER ROLE {target} VALID UNTIL 'infinity'")
    is_member_of = actual.get("member_of", [])
    statements += [f"GRANT {identifier(role)} TO {target}" for role in member_of if role not in is_member_of]
    statements += [f"REVOKE {identifier(role)} FROM {target}" for role in is_member_of if role not in member_of]
    if sorted(actual.get("settings", [])) != sorted(settings):
        if actual.get("settings"):
            statements.append(f"ALTER ROLE {target} RESET ALL")
        for parameter, _, value in (entry.partition("=") for entry in settings):
            statements.append(f"ALTER ROLE {target} SET {parameter} = {literal(value)}")
    return statements


def plan(
    roles: Mapping[str, Mapping[str, Any]],
    verifiers: Mapping[str, str],
    database: str,
    actual: Mapping[str, Mapping[str, Any]],
    rights: set[tuple[str, str, str]],
    rewinders: Collection[tuple[str, str]] = (),
) -> tuple[list[str], dict[str, str]]:
    """Return the statements that are needed, and the verifiers that are to be set, by login."""
    statements: list[str] = []
    unknown: dict[str, str] = {}
    for name, role in roles.items():
        login = role["login"]
        settings = [setting(key, value) for key, value in (role["settings"] | {"role": name}).items()]
        statements += plan_role(
            name, actual.get(name, {}), login=False, connections=-1, member_of=role["member_of"], settings=[]
        )
        if actual.get(name, {}).get("rolpassword"):
            statements.append(f"ALTER ROLE {identifier(name)} PASSWORD NULL")
        statements += plan_role(
            login,
            actual.get(login, {}),
            login=True,
            connections=int(role["connections"]),
            member_of=[name],
            settings=settings,
            replication=role.get("replication", False),
        )
        if actual.get(login, {}).get("rolpassword") != verifiers[name]:
            unknown[login] = verifiers[name]

        if role.get("replication"):
            statements += [
                f"GRANT EXECUTE ON FUNCTION pg_catalog.{function} TO {identifier(name)}"
                for function in REWIND
                if (name, function) not in rewinders
            ]
        granted = {right for where, who, right in rights if (where, who) == (database, name)}
        wanted = {"CONNECT"} | ({"TEMPORARY"} if role["temporary"] else set())
        on = f"ON DATABASE {identifier(database)}"
        statements += [f"GRANT {right} {on} TO {identifier(name)}" for right in sorted(wanted - granted)]
        statements += [f"REVOKE {right} {on} FROM {identifier(name)}" for right in sorted(granted - wanted)]
    statements += [
        f"REVOKE ALL ON DATABASE {identifier(name)} FROM PUBLIC"
        for name in sorted({where for where, who, _right in rights if who == "PUBLIC"})
    ]
    return statements, unknown


def run(module: AnsibleModule) -> dict[str, Any]:
    params = module.params
    roles = {
        name: {"settings": {}, "member_of": [], "temporary": False} | role for name, role in params["roles"].items()
    }
    connection = psycopg.connect(
        dbname=params["login_db"], port=params["login_port"], application_name="timescaledb_roles"
    )
    cursor: Any
    with connection, connection.cursor() as cursor:
        # The lock keeps out a second run, which would find the same things missing.
        cursor.execute("SELECT pg_advisory_xact_lock(hashtext('timescaledb_roles'))")
        names = [*roles, *(role["login"] for role in roles.values())]
        found = cursor.execute(ROLES, [names])
        columns = [column.name for column in found.description]
        actual = {row[0]: dict(zip(columns, row, strict=True)) for row in found.fetchall()}
        rights = set(cursor.execute(DATABASE_RIGHTS).fetchall())
        rewinders = set(cursor.execute(MAY_REWIND, [[*REWIND], [*roles]]).fetchall())
        statements, verifiers = plan(roles, params["verifiers"], params["login_db"], actual, rights, rewinders)
        if cursor.execute(PUBLIC_MAY_CREATE).fetchone()[0]:
            statements.append("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
        told = statements + [f"ALTER ROLE {identifier(login)} PASSWORD its verifier" for login in verifiers]
        if not module.check_mode:
            # pgaudit is off in the database of hypertables, where it would crash a COPY; it is on for these
            # statements.
            cursor.execute("SET LOCAL pgaudit.log = 'role'")
            for statement in statements:
                cursor.execute(statement)
            for parameter, value in QUIET.items():
                cursor.execute(f"SET LOCAL {parameter} = {literal(value)}")
            for login, verifier in verifiers.items():
                cursor.execute(f"ALTER ROLE {identifier(login)} PASSWORD {literal(verifier)}")
    text = "".join(f"{statement};\n" for statement in told)
    return {"changed": bool(told), "statements": told, "diff": {"prepared": text}}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "login_db": {"type": "str", "required": True},
            "login_port": {"type": "int", "default": 5432},
            "roles": {"type": "dict", "required": True},
            "verifiers": {"type": "dict", "required": True, "no_log": True},
        },
        supports_check_mode=True,
    )
    if not HAS_PSYCOPG:
        module.fail_json(msg=missing_required_lib("psycopg"))
    try:
        module.exit_json(**run(module))
    except psycopg.Error as error:
        module.fail_json(msg=f"PostgreSQL refuses: {error.diag.message_primary or type(error).__name__}.")


if __name__ == "__main__":
    main()
