"""`larder check`, and the last stage of a run: judge what lies in the database, and tell of it."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from larder.errors import ConfigError, LarderError
from larder.features import definitions
from larder.log import event
from larder.operations import check, drift, drift_report, metrics, quality
from larder.operations.check import Found
from larder.operations.credentials import Credentials
from larder.operations.drift import Judged
from larder.postgres import session
from larder.quality import rules

LONGEST = "10min"  # of a statement: nobody waits for this
REPORT = "drift.html"


@dataclass
class Checked:
    """What the rules found, and the newest day of each feature's drift."""

    findings: list[Found] = field(default_factory=list)
    drift: list[Judged] = field(default_factory=list)


def read(repo: Path) -> tuple[rules.Rules, definitions.Definitions]:
    """The rules of a repository and its computed views, judged. Raises ConfigError."""
    try:
        defined = definitions.read(repo)
        return rules.read(repo, defined.features()), defined
    except (definitions.DefinitionError, rules.RuleError) as error:
        raise ConfigError(str(error)) from None


def report(credentials: Credentials, repo: Path) -> str:
    """The report of drift as HTML, of what the last check found."""
    asked, _ = read(repo)
    with session.connect(credentials.pipeline_url, "drift") as connection:
        return drift_report.html(connection, asked.drift or rules.Drift(), drift.newest(connection))


def run(credentials: Credentials, repo: Path, metrics_dir: Path | None, *, new_reference: bool = False) -> Checked:
    """Judge days, features and drift; write quality.prom, drift.prom and drift.html. Nothing without rules."""
    told = Checked()
    asked, defined = read(repo)
    if not asked:
        return told
    with session.connect(credentials.pipeline_url, "check") as connection:
        try:
            connection.execute(f"SET statement_timeout = '{LONGEST}'")
            told.findings = check.check(connection, asked, defined)
            told.drift = drift.drift(connection, asked, defined, new_reference=new_reference)
        except psycopg.errors.QueryCanceled:
            raise LarderError(f"A statement of the check took longer than {LONGEST}.") from None
        for severity in ("fail", "warn"):
            for one in [found for found in told.findings if found.severity == severity][:5]:
                level = logging.ERROR if severity == "fail" else logging.WARNING
                event("found", level=level, rule=one.rule, of=one.of or one.symbol, what=one.message)
        event("checked", findings=len(told.findings), drifted=sum(one.moved for one in told.drift))
        if metrics_dir:
            metrics.write_quality(metrics_dir, *quality.counts(connection))
            metrics.write_drift(metrics_dir, told.drift)
            if asked.drift:
                report = drift_report.html(connection, asked.drift, told.drift)
                metrics.write_text(metrics_dir / REPORT, report)
    return told
