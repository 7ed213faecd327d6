"""`larder status`: what is registered, how much there is, how old it is, and how long a real read takes."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from statistics import median
from time import perf_counter
from typing import Any

import psycopg
from psycopg import sql

from larder.errors import LarderError
from larder.log import logger
from larder.operations import active, apply, backups, feast_store, registry, runs
from larder.operations.credentials import Credentials
from larder.postgres import session

READS = 5
BARS = """
SELECT (SELECT max(event_timestamp) FROM market_data.ohlcv_daily), (SELECT count(*) FROM market_data.rejected_bars),
       (SELECT count(*) FROM market_data.pending_compute)
"""
REFUSED = "SELECT path, reason FROM market_data.refused_files ORDER BY path"
REFUSED_SHOWN = 10
SHOWN = 5
ASKED_AT_ONCE = 1000
TEN_YEARS = 10 * 366 * 86400  # for an online store without a TTL


@dataclass
class View:
    """A feature view and the table of its batch source."""

    name: str
    fed_by: str
    features: int
    rows: int
    newest: datetime | None
    materialized: datetime | None


@dataclass
class Status:
    """What is wrong, if anything, stands in `problems`."""

    project: str
    active_host: str | None = None
    spare: bool = False  # this host is one: another runs the pipeline
    views: list[View] = field(default_factory=list)
    newest_bar: datetime | None = None
    last_materialization: datetime | None = None
    age_seconds: float | None = None
    rejected_bars: int = 0
    pending_symbols: int = 0
    last_run: runs.Run | None = None
    refused_files: dict[str, str] = field(default_factory=dict)  # and why
    read: dict[str, Any] | None = None
    proven_backup: backups.Proof | None = None  # where there is a backup host
    problems: list[str] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        return {"healthy": self.healthy, **asdict(self)}


def status(credentials: Credentials, *, max_age_hours: float) -> Status:
    with session.connect(credentials.pipeline_url, "status") as connection, feast_store.quiet():
        store = feast_store.open_store(credentials.feature_store)
        result = Status(project=store.project)
        result.active_host = active.active(credentials)
        result.spare = active.here() not in (None, result.active_host) and result.active_host is not None
        batch = {view.name for view in feast_store.batch_views(store)}
        views = sorted(store.list_feature_views(), key=lambda v: v.name)
        result.views = [_view(connection, view, batch=view.name in batch) for view in views]
        _bars(connection, result)
        _last_run(connection, credentials, result)
        result.proven_backup, problems = backups.proof(connection)
        result.problems += problems
        now: datetime = connection.execute("SELECT now()").fetchall()[0][0]
        if not views:
            result.problems.append("No feature view is registered: run larder apply.")
        whole = _registry(credentials, store, result)
        times = [view.materialized for view in result.views if view.name in batch]
        if times and None in times:
            never = [v.name for v in result.views if v.name in batch and v.materialized is None]
            result.problems.append(f"Never materialized: {', '.join(never)}.")
        elif times:
            result.last_materialization = min(t for t in times if t)
            result.age_seconds = (now - result.last_materialization).total_seconds()
            if result.age_seconds > max_age_hours * 3600:
                result.problems.append(f"The last materialization is {result.age_seconds / 3600:.1f} hours old.")
        if batch and whole:
            served = [v for v in views if v.name in batch]
            _read(connection, store, served, result)
            for view in served:
                _online(connection, store, view, result)
    return result


def _registry(credentials: Credentials, store: Any, result: Status) -> bool:
    """Whether all that was applied is there; somebody may have deleted objects, or features of a view."""
    with session.connect(credentials.registry_url, "status") as connection:
        lost = apply.lacking(connection, store.project)
        features = apply.lacking_features(connection, store.project, registry.features(store))
    if lost:
        result.problems.append(f"The registry lost {registry.named(lost)}: larder apply brings back what was applied.")
    elif features:
        result.problems.append(
            f"The registry lost {len(features)} features ({', '.join(features[:SHOWN])}): larder apply --force brings "
            "them back."
        )
    return not lost


def _online(connection: psycopg.Connection, store: Any, view: Any, result: Status) -> None:
    """Entities whose newest row the online store does not have: evicted, lost, or never written.

    Every entity is asked for, since a full Redis evicts any of them. What is older than the online TTL went by itself.
    """
    ttl = getattr(store.config.online_store, "key_ttl_seconds", None) or TEN_YEARS
    query = sql.SQL(
        "SELECT {keys}, max({time}) FROM {table} AS source "
        "WHERE {time} > now() - %s * interval '1 second' AND {time} <= now() GROUP BY {keys} ORDER BY {keys}"
    ).format(
        keys=sql.SQL(", ").join(map(sql.Identifier, view.join_keys)),
        time=sql.Identifier(view.batch_source.timestamp_field),
        table=_table(view),
    )
    rows = connection.execute(query, [ttl]).fetchall()
    missing: list[str] = []
    older: list[str] = []
    for first in range(0, len(rows), ASKED_AT_ONCE):
        part = rows[first : first + ASKED_AT_ONCE]
        entities = [dict(zip(view.join_keys, keys, strict=True)) for *keys, _ in part]
        answer = store.get_online_features([f"{view.name}:{view.features[0].name}"], entities).proto
        stamps = answer.results[-1].event_timestamps
        for (*keys, newest), stamp in zip(part, stamps, strict=True):
            name = "/".join(map(str, keys))
            if stamp.seconds == 0:
                missing.append(name)
            elif stamp.seconds < int(newest.timestamp()):
                older.append(name)
    for names, what in ((missing, "nothing"), (older, "an older row than the database")):
        if names:
            result.problems.append(
                f"{view.name}: of {len(names)} of {len(rows)} entities the online store has {what} "
                f"({', '.join(names[:SHOWN])}): larder materialize --since {rows_since(rows)} writes them."
            )


def rows_since(rows: Sequence[tuple[Any, ...]]) -> str:
    """The day from which on a window holds the newest row of every entity."""
    return f"{min(newest for *_, newest in rows):%Y-%m-%d}"


def _table(view: Any) -> sql.Composable:
    source = view.batch_source.get_table_query_string()
    return sql.SQL(source) if source.startswith("(") else session.identifier(source)


def _view(connection: psycopg.Connection, view: Any, *, batch: bool) -> View:
    field_name = view.batch_source.timestamp_field
    rows, newest = connection.execute(
        sql.SQL("SELECT count(*), max({}) FROM {} AS source").format(sql.Identifier(field_name), _table(view))
    ).fetchall()[0]
    return View(view.name, "batch" if batch else "push", len(view.features), rows, newest, view.most_recent_end_time)


def _bars(connection: psycopg.Connection, result: Status) -> None:
    with suppress(*session.MISSING):  # a repository with views of its own has no bars
        result.newest_bar, result.rejected_bars, result.pending_symbols = connection.execute(BARS).fetchall()[0]


def _last_run(connection: psycopg.Connection, credentials: Credentials, result: Status) -> None:
    """What the last run left undone: it failed, refused files, or symbols wait though none is under way."""
    under_way = session.is_locked(connection, "larder run")
    result.last_run = runs.last(credentials, under_way=under_way)
    if result.last_run and (problem := result.last_run.problem()):
        result.problems.append(problem)
    with suppress(*session.MISSING):  # a repository with views of its own has no files
        result.refused_files = dict(connection.execute(REFUSED).fetchall())
    shown = list(result.refused_files.values())[:REFUSED_SHOWN]
    result.problems += [f"A file is refused: {reason}" for reason in shown]
    if len(result.refused_files) > len(shown):
        result.problems.append(f"{len(result.refused_files) - len(shown)} more files are refused.")
    if result.pending_symbols and not under_way:
        result.problems.append(
            f"Symbols that wait to be computed: {result.pending_symbols:,}; the next run does it, or larder run now."
        )


def _read(connection: psycopg.Connection, store: Any, views: list[Any], result: Status) -> None:
    """Read every feature of the views for the entity of the newest row of the first one."""
    first = views[0]
    keys = first.join_keys
    row = connection.execute(
        sql.SQL("SELECT {} FROM {} AS source ORDER BY {} DESC LIMIT 1").format(
            sql.SQL(", ").join(map(sql.Identifier, keys)),
            _table(first),
            sql.Identifier(first.batch_source.timestamp_field),
        )
    ).fetchone()
    if not row:
        result.problems.append(f"{first.name} has no rows yet.")
        return
    entity = dict(zip(keys, row, strict=True))
    same = [v for v in views if v.join_keys == keys]
    references = [f"{view.name}:{feature.name}" for view in same for feature in view.features]
    seconds = []
    try:
        for _ in range(READS + 1):  # the first one also connects
            begun = perf_counter()
            answer = store.get_online_features(references, [entity], full_feature_names=True).to_dict()
            seconds.append(perf_counter() - begun)
    except Exception as error:
        logger.debug("read", exc_info=True)
        raise LarderError(
            f"The online store cannot be read: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        ) from error
    values = {name: value[0] for name, value in answer.items() if name not in keys}
    empty = [v.name for v in same if all(values[f"{v.name}__{f.name}"] is None for f in v.features)]
    if empty:
        result.problems.append(f"The online store has nothing of {entity} for {', '.join(empty)}.")
    result.read = {"entity": entity, "features": len(references), "latency_ms": round(median(seconds[1:]) * 1000, 3)}


def as_text(result: Status) -> str:
    # The verdict comes first: what follows it are figures, of which none may sound better.
    verdict = ["not healthy:", *(f"- {problem}" for problem in result.problems)] if result.problems else ["healthy"]
    lines = [*verdict, "", f"{'view':<34}{'fed by':<8}{'features':>8}{'rows':>12}  {'newest':<18}{'materialized':<18}"]

    def minute(time: datetime | None) -> str:
        return f"{time:%Y-%m-%d %H:%M}" if time else "never"

    lines += [
        f"{v.name:<34}{v.fed_by:<8}{v.features:>8}{v.rows:>12,}  {minute(v.newest):<18}{minute(v.materialized):<18}"
        for v in result.views
    ]
    age = f", {result.age_seconds / 3600:.1f} hours ago" if result.age_seconds is not None else ""
    if result.active_host:
        spare = "; this host is a spare" if result.spare else ""
        lines += ["", f"pipeline              runs on {result.active_host}{spare}"]
    else:
        lines.append("")
    lines += [
        f"newest bar            {minute(result.newest_bar)}",
        f"last materialization  {minute(result.last_materialization)}{age}",
        f"last run              {_told(result.last_run, len(result.refused_files))}",
        f"refused files         {len(result.refused_files):,}",
        f"rejected bars         {result.rejected_bars:,}",
        f"symbols to compute    {result.pending_symbols:,}",
    ]
    if result.proven_backup:
        lines.append(f"backup proven         {backups.told(result.proven_backup)}")
    if result.read:
        lines.append(
            f"online read           {result.read['features']} features in {result.read['latency_ms']:.1f} ms (median)"
        )
    return "\n".join(lines)


def _told(run: runs.Run | None, refused: int) -> str:
    if run is None:
        return "never"
    if run.under_way:
        return f"{run.began:%Y-%m-%d %H:%M}, under way"
    done = "left out refused files" if refused else "succeeded"
    how = "did not end" if run.ended is None else "failed" if run.failure else done
    return f"{run.began:%Y-%m-%d %H:%M}, {how}"
