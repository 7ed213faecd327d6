"""What timescaledb_tables sees in a declaration before it asks a server; the rest is molecule/timescaledb's."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

SOURCE = Path(__file__).parents[2] / "ansible/plugins/modules/timescaledb_tables.py"
spec = importlib.util.spec_from_file_location("timescaledb_tables", SOURCE)
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)

ROLES = {"load": "feast_load", "train": "feast_train"}


def bars(**changes):
    """Return a sound declaration, as AnsibleModule hands it over, with changes."""
    columns = [
        {"name": name, "type": type_, "nullable": False, "default": None}
        for name, type_ in (("symbol", "text"), ("at", "timestamptz"), ("close", "real"))
    ]
    return {
        "name": "market_data.bars",
        "columns": columns,
        "primary_key": ["symbol", "at"],
        "hypertable": {"time_column": "at", "chunk_interval": "365 days"},
        "indexes": [{"columns": ["at DESC"]}],
        "retention": None,
        "grants": {"load": ["select", "insert"]},
    } | changes


def problems(*tables, schemas=("market_data",)):
    return module.check_declaration({schema: {} for schema in schemas}, tables, ROLES)


def test_a_sound_declaration_has_no_problems():
    assert problems(bars()) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": "bars"}, "bars must be schema.table with one of the schemas market_data."),
        ({"name": "other.bars"}, "other.bars must be schema.table with one of the schemas market_data."),
        ({"columns": bars()["columns"] * 2}, "market_data.bars declares column close twice."),
        ({"primary_key": ["at", "ticker"]}, "market_data.bars has ticker in its primary key, which is not among its"),
        ({"primary_key": ["symbol"]}, "market_data.bars has the time column at, which its primary key must contain."),
        (
            {"hypertable": {"time_column": "time", "chunk_interval": "1 day"}},
            "market_data.bars has the time column time, which is not among its columns.",
        ),
        ({"hypertable": None, "retention": "90 days"}, "market_data.bars has a retention, but is no hypertable"),
        (
            {"indexes": [{"columns": ["clsoe"]}]},
            "market_data.bars has an index on clsoe, which is not among its columns.",
        ),
        (
            {"grants": {"laod": ["select"]}},
            "market_data.bars grants to laod, which is none of the purposes load, train.",
        ),
        ({"grants": {"load": ["drop"]}}, "market_data.bars grants ['drop'] to load; a list of select, insert"),
        ({"grants": {"load": "select"}}, "market_data.bars grants select to load; a list of select, insert"),
    ],
)
def test_a_mistake_is_named_in_one_sentence(changes, sentence):
    assert any(problem.startswith(sentence) for problem in problems(bars(**changes))), problems(bars(**changes))


def test_a_table_that_is_declared_twice_is_refused():
    assert "market_data.bars is declared twice." in problems(bars(), bars())


@pytest.mark.parametrize(
    ("written", "key"),
    [
        ("at", ("at", False, False)),
        ("at desc", ("at", True, True)),
        ("at DESC NULLS LAST", ("at", True, False)),
        ("at ASC NULLS FIRST", ("at", False, True)),
        ("Event time DESC", ("Event time", True, True)),
    ],
)
def test_an_index_column_is_read_as_postgresql_reads_it(written, key):
    assert module.index_key([written]) == (key,)


@given(st.text(min_size=1))
def test_an_identifier_cannot_leave_its_quotes(name):
    quoted = module.identifier(name)
    assert quoted[0] == quoted[-1] == '"'
    assert quoted[1:-1].replace('""', "").count('"') == 0
    assert quoted[1:-1].replace('""', '"') == name


def test_an_empty_database_gets_everything_in_order():
    statements, widenings = module.plan({"market_data": {"train": ["usage"]}}, [bars()], ROLES, [], module.State())
    assert widenings == []
    assert [statement.split(" ")[0:2] for statement in statements] == [
        ["CREATE", "SCHEMA"],
        ["GRANT", "USAGE"],
        ["GRANT", "USAGE"],
        ["CREATE", "TABLE"],
        ["SELECT", 'create_hypertable(\'"market_data"."bars"\','],
        ["CREATE", "INDEX"],
        ["GRANT", "INSERT,"],
    ]


def retyped(is_, asked, allowed=(), **actual):
    """Plan for a table whose column close is of one type and declared as another."""

    def columns(type_):
        at = {name: module.Column(t, True, None) for name, t in (("symbol", "text"), ("at", "timestamptz"))}
        return at | {"close": module.Column(type_, True, None)}

    declared = bars(hypertable=None, indexes=[], grants={})
    declared["columns"][2]["type"] = asked
    key = ["symbol", "at"]
    state = module.State(
        schemas={"market_data": {}},
        tables={"market_data.bars": module.Table(columns(is_), key, **actual)},
        declared={"market_data.bars": module.Table(columns(asked), key)},
    )
    return module.plan({"market_data": {}}, [declared], {}, allowed, state)


@pytest.mark.parametrize(("is_", "asked"), module.WIDENINGS)
def test_a_wider_type_is_neither_refused_nor_given_unasked(is_, asked):
    statements, (widening,) = retyped(is_, asked)
    assert statements == []
    assert widening.as_dict() == {"column": "market_data.bars.close", "from": is_, "to": asked}
    assert widening.statements[0] == (
        f'ALTER TABLE "market_data"."bars" ALTER COLUMN "close" TYPE {asked} USING "close"::{asked}'
    )
    refuses_bytes = [s for s in widening.statements[1:] if 'ADD CONSTRAINT "close_is_no_bigint" CHECK' in s]
    assert len(refuses_bytes) == (is_ == "bigint") == len(widening.statements) - 1


@pytest.mark.parametrize("is_", ["smallint", "integer", "bigint", "real", "double precision", "numeric", "text"])
@pytest.mark.parametrize("asked", ["smallint", "integer", "bigint", "real", "double precision", "numeric", "text"])
def test_every_other_type_is_refused_unless_it_is_named(is_, asked):
    if is_ == asked or (is_, asked) in module.WIDENINGS:
        return
    with pytest.raises(module.RefusedError, match=r"values would be converted.*add market_data\.bars\.close"):
        retyped(is_, asked)
    statements, widenings = retyped(is_, asked, ["market_data.bars.close"])
    assert len(statements) == 1
    assert widenings == []


def test_a_value_that_a_wider_type_lacks_is_named_unless_it_may_change():
    values = {"close": "symbol A, at 2026-01-05T00:00:00+00:00, close 9007199254740993"}
    with pytest.raises(module.RefusedError) as refused:
        retyped("bigint", "double precision", changed_values=values)
    (sentence,) = refused.value.args
    assert sentence == (
        "market_data.bars has the column close as bigint, and double precision is asked for: of symbol A, "
        "at 2026-01-05T00:00:00+00:00, close 9007199254740993 it would make another number. "
        "If that is meant, add market_data.bars.close to timescaledb_allow_lossy."
    )
    _, widenings = retyped("bigint", "double precision", ["market_data.bars.close"], changed_values=values)
    assert len(widenings) == 1


def test_all_refusals_are_told_at_once_and_nothing_is_planned():
    state = module.State(owned=["market_data.old", "market_data.older"])
    with pytest.raises(module.RefusedError) as refused:
        module.plan({"market_data": {}}, [], ROLES, ["market_data.older"], state)
    assert len(refused.value.args) == 1
    assert "add market_data.old to timescaledb_allow_lossy" in refused.value.args[0]
