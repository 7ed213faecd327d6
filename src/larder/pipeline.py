"""`larder run`: the stages of the pipeline in order, by one host at a time."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import psycopg

from larder import db, metrics
from larder.apply import note_run
from larder.credentials import Credentials
from larder.errors import LarderError, RefusedFileError
from larder.log import event

STAGES = ("load", "compute", "materialize")


@dataclass
class _Run:
    seconds: dict[str, float] = field(default_factory=dict)
    bars: int = 0
    rejected: int = 0
    refused: int = 0
    rows: int = 0


def run(
    credentials: Credentials,
    stages: Sequence[str],
    incoming: Sequence[Path],
    *,
    days: int = 7,
    metrics_dir: Path | None = None,
) -> None:
    """Run the stages. A file that load refuses stops nothing, but the run then ends with RefusedFileError."""
    with db.connect(credentials.pipeline_url, "run") as connection, db.try_lock(connection, "larder run"):
        started = time.time()
        began: datetime = connection.execute("SELECT clock_timestamp()").fetchall()[0][0]
        done = _Run()
        success = False
        try:
            for stage in STAGES:
                if stage in stages:
                    begun = time.monotonic()
                    try:
                        _stage(stage, credentials, incoming, days, done)
                    finally:
                        done.seconds[stage] = time.monotonic() - begun
            note_run(credentials, began)
            success = True
        finally:
            event(
                "run",
                level=20 if success else 40,
                result="success" if success else "failure",
                seconds=time.time() - started,
                bars=done.bars,
                rejected=done.rejected,
                refused=done.refused,
                rows=done.rows,
            )
            if metrics_dir:
                _write_metrics(metrics_dir, connection, done, started, success=success)
    if done.refused:
        raise RefusedFileError(f"{done.refused} of the files could not be understood (see above); all else was done.")


def _stage(stage: str, credentials: Credentials, incoming: Sequence[Path], days: int, done: _Run) -> None:
    if stage == "load":
        from larder.load import load

        loaded = load(credentials.load_url, incoming)
        done.bars, done.rejected, done.refused = loaded.changed, loaded.rejected, loaded.refused
    elif stage == "compute":
        from larder.compute import compute

        done.rows = compute(credentials.pipeline_url)
    else:
        from larder.materialize import materialize

        materialize(credentials, days=days)


def _write_metrics(
    directory: Path, connection: psycopg.Connection, done: _Run, started: float, *, success: bool
) -> None:
    now = time.time()
    last_success = "larder_pipeline_last_success_timestamp_seconds"
    values: dict[str, float | dict[str, float]] = {
        "larder_pipeline_last_run_timestamp_seconds": now,
        last_success: now if success else metrics.read(directory, last_success),
        "larder_pipeline_success": float(success),
        "larder_pipeline_duration_seconds": now - started,
        "larder_pipeline_stage_duration_seconds": done.seconds,
        "larder_pipeline_bars_changed": done.bars,
        "larder_pipeline_bars_rejected": done.rejected,
        "larder_pipeline_files_refused": done.refused,
        "larder_pipeline_feature_rows_changed": done.rows,
    }
    # A repository with views of its own has no bars, and a database that was lost gives no counts.
    with suppress(psycopg.Error):
        rows = connection.execute(
            "SELECT (SELECT count(*) FROM market_data.rejected_bars), "
            "(SELECT coalesce(extract(epoch FROM max(event_timestamp)), 0) FROM market_data.ohlcv_daily)"
        ).fetchall()
        values["larder_rejected_bars"], values["larder_newest_bar_timestamp_seconds"] = map(float, rows[0])
    try:
        metrics.write(directory, values)
    except OSError as error:
        raise LarderError(f"The metrics cannot be written to {directory}: {error.strerror}.") from error
