"""`larder skew`: what clients were served against what a training set has of the same entities at the same times.

The feature servers keep samples of what they answered (larder.serving.served), and this host fetches them, with the
certificate by which PostgreSQL knows it. The other side is Feast's own point-in-time join, as a training set is made.
A value that differs is explained by the newest row of its time, and by when that row was written: what came after it
was served is a lag, which every feed has, and no skew.
"""

import json
import math
import random
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from os import environ
from typing import Any

import psycopg
from psycopg import sql

from larder.errors import ConfigError, LarderError, reason
from larder.features import definitions
from larder.operations import feast_store
from larder.operations.check import note
from larder.operations.credentials import Credentials
from larder.operations.explain import same
from larder.operations.facts import Fact, State
from larder.postgres import session

SHOWN = 10
TIMEOUT = 10  # seconds, of an instance
MOST_BYTES = 64 << 20  # of an instance
# Older samples are not compared again: what was wrong is told for so long.
WINDOW = timedelta(days=3)
# A run writes to the database first, and to the online store by its end.
ONLINE_WITHIN = timedelta(hours=2)
RESULTS = ("equal", "different", "late", "corrected", "expired")
NUMBER = "larder_number"
TYPES = {"STRING": "text", "INT32": "bigint", "INT64": "bigint"}  # of the keys that a sample may have
SCALARS = {"STRING", "INT32", "INT64", "FLOAT", "DOUBLE", "BOOL"}

# The newest row of each entity at its time, and when it was written, where that is noted.
ROWS = """
SELECT asked.number, newest.time, {written} FROM unnest({asked}, %s::timestamptz[], %s::integer[])
AS asked ({names}, at, number), LATERAL (
    SELECT source.{time} AS time{columns} FROM {table} AS source WHERE {match} AND source.{time} <= asked.at
    ORDER BY source.{time} DESC{created} LIMIT 1
) AS newest{runs}
"""
RUNS = " LEFT JOIN features.runs ON runs.run_id = newest.noted"
HAS = "SELECT count(*) FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attname = %s AND NOT attisdropped"
COMPARED = "SELECT checked_at, noted FROM quality.checks WHERE what = 'skew'"


@dataclass(frozen=True)
class Sample:
    """A row of one view as it was served: its event time, None where the online store had none, and its values."""

    at: datetime
    entity: Mapping[str, Any]
    time: datetime | None
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Different:
    """A value that was served, and that a training set has otherwise."""

    entity: str
    feature: str
    served_at: datetime
    served: Any
    served_time: datetime | None
    joined: Any
    row_time: datetime | None

    @property
    def sentence(self) -> str:
        of = f" of {self.served_time:%Y-%m-%d %H:%M}" if self.served_time else ""
        row = f"of {self.row_time:%Y-%m-%d %H:%M}" if self.row_time else "of no row"
        return (
            f"{self.entity} {self.feature} was served at {self.served_at:%Y-%m-%d %H:%M} UTC as {self.served}{of}, and "
            f"a training set has {self.joined}, {row}."
        )


@dataclass
class Skew:
    """How many values were compared, by feature and result; which instances did not answer."""

    samples: int = 0
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    different: list[Different] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)

    def total(self, result: str) -> int:
        return sum(of.get(result, 0) for of in self.counts.values())

    @property
    def values(self) -> int:
        return sum(map(self.total, RESULTS))

    def add(self, feature: str, result: str) -> None:
        of = self.counts.setdefault(feature, dict.fromkeys(RESULTS, 0))
        of[result] += 1

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def urls() -> list[str]:
    """Where the instances tell their samples, as this host's settings say it; none where no reads are kept."""
    return environ.get("LARDER_SAMPLES", "").split()


def skew(credentials: Credentials, asked: Sequence[str], most: int) -> Skew:
    """Compare so many of the samples of these instances, chosen at random where there are more.

    Raises LarderError where no instance answers, or the database cannot be read.
    """
    if not asked:
        raise ConfigError("No reads are kept: larder_skew_sample_ratio in the inventory is 0 (docs/quality.md).")
    told = Skew()
    since = (datetime.now(UTC) - WINDOW).isoformat()
    kept = [line for line in _kept(credentials, asked, told) if line["served_at"] >= since]
    if len(told.silent) == len(asked):
        raise LarderError(f"No feature server tells what it served: {told.silent[0]}.")
    told.samples = min(len(kept), most)
    views: dict[str, list[Sample]] = {}
    for view, sample in (one for line in random.sample(kept, told.samples) for one in _samples(line)):
        views.setdefault(view, []).append(sample)
    with session.connect(credentials.pipeline_url, "skew") as connection, feast_store.quiet():
        store = feast_store.open_store(credentials.feature_store)
        known = {view.name: view for view in store.list_feature_views()}
        for name in sorted(views.keys() & known.keys()):
            _compare(connection, store, known[name], views[name], told)
        with suppress(*session.MISSING):  # no rules, no table
            note(
                connection,
                "skew",
                samples=told.samples,
                silent=len(told.silent),
                **{result: told.total(result) for result in RESULTS},
                examples=[one.sentence for one in told.different[:SHOWN]],
            )
    return told


