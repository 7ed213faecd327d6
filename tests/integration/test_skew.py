"""`larder skew`: what clients were served is compared with a training set, in real stores and over the wire."""

import asyncio
import json
import os
import ssl
import subprocess
from datetime import UTC, datetime, timedelta

import pandas as pd
import psycopg
import pytest
from click.testing import CliRunner
from feast import FeatureStore
from feast.feature_server import get_app
from psycopg.conninfo import make_conninfo
from test_lost_state import REPOSITORY, SYMBOLS, TODAY, online, stack  # noqa: F401 # fixtures
from test_verify import run, walking  # noqa: F401 # a fixture

from larder.bars.load import load
from larder.cli import main
from larder.operations import skew
from larder.operations.facts import State
from larder.operations.materialize import materialize
from larder.operations.status import status
from larder.serving import served
from larder.serving.application import failed
from larder.serving.checks import Server
from larder.serving.online import PATH, Online
from larder.serving.query import JSON

pytestmark = pytest.mark.skipif(
    not os.environ.get("LARDER_TEST_POSTGRES"),
    reason="LARDER_TEST_POSTGRES names no server; the pipeline scenario does",
)
MA = [f"technical_indicators_ma:{name}" for name in ("sma_20", "ema_12")]
QUOTES = [f"market_features:{name}" for name in ("close", "bid")]


class Instance:
    """A feature server that keeps a sample of every read, and tells it as an instance does."""

    def __init__(self, credentials, directory):
        self.directory, self.credentials = directory, credentials
        self.served = served.Served(1, directory)
        self.server = Server(("127.0.0.1", 0), tls(directory), {"/served": self.served.told})
        self.url = f"https://127.0.0.1:{self.server.server_address[1]}/served"
        certificate = {"sslcert": "tls.crt", "sslkey": "tls.key", "sslrootcert": "ca.crt"}
        own = {name: str(directory / file) for name, file in certificate.items()}
        (credentials.directory / "pipeline_url").write_text(make_conninfo(credentials.pipeline_url, **own))

    def read(self, symbols, features, at=None):
        """Answer clients' reads of one entity each, as if it was this time."""
        store = FeatureStore(fs_yaml_file=self.credentials.feature_store)
        app = Online(store, get_app(store), failed, self.served)

        async def ask():
            for symbol in symbols:
                sent = []
                body = json.dumps({"features": features, "entities": {"symbol": [symbol]}}).encode()

                async def receive(body=body):
                    return {"type": "http.request", "body": body}

                async def send(message, sent=sent):
                    sent.append(message)

                headers = [(b"content-type", JSON)]
                await app({"type": "http", "method": "POST", "path": PATH, "headers": headers}, receive, send)
                assert sent[0]["status"] == 200
            app.close()

        asyncio.run(ask())
        held, self.served.held = self.served.held, []
        self.served.write([sample._replace(now=at.timestamp()) if at else sample for sample in held])


def tls(directory):
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", directory / "tls.key", "-out", directory / "tls.crt"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *subject, *files]
    subprocess.run(command, check=True, capture_output=True)
    (directory / "ca.crt").write_bytes((directory / "tls.crt").read_bytes())
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=directory / "ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(directory / "tls.crt", directory / "tls.key")
    return context


