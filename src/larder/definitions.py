"""Which definitions the features in the database were computed with: other ones, and every symbol is computed anew."""

import hashlib
from importlib.metadata import version
from pathlib import Path

import psycopg


def fingerprint() -> str:
    """Of the module that defines the features, and of TA-Lib."""
    source = Path(__file__).with_name("indicators.py").read_bytes()
    return hashlib.sha256(source + version("ta-lib").encode()).hexdigest()


def changed(connection: psycopg.Connection) -> bool:
    """Whether the features in the database were computed with other definitions than these."""
    # A repository with views of its own has no such table.
    if connection.execute("SELECT to_regclass('features.computed_with')").fetchall()[0][0] is None:
        return False
    return connection.execute("SELECT fingerprint FROM features.computed_with").fetchall() not in (
        [],
        [(fingerprint(),)],
    )


def note(connection: psycopg.Connection) -> None:
    """Note that the features were computed with these definitions."""
    with connection.transaction():
        connection.execute("DELETE FROM features.computed_with")
        connection.execute("INSERT INTO features.computed_with VALUES (%s)", [fingerprint()])
