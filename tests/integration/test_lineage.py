"""OpenLineage: a real receiver is told what a run does; whatever the receiver does, the run goes on."""

import json
import os
import socket
import ssl
import subprocess
import threading
from contextlib import contextmanager
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from uuid import UUID

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from test_lost_state import REPOSITORY, SYMBOLS, TODAY, VIEWS, online, stack  # noqa: F401 # fixtures

from larder.errors import LarderError
from larder.operations import lineage, pipeline

pytestmark = pytest.mark.skipif(
    not os.environ.get("LARDER_TEST_POSTGRES"),
    reason="LARDER_TEST_POSTGRES names no server; the pipeline scenario does",
)
STAGES = ["load", "compute", "materialize", "check"]
TOKEN = "t0ken-of-the-receiver"
FACETS = "https://openlineage.io/spec/"


class Receiver(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, handler):
        super().__init__(("127.0.0.1", 0), handler)
        self.events, self.headers, self.over = [], [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/api/v1/lineage"


class Taking(BaseHTTPRequestHandler):
    """Takes every event."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.events.append(json.loads(body or "null"))
        self.server.headers.append(dict(self.headers))
        self.answer()

    def answer(self):
        self.send_response(201)
        self.end_headers()

    do_GET = do_POST  # noqa: N815 # what a redirect makes of a POST

    def log_message(self, *_):
        pass


class Refusing(Taking):
    def answer(self):
        self.send_error(500)


class Silent(Taking):
    """Answers much later than anybody waits."""

    def answer(self):
        self.server.over.wait(60)
        super().answer()


class Dripping(Taking):
    """Sends a byte again and again: no read ever takes long."""

    def answer(self):
        for byte in b"HTTP/1.1 201 Created" + b" " * 600:
            if self.server.over.wait(0.1):
                break
            self.wfile.write(bytes([byte]))
        self.wfile.write(b"\r\n\r\n")


@contextmanager
def receiver(handler):
    server = Receiver(handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def run(stack, tmp_path, monkeypatch):  # noqa: F811
    """Run the pipeline with one new bar of each symbol, and a receiver; return what the metrics say of the events."""
    incoming = tmp_path / "incoming"
    incoming.mkdir()
    rows = [f"{symbol},{TODAY},11,13,10,12,200" for symbol in SYMBOLS]
    (incoming / "today.csv").write_text("Symbol,Date,Open,High,Low,Close,Volume\n" + "\n".join(rows) + "\n")

    def run(url, stages=STAGES):
        monkeypatch.setenv("LARDER_OPENLINEAGE_URL", url)
        pipeline.run(stack, stages, [incoming], REPOSITORY, metrics_dir=tmp_path / "metrics")
        return told()

    def told():
        lines = (tmp_path / "metrics/pipeline.prom").read_text().splitlines()
        return {
            name: float(value)
            for name, value in (line.split() for line in lines if line.startswith("larder_pipeline_lineage"))
        }

    run.told, run.credentials, run.file = told, stack, incoming / "today.csv"
    return run


def counts(sent, lost):
    return {"larder_pipeline_lineage_sent": sent, "larder_pipeline_lineage_lost": lost}


def names(datasets):
    return [(dataset["namespace"], dataset["name"]) for dataset in datasets]


def rows(credentials, query):
    with psycopg.connect(credentials.pipeline_url) as connection:
        return connection.execute(query).fetchall()


def facets(held):
    if isinstance(held, dict):
        for name, one in held.items():
            if name in ("facets", "outputFacets", "inputFacets"):
                yield from one.values()
            yield from facets(one)
    elif isinstance(held, list):
        for one in held:
            yield from facets(one)


def test_a_run_is_told_from_the_file_to_the_views_of_the_online_store(run):
    (run.credentials.directory / "openlineage_token").write_text(TOKEN + "\n")
    with receiver(Taking) as server:
        assert run(server.url) == counts(10, 0)
    assert [(event["eventType"], event["job"]["name"]) for event in server.events] == [
        ("START", "pipeline"),
        *[(kind, stage) for stage in STAGES for kind in ("START", "COMPLETE")],
        ("COMPLETE", "pipeline"),
    ]
    assert {event["job"]["namespace"] for event in server.events} == {"larder.test"}
    assert {header["Authorization"] for header in server.headers} == {f"Bearer {TOKEN}"}
    assert {header["Content-Type"] for header in server.headers} == {"application/json"}
    ids = {}
    for event in server.events:
        ids.setdefault(event["job"]["name"], set()).add(str(UUID(event["run"]["runId"])))
        assert datetime.fromisoformat(event["eventTime"]).utcoffset() == timedelta(0)
        assert event["schemaURL"] == f"{FACETS}2-0-2/OpenLineage.json#/$defs/RunEvent"
        assert event["producer"].startswith("urn:larder:")
        parent = event["run"]["facets"].get("parent")
        assert (parent is None) == (event["job"]["name"] == "pipeline")
        if parent:
            assert {parent["run"]["runId"]} == ids["pipeline"]
            assert parent["job"] == {"namespace": "larder.test", "name": "pipeline"}
    assert {len(of) for of in ids.values()} == {1}
    every = [*facets(server.events)]
    assert len(every) > 50
    assert all(one["_producer"].startswith("urn:") and one["_schemaURL"].startswith(FACETS) for one in every)

    ended = {event["job"]["name"]: event for event in server.events if event["eventType"] == "COMPLETE"}
    given = conninfo_to_dict(run.credentials.pipeline_url)
    postgres = f"postgres://localhost:{given.get('port', 5432)}"
    bars = (postgres, f"{given['dbname']}.market_data.ohlcv_daily")
    features = {(postgres, f"{given['dbname']}.features.{view}") for view in VIEWS}
    (file,) = names(ended["load"]["inputs"])
    assert file == (f"file://{socket.gethostname()}", str(run.file))
    assert names(ended["load"]["outputs"]) == [bars]
    assert names(ended["compute"]["inputs"]) == [bars]
    assert set(names(ended["compute"]["outputs"])) == set(names(ended["materialize"]["inputs"])) == features
    redis = f"redis://{run.credentials.feature_store_config()['online_store']['connection_string']}"
    assert set(names(ended["materialize"]["outputs"])) == {(redis, f"test.{view}") for view in VIEWS}

    statistics = ended["load"]["outputs"][0]["outputFacets"]["outputStatistics"]
    assert statistics["rowCount"] == len(SYMBOLS)
    newest = rows(
        run.credentials, "SELECT max(load_id), (SELECT max(run_id) FROM features.runs) FROM market_data.loads"
    )
    numbers = [ended["load"]["run"]["facets"]["larder"]["loads"], ended["compute"]["run"]["facets"]["larder"]["runs"]]
    assert numbers == [[newest[0][0]], [newest[0][1]]]
    columns = {
        output["name"].rpartition(".")[2]: {c["name"]: c for c in output["facets"]["schema"]["fields"]}
        for output in ended["compute"]["outputs"]
    }
    assert columns["technical_indicators_ma"]["sma_20"]["type"] == "double precision"
    assert columns["technical_indicators_ma"]["sma_20"]["description"]
    online_columns = {
        field["name"]
        for output in ended["materialize"]["outputs"]
        if output["name"].endswith("technical_indicators_ma")
        for field in output["facets"]["schema"]["fields"]
    }
    assert {"symbol", "sma_20"} <= online_columns


def test_a_stage_that_fails_is_told_with_the_reason(run):
    with psycopg.connect(run.credentials.pipeline_url) as connection:
        connection.execute("DROP TABLE features.pending_materialize")
    with receiver(Taking) as server, pytest.raises(LarderError):
        run(server.url)
    failed = {e["job"]["name"]: e for e in server.events if e["eventType"] == "FAIL"}
    assert [*failed] == ["compute", "pipeline"]
    for event in failed.values():
        assert "pending_materialize" in event["run"]["facets"]["errorMessage"]["message"]
        assert event["run"]["facets"]["errorMessage"]["programmingLanguage"] == "Python"
    assert run.told() == counts(6, 0)


@pytest.mark.parametrize("handler", [Refusing, Silent, Dripping, None])
def test_no_receiver_fails_a_run_and_what_it_has_not_taken_is_counted_and_told(run, handler, monkeypatch, caplog):
    """With no bound to what a run waits, the silent and the dripping one would take the events in the end."""
    monkeypatch.setattr(lineage, "SECONDS", 1.0)
    with receiver(handler or Taking) as server:
        url = server.url if handler else "http://127.0.0.1:1/"
        assert run(url, ["load", "compute"]) == counts(0, 6)
    assert [record.getMessage() for record in caplog.records if "lineage not told events=6" in record.getMessage()]


def test_the_token_goes_to_nobody_else(run):
    (run.credentials.directory / "openlineage_token").write_text(TOKEN)
    with receiver(Taking) as elsewhere:

        class Redirecting(Taking):
            def answer(self):
                self.send_response(int(self.path[1:]))
                self.send_header("Location", elsewhere.url)
                self.end_headers()

        for status in (302, 307):
            with receiver(Redirecting) as server:
                assert run(server.url.replace("/api/v1/lineage", f"/{status}"), ["check"]) == counts(0, 4)
        assert elsewhere.events == []


def test_a_receiver_is_told_by_tls_only_if_its_certificate_is_trusted(run, tmp_path, monkeypatch):
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", tmp_path / "tls.key", "-out", tmp_path / "tls.crt"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *subject, *files]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    with receiver(Taking) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        url = server.url.replace("http:", "https:")
        assert run(url, ["check"]) == counts(0, 4)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "tls.crt"))
        assert run(url, ["check"]) == counts(4, 0)


def test_without_a_receiver_nothing_is_told(run):
    assert run("") == {}
