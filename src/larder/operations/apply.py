"""`larder apply`: the feature repository into the registry, when it changed, by one at a time."""

import hashlib
import logging
import sys
import traceback
from collections.abc import Collection
from datetime import datetime
from pathlib import Path

import psycopg

from larder import feast_version
from larder.errors import BusyError, ConfigError, LarderError
from larder.features.definitions import FILE as COMPUTED_VIEWS
from larder.log import event, logger
from larder.operations import active, feast_store, registry
from larder.operations.credentials import Credentials
from larder.postgres import session
from larder.quality import rules

# In the registry's own schema, so that it is backed up and restored with what it speaks of.
TABLE = """
CREATE TABLE IF NOT EXISTS larder_apply (
    project text PRIMARY KEY,
    fingerprint text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    run_at timestamptz -- when the last successful run of the pipeline began
);
-- What the registry held then.
ALTER TABLE larder_apply ADD COLUMN IF NOT EXISTS objects text[], ADD COLUMN IF NOT EXISTS features text[]
"""
REMEMBER = """
INSERT INTO larder_apply (project, fingerprint, objects, features) VALUES (%s, %s, %s, %s)
ON CONFLICT (project) DO UPDATE SET (fingerprint, objects, features, applied_at)
    = (excluded.fingerprint, excluded.objects, excluded.features, excluded.applied_at)
"""


def fingerprint(repo: Path) -> str:
    """Of every file that Feast would read, by name and content, and of Feast's version."""
    digest = hashlib.sha256(f"feast {feast_version.checked()}\n".encode())
    files = [
        p for p in sorted(repo.rglob("*.py")) if not any(part.startswith(".") for part in p.relative_to(repo).parts)
    ]
    if not files:
        raise ConfigError(f"{repo} holds no feature definitions (*.py).")
    for path in [*files, *repo.glob(".feastignore"), *repo.glob(COMPUTED_VIEWS)]:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(repo)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def apply(credentials: Credentials, repo: Path, *, force: bool = False) -> bool:
    """Whether anything was applied: the repository changed, or the registry lacks what was applied last.

    Feast removes from the registry what the repository no longer has.
    """
    if not repo.is_dir():
        raise ConfigError(f"There is no feature repository at {repo}.")
    project = credentials.feature_store_config()["project"]
    wanted = fingerprint(repo)
    _try_definitions(repo)
    with session.connect(credentials.registry_url, "apply") as connection:
        connection.execute("SET lock_timeout = '120s'")
        try:  # two applies at once lose objects
            connection.execute("SELECT pg_advisory_lock(hashtextextended('larder apply', 0))")
        except psycopg.errors.LockNotAvailable:
            raise BusyError("Another larder apply has been running for two minutes.") from None
        active.refuse_a_spare(credentials)
        connection.execute(TABLE)
        rows = connection.execute("SELECT fingerprint FROM larder_apply WHERE project = %s", [project]).fetchall()
        lost = lacking(connection, project)
        if rows == [(wanted,)] and not lost and not force:
            return False
        if lost:
            event("lost", level=logging.WARNING, project=project, objects=registry.named(lost))
        registry.forget_versions(connection, project)
        _feast_apply(credentials.feature_store, repo)
        with feast_store.quiet():
            features = registry.features(feast_store.open_store(credentials.feature_store))
        connection.execute(REMEMBER, [project, wanted, registry.objects(connection, project), features])
    event("applied", project=project, repo=repo)
    return True


def _try_definitions(repo: Path) -> None:
    from larder.features.formulas import Formulas

    formulas = Formulas(repo)
    try:
        rules.read(repo, formulas.definitions.features())
    except rules.RuleError as error:
        raise ConfigError(str(error)) from None
    formulas.try_out()


def lacking(connection: psycopg.Connection, project: str) -> list[str]:
    """What was applied and is no longer in the registry: `feature_views volume_indicators`."""
    try:
        rows = connection.execute("SELECT objects FROM larder_apply WHERE project = %s", [project]).fetchall()
    except session.MISSING:  # nothing was applied, or by a version that did not remember this
        return []
    applied = (rows[0][0] if rows else None) or []
    return sorted({*applied} - {*registry.objects(connection, project)})


def lacking_features(connection: psycopg.Connection, project: str, present: Collection[str]) -> list[str]:
    """Features that were applied and are not among those present: `volume_indicators:obv`."""
    try:
        rows = connection.execute("SELECT features FROM larder_apply WHERE project = %s", [project]).fetchall()
    except session.MISSING:
        return []
    applied = (rows[0][0] if rows else None) or []
    return sorted({*applied} - {*present})


def due(credentials: Credentials, repo: Path) -> bool:
    """Whether the repository, or a feature's definition, changed since the last successful run of the pipeline."""
    from larder.features import record
    from larder.features.formulas import Formulas

    with session.connect(credentials.pipeline_url, "due") as connection:
        if record.changed(connection, Formulas(repo)):
            return True
    with session.connect(credentials.registry_url, "due") as connection:
        if connection.execute("SELECT to_regclass('larder_apply')").fetchall()[0][0] is None:
            return False
        rows = connection.execute(
            "SELECT FROM larder_apply WHERE project = %s AND (run_at IS NULL OR run_at < applied_at)",
            [credentials.feature_store_config()["project"]],
        ).fetchall()
        return bool(rows)


def note_run(credentials: Credentials, began: datetime) -> None:
    """Note that a run of the pipeline that began then has succeeded."""
    with session.connect(credentials.registry_url, "run") as connection:
        connection.execute(TABLE)
        project = credentials.feature_store_config()["project"]
        connection.execute("UPDATE larder_apply SET run_at = %s WHERE project = %s", [began, project])


def _feast_apply(feature_store_yaml: Path, repo: Path) -> None:
    sys.dont_write_bytecode = True  # the repository may be read-only
    sys.path.insert(0, str(repo))
    with feast_store.quiet():
        from feast.repo_config import load_repo_config
        from feast.repo_operations import apply_total

        try:
            apply_total(load_repo_config(repo, feature_store_yaml), repo, skip_source_validation=False)
        except (Exception, SystemExit) as error:
            logger.debug("feast apply", exc_info=True)
            frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(repo)]
            where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
            what = (str(error).splitlines() or [""])[0]
            raise LarderError(f"Feast cannot apply {repo}{where}: {type(error).__name__}: {what}") from error
