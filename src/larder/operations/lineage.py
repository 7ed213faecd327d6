"""OpenLineage events of a run of the pipeline: files -> bars -> features -> the online store's views.

The run and each of its stages is a job of the namespace that the project names; START comes when it begins, COMPLETE or
FAIL when it ends. OpenLineage wants UUIDs: a run's follows from the project, the job and the time at which it began.
The numbers that Larder itself has for loads and computations, which stored rows have, are in the run facet `larder`.

Nothing that becomes of an event fails a run, and all of them together hold it up for `SECONDS` at most. What the
receiver has not taken is counted. The module has no client library: the events are plain JSON, and openlineage-python
would bring packages, retries with pauses, and settings from the environment.
"""

import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from os import environ
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import psycopg

from larder import origin
from larder.errors import LarderError, reason
from larder.features import definitions
from larder.log import event, logger
from larder.operations import feast_store
from larder.operations.credentials import Credentials
from larder.postgres import session

SECONDS = 5.0  # of a run, for all its events together
ONE_SECONDS = 3.0  # of an event
MOST_FILES = 1000  # of an event
SPEC = "https://openlineage.io/spec"
SCHEMA = f"{SPEC}/2-0-2/OpenLineage.json#/$defs"
BARS = "market_data.ohlcv_daily"

LOADS = "SELECT load_id, path, changed FROM market_data.loads WHERE loaded_at >= %s ORDER BY load_id"
RUNS = "SELECT run_id FROM features.runs WHERE began_at >= %s ORDER BY run_id"
COLUMNS = """
SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute
WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped ORDER BY attnum
"""

