#!/usr/bin/python
# Copyright: The Larder authors
# SPDX-License-Identifier: Apache-2.0
"""Bring schemas and (hyper)tables to their declared state in one transaction."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ansible.module_utils.basic import AnsibleModule, missing_required_lib

try:
    import psycopg

    HAS_PSYCOPG = True
except ImportError:
    HAS_PSYCOPG = False

DOCUMENTATION = r"""
---
module: timescaledb_tables
short_description: Bring schemas and hypertables to their declared state
description:
  - Creates and extends schemas, tables, hypertables, indexes and grants, all in one transaction.
  - Works with the Apache edition of TimescaleDB.
  - What would lose data, or leave old data as it was, is refused unless O(allow_lossy) names it.
  - A column that is declared wider than it is keeps every value, but its table is rewritten under a lock, and whoever
    writes rows in a binary format must know of it. So that is left to a call of its own, which names it as O(widen).
    What was a C(bigint) then has a constraint that refuses a bigint's bytes.
  - Indexes that are not declared, and rights of roles that O(roles) does not name, are left alone.
author: The Larder authors
options:
  login_db:
    description: Database to connect to, over the local socket and as the operating system's user.
    type: str
    required: true
  login_port:
    description: Port of the server; it names the socket too.
    type: int
    default: 5432
  owner:
    description: Role that owns what is created. Its tables are the declared ones; any other is refused as undeclared.
    type: str
    required: true
  roles:
    description: Role behind each purpose that a grant may name.
    type: dict
    required: true
  schemas:
    description:
      - Schemas, each with the rights on the schema itself by purpose.
      - A purpose with rights on one of its tables may use the schema without being named here.
    type: dict
    required: true
  tables:
    description: Tables.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Schema and table, joined by a dot.
        type: str
        required: true
      columns:
        description: Columns in order.
        type: list
        elements: dict
        required: true
        suboptions:
          name:
            description: Name of the column.
            type: str
            required: true
          type:
            description: PostgreSQL's type.
            type: str
            required: true
          nullable:
            description: Whether the column may be empty.
            type: bool
            default: true
          default:
            description: SQL expression for rows that do not give the column.
            type: str
      primary_key:
        description: Columns of the primary key; a hypertable's has its time column among them.
        type: list
        elements: str
        default: []
      hypertable:
        description: Makes the table a hypertable.
        type: dict
        suboptions:
          time_column:
            description: Column by which the table is cut into chunks.
            type: str
            required: true
          chunk_interval:
            description: Range of time of one chunk, as PostgreSQL's interval.
            type: str
            required: true
      indexes:
        description: Indexes beside the primary key.
        type: list
        elements: dict
        default: []
        suboptions:
          columns:
            description: Columns in order, each with C(ASC) or C(DESC) and C(NULLS FIRST) or C(NULLS LAST) where wanted.
            type: list
            elements: str
            required: true
      retention:
        description: Age past which chunks may be dropped. Checked here; dropping is the role's timer.
        type: str
      grants:
        description: Rights on the table by purpose. A right of one of O(roles) that does not stand here is revoked.
        type: dict
        default: {}
  allow_lossy:
    description:
      - Names of what may change although data is lost or old data stays as it was.
      - C(schema.table) is dropped, C(schema.table.column) dropped or retyped; C(schema.table.primary_key) and
        C(schema.table.chunk_interval) change. A chunk interval holds for new chunks only.
    type: list
    elements: str
    default: []
  widen:
    description:
      - Column, as C(schema.table.column), to bring to its declared wider type.
      - RV(widenings) of a call without it says which there are.
    type: str
attributes:
  check_mode:
    support: full
    description: Without a server to ask, reports what an empty database would need.
  diff_mode:
    support: full