@pytest.fixture
def instance(walking, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(served, "SECONDS_APART", 0)
    directory = tmp_path / "instance"
    directory.mkdir()
    one = Instance(walking, directory)
    yield one
    one.server.close()


def compare(credentials, *instances, most=5000):
    return skew.skew(credentials, [one.url for one in instances], most)


def totals(told):
    return {result: told.total(result) for result in skew.RESULTS if told.total(result)}


def change(credentials, statement, *parameters):
    with psycopg.connect(credentials.pipeline_url, autocommit=True) as connection:
        assert connection.execute(statement, parameters).rowcount > 0


def quote(credentials, symbol, at, close, created=None):
    change(
        credentials,
        "INSERT INTO market_data.quotes (symbol, event_timestamp, close, created) VALUES (%s, %s, %s, %s)",
        *(symbol, at, close, created or at),
    )


def fact(credentials):
    return [fact for fact in status(credentials).facts if fact.name == "skewed_served_values"]


def test_what_is_served_as_it_is_stored_is_equal_and_told_everywhere(walking, instance, tmp_path, monkeypatch):  # noqa: F811
    assert fact(walking) == [], "no reads are kept"
    monkeypatch.setenv("LARDER_SAMPLES", instance.url)
    assert fact(walking)[0].state == State.UNKNOWN
    instance.read(SYMBOLS, MA)
    instance.read(["nobody"], MA)
    options = ["--credentials", str(walking.directory), "skew", "--metrics-dir", str(tmp_path)]
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 0, done.output
    count = len(SYMBOLS) * len(MA)
    assert f"{count} values of {len(SYMBOLS) + 1} samples compared, 0 different" in done.output
    written = (tmp_path / "skew.prom").read_text().splitlines()
    labels = 'feature="sma_20",result="equal",view="technical_indicators_ma"'
    assert f"larder_skew_values{{{labels}}} {float(len(SYMBOLS))}" in written
    (found,) = fact(walking)
    assert (found.state, found.value) == (State.OK, 0)
    assert compare(walking, instance, most=7).samples == 7


def test_a_value_that_the_history_has_otherwise_is_named(walking, instance, monkeypatch):  # noqa: F811
    monkeypatch.setenv("LARDER_SAMPLES", instance.url)
    newest = "symbol = 'S007' AND event_timestamp = (SELECT max(event_timestamp) FROM features.technical_indicators_ma)"
    # The online store gets another value than the history has: what was served is that of a wrong row.
    double = f"UPDATE features.technical_indicators_ma SET sma_20 = sma_20 * %s WHERE {newest}"
    change(walking, double, 2.0)
    materialize(walking, days=400)
    change(walking, double, 0.5)
    change(walking, "UPDATE features.runs SET began_at = began_at - interval '1 day'")
    instance.read(["S007", "S008"], MA)
    told = compare(walking, instance)
    assert totals(told) == {"equal": 3, "different": 1}
    (one,) = told.different
    assert (one.entity, one.feature) == ("S007", "technical_indicators_ma:sma_20")
    assert one.served == pytest.approx(2 * one.joined)
    assert one.served_time == one.row_time
    (found,) = fact(walking)
    assert (found.state, found.value) == (State.FAILED, 1)
    assert found.sentence.startswith("S007 technical_indicators_ma:sma_20 was served at ")
    done = CliRunner().invoke(main, ["--credentials", str(walking.directory), "skew", "--json"])
    assert done.exit_code == 5
    assert json.loads(done.stdout)["counts"]["technical_indicators_ma:sma_20"]["different"] == 1


def test_a_row_that_came_after_the_read_is_late_and_a_corrected_one_is_no_alarm(walking, instance, tmp_path):  # noqa: F811
    bars = tmp_path / "late.csv"
    first, last = SYMBOLS[:5], SYMBOLS[5:8]
    instance.read([*first, *last, "S020"], MA)
    # Today's bar comes later, but its event time, the beginning of the day, is before the read.
    lines = [f"{symbol},{TODAY},60,61,59,60,5000" for symbol in first]
    # And yesterday's is corrected.
    lines += [f"{symbol},{TODAY - timedelta(1)},70,71,69,70,5000" for symbol in last]
    bars.write_text("Symbol,Date,Open,High,Low,Close,Volume\n" + "\n".join(lines) + "\n")
    load(walking.load_url, [bars])
    run(walking)
    assert totals(compare(walking, instance)) == {"equal": 2, "late": 10, "corrected": 6}


def test_a_row_that_was_there_long_before_the_read_and_was_not_served_is_different(walking, instance, online):  # noqa: F811
    online.delete(*[key for key in online.scan_iter() if b"S003" in key])
    change(walking, "UPDATE features.runs SET began_at = began_at - interval '1 day'")
    instance.read(["S003", "S004"], MA)
    told = compare(walking, instance)
    assert totals(told) == {"equal": 2, "different": 2}
    assert {one.served for one in told.different} == {None}
    assert {one.entity for one in told.different} == {"S003"}


def test_pushed_rows_are_judged_by_when_they_were_created(walking, instance):  # noqa: F811
    store = FeatureStore(fs_yaml_file=walking.feature_store)
    now = datetime.now(UTC)
    pushed = {symbol: now - age for symbol, age in PUSHED.items()}
    rows = {"symbol": [*pushed], "close": [10.0] * len(pushed), "event_timestamp": [*pushed.values()]}
    rows |= {name: [None] * len(pushed) for name in ("open", "high", "low", "volume", "bid", "ask", "spread")}
    rows["created"] = [now] * len(pushed)
    store.write_to_online_store("market_features", pd.DataFrame(rows))
    instance.read(PUSHED, QUOTES, at=now)
    quote(walking, "ONLINE-ONLY", now - timedelta(hours=7), 9.0, created=now + timedelta(minutes=1))
    for symbol, at in pushed.items():
        if symbol != "ONLINE-ONLY":
            quote(walking, symbol, at, 10.0)
    quote(walking, "LATE", now - timedelta(minutes=1), 11.0, created=now + timedelta(minutes=1))
    quote(walking, "MISSED", now - timedelta(hours=5), 11.0)
    quote(walking, "CORRECTED", pushed["CORRECTED"], 12.0, created=now + timedelta(minutes=1))
    told = compare(walking, instance)
    counts = told.counts["market_features:close"]
    assert counts == {"equal": 1, "late": 1, "corrected": 1, "expired": 1, "different": 2}
    assert {one.entity for one in told.different} == {"ONLINE-ONLY", "MISSED"}


PUSHED = {
    "EQUAL": timedelta(hours=6),
    "LATE": timedelta(hours=6),
    "MISSED": timedelta(hours=6),
    "CORRECTED": timedelta(hours=6),
    "ONLINE-ONLY": timedelta(hours=6),
    "OLD": timedelta(days=2),  # beyond the view's ttl of a day: a training set has null
}


def test_an_instance_that_does_not_answer_hides_no_other_and_none_at_all_is_an_error(walking, instance, monkeypatch):  # noqa: F811
    instance.read(SYMBOLS[:2], MA)
    instance.read(SYMBOLS[:1], MA, at=datetime.now(UTC) - skew.WINDOW - timedelta(hours=1))
    with (instance.directory / "served.jsonl").open("a") as file:
        file.write('{"served_at": "2026-')  # it was killed as it wrote
    closed = "https://127.0.0.1:1/served"
    monkeypatch.setenv("LARDER_SAMPLES", f"{closed} {instance.url}")
    told = skew.skew(walking, skew.urls(), 5000)
    (found,) = fact(walking)
    assert found.state == State.WARNING
    assert found.sentence.startswith("1 feature servers did not tell what they served")
    assert (told.samples, totals(told)) == (2, {"equal": 4})
    assert told.silent[0].startswith(closed)
    command = ["--credentials", str(walking.directory), "skew", "--from"]
    done = CliRunner().invoke(main, [*command, closed])
    assert done.exit_code == 1
    assert "No feature server tells what it served" in done.output
    monkeypatch.delenv("LARDER_SAMPLES")
    assert CliRunner().invoke(main, command[:-1]).exit_code == 2


def test_a_server_of_another_ca_is_not_believed(walking, instance, tmp_path):  # noqa: F811
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    server = Server(("127.0.0.1", 0), tls(stranger), {"/served": lambda _: (200, "application/jsonl", b"")})
    try:
        told = skew.skew(walking, [f"https://127.0.0.1:{server.server_address[1]}/served", instance.url], 10)
    finally:
        server.close()
    assert "CERTIFICATE_VERIFY_FAILED" in told.silent[0]