Json = dict[str, Any]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow nobody elsewhere: the token is for this receiver alone."""


class Lineage:
    """What tells the receiver, for one run; without a URL it tells nobody anything."""

    def __init__(self, credentials: Credentials, repo: Path, connection: psycopg.Connection) -> None:
        self.credentials, self.repo, self.connection = credentials, repo, connection
        self.url = environ.get("LARDER_OPENLINEAGE_URL", "")
        self.sent = self.lost = 0
        self.left = SECONDS
        self.why = ""
        self.parents: list[Json] = []

    @contextmanager
    def job(self, name: str) -> Iterator[None]:
        """Tell that a job begins, and how it ended; one within another is its child."""
        if not self.url:
            yield
            return
        began = datetime.now(UTC)
        self._tell("START", name, began)
        try:
            with self._child(name, began):
                yield
        except BaseException as error:
            self._tell("FAIL", name, began, error)
            raise
        self._tell("COMPLETE", name, began)

    def report(self) -> Mapping[str, float]:
        """Tell the journal of what was lost; return the metrics of the events."""
        if not self.url:
            return {}
        if self.lost:
            event("lineage not told", level=logging.WARNING, events=self.lost, reason=self.why)
        return {"larder_pipeline_lineage_sent": self.sent, "larder_pipeline_lineage_lost": self.lost}

    @contextmanager
    def _child(self, name: str, began: datetime) -> Iterator[None]:
        depth = len(self.parents)
        with suppress(Exception):  # without a project there is no event either, and that is counted
            self.parents.append({"run": {"runId": self._id(name, began)}, "job": self._job(name)})
        try:
            yield
        finally:
            del self.parents[depth:]

    def _tell(self, kind: str, name: str, began: datetime, error: BaseException | None = None) -> None:
        try:
            self._post(json.dumps(self._event(kind, name, began, error)).encode())
            self.sent += 1
        except Exception as failure:
            logger.debug("lineage", exc_info=True)
            self.lost += 1
            self.why = self.why or _said(failure)

    def _post(self, body: bytes) -> None:
        """Hand over an event. A thread does it, since a name server or a receiver may take for ever in many ways."""
        if self.left <= 0:
            raise LarderError(f"the receiver has taken {SECONDS:g} seconds of the run")
        outcome: list[Exception | None] = []
        headers = {"Content-Type": "application/json", **self._authorization()}
        request = urllib.request.Request(self.url, body, headers, method="POST")  # noqa: S310 # the role says which

        def post() -> None:
            try:
                opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)
                with opener.open(request, timeout=ONE_SECONDS):
                    outcome.append(None)
            except urllib.error.HTTPError as refusal:
                outcome.append(LarderError(f"the receiver answers {refusal.code}"))
            except Exception as failure:
                outcome.append(failure)

        begun = time.monotonic()
        thread = threading.Thread(target=post, name="lineage", daemon=True)
        thread.start()
        thread.join(min(ONE_SECONDS, self.left))
        self.left -= time.monotonic() - begun
        if not outcome:
            raise LarderError("the receiver does not answer in time")
        if outcome[0]:
            raise outcome[0]

    def _authorization(self) -> dict[str, str]:
        token = self.credentials.openlineage_token
        return {"Authorization": f"Bearer {token}"} if token else {}

    def _event(self, kind: str, name: str, began: datetime, error: BaseException | None) -> Json:
        inputs, outputs, numbers = self._datasets(name, began, ended=kind != "START")
        who = {"host": origin.host(), "code": origin.code(), "invocation": origin.invocation()}
        run: Json = {"larder": self._facet(f"{SCHEMA}/RunFacet", **who, **numbers)}
        if self.parents:
            run["parent"] = self._facet(self._schema("1-0-1/ParentRunFacet"), **self.parents[-1])
        if error:
            run["errorMessage"] = self._facet(
                self._schema("1-0-1/ErrorMessageRunFacet"), message=_said(error), programmingLanguage="Python"
            )
        job_type = {"processingType": "BATCH", "integration": "LARDER", "jobType": "TASK" if self.parents else "DAG"}
        job = self._job(name) | {"facets": {"jobType": self._facet(self._schema("2-0-3/JobTypeJobFacet"), **job_type)}}
        return {
            "eventType": kind,
            "eventTime": (began if kind == "START" else datetime.now(UTC)).isoformat(),
            "run": {"runId": self._id(name, began), "facets": run},
            "job": job,
            "inputs": inputs,
            "outputs": outputs,
            "producer": _producer(),
            "schemaURL": f"{SCHEMA}/RunEvent",
        }

    @property
    def project(self) -> str:
        return str(self.credentials.feature_store_config()["project"])

    def _job(self, name: str) -> Json:
        return {"namespace": f"larder.{self.project}", "name": name}

    def _id(self, name: str, began: datetime) -> str:
        return str(uuid5(NAMESPACE_URL, f"larder.{self.project}/{name}/{began.isoformat()}"))

    @staticmethod
    def _schema(facet: str) -> str:
        return f"{SPEC}/facets/{facet}.json#/$defs/{facet.partition('/')[2]}"

    @staticmethod
    def _facet(schema: str, **held: Any) -> Json:
        return {"_producer": _producer(), "_schemaURL": schema, **held}

    def _datasets(self, name: str, began: datetime, *, ended: bool) -> tuple[list[Json], list[Json], Json]:
        """What a job reads and writes, and Larder's numbers of what it did; less where that cannot be found out."""
        found: tuple[list[Json], list[Json], Json] = [], [], {}
        with suppress(Exception):  # the run itself says what is wrong with the database or the repository
            if name == "load":
                found = self._load(began, ended=ended)
            elif name in ("compute", "check"):
                found = self._compute(name, began, ended=ended)
            elif name == "materialize" and ended:
                found = self._materialize()
        return found

    def _load(self, began: datetime, *, ended: bool) -> tuple[list[Json], list[Json], Json]:
        loads: list[Any] = []
        if ended:
            with suppress(*session.MISSING):  # a repository of one's own may note no loads
                loads = self.connection.execute(LOADS, [began]).fetchall()
        files = [{"namespace": f"file://{origin.host()}", "name": path} for _, path, _ in loads[:MOST_FILES]]
        bars = self._table(BARS)
        if ended:
            rows = sum(changed for *_, changed in loads)
            statistics = self._facet(self._schema("1-0-2/OutputStatisticsOutputDatasetFacet"), rowCount=rows)
            bars["outputFacets"] = {"outputStatistics": statistics}
        return files, [bars], {"loads": [number for number, *_ in loads]} if ended else {}

    def _compute(self, name: str, began: datetime, *, ended: bool) -> tuple[list[Json], list[Json], Json]:
        defined = definitions.read(self.repo)
        said = {view.table: {f.name: f.description or f.formula for f in view.features} for view in defined.views}
        features = [self._table(view.table, said[view.table]) for view in defined.views]
        sources = [self._table(table) for table in defined.sources]
        if name == "check":
            return [*sources, *features], [], {}
        numbers = {"runs": [n for (n,) in self.connection.execute(RUNS, [began])]} if ended else {}
        return sources, features, numbers

    def _materialize(self) -> tuple[list[Json], list[Json], Json]:
        with feast_store.quiet():
            views = feast_store.batch_views(feast_store.open_store(self.credentials.feature_store))
        tables = [view.batch_source.get_table_query_string() for view in views]
        inputs = [self._table(table) for table in dict.fromkeys(tables) if not table.startswith("(")]
        address = self.credentials.feature_store_config()["online_store"]["connection_string"].partition(",")[0]
        outputs = [
            {
                "namespace": f"redis://{address}",
                "name": f"{self.project}.{view.name}",
                "facets": {"schema": self._fields((c.name, str(c.dtype), c.description) for c in view.schema)},
            }
            for view in views
        ]
        return inputs, outputs, {}

    def _table(self, table: str, said: Mapping[str, str] | None = None) -> Json:
        """A table with its columns."""
        given = psycopg.conninfo.conninfo_to_dict(self.credentials.pipeline_url)
        columns: Sequence[Any] = self.connection.execute(COLUMNS, [table]).fetchall()
        host = given.get("host") or "localhost"
        return {
            "namespace": f"postgres://{'localhost' if str(host).startswith('/') else host}:{given.get('port') or 5432}",
            "name": f"{given.get('dbname')}.{table}",
            "facets": {"schema": self._fields((name, kind, (said or {}).get(name, "")) for name, kind in columns)},
        }

    def _fields(self, columns: Iterator[tuple[str, str, str]]) -> Json:
        fields = [
            {"name": name, "type": kind} | ({"description": said} if said else {}) for name, kind, said in columns
        ]
        return self._facet(self._schema("1-1-1/SchemaDatasetFacet"), fields=fields)


def _producer() -> str:
    return f"urn:larder:{origin.code()}"


def _said(error: BaseException) -> str:
    if isinstance(error, LarderError):
        return error.message
    return reason(error) if isinstance(error, Exception) else "it was stopped"