"""

EXAMPLES = r"""
- name: Keep daily bars for ten years
  timescaledb_tables:
    login_db: feast
    owner: feast_owner
    roles: {load: feast_load, train: feast_train}
    schemas: {market_data: {}}
    tables:
      - name: market_data.ohlcv_daily
        columns:
          - {name: symbol, type: text, nullable: false}
          - {name: event_timestamp, type: timestamptz, nullable: false}
          - {name: close, type: double precision}
        primary_key: [symbol, event_timestamp]
        hypertable: {time_column: event_timestamp, chunk_interval: 365 days}
        indexes:
          - {columns: [event_timestamp DESC]}
        retention: 10 years
        grants: {load: [select, insert, update], train: [select]}
  become: true
  become_user: postgres
"""

RETURN = r"""
statements:
  description: SQL that was run, or in check mode would be.
  returned: success
  type: list
  elements: str
  sample: ['ALTER TABLE "features"."price_action" ADD COLUMN "gap" double precision']
widenings:
  description: Columns that are declared wider than they are, but for the one that O(widen) names.
  returned: success
  type: list
  elements: dict
  sample: [{column: market_data.ohlcv_daily.volume, from: bigint, to: double precision}]
"""

TABLE_RIGHTS = ("select", "insert", "update", "delete", "truncate", "references", "trigger")
SCHEMA_RIGHTS = ("usage", "create")
ALLOW = "timescaledb_allow_lossy"

# A change waits this long for readers and writers, so that sessions which queue behind the change wait no longer.
LOCK_TIMEOUT = "30s"

# Changes of type that keep every value. Where the new type lacks some values of the old one, the condition tells
# which values stay: past 2^53 a double does not have every whole number.
WIDENINGS = {
    ("smallint", "integer"): "",
    ("smallint", "bigint"): "",
    ("smallint", "double precision"): "",
    ("integer", "bigint"): "",
    ("integer", "double precision"): "",
    ("real", "double precision"): "",
    ("bigint", "double precision"): (
        # The largest bigint, rounded to a double, would be too large for a bigint.
        "{column} IS NULL OR CASE WHEN {column} BETWEEN -9223372036854774784 AND 9223372036854774784"
        " THEN {column}::double precision::bigint = {column} ELSE false END"
    ),
}

COLUMNS = """
SELECT attname, format_type(atttypid, atttypmod), attnotnull, pg_get_expr(adbin, adrelid)
FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped ORDER BY attnum
"""
# Bit 0 of indoption is DESC, bit 1 NULLS FIRST. Partial and expression indexes do not replace a plain one.
INDEXES = """
SELECT indisprimary, indexrelid::regclass::text, conname, array_agg(attname::text ORDER BY position),
       array_agg((indoption[position - 1] & 1) = 1 ORDER BY position),
       array_agg((indoption[position - 1] & 2) = 2 ORDER BY position)
