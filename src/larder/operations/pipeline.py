"""`larder run`: the stages of the pipeline in order, by one host at a time."""

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import psycopg

from larder.bars.settings import Files
from larder.errors import BusyError, LarderError, RefusedFileError, SymbolsError, reason
from larder.log import event, logger
from larder.operations import active, runs
from larder.operations.apply import note_run
from larder.operations.credentials import Credentials
from larder.operations.lineage import Lineage
from larder.postgres import session

STAGES = ("load", "compute", "materialize", "check")
STORED = """
SELECT (SELECT count(*) FROM market_data.rejected_bars),
       (SELECT coalesce(extract(epoch FROM max(event_timestamp)), 0) FROM market_data.ohlcv_daily)
"""


@dataclass
class _Run:
    started: float = field(default_factory=time.time)
    success: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    bars: int = 0
    rejected: int = 0
    quarantined: int = 0
    refused: int = 0
    not_computed: SymbolsError | None = None
    rows: int = 0
    stored: dict[str, float] = field(default_factory=dict)
    lineage: Lineage | None = None


def run(
    credentials: Credentials,
    stages: Sequence[str],
    incoming: Sequence[Path],
    repo: Path,
    *,
    days: int = 7,
    metrics_dir: Path | None = None,
    files: Files | None = None,
) -> None:
    """Run the stages. A file that is refused, and a symbol that cannot be computed, keep out nothing else.

    The run then ends with RefusedFileError or SymbolsError.
    """
    done = _Run()
    try:
        with session.connect(credentials.pipeline_url, "run") as connection, session.try_lock(connection, "larder run"):
            active.refuse_a_spare(credentials)
            began: datetime = connection.execute("SELECT clock_timestamp()").fetchall()[0][0]
            runs.begin(credentials)
            done.lineage = lineage = Lineage(credentials, repo, connection)
            try:
                with lineage.job("pipeline"):
                    for stage in STAGES:
                        if stage in stages:
                            begun = time.monotonic()
                            try:
                                with lineage.job(stage):
                                    _stage(stage, credentials, incoming, repo, days, files, done, metrics_dir)
                            finally:
                                done.seconds[stage] = time.monotonic() - begun
                    if done.not_computed:
                        raise done.not_computed
                    if "materialize" in stages:
                        note_run(credentials, began)
                    done.stored = _stored(connection)
            except BaseException as error:
                with suppress(LarderError):  # where the database is lost, the note that it began stays
                    runs.end(credentials, _why(error))
                raise
            runs.end(credentials)
            done.success = True
    except BusyError:  # the other one reports, on this host or on another
        raise
    except Exception:
        _report(done, metrics_dir)
        _tell_facts(credentials, metrics_dir)
        raise
    except BaseException:  # it was stopped, and has no time to look at all else
        _report(done, metrics_dir)
        raise
    _report(done, metrics_dir)
    _tell_facts(credentials, metrics_dir)
    if done.refused:
        raise RefusedFileError(f"{done.refused} of the files could not be understood (see above); all else was done.")


def _why(error: BaseException) -> str:
    if isinstance(error, LarderError):
        return error.message
    return "it was stopped." if isinstance(error, SystemExit | KeyboardInterrupt) else f"{reason(error)}."


def _stage(
    stage: str,
    credentials: Credentials,
    incoming: Sequence[Path],
    repo: Path,
    days: int,
    files: Files | None,
    done: _Run,
    metrics_dir: Path | None,
) -> None:
    if stage == "load":
        from larder.bars.load import load
        from larder.operations import checks

        loaded = load(credentials.load_url, incoming, files, rules=checks.read(repo)[0])
        done.bars, done.rejected, done.refused = loaded.changed, loaded.rejected, loaded.refused
        done.quarantined = loaded.quarantined
    elif stage == "compute":
        from larder.features.compute import compute
        from larder.features.formulas import Formulas

        try:
            done.rows = compute(credentials.pipeline_url, Formulas(repo))
        except SymbolsError as error:  # the others go on to the online store
            done.not_computed, done.rows = error, error.rows
    elif stage == "materialize":
        from larder.operations.materialize import materialize

        materialize(credentials, days=days)
    else:
        _check(credentials, repo, metrics_dir)


def _check(credentials: Credentials, repo: Path, metrics_dir: Path | None) -> None:
    """Judge what is served by now. No run fails because it cannot be judged: the age of the last check tells of it."""
    from larder.operations import checks

    try:
        checks.run(credentials, repo, metrics_dir)
    except Exception as error:
        logger.debug("check", exc_info=True)
        event("not checked", level=logging.ERROR, reason=reason(error))


def _stored(connection: psycopg.Connection) -> dict[str, float]:
    with suppress(*session.MISSING):  # a repository with views of its own has no bars
        rejected, newest = connection.execute(STORED).fetchall()[0]
        return {"larder_rejected_bars": rejected, "larder_newest_bar_timestamp_seconds": float(newest)}
    return {}


def _report(done: _Run, metrics_dir: Path | None) -> None:
    now = time.time()
    event(
        "run",
        level=logging.INFO if done.success else logging.ERROR,
        result="success" if done.success else "failure",
        seconds=now - done.started,
        bars=done.bars,
        rejected=done.rejected,
        quarantined=done.quarantined,
        refused=done.refused,
        rows=done.rows,
    )
    lineage = done.lineage.report() if done.lineage else {}
    if not metrics_dir:
        return
    from larder.operations import metrics

    last_success = "larder_pipeline_last_success_timestamp_seconds"
    try:
        metrics.write(
            metrics_dir,
            {
                "larder_pipeline_last_run_timestamp_seconds": now,
                last_success: now if done.success else metrics.read(metrics_dir, last_success),
                "larder_pipeline_success": float(done.success),
                "larder_pipeline_duration_seconds": now - done.started,
                "larder_pipeline_stage_duration_seconds": done.seconds,
                "larder_pipeline_bars_changed": done.bars,
                "larder_pipeline_bars_rejected": done.rejected,
                "larder_pipeline_bars_quarantined": done.quarantined,
                "larder_pipeline_files_refused": done.refused,
                "larder_pipeline_feature_rows_changed": done.rows,
                **done.stored,
                **lineage,
            },
        )
    except OSError as error:
        raise LarderError(f"The metrics cannot be written to {metrics_dir}: {error.strerror}.") from error


def _tell_facts(credentials: Credentials, metrics_dir: Path | None) -> None:
    """Write the metrics of `larder status`, which say themselves how old they are. No run fails because they cannot."""
    if not metrics_dir:
        return
    from larder.operations import metrics, status

    try:
        metrics.write_facts(metrics_dir, status.status(credentials).facts)
    except Exception as error:
        logger.debug("status", exc_info=True)
        event("status is unknown", level=logging.WARNING, reason=reason(error))
