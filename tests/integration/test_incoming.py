"""The incoming folder: whatever is in it is loaded or refused by its name, and a bad file harms only itself."""

import multiprocessing
import os
import resource
import signal
import socket
import threading
import time
from datetime import UTC, date, datetime

import psycopg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from fuzz import file_of
from test_bars_to_features import ADMIN, REPO, VIEWS, ask, compute, lines, write

from larder.bars import Options, Stored
from larder.bars.load import inspect, load
from larder.cli import main
from larder.errors import LarderError, RefusedFileError, SymbolsError
from larder.operations import metrics, pipeline, runs, survey
from larder.operations import status as reporting

pytestmark = pytest.mark.skipif(not ADMIN, reason="LARDER_TEST_POSTGRES names no server; the pipeline scenario does")
FUZZED = int(os.environ.get("LARDER_FUZZ_FILES", "300"))
SEED = int(os.environ.get("LARDER_FUZZ_SEED", "1"))
LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('larder load', 0))"
WAITS = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"


@pytest.fixture
def incoming(tmp_path):
    folder = tmp_path / "incoming"
    folder.mkdir()
    return folder


def refused(url):
    return {
        path.rsplit("/", 1)[-1]: reason
        for path, reason in ask(url, "SELECT path, reason FROM market_data.refused_files")
    }


def symbols(url):
    return [symbol for (symbol,) in ask(url, "SELECT DISTINCT symbol FROM market_data.ohlcv_daily ORDER BY 1")]


def test_what_is_no_file_of_bars_is_refused_by_its_name(url, incoming):
    write(incoming / "GOOD.csv", lines(30))
    (incoming / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    (incoming / "empty.csv").touch()
    (incoming / "gone.csv").symlink_to("nowhere.csv")
    (incoming / "folder").symlink_to("/tmp")
    os.mkfifo(incoming / "pipe.csv")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(incoming / "socket.csv"))
    write(incoming / os.fsdecode(b"caf\xe9.csv"), lines(30))
    write(incoming / "new\nline.csv", lines(30))
    write(incoming / ".half.csv", lines(30))
    (incoming / ".partial").mkdir()
    write(incoming / ".partial/whole.csv", lines(30))
    loaded = load(url, [incoming])
    server.close()
    assert symbols(url) == ["GOOD"]
    reasons = refused(url)
    assert loaded.refused == len(reasons) == 8
    assert "a link to a folder" in reasons.pop("folder")
    says = {"photo.png": "a picture", "empty.csv": "is empty", "gone.csv": "leads nowhere", "pipe.csv": "a named pipe"}
    says |= {"socket.csv": "a socket", "caf\\udce9.csv": "not UTF-8", "new\\nline.csv": "is no symbol"}
    assert {name: says[name] in reason for name, reason in reasons.items()} == dict.fromkeys(says, True)
    assert all(str(incoming) in reason for reason in reasons.values())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_refused_by_its_name(url, incoming):
    write(incoming / "GOOD.csv", lines(30))
    write(incoming / "closed.csv", lines(30)).chmod(0)
    (incoming / "room").mkdir(0o000)
    load(url, [incoming])
    (incoming / "room").chmod(0o700)
    assert "may not read it" in refused(url)["closed.csv"]
    assert "may not look into this folder" in refused(url)["room"]
    load(url, [incoming])
    assert list(refused(url)) == ["closed.csv"], "the folder can be read now"


def test_the_newest_file_has_the_last_word(url, incoming):
    rows = lines(30)
    corrected = [rows[0].split(",")[0] + ",100,101,99,100,5", *rows[1:]]
    for name, content, age in (("a.csv", corrected, 10), ("b.csv", rows, 20)):
        write(incoming / name, [f"{row},S" for row in content], "Date,Open,High,Low,Close,Volume,Symbol\n")
        os.utime(incoming / name, (time.time() - age, time.time() - age))
    load(url, [incoming])
    assert ask(url, "SELECT close FROM market_data.ohlcv_daily ORDER BY event_timestamp LIMIT 1") == [(100,)]


def test_a_refused_file_is_refused_until_it_is_mended_or_gone(url, incoming):
    write(incoming / "A.csv", ["x"], header="what,is,this\n")
    write(incoming / "B.csv", ["x"], header="what,is,this\n")
    assert [load(url, [incoming]).refused for _ in range(2)] == [2, 2]
    assert sorted(refused(url)) == ["A.csv", "B.csv"]
    write(incoming / "A.csv", lines(30))
    (incoming / "B.csv").unlink()
    assert load(url, [incoming]).refused == 0
    assert refused(url) == {}
    write(incoming / "A.csv", ["x"], header="what,is,this\n")
    load(url, [incoming])
    assert load(url, [write(incoming / "A.csv", lines(31))]).refused == 0, "a file that is named"
    assert refused(url) == {}