FROM pg_index
JOIN pg_class AS index ON index.oid = indexrelid
JOIN pg_am ON pg_am.oid = relam AND amname = 'btree'
CROSS JOIN generate_series(1, indnkeyatts) AS position
JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[position - 1]
LEFT JOIN pg_constraint ON conindid = indexrelid AND contype = 'p'
WHERE indrelid = %s AND indisvalid AND indpred IS NULL AND indexprs IS NULL
GROUP BY indisprimary, indexrelid, conname
"""
HYPERTABLE = """
SELECT column_name::text, time_interval::text, time_interval = %s::interval
FROM timescaledb_information.dimensions
WHERE hypertable_schema = %s AND hypertable_name = %s AND dimension_number = 1
"""
TABLE_GRANTS = """
SELECT rolname::text, lower(privilege_type)
FROM pg_class CROSS JOIN aclexplode(relacl) JOIN pg_roles ON pg_roles.oid = grantee
WHERE pg_class.oid = %s
"""
SCHEMA_GRANTS = """
SELECT nspname::text, rolname::text, lower(privilege_type)
FROM pg_namespace LEFT JOIN aclexplode(nspacl) ON true LEFT JOIN pg_roles ON pg_roles.oid = grantee
"""
OWNED_TABLES = """
SELECT nspname || '.' || relname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
WHERE relkind IN ('r', 'p') AND relowner = (SELECT oid FROM pg_roles WHERE rolname = %s)
AND nspname !~ '^(pg_|_timescaledb)' ORDER BY 1
"""

IndexKey = tuple[tuple[str, bool, bool], ...]
Grants = dict[str, set[str]]


@dataclass
class Widening:
    """A column that is to get a wider type, and how."""

    column: str
    from_: str
    to: str
    statements: list[str]

    def as_dict(self) -> dict[str, str]:
        return {"column": self.column, "from": self.from_, "to": self.to}


class RefusedError(Exception):
    """The declaration cannot be met; each argument is a sentence for the user."""


@dataclass
class Column:
    """A column as the server describes it, so that two spellings of one type or default are equal."""

    type: str
    not_null: bool
    default: str | None


@dataclass
class Table:
    """What the server says of an existing table."""

    columns: dict[str, Column]
    primary_key: list[str]
    primary_key_name: str | None = None
    indexes: set[IndexKey] = field(default_factory=set)
    hypertable: dict[str, Any] | None = None
    grants: Grants = field(default_factory=dict)
    filled: bool = False
    columns_with_nulls: set[str] = field(default_factory=set)
    # By column, the first row that the declared type would change.
    changed_values: dict[str, str] = field(default_factory=dict)


@dataclass
class State:
    """What the server has: rights by schema, and the declared tables as they are and as they would be read back."""

    schemas: dict[str, Grants] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    declared: dict[str, Table] = field(default_factory=dict)
    owned: list[str] = field(default_factory=list)


def identifier(name: str) -> str:
    """Quote a name as an SQL identifier; a table's schema and name are quoted apart."""
    return '"' + name.replace('"', '""') + '"'


def relation(name: str) -> str:
    return ".".join(identifier(part) for part in name.split(".", 1))


def literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def names(columns: Iterable[str]) -> str:
    return ", ".join(identifier(column) for column in columns)


def index_key(columns: Sequence[str]) -> IndexKey:
    """Parse ``column [ASC|DESC] [NULLS FIRST|LAST]``, with PostgreSQL's defaults for what is left out."""
    keys = []
    for column in columns:
        match = re.fullmatch(r"(\S.*?)(?:\s+(asc|desc))?(?:\s+nulls\s+(first|last))?", column.strip(), re.IGNORECASE)
        if match is None:
            raise ValueError(column)
        descending = (match[2] or "asc").lower() == "desc"
        nulls_first = match[3].lower() == "first" if match[3] else descending
        keys.append((match[1], descending, nulls_first))
    return tuple(keys)


def duplicates(items: Iterable[str]) -> list[str]:
    seen: set[str] = set()
    return [item for item in items if item in seen or seen.add(item)]  # type: ignore[func-returns-value]


