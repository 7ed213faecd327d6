"""`larder status`: all facts about the stack, those that are wrong first."""

from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any

from larder.operations import active, feast_store
from larder.operations.credentials import Credentials
from larder.operations.facts import Fact, State, told
from larder.operations.survey import View, survey
from larder.postgres import session

MAX_AGE_HOURS = 26.0  # of a materialization, and of a day's rows: a daily run, and two hours


@dataclass
class Status:
    """What was found, and which host runs the pipeline."""

    project: str
    active_host: str | None = None
    spare: bool = False  # this host is one: another runs the pipeline
    views: list[View] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """What is wrong, a sentence each."""
        return told(self.facts, State.FAILED)

    @property
    def healthy(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        warnings = told(self.facts, State.WARNING)
        return {"healthy": self.healthy, "problems": self.problems, "warnings": warnings, **asdict(self)}


def status(credentials: Credentials, *, max_age_hours: float = MAX_AGE_HOURS) -> Status:
    with session.connect(credentials.pipeline_url, "status") as connection, feast_store.quiet():
        store = feast_store.open_store(credentials.feature_store)
        found = survey(connection, credentials, store, late=timedelta(hours=max_age_hours))
        result = Status(store.project, active.active(credentials), views=found.views, facts=found.facts)
        result.spare = active.here() not in (None, result.active_host) and result.active_host is not None
    return result


def as_text(result: Status) -> str:
    # The verdict comes first: what follows it are figures, of which none may sound better.
    lines = ["not healthy:", *(f"- {problem}" for problem in result.problems)] if result.problems else ["healthy"]
    if warnings := told(result.facts, State.WARNING):
        lines += ["", "warnings:", *(f"- {warning}" for warning in warnings)]
    lines += ["", f"{'view':<34}{'fed by':<8}{'features':>8}{'entities':>10}{'online':>10}  {'newest':<18}materialized"]

    def minute(time: datetime | None) -> str:
        return f"{time:%Y-%m-%d %H:%M}" if time else "never"

    def number(count: int | None) -> str:
        return "" if count is None else f"{count:,}"

    lines += [
        f"{v.name:<34}{v.fed_by:<8}{v.features:>8}{number(v.entities):>10}{number(v.online):>10}  "
        f"{minute(v.newest):<18}{minute(v.materialized)}"
        for v in result.views
    ]
    lines.append("")
    if result.active_host:
        spare = "; this host is a spare" if result.spare else ""
        lines.append(f"The pipeline runs on {result.active_host}{spare}.")
    # What is so of each view stands in the table.
    lines += told((fact for fact in result.facts if fact.of not in {v.name for v in result.views}), State.OK)
    lines += told(result.facts, State.UNKNOWN)
    return "\n".join(lines)
