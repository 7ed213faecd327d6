"""`larder verify`: a sample of what clients are served, computed again from the bars.

The whole history of each symbol is computed in one go: nothing that an incremental run, a materialization or Redis did
to a value is used again.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
from psycopg import sql

from larder.errors import LarderError, reason
from larder.features.definitions import Source, View
from larder.features.formulas import Formulas
from larder.operations import feast_store
from larder.operations.check import note
from larder.operations.credentials import Credentials
from larder.operations.explain import same
from larder.operations.facts import Fact, State
from larder.postgres import arrays, session

EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
BEGINNING = datetime(1, 1, 1, tzinfo=UTC)
SHOWN = 10

# One step of the index for each key.
KEYS = """
WITH RECURSIVE keys (key) AS (
    (SELECT {key} FROM {table} ORDER BY {key} LIMIT 1)
    UNION ALL
    SELECT (SELECT {key} FROM {table} WHERE {key} > keys.key ORDER BY {key} LIMIT 1) FROM keys WHERE key IS NOT NULL
)
SELECT key FROM keys WHERE key IS NOT NULL ORDER BY random() LIMIT %s
"""
# Values that are about to change, or that the online store is about to get.
PENDING = """
SELECT symbol FROM features.pending_materialize
UNION ALL SELECT {key}::text FROM {notes}
"""
CHECKED = "SELECT checked_at, noted FROM quality.checks WHERE what = 'verify'"


@dataclass(frozen=True)
class Wrong:
    """A value that is served, and is not what the bars give."""

    symbol: str
    view: str
    feature: str
    served: float | int | str | None
    expected: float | None
    event_timestamp: datetime

    @property
    def sentence(self) -> str:
        return (
            f"{self.symbol} {self.view}:{self.feature} of {self.event_timestamp:%Y-%m-%d %H:%M} is served as "
            f"{self.served}, and the bars give {self.expected}."
        )


@dataclass
class Verified:
    """How many values of how many symbols were verified; the wrong ones; symbols about to change, or not served."""

    symbols: int = 0
    values: int = 0
    skipped: int = 0
    wrong: list[Wrong] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify(credentials: Credentials, repo: Path, sample: int, symbols: Sequence[str] = ()) -> Verified:
    """Verify every computed feature of a sample of the keys of each source, or of these symbols."""
    told = Verified()
    formulas = Formulas(repo)
    with session.connect(credentials.pipeline_url, "verify") as connection, feast_store.quiet():
        store = feast_store.open_store(credentials.feature_store)
        online = {view.name for view in feast_store.batch_views(store)}
        for source in formulas.definitions.sources.values():
            views = [view for view in formulas.definitions.views_of(source) if view.name in online]
            if not views:
                continue
            keys = [_key(source, symbol) for symbol in symbols] or _sample(connection, source, sample)
            first = _pass(connection, store, formulas, source, views, keys)
            told.symbols += first.symbols
            told.values += first.values
            told.skipped += first.skipped
            if first.wrong:  # a run may have been between what was served and the bars
                again = [_key(source, symbol) for symbol in dict.fromkeys(wrong.symbol for wrong in first.wrong)]
                told.wrong += _pass(connection, store, formulas, source, views, again).wrong
        with suppress(*session.MISSING):  # no rules, no table
            examples = [wrong.sentence for wrong in told.wrong[:SHOWN]]
            count = len(told.wrong)
            note(connection, "verify", symbols=told.symbols, values=told.values, wrong=count, examples=examples)
    return told


def _key(source: Source, symbol: str) -> arrays.Key:
    return int(symbol) if source.key_type == "bigint" else symbol


def _sample(connection: psycopg.Connection, source: Source, count: int) -> list[arrays.Key]:
    query = sql.SQL(KEYS).format(key=sql.Identifier(source.key), table=session.identifier(source.table))
    return [key for (key,) in connection.execute(query, [count])]


def _pending(connection: psycopg.Connection, source: Source) -> set[str]:
    found: set[str] = set()
    notes = source.notes
    query = sql.SQL(PENDING if notes else PENDING.split("UNION", maxsplit=1)[0]).format(
        key=sql.Identifier(source.key), notes=session.identifier(notes or "")
    )
    with suppress(*session.MISSING):
        found = {key for (key,) in connection.execute(query)}
    return found


def _pass(
    connection: psycopg.Connection,
    store: Any,
    formulas: Formulas,
    source: Source,
    views: Sequence[View],
    keys: Sequence[arrays.Key],
) -> Verified:
    told = Verified()
    pending = _pending(connection, source)
    served = _served(store, source, views, keys)
    rows = arrays.read(
        connection,
        source.table,
        source.columns,
        dict.fromkeys(keys, BEGINNING),
        None,
        key=(source.key, source.time),
        key_type=source.key_type,
    )
    expected = {
        key: _expected(formulas, source, views, times, columns, served.get(key, {})) for key, times, columns in rows
    }
    pending |= _pending(connection, source)
    for key in keys:
        if str(key) in pending or key not in expected or key not in served:
            told.skipped += 1
            continue
        told.symbols += 1
        for view in views:
            if view.name not in served[key]:
                continue
            time, values = served[key][view.name]
            at = expected[key].get(view.name)
            for feature in view.features:
                told.values += 1
                right = at[feature.name] if at else None
                if at is None or not same(values[feature.name], right):
                    wrong = Wrong(str(key), view.name, feature.name, values[feature.name], right, time)
                    told.wrong.append(wrong)
    return told


def _served(
    store: Any, source: Source, views: Sequence[View], keys: Sequence[arrays.Key]
) -> dict[arrays.Key, dict[str, tuple[datetime, dict[str, Any]]]]:
    """What a client would be answered: by key and view the row's time and its values."""
    names = [(view.name, feature.name) for view in views for feature in view.features]
    try:
        answer = store.get_online_features(
            [f"{view}:{feature}" for view, feature in names], {source.key: list(keys)}, full_feature_names=True
        ).proto
    except Exception as error:
        raise LarderError(f"The online store cannot be read: {reason(error)}.") from error
    at = {name: number for number, name in enumerate(answer.metadata.feature_names.val)}
    found: dict[arrays.Key, dict[str, tuple[datetime, dict[str, Any]]]] = {}
    for view, feature in names:
        result = answer.results[at[f"{view}__{feature}"]]
        for key, value, stamp in zip(keys, result.values, result.event_timestamps, strict=True):
            if not stamp.seconds:
                continue
            row = found.setdefault(key, {}).setdefault(view, (stamp.ToDatetime(tzinfo=UTC), {}))
            kind = value.WhichOneof("val")
            row[1][feature] = getattr(value, kind) if kind else None
    return found


