"""All facts about the stack, found in one place: `larder status`, its JSON and the metrics say the same.

Nothing here counts all rows of a hypertable: what has to be known of one is read by steps of its index.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import psycopg
from prometheus_client.parser import text_string_to_metric_families
from psycopg import sql

from larder.errors import reason
from larder.log import logger
from larder.operations import apply, backups, drift, evictions, feast_store, quality, registry, runs, skew, verify
from larder.operations.credentials import Credentials
from larder.operations.facts import Fact, State
from larder.operations.freshness import freshness
from larder.postgres import session

READS = 5
SHOWN = 5
REFUSED_SHOWN = 10
ASKED_AT_ONCE = 1000
TEN_YEARS = 10 * 366 * 86400  # for an online store without a TTL
DAYS_COMPARED = 10
FEW_SYMBOLS = 0.9  # of as many as a day usually has
CERTIFICATES = Path("/var/lib/larder/metrics")
ENDS_SOON, ENDS = timedelta(days=30), timedelta(days=7)

BARS = "market_data.ohlcv_daily"
NOTES = """
SELECT (SELECT count(*) FROM market_data.pending_compute), (SELECT count(*) FROM market_data.rejected_bars)
"""
REFUSED = "SELECT reason FROM market_data.refused_files ORDER BY path"
# One step of the index for each day: the newest row, then the newest one of any day before.
DAYS = """
WITH RECURSIVE days (newest) AS (
    SELECT max({time}) FROM {table} AS source WHERE {time} <= now()
    UNION ALL
    SELECT (SELECT max({time}) FROM {table} AS source WHERE {time} < date_trunc('day', days.newest)) FROM days
    WHERE days.newest > now() - interval '1 year'
)
SELECT newest FROM days WHERE newest IS NOT NULL
"""
SYMBOLS_A_DAY = "SELECT count(*) FROM market_data.ohlcv_daily WHERE event_timestamp >= %s AND event_timestamp < %s"
# Who may not monitor sees the slots, but not pg_stat_replication.
SLOTS = """
SELECT slot_name, active, wal_status = 'lost', pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::bigint
FROM pg_replication_slots WHERE slot_type = 'physical' AND NOT temporary AND NOT pg_is_in_recovery() ORDER BY slot_name
"""


@dataclass
class View:
    """A feature view, its newest row, and how many of its entities the online store has as the database has them."""

    name: str
    fed_by: str
    features: int
    newest: datetime | None
    materialized: datetime | None
    entities: int | None = None
    online: int | None = None


@dataclass
class Survey:
    """What was found."""

    views: list[View] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)


def survey(connection: psycopg.Connection, credentials: Credentials, store: Any, *, late: timedelta) -> Survey:
    """Find all facts. `late`: how old a materialization may be, and how long after its day a row may come."""
    now: datetime = connection.execute("SELECT now()").fetchall()[0][0]
    found = Survey(facts=list(of_the_pipeline(connection, credentials, now)))
    batch = sorted(feast_store.batch_views(store), key=lambda view: view.name)
    names = {view.name for view in batch}
    for view in sorted(store.list_feature_views(), key=lambda view: view.name):
        days = _days(connection, _table(view), view.batch_source.timestamp_field)
        fed_by = "batch" if view.name in names else "push"
        newest = days[0] if days else None
        found.views.append(View(view.name, fed_by, len(view.features), newest, view.most_recent_end_time))
        if days or fed_by == "batch":  # nobody has to push
            found.facts.append(freshness("feature_age_seconds", view.name, days, now, late))
    served = [view for view in found.views if view.name in names]
    lost = _registry(credentials, store, found.views)
    found.facts.append(lost)
    if served:
        found.facts.append(_materialization(served, now, late))
        if lost.state == State.OK:
            found.facts += _online(store, batch, served, now)
    found.facts.append(evictions.fact(credentials, store))
    found.facts += quality.facts(connection, now, late)
    found.facts += drift.facts(connection)
    found.facts += verify.facts(connection, now, late)
    found.facts += skew.facts(connection, now, late)
    found.facts += _replication(connection)
    found.facts += backups.facts(connection)
    found.facts += certificates(CERTIFICATES, now)
    return found


def of_the_pipeline(connection: psycopg.Connection, credentials: Credentials, now: datetime) -> Iterator[Fact]:
    """What the last run left: it failed, refused files, symbols wait though none is under way, too few bars came."""
    refused: list[str] = []
    with suppress(*session.MISSING):  # a repository with views of its own has no files
        refused = [why for (why,) in connection.execute(REFUSED)]
    under_way = session.is_locked(connection, "larder run")
    yield _last_run(runs.last(credentials, under_way=under_way), now, refused=bool(refused))
    with suppress(*session.MISSING):
        waiting, rejected = connection.execute(NOTES).fetchall()[0]
        yield _refused(refused)
        yield _waiting(waiting, under_way=under_way)
        yield Fact("rejected_bars", State.OK, rejected, f"Impossible bars in market_data.rejected_bars: {rejected:,}.")
        days = _days(connection, session.identifier(BARS), "event_timestamp")
        if len(days) > 1:
            yield _symbols_of_a_day(connection, days)


def _last_run(run: runs.Run | None, now: datetime, *, refused: bool) -> Fact:
    name = "last_run_age_seconds"
    if run is None:
        return Fact(name, State.UNKNOWN, None, "The pipeline has not run yet.")
    age = (now - (run.ended or run.began)).total_seconds()
    if problem := run.problem():
        return Fact(name, State.FAILED, age, problem)
    if run.under_way:
        return Fact(name, State.OK, age, f"A run began at {run.began:%Y-%m-%d %H:%M} UTC and is under way.")
    how = "left out refused files" if refused else "succeeded"
    return Fact(name, State.OK, age, f"The last run, of {run.ended:%Y-%m-%d %H:%M} UTC, {how}.")


def _refused(reasons: Sequence[str]) -> Fact:
    if not reasons:
        return Fact("refused_files", State.OK, 0, "No file is refused.")
    lines = [f"A file is refused: {why}" for why in reasons[:REFUSED_SHOWN]]
    if len(reasons) > REFUSED_SHOWN:
        lines.append(f"{len(reasons) - REFUSED_SHOWN} more files are refused.")
    return Fact("refused_files", State.FAILED, len(reasons), "\n".join(lines))


def _waiting(waiting: int, *, under_way: bool) -> Fact:
    if not waiting:
        return Fact("pending_symbols", State.OK, 0, "No symbol waits to be computed.")
    said = f"Symbols that wait to be computed: {waiting:,}; "
    if under_way:
        return Fact("pending_symbols", State.OK, waiting, f"{said}a run is under way.")
    return Fact("pending_symbols", State.FAILED, waiting, f"{said}the next run does it, or larder run now.")


def _symbols_of_a_day(connection: psycopg.Connection, days: Sequence[datetime]) -> Fact:
    """Compare how many symbols have a bar on the newest day with as many as the days before had."""
    counts = []
    for day in days[: DAYS_COMPARED + 1]:
        begin = day.replace(hour=0, minute=0, second=0, microsecond=0)
        counts.append(connection.execute(SYMBOLS_A_DAY, [begin, begin + timedelta(days=1)]).fetchall()[0][0])
    usual = median(counts[1:])
    state = State.WARNING if counts[0] < FEW_SYMBOLS * usual else State.OK
    said = f"Symbols with a bar of {days[0]:%Y-%m-%d}: {counts[0]:,}; a day usually has {usual:,.0f}."
    return Fact("newest_day_symbols_ratio", state, counts[0] / usual, said)


def _table(view: Any) -> sql.Composable:
    source = view.batch_source.get_table_query_string()
    return sql.SQL(source) if source.startswith("(") else session.identifier(source)


def _days(connection: psycopg.Connection, table: sql.Composable, time: str) -> list[datetime]:
    """The newest time of each day that has rows, the newest day first, for a year."""
    query = sql.SQL(DAYS).format(time=sql.Identifier(time), table=table)
    return [newest.astimezone(UTC) for (newest,) in connection.execute(query)]


def _registry(credentials: Credentials, store: Any, views: Sequence[View]) -> Fact:
    """Whether all that was applied is there; somebody may have deleted objects, or features of a view."""
    name = "registry_lost_objects"
    with session.connect(credentials.registry_url, "status") as connection:
        lost = apply.lacking(connection, store.project)
        features = apply.lacking_features(connection, store.project, registry.features(store))
    if lost:
        said = f"The registry lost {registry.named(lost)}: larder apply brings back what was applied."
        return Fact(name, State.FAILED, len(lost), said)
    if not views:
        return Fact(name, State.FAILED, 0, "No feature view is registered: run larder apply.")
    if features:
        said = (
            f"The registry lost {len(features)} features ({', '.join(features[:SHOWN])}): larder apply --force brings "
            "them back."
        )
        return Fact(name, State.FAILED, len(features), said)
    return Fact(name, State.OK, 0, "The registry has all that was applied.")


def _materialization(views: Sequence[View], now: datetime, late: timedelta) -> Fact:
    name = "materialization_age_seconds"
    if never := [view.name for view in views if view.materialized is None]:
        return Fact(name, State.FAILED, None, f"Never materialized: {', '.join(never)}.")
    last = min(view.materialized for view in views if view.materialized)
    seconds = (now - last).total_seconds()
    if seconds > late.total_seconds():
        return Fact(name, State.FAILED, seconds, f"The last materialization is {seconds / 3600:.1f} hours old.")
    return Fact(name, State.OK, seconds, f"The last materialization is of {last:%Y-%m-%d %H:%M} UTC.")


def _online(store: Any, views: Sequence[Any], told: Sequence[View], now: datetime) -> Iterator[Fact]:
    """What clients would be answered: of every entity of every view, since a full Redis evicts any of them."""
    try:
        newest = {view.name: _newest_rows(store, view, now) for view in views}
        found = [_completeness(store, view, newest[view.name], shown) for view, shown in zip(views, told, strict=True)]
        read = _read(store, views, newest)
    except Exception as error:  # whatever a store raises, clients' reads fail of it, too
        logger.debug("read", exc_info=True)
        said = f"The online store cannot be read: {reason(error)}."
        yield Fact("online_read_seconds", State.FAILED, None, said)
        return
    yield from found
    yield from read


def _newest_rows(store: Any, view: Any, now: datetime) -> list[tuple[dict[str, Any], datetime]]:
    """Each entity with the time of its newest row, as a materialization would find them.

    What is older than the online TTL went by itself.
    """
    from feast.utils import _get_column_names, _run_pyarrow_field_mapping

    ttl = getattr(store.config.online_store, "key_ttl_seconds", None) or TEN_YEARS
    entities = [store.registry.get_entity(name, store.project) for name in view.entities]
    keys, features, time, created = _get_column_names(view, entities)
    rows = (
        store._get_provider()
        .offline_store.pull_latest_from_table_or_query(
            config=store.config,
            data_source=view.batch_source,
            join_key_columns=keys,
            feature_name_columns=features[:1],
            timestamp_field=time,
            created_timestamp_column=created,
            start_date=now - timedelta(seconds=ttl),
            end_date=now,
        )
        .to_arrow()
    )
    rows = _run_pyarrow_field_mapping(rows, view.batch_source.field_mapping or {})
    times = rows[view.batch_source.timestamp_field].to_pylist()
    return list(zip(rows.select(view.join_keys).to_pylist(), times, strict=True))


def _completeness(store: Any, view: Any, rows: Sequence[tuple[dict[str, Any], datetime]], shown: View) -> Fact:
    """The share of the entities whose newest row the online store has: others were evicted, lost, or never written."""
    missing: list[str] = []
    older: list[str] = []
    for first in range(0, len(rows), ASKED_AT_ONCE):
        part = rows[first : first + ASKED_AT_ONCE]
        entities = {key: [row[key] for row, _ in part] for key in view.join_keys}
        answer = store.get_online_features([f"{view.name}:{view.features[0].name}"], entities).proto
        for (row, newest), stamp in zip(part, answer.results[-1].event_timestamps, strict=True):
            name = "/".join(map(str, row.values()))
            if stamp.seconds == 0:
                missing.append(name)
            elif stamp.seconds < int(newest.timestamp()):
                older.append(name)
    shown.entities, shown.online = len(rows), len(rows) - len(missing) - len(older)
    if not rows:
        return Fact("online_complete_ratio", State.UNKNOWN, None, "There is nothing to be read yet.", view.name)
    since = f"larder materialize --since {min(newest for _, newest in rows):%Y-%m-%d} writes them."
    lines = [
        f"of {len(names)} of {len(rows)} entities the online store has {what} ({', '.join(names[:SHOWN])}): {since}"
        for names, what in ((missing, "nothing"), (older, "an older row than the database"))
        if names
    ]
    said = "\n".join(lines) or f"The online store has the newest rows of all {len(rows):,} entities."
    state = State.FAILED if lines else State.OK
    return Fact("online_complete_ratio", state, shown.online / len(rows), said, view.name)


def _read(store: Any, views: Sequence[Any], newest: dict[str, list[tuple[dict[str, Any], datetime]]]) -> Iterator[Fact]:
    """Read every feature of the views that share their keys with the first one, for one entity."""
    first = views[0]
    if not newest[first.name]:
        return
    entity, _ = newest[first.name][0]
    same = [view for view in views if view.join_keys == first.join_keys]
    references = [f"{view.name}:{feature.name}" for view in same for feature in view.features]
    seconds = []
    for _ in range(READS):
        begun = perf_counter()
        store.get_online_features(references, [entity], full_feature_names=True)
        seconds.append(perf_counter() - begun)
    said = f"Reading {len(references)} features of one entity takes {median(seconds) * 1000:.1f} ms (median)."
    yield Fact("online_read_seconds", State.OK, median(seconds), said)


def _replication(connection: psycopg.Connection) -> Iterator[Fact]:
    """Whether each standby is there, by its slot at the primary."""
    name = "standby_behind_bytes"
    for slot, active, lost, behind in connection.execute(SLOTS):
        if lost:
            said = "The primary no longer has the WAL that this standby needs: site.yml copies it anew."
            yield Fact(name, State.FAILED, behind, said, slot)
        elif not active:
            yield Fact(name, State.FAILED, behind, "This standby is not connected to the primary.", slot)
        else:
            said = f"This standby is connected, and confirms all but {behind or 0:,} bytes of WAL."
            yield Fact(name, State.OK, behind, said, slot)


def certificates(metrics: Path, now: datetime) -> Iterator[Fact]:
    """When the certificates of this host end, by the metrics that the role certificate writes."""
    for path in sorted(metrics.glob("certificate_*.prom")):
        with suppress(OSError, ValueError):
            for family in text_string_to_metric_families(path.read_text(encoding="utf-8")):
                for sample in family.samples:
                    left = timedelta(seconds=sample.value - now.timestamp())
                    state = State.FAILED if left < ENDS else State.WARNING if left < ENDS_SOON else State.OK
                    said = f"The certificate ends on {now + left:%Y-%m-%d}" + (
                        "." if state == State.OK else ": site.yml makes a new one."
                    )
                    yield Fact(
                        "certificate_remaining_seconds", state, left.total_seconds(), said, sample.labels["service"]
                    )