def check_declaration(
    schemas: Mapping[str, Any], tables: Sequence[Mapping[str, Any]], roles: Mapping[str, str]
) -> list[str]:
    """Return a sentence for every mistake that can be seen without a server."""
    problems = []

    def check_grants(what: str, grants: Mapping[str, Any], rights: Sequence[str]) -> None:
        for purpose, granted in grants.items():
            if purpose not in roles:
                problems.append(f"{what} grants to {purpose}, which is none of the purposes {', '.join(roles)}.")
            if not isinstance(granted, list) or not set(map(str, granted)) <= set(rights):
                problems.append(f"{what} grants {granted} to {purpose}; a list of {', '.join(rights)} is expected.")

    def check_name(what: str, name: str) -> None:
        if not name or len(name.encode()) > 63:
            problems.append(f"{what} has the name {name!r}; PostgreSQL takes 1 to 63 bytes.")

    for schema, grants in schemas.items():
        check_name("A schema", schema)
        check_grants(f"Schema {schema}", grants, SCHEMA_RIGHTS)

    problems += [f"{name} is declared twice." for name in duplicates(table["name"] for table in tables)]

    for table in tables:
        name = table["name"]
        schema, _, bare = name.partition(".")
        columns = [column["name"] for column in table["columns"]]
        if not bare or schema not in schemas:
            problems.append(f"{name} must be schema.table with one of the schemas {', '.join(schemas)}.")
        check_name(f"Table {name}", bare)
        for column in columns:
            check_name(f"A column of {name}", column)
        if not columns:
            problems.append(f"{name} has no columns.")
        problems += [f"{name} declares column {column} twice." for column in duplicates(columns)]
        problems += [
            f"{name} has {column} in its primary key, which is not among its columns."
            for column in table["primary_key"]
            if column not in columns
        ]
        for index in table["indexes"]:
            for column, _descending, _nulls in index_key(index["columns"]):
                if column not in columns:
                    problems.append(f"{name} has an index on {column}, which is not among its columns.")
        if hypertable := table["hypertable"]:
            time_column = hypertable["time_column"]
            if time_column not in columns:
                problems.append(f"{name} has the time column {time_column}, which is not among its columns.")
            if table["primary_key"] and time_column not in table["primary_key"]:
                problems.append(f"{name} has the time column {time_column}, which its primary key must contain.")
        elif table["retention"]:
            problems.append(f"{name} has a retention, but is no hypertable: only chunks can be dropped by age.")
        check_grants(name, table["grants"], TABLE_RIGHTS)
    return problems


def column_clause(table: Mapping[str, Any], column: Mapping[str, Any]) -> str:
    hypertable = table["hypertable"]
    not_null = not column["nullable"] or (hypertable and column["name"] == hypertable["time_column"])
    clause = f"{identifier(column['name'])} {column['type']}"
    if column["default"] is not None:
        clause += f" DEFAULT {column['default']}"
    return clause + (" NOT NULL" if not_null else "")


def create_clauses(table: Mapping[str, Any]) -> str:
    clauses = [column_clause(table, column) for column in table["columns"]]
    if table["primary_key"]:
        clauses.append(f"PRIMARY KEY ({names(table['primary_key'])})")
    return "(\n    " + ",\n    ".join(clauses) + "\n)"


def create_hypertable(table: Mapping[str, Any], *, filled: bool) -> str:
    hypertable = table["hypertable"]
    interval = f"INTERVAL {literal(hypertable['chunk_interval'])}"
    migrate = ", migrate_data => true" if filled else ""
    return (
        f"SELECT create_hypertable({literal(relation(table['name']))}, "
        f"by_range({literal(hypertable['time_column'])}, {interval}), create_default_indexes => false{migrate})"
    )


def create_index(name: str, key: IndexKey) -> str:
    columns = [
        identifier(column)
        + (" DESC" if descending else "")
        + (f" NULLS {'FIRST' if first else 'LAST'}" if first != descending else "")
        for column, descending, first in key
    ]
    return f"CREATE INDEX ON {relation(name)} ({', '.join(columns)})"


def plan_grants(kind: str, name: str, wanted: Grants, actual: Grants, managed: Iterable[str]) -> list[str]:
    """Grant what is missing and revoke what is not declared, for the roles in ``managed`` only."""
    statements = []
    for role in managed:
        missing = sorted(wanted.get(role, set()) - actual.get(role, set()))
        surplus = sorted(actual.get(role, set()) - wanted.get(role, set()))
        if missing:
            statements.append(f"GRANT {', '.join(missing).upper()} ON {kind} {name} TO {identifier(role)}")
        if surplus:
            statements.append(f"REVOKE {', '.join(surplus).upper()} ON {kind} {name} FROM {identifier(role)}")
    return statements


def changed_value(table: Mapping[str, Any], column: str, from_: str, to: str) -> str | None:
    """Return the query for a row whose value the wider type would change; None where no value can change."""
    condition = WIDENINGS[from_, to].format(column=identifier(column))
    if not condition:
        return None
    row = ", ".join(f"{literal(k)}, {identifier(k)}" for k in [*table["primary_key"], column])
    # Identifiers are quoted.
    return f"SELECT json_build_object({row}) FROM {relation(table['name'])} WHERE NOT ({condition}) LIMIT 1"  # noqa: S608


