"""What clients are answered is sampled, kept in bounded files, and told to whoever shows a certificate of the stack."""

import asyncio
import json
import math
import socket
import ssl
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime

import pytest
from feast.protos.feast.types.Value_pb2 import Value
from test_online import SYMBOLS, Server, redis, refs, server  # noqa: F401 # fixtures

from larder.serving import metrics, served
from larder.serving.plan import Plan
from larder.serving.query import Query
from larder.serving.served import Sample, Served

FEATURES = [*refs("prices", "numbers"), "all_types:double", "all_types:string", "all_types:bytes"]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    directory = tmp_path_factory.mktemp("certificate")
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", directory / "tls.key", "-out", directory / "tls.crt"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", *subject, *files]
    subprocess.run(command, check=True, capture_output=True)
    (directory / "ca.crt").write_bytes((directory / "tls.crt").read_bytes())
    return directory


@contextmanager
def instance(server, certificate, state, monkeypatch, ratio):  # noqa: F811
    """An instance beside the module's, over the same stores, that keeps a sample of such a share; and its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"ADDRESS": "127.0.0.1", "INSTANCE": "1", "SAMPLE_PORT": port, "CERTIFICATE": certificate}
    for name, value in (own | {"SKEW_SAMPLE_RATIO": ratio}).items():
        monkeypatch.setenv(f"LARDER_{name}", str(value))
    monkeypatch.setenv("STATE_DIRECTORY", str(state))
    another = Server(server.runner, server.directory)
    try:
        yield another, port
    finally:
        another.close()


@pytest.fixture
def keeping(server, certificate, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(served, "SECONDS_APART", 0)
    monkeypatch.setattr(served, "WRITE_SECONDS", 0.01)
    with instance(server, certificate, tmp_path, monkeypatch, "1") as (another, port):
        another.told = lambda count: told(another, port, certificate, count)
        yield another


def told(server, port, certificate, count):  # noqa: F811
    """The samples that an instance tells, when there are so many."""
    tls = ssl.create_default_context(cafile=certificate / "ca.crt")
    tls.load_cert_chain(certificate / "tls.crt", certificate / "tls.key")
    for _ in range(200):
        server.runner.run(asyncio.sleep(0.05))
        with urllib.request.urlopen(f"https://127.0.0.1:{port}/served", context=tls, timeout=5) as answer:
            lines = answer.read().splitlines()
        if len(lines) >= count:
            return [json.loads(line) for line in lines]
    raise AssertionError(lines)


def dropped():
    return metrics.SAMPLES.labels("dropped").numbers[0]


def test_a_sample_has_the_values_and_event_times_that_the_client_was_answered(keeping):
    for symbol in SYMBOLS:
        _, who, answer = keeping.read(
            {"entities": {"symbol": [symbol]}, "features": FEATURES, "full_feature_names": True}
        )
        assert who == "larder"
        keeping.answers = [*getattr(keeping, "answers", []), json.loads(answer)]
    samples = keeping.told(len(SYMBOLS))
    assert [sample["entity"] for sample in samples] == [{"symbol": symbol} for symbol in SYMBOLS]
    compared = 0
    for sample, answer in zip(samples, keeping.answers, strict=True):
        assert abs(datetime.now(UTC) - datetime.fromisoformat(sample["served_at"])).total_seconds() < 600
        names = answer["metadata"]["feature_names"]
        columns = dict(zip(names, answer["results"], strict=True))
        for ref in FEATURES:
            view, _, name = ref.partition(":")
            column, row = columns[f"{view}__{name}"], sample["views"][view]
            at = datetime.fromisoformat(column["event_timestamps"][0])
            assert (datetime.fromisoformat(row["event_timestamp"]) if row["event_timestamp"] else at).replace(
                microsecond=at.microsecond
            ) == at
            if name == "bytes":
                assert row["values"].get("bytes") is None, "only types that are compared are kept"
                continue
            value, shown = row["values"][name], column["values"][0]
            if isinstance(value, float) and not math.isfinite(value):
                continue  # Feast has words for these
            compared += value is not None
            assert value == shown
    assert compared > 50


def test_a_large_read_and_one_by_url_have_a_sample_of_one_row(keeping):
    entities = [f"E{n}" for n in range(2000)]
    keeping.read({"entities": {"symbol": entities}, "features": refs("prices", "numbers")})
    keeping.get("/features/A?features=prices:close")
    large, one = keeping.told(2)
    assert large["entity"]["symbol"] in entities
    assert large["views"]["prices"] == {
        "event_timestamp": None,
        "values": dict.fromkeys(["open", "close", "volume", "note"]),
    }
    assert one["entity"] == {"symbol": "A"}


def test_what_is_too_old_for_the_client_was_not_served(keeping):
    for max_age in ({}, {"max_age_s": 1e-6}):
        keeping.read({"entities": {"symbol": ["PUSHED"]}, "features": ["prices:close"]} | max_age)
    whole, masked = keeping.told(2)
    assert whole["views"]["prices"]["values"] == {"close": 2.5}
    assert masked["views"] == {}


def test_a_health_check_and_a_read_that_feast_answers_have_no_sample(keeping):
    assert keeping.get("/ready")[0] == 200
    assert keeping.read({"entities": {"symbol": ["A"]}, "feature_service": "computed"})[1] == "feast"
    keeping.get("/features/B?features=prices:close")
    assert [sample["entity"] for sample in keeping.told(1)] == [{"symbol": "B"}]


def test_nobody_is_told_who_shows_no_certificate(server, certificate, tmp_path, monkeypatch):  # noqa: F811
    def answered(scheme):
        tls = ssl.create_default_context(cafile=certificate / "ca.crt")
        try:
            with urllib.request.urlopen(f"{scheme}://127.0.0.1:{port}/served", context=tls, timeout=5) as answer:
                return answer.status
        except OSError:  # by TLS 1.3, a refusal may come as an alert, as a reset or as an end
            return None

    with instance(server, certificate, tmp_path, monkeypatch, "1") as (another, port):
        assert [answered("https"), answered("http")] == [None, None]
        assert told(another, port, certificate, 0) == []


def test_without_a_share_nothing_is_kept_and_no_port_is_open(server, certificate, tmp_path, monkeypatch):  # noqa: F811
    with instance(server, certificate, tmp_path, monkeypatch, "0") as (another, port):
        another.read({"entities": {"symbol": ["A"]}, "features": ["prices:close"]})
        another.runner.run(asyncio.sleep(0.05))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 1)
        assert [*tmp_path.iterdir()] == []


def test_a_worker_keeps_one_sample_in_ten_seconds_and_counts_the_others(tmp_path):
    one, before = Served(1, tmp_path), dropped()
    assert [one.pick(3) in range(3), one.pick(3), one.pick(3)] == [True, -1, -1]
    assert dropped() - before == 2
    one.next -= 10
    assert one.pick(1) == 0


def test_a_share_of_the_reads_is_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(served, "SECONDS_APART", 0)
    some, before = Served(0.1, tmp_path), dropped()
    chosen = sum(some.pick(1) == 0 for _ in range(20_000))
    assert 1500 < chosen < 2500
    assert dropped() == before


def sample(number):
    plan = Plan("p", ["prices:close"], full_names=False)
    plan.refs = ["prices:close"]
    plan.views = [served_view()]
    value = Value(double_val=number).SerializeToString()
    return Sample(plan, None, {"symbol": f"S{number}"}, [[value, b""]], time.time())


def served_view():
    from larder.serving.plan import View

    return View("prices", 0, 0, 1)


def test_the_files_stay_bounded_and_have_the_newest_samples_of_all_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(served, "FILE_BYTES", 20_000)
    workers = [Served(1, tmp_path) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for n in range(0, 2000, 4):
            [*pool.map(lambda worker, number: worker.write([sample(number)]), workers, range(n, n + 4))]
    lines = [json.loads(line) for line in workers[0].told("")[2].splitlines()]
    numbers = sorted(int(line["entity"]["symbol"][1:]) for line in lines)
    # The first four come at once, and a file ends between any of them.
    assert numbers[3:] == [*range(2000 - len(numbers) + 3, 2000)]
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 20_000 < size <= 40_000


def test_reads_go_on_and_are_counted_where_no_sample_can_be_kept(tmp_path, monkeypatch):
    lost, before = Served(1, tmp_path / "missing"), dropped()
    lost.write([sample(1), sample(2)])
    assert dropped() - before == 2
    # A disk that hangs: what is held does not grow.
    monkeypatch.setattr(served, "SECONDS_APART", 0)
    query = Query({"symbol": ["A"]}, ("prices:close",), "", False, False, None, False)
    for _ in range(500):
        if (row := lost.pick(1)) >= 0:
            lost.note(query, sample(1).plan, {"symbol": ["A"]}, [[[b"", b""]]], row, time.time())
    assert len(lost.held) == served.MOST_HELD
    assert dropped() - before == 2 + 500 - served.MOST_HELD
