"""Views that a team's own repository computes from its own hypertable: what changed is found, whoever changed it."""

import os

import psycopg
import pytest

from larder.errors import SymbolsError
from larder.features import record
from larder.features.compute import compute
from larder.features.formulas import Formulas

ADMIN = os.environ.get("LARDER_TEST_POSTGRES", "")
pytestmark = pytest.mark.skipif(not ADMIN, reason="LARDER_TEST_POSTGRES names no server; the pipeline scenario does")
TABLES = """
schemas: [risk]
tables:
  - name: risk.limits
    columns:
      - {name: account_id, type: bigint, nullable: false}
      - {name: valid_from, type: timestamptz, nullable: false}
      - {name: used, type: double precision}
      - {name: allowed, type: numeric}
      - {name: tier, type: text}
    primary_key: [account_id, valid_from]
    hypertable: {time_column: valid_from, chunk_interval: 30 days}
    grants: {pipeline: [select]}
"""
VIEWS = """
views:
  - name: utilisation
    source: risk.limits
    features:
      - {name: share, formula: used / allowed}
      - {name: growth, formula: share - before(share)}
      - {name: breaches, type: Int64, running_total: used > allowed}
"""
CODE = """
import numpy as np

def before(values):
    return np.concatenate(([np.nan], values[:-1]))
"""
READ = (
    "SELECT valid_from::date::text, share, growth, breaches FROM features.utilisation WHERE account_id = %s ORDER BY 1"
)


@pytest.fixture
def repository(tmp_path):
    for name, text in (("tables.yml", TABLES), ("computed_views.yml", VIEWS), ("formulas.py", CODE)):
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def database(url, repository):
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA risk")
        connection.execute(
            "CREATE TABLE risk.limits (account_id bigint, valid_from timestamptz, used float8, allowed numeric,"
            " tier text, PRIMARY KEY (account_id, valid_from))"
        )
        for table in Formulas(repository).definitions.tables()[-1:]:
            columns = ", ".join(f"{column['name']} {column['type']}" for column in table["columns"])
            connection.execute(f"CREATE TABLE {table['name']} ({columns}, PRIMARY KEY (account_id, valid_from))")
        connection.execute("SET TIME ZONE 'UTC'")
        yield connection


def put(database, account, day, used, allowed=100):
    database.execute(
        "INSERT INTO risk.limits VALUES (%s, %s, %s, %s, 'gold') ON CONFLICT (account_id, valid_from)"
        " DO UPDATE SET used = excluded.used",
        [account, f"2024-01-{day:02}", used, allowed],
    )


def test_new_and_corrected_rows_are_found_and_computed_and_nothing_else(url, database, repository):
    for account in (7, 8):
        put(database, account, 1, 50)
        put(database, account, 2, 150)
    formulas = Formulas(repository)
    assert compute(url, formulas) == 4
    assert database.execute(READ, [7]).fetchall() == [("2024-01-01", 0.5, None, 0), ("2024-01-02", 1.5, 1.0, 1)]
    assert compute(url, formulas) == 0
    put(database, 7, 3, 200)
    put(database, 8, 1, 120)  # a correction by hand, of a row that is not the newest
    assert compute(url, formulas) == 3
    assert database.execute(READ, [8]).fetchall() == [
        ("2024-01-01", 1.2, None, 1),
        ("2024-01-02", 1.5, pytest.approx(0.3), 2),
    ]
    noted = database.execute("SELECT symbol, since::date::text FROM features.pending_materialize ORDER BY 1").fetchall()
    assert noted == [("7", "2024-01-02"), ("8", "2024-01-02")], "the earliest newest row that the online store lacks"
    database.execute("UPDATE risk.limits SET tier = 'silver'")
    database.execute(
        "UPDATE risk.limits SET used = NULL, allowed = 50 WHERE account_id = 7 AND valid_from = '2024-01-02'"
    )
    assert compute(url, formulas) == 2, "a column that is no number changes nothing"
    assert database.execute(READ, [7]).fetchall()[1:] == [("2024-01-02", None, None, 0), ("2024-01-03", 2.0, None, 1)]


def test_other_definitions_compute_every_key_anew(url, database, repository):
    put(database, 7, 1, 50)
    compute(url, Formulas(repository))
    (repository / "computed_views.yml").write_text(VIEWS.replace("used / allowed", "used / allowed * 100"))
    formulas = Formulas(repository)
    assert record.changed(database, formulas)
    assert compute(url, formulas) == 1
    assert database.execute(READ, [7]).fetchall() == [("2024-01-01", 50.0, None, 0)]
    assert not record.changed(database, formulas)


def test_key_that_cannot_be_computed_keeps_no_other_out_and_is_tried_again(url, database, repository):
    put(database, 7, 1, 50)
    put(database, 8, 1, 50)
    database.execute("ALTER TABLE features.utilisation ADD CONSTRAINT seven CHECK (account_id <> 7)")
    with pytest.raises(SymbolsError, match=r"^1 of the symbols could not be computed: 7 \("):
        compute(url, Formulas(repository))
    assert len(database.execute(READ, [8]).fetchall()) == 1
    database.execute("ALTER TABLE features.utilisation DROP CONSTRAINT seven")
    assert compute(url, Formulas(repository)) == 1
