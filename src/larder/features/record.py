"""Which definitions the features in the database were computed with: other ones, and every key is computed anew."""

import hashlib
from importlib.metadata import version

import psycopg

from larder.features.formulas import Formulas


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
