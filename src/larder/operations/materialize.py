"""`larder materialize`: the newest row of each entity into the online store, corrected ones too.

Feast's own watermark (materialize-incremental) is event time: a bar that arrives late, or again, is behind it for ever.
So a window that ends now is materialized each time. Redis would still skip a corrected row, because its timestamp is
not newer than what is stored; `skip_dedup: true` in the pipeline's feature_store.yaml writes it. That is right here:
 - every window ends at the database's now(), so that the newest row of an entity in it is the newest row there is, and
   writing it cannot take the store back to an older one;
 - one writes at a time: a lock admits one materialization, and views that are fed by push are left out (a push keeps
   Feast's comparison of timestamps).
"""

from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any

import psycopg

from larder.errors import LarderError
from larder.log import event, logger
from larder.operations import evictions, feast_store
from larder.operations.credentials import Credentials
from larder.postgres import session

# A row that changed meanwhile was noted again and keeps its note.
DONE = """
DELETE FROM features.pending_materialize p USING unnest(%s::text[], %s::timestamptz[]) AS done (symbol, noted_at)
WHERE (p.symbol, p.noted_at) = (done.symbol, done.noted_at)
"""
BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)


def materialize(credentials: Credentials, *, days: int = 7, since: datetime | None = None) -> int:
    """Write a window of every batch view to the online store; returns the number of views.

    The window is `days` long, longer where a symbol with only older bars has changed; `since` sets its start. After an
    apply, views are materialized from the beginning: they may have features that the online store has nothing of.
    """
    with (
        session.connect(credentials.pipeline_url, "materialize") as connection,
        session.try_lock(connection, "larder materialize"),
    ):
        pending, start, end = _window(connection, days)
        applied = _applied(credentials)
        with feast_store.quiet():
            store = feast_store.open_store(credentials.feature_store)
            views = feast_store.batch_views(store)
            evictions.note(credentials, store)
            windows: dict[datetime, list[str]] = {}
            for view in views:
                last = view.most_recent_end_time
                begin = since or (BEGINNING if last is None or last < applied else start)
                windows.setdefault(begin, []).append(view.name)
            for begin, names in windows.items():
                started = monotonic()
                _some(store, names, begin, end)
                event("materialized", views=" ".join(names), start=begin.isoformat(), seconds=monotonic() - started)
        if pending:
            symbols, times = zip(*pending, strict=True)
            connection.execute(DONE, [list(symbols), list(times)])
    return len(views)


def _window(connection: psycopg.Connection, days: int) -> tuple[list[tuple[str, datetime]], datetime, datetime]:
    """What is pending, and the window: from `days` ago, or from the newest bar of a changed symbol if that is older."""
    end: datetime = connection.execute("SELECT now()").fetchall()[0][0]
    start = end - timedelta(days=days)
    # A repository with views of its own may have no such table.
    if connection.execute("SELECT to_regclass('features.pending_materialize')").fetchall()[0][0] is None:
        return [], start, end
    rows = connection.execute("SELECT symbol, noted_at, since FROM features.pending_materialize").fetchall()
    return [(symbol, noted_at) for symbol, noted_at, _ in rows], min([start, *(since for *_, since in rows)]), end


def _applied(credentials: Credentials) -> datetime:
    """When `larder apply` last changed the registry."""
    with session.connect(credentials.registry_url, "the registry") as connection:
        if connection.execute("SELECT to_regclass('larder_apply')").fetchall()[0][0] is None:
            return BEGINNING
        rows = connection.execute(
            "SELECT applied_at FROM larder_apply WHERE project = %s", [credentials.feature_store_config()["project"]]
        ).fetchall()
        return rows[0][0] if rows else BEGINNING


def _some(store: Any, views: list[str], start: datetime, end: datetime) -> None:
    """Views of one window together: the compute engine reads and writes some of them side by side."""
    try:
        store.materialize(start, end, views)
    except Exception as error:
        logger.debug("materialize", exc_info=True)
        which = ", ".join(getattr(error, "__notes__", views))  # the engine notes the view that failed
        raise LarderError(
            f"{which} cannot be materialized: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        ) from error