def _kept(credentials: Credentials, asked: Sequence[str], told: Skew) -> Iterator[dict[str, Any]]:
    """The samples of all instances that answer; what an instance was about to write when it was killed is left out."""
    opener = urllib.request.build_opener(
        urllib.request.HTTPSHandler(context=_tls(credentials)), urllib.request.ProxyHandler({})
    )
    for url in asked:
        try:
            with opener.open(url, timeout=TIMEOUT) as answer:
                lines = answer.read(MOST_BYTES).splitlines()
        except (OSError, ValueError) as error:
            told.silent.append(f"{url}: {reason(error)}")
            continue
        for line in lines:
            with suppress(ValueError):
                yield json.loads(line)


def _tls(credentials: Credentials) -> ssl.SSLContext:
    given = psycopg.conninfo.conninfo_to_dict(credentials.pipeline_url)
    try:
        context = ssl.create_default_context(cafile=str(given["sslrootcert"]))
        context.load_cert_chain(str(given["sslcert"]), str(given["sslkey"]))
    except KeyError as error:
        raise ConfigError(f"pipeline_url names no {error.args[0]}: feature servers ask for a certificate.") from None
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"The certificate of this host cannot be used: {reason(error)}.") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def _samples(line: Mapping[str, Any]) -> Iterator[tuple[str, Sample]]:
    for view, row in line["views"].items():
        time = row["event_timestamp"]
        yield (
            view,
            Sample(
                datetime.fromisoformat(line["served_at"]),
                line["entity"],
                datetime.fromisoformat(time) if time else None,
                row["values"],
            ),
        )


def _compare(connection: psycopg.Connection, store: Any, view: Any, samples: Sequence[Sample], told: Skew) -> None:
    """Compare what was served of a view with the point-in-time join, and explain what differs."""
    types = {column.name: column.dtype.to_value_type().name for column in view.entity_columns}
    features = {feature.name for feature in view.features if feature.dtype.to_value_type().name in SCALARS}
    features &= {name for sample in samples for name in sample.values}
    samples = [sample for sample in samples if types.keys() <= sample.entity.keys()]
    if not features or not samples or not types or any(kind not in TYPES for kind in types.values()):
        return
    joined = _join(store, view.name, list(types), sorted(features), samples)
    unequal: dict[int, list[tuple[str, Any]]] = {}
    for number, sample in enumerate(samples):
        for name, served in sample.values.items():
            if name not in features:
                continue
            value = _plain(joined[name][number])
            if not same(_plain(served), value):
                unequal.setdefault(number, []).append((name, value))
            elif sample.time or value is not None:  # of an entity that nobody has there is nothing to compare
                told.add(f"{view.name}:{name}", "equal")
    rows = _rows(connection, view, types, {number: samples[number] for number in unequal})
    for number, values in unequal.items():
        sample, (time, written) = samples[number], rows.get(number, (None, None))
        result = _judge(sample, view.ttl, time, written)
        for name, value in values:
            told.add(f"{view.name}:{name}", result)
            if result == "different":
                entity = "/".join(str(sample.entity[key]) for key in types)
                feature, served = f"{view.name}:{name}", sample.values[name]
                told.different.append(Different(entity, feature, sample.at, served, sample.time, value, time))


def _judge(sample: Sample, ttl: timedelta | None, time: datetime | None, written: datetime | None) -> str:
    """Say why a value differs, by the newest row of its time and when that row was written, if that is known."""
    if sample.time and ttl and sample.at - sample.time > ttl and (time is None or time <= sample.time):
        return "expired"
    if time is None or (sample.time and time < sample.time):
        return "different"  # the history has not got what was served
    after = None if written is None else written > sample.at - ONLINE_WITHIN
    if sample.time == time:
        return "corrected" if after else "different"
    return "different" if after is False else "late"