def test_a_file_that_rejected_too_much_leaves_nothing(url, incoming):
    write(incoming / "A.csv", [*lines(30), *(f"2024-03-{day:02},1,1,2,1,5" for day in range(1, 4))])
    write(incoming / "B.csv", [f"2024-03-{day:02},1,1,2,1,5" for day in range(1, 4)])
    assert load(url, [incoming]).refused == 2
    assert "3 of its 33 bars" in refused(url)["A.csv"]
    assert "none of its 3 bars" in refused(url)["B.csv"]
    assert ask(url, "SELECT count(*) FROM market_data.rejected_bars") == [(0,)]


@pytest.mark.parametrize("event", ["grows", "is replaced", "is removed"])
def test_a_file_that_changes_while_it_is_read_is_refused(url, incoming, event):
    file = write(incoming / "A.csv", lines(30))
    write(incoming / "B.csv", lines(30))
    os.utime(file, (1, 1))
    with psycopg.connect(url) as other:
        other.execute(LOCK)
        loading = threading.Thread(target=load, args=[url, [incoming]])
        loading.start()
        while ask(url, WAITS) == [(0,)]:
            assert loading.is_alive()
        if event == "grows":
            write(file, lines(31))
        elif event == "is replaced":
            write(incoming / ".A.csv", lines(30, 1)).rename(file)
            os.utime(file, (1, 1))
        else:
            file.unlink()
    loading.join()
    assert symbols(url) == ["B"]
    assert ("does not exist any more" if event == "is removed" else "changed while it was read") in refused(url)[
        "A.csv"
    ]


def test_a_file_that_ends_its_reader_is_refused_and_the_next_is_read(url, incoming):
    """As a crash in a parser does, or the kernel where memory is short."""
    rows = [row for n in range(3000) for row in (f"{line},S{n}" for line in lines(100, n % 7))]
    write(incoming / "A.csv", rows, "Date,Open,High,Low,Close,Volume,Symbol\n")
    os.utime(incoming / "A.csv", (1, 1))
    write(incoming / "B.csv", lines(30))
    loading = threading.Thread(target=load, args=[url, [incoming]])
    loading.start()
    while not (readers := multiprocessing.active_children()):
        assert loading.is_alive()
    os.kill(readers[0].pid, signal.SIGKILL)
    loading.join()
    assert symbols(url) == ["B"]
    assert "needs more memory than there is" in refused(url)["A.csv"]


def test_text_that_is_no_text_harms_only_its_file(url, incoming):
    """Parquet does not check that its strings are UTF-8."""
    days = pa.array([20240102, 20240103])
    prices = {name: pa.array([1.0, 1.0]) for name in ("open", "high", "low", "close", "volume")}
    for name, text in (("a", b"\xff\xfe"), ("b", b"A\0B"), ("c", b"\xed\xa0\x80")):
        symbol = pa.array([text, text], pa.binary()).view(pa.string())
        pq.write_table(pa.table({"date": days, "symbol": symbol, **prices}), incoming / f"{name}.parquet")
    write(incoming / "GOOD.csv", lines(30))
    assert load(url, [incoming]).refused == 3
    assert symbols(url) == ["GOOD"]


def test_a_lost_database_ends_the_run_and_no_file_is_blamed(url, incoming):
    write(incoming / "A.csv", lines(30))
    failures = []

    def run():
        try:
            load(url, [incoming])
        except LarderError as error:
            failures.append(error)

    with psycopg.connect(url) as other:
        other.execute(LOCK)
        loading = threading.Thread(target=run)
        loading.start()
        while ask(url, WAITS) == [(0,)]:
            assert loading.is_alive()
        other.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted")
        loading.join()
    assert [type(failure) for failure in failures] == [LarderError]
    assert "PostgreSQL was lost" in failures[0].message
    assert refused(url) == {}


def test_a_symbol_that_cannot_be_computed_keeps_no_other_out(url, tmp_path, credentials):
    for name in ("A", "B", "C"):
        load(url, [write(tmp_path / f"{name}.csv", lines(30))])
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("ALTER TABLE features.price_action ADD CHECK (symbol <> 'B')")
    with pytest.raises(SymbolsError, match=r"^1 of the symbols could not be computed: B \("):
        compute(url)
    assert ask(url, "SELECT symbol, count(*) FROM features.price_action GROUP BY 1 ORDER BY 1") == [
        ("A", 30),
        ("C", 30),
    ]
    assert ask(url, "SELECT symbol FROM market_data.pending_compute") == [("B",)]
    with pytest.raises(SymbolsError) as caught:
        pipeline.run(credentials, ["compute"], [], REPO, metrics_dir=tmp_path)
    assert caught.value.exit_code == 1
    assert "1 of the symbols could not be computed: B" in problems(url, credentials)[0]