def plan_table(
    table: Mapping[str, Any], actual: Table, wanted: Table, allowed: Iterable[str], widenings: list[Widening]
) -> list[str]:
    """Return the statements that change an existing table, and add its widenings; refuse changes that lose data."""
    name, target, hypertable = table["name"], relation(table["name"]), table["hypertable"]
    refusals: list[str] = []
    statements: list[str] = []

    def allow(what: str, sentence: str) -> bool:
        if f"{name}.{what}" in allowed:
            return True
        refusals.append(f"{sentence} If that is meant, add {name}.{what} to {ALLOW}.")
        return False

    new_key = actual.primary_key != wanted.primary_key
    if new_key:
        was, asked = (f"({', '.join(key)})" if key else "none" for key in (actual.primary_key, wanted.primary_key))
        if (
            allow("primary_key", f"{name} has the primary key {was}, and {asked} is asked for: rows may collide.")
            and actual.primary_key
        ):
            statements.append(f"ALTER TABLE {target} DROP CONSTRAINT {identifier(str(actual.primary_key_name))}")

    for column, is_ in actual.columns.items():
        if column not in wanted.columns:
            sentence = (
                f"{name} has the column {column} ({is_.type}), which is no longer declared: its data would be lost."
            )
            if allow(column, sentence):
                statements.append(f"ALTER TABLE {target} DROP COLUMN {identifier(column)}")

    for declared in table["columns"]:
        column = declared["name"]
        alter = f"ALTER TABLE {target} ALTER COLUMN {identifier(column)}"
        asked_ = wanted.columns[column]
        if column not in actual.columns:
            if asked_.not_null and asked_.default is None and actual.filled:
                refusals.append(
                    f"{name} has rows, and its new column {column} ({asked_.type}) is NOT NULL without a default: "
                    "give it a default, or let it be null."
                )
            statements.append(f"ALTER TABLE {target} ADD COLUMN {column_clause(table, declared)}")
            continue
        is_ = actual.columns[column]
        retyping = statements
        if is_.type != asked_.type:
            change = f"{name} has the column {column} as {is_.type}, and {asked_.type} is asked for"
            if (is_.type, asked_.type) in WIDENINGS:
                retyping = []
                if column in actual.changed_values:
                    allow(column, f"{change}: of {actual.changed_values[column]} it would make another number.")
                widenings.append(Widening(f"{name}.{column}", is_.type, asked_.type, retyping))
            if retyping is not statements or allow(column, f"{change}: values would be converted."):
                retyping.append(f"{alter} TYPE {asked_.type} USING {identifier(column)}::{asked_.type}")
            if (is_.type, asked_.type) == ("bigint", "double precision"):
                # After a rollback, the former release writes a bigint's bytes: as a double they are smaller than
                # any real volume.
                retyping.append(
                    f"ALTER TABLE {target} ADD CONSTRAINT {identifier(f'{column}_is_no_bigint')} "
                    f"CHECK ({identifier(column)} = 0 OR abs({identifier(column)}) > 1e-300)"
                )
        if is_.default != asked_.default:
            retyping.append(
                f"{alter} DROP DEFAULT" if asked_.default is None else f"{alter} SET DEFAULT {declared['default']}"
            )
        if asked_.not_null and not is_.not_null:
            if column in actual.columns_with_nulls:
                refusals.append(
                    f"{name} has rows in which {column} is null, and NOT NULL is asked for: fill them first."
                )
            statements.append(f"{alter} SET NOT NULL")
        if is_.not_null and not asked_.not_null:
            statements.append(f"{alter} DROP NOT NULL")

    if new_key and wanted.primary_key:
        statements.append(f"ALTER TABLE {target} ADD PRIMARY KEY ({names(wanted.primary_key)})")

    if hypertable and not actual.hypertable:
        statements.append(create_hypertable(table, filled=actual.filled))
    elif actual.hypertable and not hypertable:
        refusals.append(f"{name} is a hypertable and cannot become a plain table: declare a new one and copy the rows.")
    elif hypertable and actual.hypertable:
        if actual.hypertable["time_column"] != hypertable["time_column"]:
            refusals.append(
                f"{name} is cut into chunks by {actual.hypertable['time_column']} and cannot be by "
                f"{hypertable['time_column']}: declare a new table and copy the rows."
            )
        if not actual.hypertable["same_interval"]:
            sentence = (
                f"{name} has chunks of {actual.hypertable['chunk_interval']}, and "
                f"{hypertable['chunk_interval']} is asked for: only new chunks would get it."
            )
            if allow("chunk_interval", sentence):
                interval = literal(hypertable["chunk_interval"])
                statements.append(f"SELECT set_chunk_time_interval({literal(target)}, INTERVAL {interval})")

    if refusals:
        raise RefusedError(*refusals)
    return statements


