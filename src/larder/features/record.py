"""Which definitions the features in the database were computed with, and when, and by whom.

With other definitions, every key is computed anew.
"""

import hashlib
from importlib.metadata import version

import psycopg

from larder import origin
from larder.features.definitions import Source
from larder.features.formulas import Formulas

# The lock of a computation keeps out another one that would take the same number.
BEGIN = """
INSERT INTO features.runs (run_id, source, fingerprint, host, code, invocation)
SELECT coalesce(max(run_id), 0) + 1, %s, %s, %s, %s, %s FROM features.runs RETURNING run_id
"""


def fingerprint(formulas: Formulas) -> str:
    """Of the definitions, of the prices that indicators are computed from, and of TA-Lib."""
    text = f"{formulas.definitions.fingerprint} {version('ta-lib')} {formulas.prices}"
    return hashlib.sha256(text.encode()).hexdigest()


def changed(connection: psycopg.Connection, formulas: Formulas) -> bool:
    """Whether the features in the database were computed with other definitions than these."""
    if not formulas.definitions.views:
        return False
    return connection.execute("SELECT fingerprint FROM features.computed_with").fetchall() not in (
        [],
        [(fingerprint(formulas),)],
    )


def note(connection: psycopg.Connection, formulas: Formulas) -> None:
    """Note that the features were computed with these definitions."""
    with connection.transaction():
        connection.execute("DELETE FROM features.computed_with")
        connection.execute("INSERT INTO features.computed_with VALUES (%s)", [fingerprint(formulas)])


def begin(connection: psycopg.Connection, formulas: Formulas, source: Source) -> int:
    """Note that the views of a source are computed now; returns the run's number, which its rows have."""
    who = [origin.host(), origin.code(), origin.invocation()]
    run_id: int = connection.execute(BEGIN, [source.table, fingerprint(formulas), *who]).fetchall()[0][0]
    return run_id