def _join(
    store: Any, view: str, keys: Sequence[str], features: Sequence[str], samples: Sequence[Sample]
) -> dict[str, list[Any]]:
    """What a training set has: by feature, a value for each sample."""
    import pandas as pd

    frame = pd.DataFrame({key: [sample.entity[key] for sample in samples] for key in keys})
    frame["event_timestamp"] = pd.to_datetime([sample.at for sample in samples], utc=True)
    frame[NUMBER] = range(len(samples))
    try:
        table = store.get_historical_features(frame, [f"{view}:{name}" for name in features]).to_arrow()
    except Exception as error:
        raise LarderError(f"The point-in-time join of {view} failed: {reason(error)}.") from error
    place = dict(zip(table[NUMBER].to_pylist(), range(table.num_rows), strict=True))
    found = {name: table[name].to_pylist() for name in features}
    return {name: [values[place[number]] for number in range(len(samples))] for name, values in found.items()}


def _plain(value: Any) -> Any:
    """A NaN is no value, in the history as in what is served."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _rows(
    connection: psycopg.Connection, view: Any, types: Mapping[str, str], samples: Mapping[int, Sample]
) -> dict[int, tuple[datetime, datetime | None]]:
    """The time of the newest row of each sample's time, and when it was written, by the sample's number."""
    if not samples:
        return {}
    source = view.batch_source
    columns = {mapped: column for column, mapped in (source.field_mapping or {}).items()}
    table, created = source.get_table_query_string(), source.created_timestamp_column
    runs = not table.startswith("(") and connection.execute(HAS, [table, definitions.RUN]).fetchall()[0][0]
    names = [sql.Identifier(f"k{number}") for number in range(len(types))]
    noted: sql.Composable = sql.SQL("")
    if created:
        noted = sql.SQL(", source.{} AS written").format(sql.Identifier(created))
    elif runs:
        noted = sql.SQL(", source.{} AS noted").format(sql.Identifier(definitions.RUN))
    query = sql.SQL(ROWS).format(
        written=sql.SQL("newest.written" if created else "runs.began_at" if runs else "NULL::timestamptz"),
        asked=sql.SQL(", ").join(sql.SQL(f"%s::{TYPES[kind]}[]") for kind in types.values()),
        names=sql.SQL(", ").join(names),
        time=sql.Identifier(source.timestamp_field),
        columns=noted,
        table=sql.SQL(table) if table.startswith("(") else session.identifier(table),
        match=sql.SQL(" AND ").join(
            sql.SQL("source.{} = asked.{}").format(sql.Identifier(columns.get(key, key)), name)
            for key, name in zip(types, names, strict=True)
        ),
        created=sql.SQL(", source.{} DESC").format(sql.Identifier(created)) if created else sql.SQL(""),
        runs=sql.SQL(RUNS if runs and not created else ""),
    )
    given = [[sample.entity[key] for sample in samples.values()] for key in types]
    found = connection.execute(query, [*given, [sample.at for sample in samples.values()], list(samples)])
    return {number: (time, written) for number, time, written in found}


def facts(connection: psycopg.Connection, now: datetime, late: timedelta) -> Iterator[Fact]:
    """What the last comparison found; nothing where no reads are kept."""
    name = "skewed_served_values"
    if not urls():
        return
    with suppress(*session.MISSING):
        row = connection.execute(COMPARED).fetchone()
        if row is None:
            said = "What clients were served was not compared with the history yet: larder skew does it."
            yield Fact(name, State.UNKNOWN, None, said)
            return
        when, noted = row
        values = sum(noted[result] for result in RESULTS)
        if noted["different"]:
            yield Fact(name, State.FAILED, noted["different"], "\n".join(noted["examples"]))
        elif noted["silent"]:
            said = f"{noted['silent']} feature servers did not tell what they served: journalctl -u feast-skew.service."
            yield Fact(name, State.WARNING, 0, said)
        elif now - when > late:
            said = f"What clients were served was last compared at {when:%Y-%m-%d %H:%M} UTC: see feast-skew.service."
            yield Fact(name, State.WARNING, 0, said)
        else:
            said = (
                f"Of {values:,} values in {noted['samples']:,} samples of what clients were served, none differs from "
                f"the history for no known reason ({when:%Y-%m-%d %H:%M} UTC)."
            )
            yield Fact(name, State.OK, 0, said)


def as_text(told: Skew) -> str:
    lines = [f"{told.values:,} values of {told.samples:,} samples compared, {told.total('different'):,} different"]
    lines += [f"not answered: {why}" for why in told.silent]
    if told.counts:
        width = max(map(len, told.counts)) + 2
        lines += ["", f"{'feature':<{width}}{'compared':>9}" + "".join(f"{result:>11}" for result in RESULTS)]
        for feature, of in sorted(told.counts.items(), key=lambda one: (-one[1]["different"], one[0])):
            lines.append(f"{feature:<{width}}{sum(of.values()):>9,}" + "".join(f"{of[r]:>11,}" for r in RESULTS))
    lines += ["", *(f"- {one.sentence}" for one in told.different[:SHOWN])] if told.different else []
    return "\n".join(lines)