def plan(
    schemas: Mapping[str, Mapping[str, Sequence[str]]],
    tables: Sequence[Mapping[str, Any]],
    roles: Mapping[str, str],
    allowed: Iterable[str],
    state: State,
) -> tuple[list[str], list[Widening]]:
    """Return the statements from ``state`` to the declaration, and the widenings of columns; or refuse."""
    statements: list[str] = []
    widenings: list[Widening] = []
    refusals: list[str] = []
    declared = {table["name"] for table in tables}

    for schema, grants in schemas.items():
        wanted = {roles[purpose]: set(rights) for purpose, rights in grants.items()}
        for table in tables:
            if table["name"].startswith(f"{schema}."):
                for purpose in table["grants"]:
                    wanted.setdefault(roles[purpose], set()).add("usage")
        if schema not in state.schemas:
            statements.append(f"CREATE SCHEMA {identifier(schema)}")
        actual = state.schemas.get(schema, {})
        statements += plan_grants("SCHEMA", identifier(schema), wanted, actual, roles.values())

    for name in state.owned:
        if name not in declared:
            if name in allowed:
                statements.append(f"DROP TABLE {relation(name)}")
            else:
                refusals.append(
                    f"{name} exists but is no longer declared: its data would be lost. "
                    f"If that is meant, add {name} to {ALLOW}."
                )

    for table in tables:
        name = table["name"]
        existing = state.tables.get(name)
        if existing is None:
            statements.append(f"CREATE TABLE {relation(name)} {create_clauses(table)}")
            if table["hypertable"]:
                statements.append(create_hypertable(table, filled=False))
        else:
            try:
                statements += plan_table(table, existing, state.declared[name], allowed, widenings)
            except RefusedError as refused:
                refusals += refused.args
        present = existing.indexes if existing else set()
        for key in dict.fromkeys(index_key(index["columns"]) for index in table["indexes"]):
            if key not in present:
                statements.append(create_index(name, key))
        wanted = {roles[purpose]: set(rights) for purpose, rights in table["grants"].items()}
        granted = existing.grants if existing else {}
        statements += plan_grants("TABLE", relation(name), wanted, granted, roles.values())

    if refusals:
        raise RefusedError(*refusals)
    return statements, widenings


def collect(rows: Iterable[tuple[str | None, str | None]]) -> Grants:
    grants: Grants = {}
    for role, right in rows:
        if role is not None and right is not None:
            grants.setdefault(role, set()).add(right)
    return grants


def read_table(cursor: Any, oid: int) -> Table:
    columns = {
        name: Column(type_, not_null, default)
        for name, type_, not_null, default in cursor.execute(COLUMNS, [oid]).fetchall()
    }
    table = Table(columns=columns, primary_key=[])
    for primary, _index, constraint, keys, descending, nulls_first in cursor.execute(INDEXES, [oid]).fetchall():
        if primary:
            table.primary_key, table.primary_key_name = keys, constraint
        else:
            table.indexes.add(tuple(zip(keys, descending, nulls_first, strict=True)))
    return table