def status_of(url, credentials):
    """What status finds without Feast's registry."""
    with psycopg.connect(url, autocommit=True, options="-c timezone=UTC") as connection:
        facts = list(survey.of_the_pipeline(connection, credentials, datetime.now(UTC)))
    return reporting.Status("test", facts=facts)


def problems(url, credentials):
    return status_of(url, credentials).problems


def test_stored_bars_of_another_file_are_named_before_and_when_they_are_replaced(url, incoming, caplog, credentials):
    first = write(incoming / "A.csv", lines(30))
    rows = lines(32)
    days = [row.split(",")[0] for row in rows]
    for n in (3, 7):
        rows[n] = f"{days[n]},1,3,1,2,9"
    other = write(incoming.parent / "A.csv", rows)
    assert [told.stored for told in inspect([first], Options(), url)] == [Stored(30, 0, 0, None, None, [])]
    with caplog.at_level("INFO", "larder"):
        load(url, [incoming])
        assert "replaced" not in caplog.text
        expected = Stored(2, 28, 2, date.fromisoformat(days[3]), date.fromisoformat(days[7]), ["A"])
        assert [told.stored for told in inspect([other], Options(), url)] == [expected]
        assert ask(url, "SELECT count(*) FROM market_data.ohlcv_daily") == [(30,)]
        load(url, [other])
    (record,) = [record for record in caplog.records if record.message.startswith("replaced")]
    assert record.levelname == "WARNING"
    assert record.message == f"replaced file=A.csv bars=2 first={days[3]} last={days[7]} symbols=A"
    assert [told.stored for told in inspect([other], Options(), url)] == [Stored(0, 32, 0, None, None, [])]
    shown = CliRunner().invoke(main, ["--credentials", str(credentials.directory), "inspect", str(first)])
    assert f"2 stored with other values, which would be replaced: {days[3]} to {days[7]} of A" in shown.output


def test_a_file_that_comes_again_corrects_its_own_bars_without_a_warning(url, incoming, caplog):
    load(url, [write(incoming / "A.csv", lines(30))])
    write(incoming / "A.csv", ["2024-01-01,1,3,1,2,9", *lines(30)[1:]])
    with caplog.at_level("INFO", "larder"):
        load(url, [incoming])
    (record,) = [record for record in caplog.records if record.message.startswith("replaced")]
    assert record.levelname == "INFO"


def test_inspect_does_without_a_database_that_is_not_there(incoming, caplog):
    file = write(incoming / "A.csv", lines(30))
    for url in (None, "postgresql://127.0.0.1:1/nowhere"):
        (told,) = inspect([file], Options(), url)
        assert (told.refusal, told.bars, told.stored) == (None, 30, None)
    assert "PostgreSQL cannot be reached for inspect" in caplog.text


def test_rejected_bars_are_told_with_their_reasons(url, incoming, caplog):
    write(incoming / "A.csv", [*lines(100), "2026-01-06,1,1,3,2,9", "2026-01-07,1,1,3,2,9", "2026-01-08,-1,3,1,2,9"])
    with caplog.at_level("WARNING", "larder"):
        load(url, [incoming])
    assert 'bars=3 reasons="high is below low (2), open is not positive' in caplog.text


def test_status_says_which_files_are_refused_and_why(url, incoming, credentials):
    write(incoming / "A.csv", lines(30))
    write(incoming / "B.csv", ["x"], header="what,is,this\n")
    with pytest.raises(RefusedFileError) as caught:
        pipeline.run(credentials, ["load", "compute"], [incoming], REPO)
    assert caught.value.exit_code == 3
    assert ask(url, "SELECT DISTINCT symbol FROM features.price_action") == [("A",)]
    assert problems(url, credentials) == [f"A file is refused: {refused(url)['B.csv']}"]
    shown = reporting.as_text(status_of(url, credentials)).splitlines()
    assert shown[:2] == ["not healthy:", f"- A file is refused: {refused(url)['B.csv']}"]
    assert any(line.startswith("The last run") and line.endswith("left out refused files.") for line in shown)
    (incoming / "B.csv").unlink()
    pipeline.run(credentials, ["load", "compute"], [incoming], REPO)
    assert problems(url, credentials) == []
    shown = reporting.as_text(status_of(url, credentials)).splitlines()
    assert shown[0] == "healthy"
    assert any(line.startswith("The last run") and line.endswith("succeeded.") for line in shown)


