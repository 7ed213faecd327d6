"""Which definitions the features in the database were computed with: other ones, and every symbol is computed anew."""

import hashlib
import os
from importlib.metadata import version
from pathlib import Path

import psycopg

from larder.errors import ConfigError

# What indicators are computed from: the prices as loaded, or all of a bar's scaled by adjusted_close / close.
PRICES = AS_LOADED, ADJUSTED = ("close", "adjusted_close")


def prices() -> str:
    """Which prices LARDER_INDICATOR_PRICES names."""
    name = os.environ.get("LARDER_INDICATOR_PRICES", AS_LOADED)
    if name not in PRICES:
        raise ConfigError(f"LARDER_INDICATOR_PRICES is {name!r}; it may be {' or '.join(PRICES)}.")
    return name


def fingerprint() -> str:
    """Of the module that defines the features, of the prices that they are computed from, and of TA-Lib."""
    source = Path(__file__).with_name("indicators.py").read_bytes()
    return hashlib.sha256(source + f"{version('ta-lib')} {prices()}".encode()).hexdigest()


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