def validate_types(cursor: Any, table: Mapping[str, Any]) -> None:
    """Let the server judge types and intervals, before any of them becomes part of a statement."""
    for column in table["columns"]:
        if cursor.execute("SELECT to_regtype(%s)", [column["type"]]).fetchone()[0] is None:
            raise RefusedError(
                f"{table['name']} declares column {column['name']} as {column['type']}, which is no type of PostgreSQL."
            )
    for what, interval in (
        ("chunk interval", (table["hypertable"] or {}).get("chunk_interval")),
        ("retention", table["retention"]),
    ):
        if interval is None:
            continue
        valid = cursor.execute(
            "SELECT pg_input_is_valid(%(i)s, 'interval') AND CASE WHEN pg_input_is_valid(%(i)s, 'interval')"
            " THEN %(i)s::interval > '0'::interval END",
            {"i": interval},
        ).fetchone()[0]
        if not valid:
            raise RefusedError(f"{table['name']} has the {what} {interval!r}, which is no interval such as 90 days.")


def read_state(cursor: Any, tables: Sequence[Mapping[str, Any]], owner: str) -> State:
    """Read the present state, and read the declaration back from temporary tables, which are removed again."""
    state = State()
    for schema, role, right in cursor.execute(SCHEMA_GRANTS).fetchall():
        grants = state.schemas.setdefault(schema, {})
        if role is not None:
            grants.setdefault(role, set()).add(right)
    state.owned = [name for (name,) in cursor.execute(OWNED_TABLES, [owner]).fetchall()]
    timescaledb = cursor.execute("SELECT to_regclass('timescaledb_information.dimensions')").fetchone()[0] is not None

    for table in tables:
        name, target = table["name"], relation(table["name"])
        validate_types(cursor, table)
        cursor.execute("SAVEPOINT declaration")
        try:
            cursor.execute(f"CREATE TEMPORARY TABLE larder_declaration {create_clauses(table)}")
            (oid,) = cursor.execute("SELECT 'pg_temp.larder_declaration'::regclass::oid").fetchone()
            state.declared[name] = read_table(cursor, oid)
        except psycopg.Error as error:
            raise RefusedError(f"{name} cannot be declared so: {error.diag.message_primary or error}.") from error
        cursor.execute("ROLLBACK TO SAVEPOINT declaration")

        (oid,) = cursor.execute("SELECT to_regclass(%s)::oid", [target]).fetchone()
        if oid is None:
            continue
        existing = state.tables[name] = read_table(cursor, oid)
        existing.grants = collect(cursor.execute(TABLE_GRANTS, [oid]).fetchall())
        # Identifiers are quoted.
        existing.filled = cursor.execute(f"SELECT EXISTS (SELECT FROM {target})").fetchone()[0]  # noqa: S608
        for column, wanted in state.declared[name].columns.items():
            if wanted.not_null and column in existing.columns and not existing.columns[column].not_null:
                nulls = f"SELECT EXISTS (SELECT FROM {target} WHERE {identifier(column)} IS NULL)"  # noqa: S608
                if cursor.execute(nulls).fetchone()[0]:
                    existing.columns_with_nulls.add(column)
            is_ = existing.columns.get(column)
            if is_ and (is_.type, wanted.type) in WIDENINGS:
                query = changed_value(table, column, is_.type, wanted.type)
                if row := query and cursor.execute(query).fetchone():
                    existing.changed_values[column] = ", ".join(f"{name} {value}" for name, value in row[0].items())
        if timescaledb:
            interval = (table["hypertable"] or {}).get("chunk_interval")
            row = cursor.execute(HYPERTABLE, [interval, *name.split(".", 1)]).fetchone()
            if row:
                existing.hypertable = dict(zip(("time_column", "chunk_interval", "same_interval"), row, strict=True))
    return state