def test_status_says_that_symbols_wait_to_be_computed(url, incoming, credentials):
    write(incoming / "A.csv", lines(30))
    pipeline.run(credentials, ["load"], [incoming], REPO)
    assert "Symbols that wait to be computed: 1;" in problems(url, credentials)[0]


def test_status_says_why_the_last_run_failed(url, incoming, credentials):
    write(incoming / "A.csv", lines(30))
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("ALTER TABLE features.price_action RENAME TO elsewhere")
        with pytest.raises(LarderError):
            pipeline.run(credentials, ["load", "compute"], [incoming], REPO)
        assert "The last run failed at" in problems(url, credentials)[0]
        assert "price_action" in problems(url, credentials)[0]
        connection.execute("ALTER TABLE features.elsewhere RENAME TO price_action")
    pipeline.run(credentials, ["load", "compute"], [incoming], REPO)
    assert problems(url, credentials) == []


def test_status_knows_a_run_that_was_killed_from_one_that_is_under_way(url, credentials):
    with psycopg.connect(url, autocommit=True) as other:
        other.execute("SELECT pg_advisory_lock(hashtextextended('larder run', 0))")
        runs.begin(credentials)
        assert problems(url, credentials) == []
        other.execute("SELECT pg_advisory_unlock_all()")  # a session that is closed keeps its locks for a moment
    assert "never ended: it was killed" in problems(url, credentials)[0]


def test_fuzzed_files_stop_nothing_and_store_no_bar_that_they_did_not_hold(url, tmp_path, incoming, credentials):
    """LARDER_FUZZ_FILES: how many. LARDER_FUZZ_SEED: which."""
    files = [file_of(number, SEED) for number in range(FUZZED)]
    for file in files:
        (incoming / file.name).write_bytes(file.content)
    begun = time.monotonic()
    with pytest.raises(RefusedFileError):
        pipeline.run(credentials, ["load", "compute"], [incoming], REPO, metrics_dir=tmp_path)
    seconds = time.monotonic() - begun
    reasons = refused(url)
    loaded = {path.rsplit("/", 1)[-1] for (path,) in ask(url, "SELECT path FROM market_data.loaded_files")}
    assert loaded | set(reasons) == {file.name for file in files}
    assert not loaded & set(reasons)
    assert metrics.read(tmp_path, "larder_pipeline_files_refused") == len(reasons)
    stored = {}
    for symbol, day, *bar in ask(
        url, "SELECT symbol, event_timestamp::date, open, high, low, close, volume FROM market_data.ohlcv_daily"
    ):
        stored.setdefault(symbol, {})[day] = tuple(bar)
    wrong = {}
    for file in files:
        got = stored.pop(file.symbol, {})
        if file.exact and not set(got.items()) <= set(file.bars.items()):
            wrong[file.name] = file.mutation, sorted(set(got.items()) - set(file.bars.items()))[:3]
        if file.mutation.split(",")[0] == "none" and file.exact and file.name in loaded:
            assert got == file.bars, file
    assert wrong == {}
    whole = [file for file in files if file.bars and file.exact and files.index(file) % 10 == 0]
    assert [file.name for file in whole if file.name not in loaded] == []
    for view in VIEWS:
        (((computed),),) = [ask(url, f"SELECT count(*) FROM features.{view} WHERE symbol = '{whole[0].symbol}'")[0]]
        assert computed == len(whole[0].bars)
    memory = {
        who: resource.getrusage(of).ru_maxrss >> 10
        for who, of in (("this", resource.RUSAGE_SELF), ("readers", resource.RUSAGE_CHILDREN))
    }
    print(
        f"{FUZZED} files, {len(loaded)} loaded, {len(reasons)} refused, {len(stored)} symbols of no file, "
        f"{seconds:.0f} s, memory in MB {memory}"
    )
    assert max(memory.values()) < 1500, memory


def test_bars_on_a_weekend_where_the_others_have_none_are_named(url, incoming, caplog):
    days = [f"2024-01-{day:02}" for day in range(1, 32) if day % 7 not in (6, 0) or day == 13]
    write(incoming / "AAPL.csv", [f"{day},1,3,1,2,9" for day in days])
    with caplog.at_level("WARNING", "larder"):
        load(url, [incoming])
    assert "AAPL 2024-01-13" in caplog.text