def _expected(
    formulas: Formulas,
    source: Source,
    views: Sequence[View],
    times: arrays.Times,
    columns: Mapping[str, arrays.Array],
    served: Mapping[str, tuple[datetime, Mapping[str, Any]]],
) -> dict[str, dict[str, float | None]]:
    """What the bars give for the time of each view's served row; nothing for a time of which there is no bar."""
    rows = formulas.of(source, columns)
    found = {}
    for view in views:
        if view.name not in served:
            continue
        places = np.flatnonzero(times == (served[view.name][0] - EPOCH) // timedelta(microseconds=1))
        if len(places):
            values = {name: float(column[places[0]]) for name, column in rows.features(view).items()}
            found[view.name] = {name: None if math.isnan(value) else value for name, value in values.items()}
    return found


def facts(connection: psycopg.Connection, now: datetime, late: timedelta) -> Iterator[Fact]:
    """What the last verification found."""
    name = "verified_wrong_values"
    with suppress(*session.MISSING):
        row = connection.execute(CHECKED).fetchone()
        if row is None:
            yield Fact(name, State.UNKNOWN, None, "No served value was verified yet: larder verify does it.")
            return
        when, noted = row
        if noted["wrong"]:
            said = "\n".join(noted["examples"])
            yield Fact(name, State.FAILED, noted["wrong"], said)
        elif now - when > late:
            said = f"Served values were last verified at {when:%Y-%m-%d %H:%M} UTC: see larder-verify.timer."
            yield Fact(name, State.WARNING, 0, said)
        else:
            said = (
                f"Of {noted['symbols']:,} symbols all {noted['values']:,} served values are what the bars give "
                f"({when:%Y-%m-%d %H:%M} UTC)."
            )
            yield Fact(name, State.OK, 0, said)


def as_text(told: Verified) -> str:
    skipped = f"; {told.skipped} symbols are about to change, or not served" if told.skipped else ""
    lines = [f"{told.values:,} values of {told.symbols:,} symbols verified, {len(told.wrong):,} wrong{skipped}"]
    return "\n".join([*lines, *(f"- {wrong.sentence}" for wrong in told.wrong)])