def run(module: AnsibleModule) -> dict[str, Any]:
    params = module.params
    schemas, tables, roles = params["schemas"], params["tables"], params["roles"]
    if problems := check_declaration(schemas, tables, roles):
        raise RefusedError(*problems)

    def result(statements: list[str], widenings: Sequence[Widening] = ()) -> dict[str, Any]:
        text = "".join(f"{statement};\n" for statement in statements)
        return {
            "changed": bool(statements),
            "statements": statements,
            "widenings": [widening.as_dict() for widening in widenings],
            "diff": {"prepared": text},
        }

    def planned(state: State) -> tuple[list[str], list[Widening]]:
        return plan(schemas, tables, roles, params["allow_lossy"], state)

    if not HAS_PSYCOPG:
        if module.check_mode:
            return result(*planned(State()))
        module.fail_json(msg=missing_required_lib("psycopg"))
    try:
        connection = psycopg.connect(
            dbname=params["login_db"], port=params["login_port"], application_name="timescaledb_tables"
        )
    except psycopg.OperationalError as error:
        if not module.check_mode:
            raise RefusedError(f"Database {params['login_db']} cannot be opened: {error}") from error
        module.warn(f"Database {params['login_db']} cannot be opened: reported is what an empty one would need.")
        return result(*planned(State()))

    with connection, connection.cursor() as cursor:
        # The lock keeps out a second run, which would find the same things missing.
        cursor.execute("SELECT pg_advisory_xact_lock(hashtext('timescaledb_tables'))")
        cursor.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")
        # The server's log should have only the statements that change something.
        cursor.execute("SET LOCAL log_statement = 'none'")
        widen = params["widen"]
        if widen and not module.check_mode:
            # The lock keeps out new rows between the look at all values and the change.
            execute(cursor, f"LOCK TABLE {relation(widen.rpartition('.')[0])} IN ACCESS EXCLUSIVE MODE")
        state = read_state(cursor, tables, params["owner"])
        cursor.execute("SET LOCAL log_statement TO DEFAULT")
        statements, widenings = planned(state)
        statements += [statement for found in widenings if found.column == widen for statement in found.statements]
        left = [found for found in widenings if found.column != widen]
        if module.check_mode:
            connection.rollback()
            return result(statements, left)
        cursor.execute(f"SET LOCAL ROLE {identifier(params['owner'])}")
        for statement in statements:
            execute(cursor, statement)
    return result(statements, left)


def execute(cursor: Any, statement: str) -> None:
    try:
        cursor.execute(statement)
    except psycopg.Error as error:
        raise RefusedError(
            f"PostgreSQL refuses this: {error.diag.message_primary or error}. The statement was: {statement}"
        ) from error


def main() -> None:
    column = {
        "name": {"type": "str", "required": True},
        "type": {"type": "str", "required": True},
        "nullable": {"type": "bool", "default": True},
        "default": {"type": "str"},
    }
    table = {
        "name": {"type": "str", "required": True},
        "columns": {"type": "list", "elements": "dict", "required": True, "options": column},
        "primary_key": {"type": "list", "elements": "str", "default": [], "no_log": False},
        "hypertable": {
            "type": "dict",
            "options": {
                "time_column": {"type": "str", "required": True},
                "chunk_interval": {"type": "str", "required": True},
            },
        },
        "indexes": {
            "type": "list",
            "elements": "dict",
            "default": [],
            "options": {"columns": {"type": "list", "elements": "str", "required": True}},
        },
        "retention": {"type": "str"},
        "grants": {"type": "dict", "default": {}},
    }
    module = AnsibleModule(
        argument_spec={
            "login_db": {"type": "str", "required": True},
            "login_port": {"type": "int", "default": 5432},
            "owner": {"type": "str", "required": True},
            "roles": {"type": "dict", "required": True},
            "schemas": {"type": "dict", "required": True},
            "tables": {"type": "list", "elements": "dict", "required": True, "options": table},
            "allow_lossy": {"type": "list", "elements": "str", "default": []},
            "widen": {"type": "str"},
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(**run(module))
    except RefusedError as refused:
        module.fail_json(msg="\n".join([*refused.args, "Nothing has been changed."]))


if __name__ == "__main__":
    main()
