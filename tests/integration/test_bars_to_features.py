"""Bars to features in a real PostgreSQL, whose superuser's URL is in LARDER_TEST_POSTGRES."""

import os
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from larder.bars.load import load
from larder.errors import BusyError, LarderError, RefusedFileError
from larder.features import compute as computing
from larder.features import definitions, record
from larder.features.compute import TAKE, statement
from larder.features.formulas import Formulas
from larder.operations import metrics, pipeline
from larder.postgres import tables

ADMIN = os.environ.get("LARDER_TEST_POSTGRES", "")
pytestmark = pytest.mark.skipif(not ADMIN, reason="LARDER_TEST_POSTGRES names no server; the pipeline scenario does")
HEADER = "Date,Open,High,Low,Close,Volume\n"
REPO = Path(__file__).parents[2] / "feature_repo"
DEFINED = definitions.read(REPO)
SOURCE = DEFINED.sources["market_data.ohlcv_daily"]
VIEWS = {view.name: [feature.name for feature in view.features] for view in DEFINED.views}


def compute(url, **options):
    return computing.compute(url, Formulas(REPO), **options)


def ask(url, query, *parameters):
    with psycopg.connect(url, autocommit=True, options="-c timezone=UTC") as connection:
        return connection.execute(query, parameters).fetchall()


def lines(n, seed=0, *, start="2024-01-01"):
    random = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(random.normal(0, 0.02, n)))
    days = np.datetime64(start) + np.arange(n)
    return [
        f"{d},{c * 0.99!s},{c * 1.02!s},{c * 0.98!s},{c!s},{i * 100}"
        for i, (d, c) in enumerate(zip(days, close, strict=True))
    ]


def write(path, rows, header=HEADER):
    path.write_text(header + "\n".join(rows) + "\n")
    return path


def test_a_file_loaded_twice_changes_nothing_and_rejects_nothing_again(url, tmp_path):
    file = write(
        tmp_path / "GOOG.csv", [*lines(60), "2024-03-01,1,1,2,1,5", "2024-03-02,nan,3,1,2,5", "2024-01-01,1,3,1,2,5"]
    )
    first, second = load(url, [file]), load(url, [file])
    assert (first.bars, first.changed, first.rejected) == (60, 60, 3)
    assert (second.bars, second.changed, second.rejected) == (60, 0, 3)
    rejected = ask(url, "SELECT symbol, event_timestamp::date::text, reason FROM market_data.rejected_bars ORDER BY 2")
    assert rejected == [
        ("GOOG", "2024-01-01", "a second bar of the day with other values: the first one stays"),
        ("GOOG", "2024-03-01", "high is below low"),
        ("GOOG", "2024-03-02", "open is missing"),
    ]


def test_an_equal_duplicate_is_no_reject(url, tmp_path):
    row = lines(1)[0]
    assert load(url, [write(tmp_path / "A.csv", [row, row])]).rejected == 0


def test_a_directory_gives_each_new_or_changed_file_once(url, tmp_path):
    write(tmp_path / "A.csv", lines(3))
    assert load(url, [tmp_path]).bars == 3
    write(tmp_path / "B.csv", lines(4))
    assert load(url, [tmp_path]).bars == 4
    write(tmp_path / "A.csv", lines(5))
    assert load(url, [tmp_path]).bars == 5
    assert load(url, [tmp_path]).bars == 0


def test_a_refused_file_leaves_nothing_and_keeps_no_other_out(url, tmp_path):
    write(tmp_path / "A.csv", [*lines(3), "2024-01-02 01:00:00,1,3,1,2,5"])
    write(tmp_path / "B.csv", ["x"], header="what,is,this\n")
    write(tmp_path / "C.csv", lines(3))
    loaded = load(url, [tmp_path])
    assert (loaded.bars, loaded.refused) == (3, 2)
    assert ask(url, "SELECT DISTINCT symbol FROM market_data.ohlcv_daily") == [("C",)]
    assert load(url, [tmp_path]).refused == 2, "it is refused until somebody sees to it"


def test_two_loads_at_once_lose_nothing(url, tmp_path):
    header = "Symbol," + HEADER
    rows = [f"S{s},{row}" for s in range(40) for row in lines(50, s)]
    files = [
        write(tmp_path / f"{n}.csv", order, header)
        for n, order in enumerate((rows, rows[::-1], rows[1000:] + rows[:1000]))
    ]
    failures = []

    def one(file):
        try:
            for _ in range(3):
                load(url, [file])
        except LarderError as error:
            failures.append(error)

    threads = [threading.Thread(target=one, args=[file]) for file in files] + [
        threading.Thread(target=lambda: [compute(url) for _ in range(5)])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    compute(url)
    assert ask(url, "SELECT count(*) FROM market_data.ohlcv_daily") == [(2000,)]
    assert compute(url, full=True) == 0, "what was computed meanwhile is what a full recompute gives"


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(30, 300), seed=st.integers(0, 10**6), data=st.data())
def test_an_incremental_run_equals_a_full_one(url, tmp_path, n, seed, data):
    """Also after a late and a corrected bar in the middle: every later value that depends on it is recomputed."""
    symbol = f"S{seed}_{n}"
    rows = lines(n, seed)
    late = data.draw(st.integers(0, n - 2))
    load(url, [write(tmp_path / f"{symbol}.csv", rows[:late] + rows[late + 1 : -1])])
    compute(url)
    load(url, [write(tmp_path / f"{symbol}.csv", [rows[late], rows[-1]])])
    compute(url)
    day, _, _, _, close, _ = rows[data.draw(st.integers(0, n - 1))].split(",")
    price = float(close) * 1.1
    load(url, [write(tmp_path / f"{symbol}.csv", [f"{day},{price},{price * 1.1},{price * 0.9},{price},123"])])
    assert compute(url) > 0
    assert compute(url, full=True) == 0
    assert ask(url, "SELECT count(*) FROM features.price_action WHERE symbol = %s", symbol) == [(n,)]


def test_a_part_of_a_long_history_gives_what_the_whole_gives(url, tmp_path, monkeypatch):
    """New bars (A), a correction (B), and a bar before which the total is not known (C): that history is read whole."""
    read = []
    computed = computing._Computation._computed
    monkeypatch.setattr(
        computing._Computation, "_computed", lambda self, c, s, n: read.append((list(s), n)) or computed(self, c, s, n)
    )
    rows = {name: lines(2000, seed, start="2019-01-01") for seed, name in enumerate("ABC")}
    for name in rows:
        load(url, [write(tmp_path / f"{name}.csv", rows[name][:-10])])
    compute(url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DELETE FROM features.volume_indicators WHERE symbol = 'C'")
    load(url, [write(tmp_path / "A.csv", rows["A"]), write(tmp_path / "C.csv", rows["C"])])
    load(url, [write(tmp_path / "B.csv", [rows["B"][1900].split(",")[0] + ",100,101,99,100,5"])])
    read.clear()
    assert compute(url) > 3 * 10 * 6
    assert read == [(["A", "B", "C"], SOURCE.rows_before), (["C"], None)]
    by_part = {view: values_of(url, view) for view in VIEWS}
    compute(url, full=True)
    for view, values in by_part.items():
        np.testing.assert_allclose(values, values_of(url, view), rtol=1e-9, atol=1e-9, err_msg=view)


UPSERT = """
INSERT INTO market_data.ohlcv_daily VALUES (%s, %s, %s, %s, %s, %s, %s, %s)
ON CONFLICT (symbol, event_timestamp) DO UPDATE SET volume = excluded.volume, adjusted_close = excluded.adjusted_close
"""
PENDING = """
INSERT INTO market_data.pending_compute AS pending (symbol, since) VALUES (%s, %s)
ON CONFLICT (symbol) DO UPDATE SET since = least(pending.since, excluded.since)
"""


def put(url, symbol, n, volumes, *, seed=0, adjust=1.0):
    """Store bars as a load does; volumes by the bar's number, None where there is none."""
    random = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(random.normal(0, 0.02, n)))
    days = [datetime(2019, 1, 1, tzinfo=UTC) + timedelta(i) for i in range(n)]
    with psycopg.connect(url) as connection, connection.cursor() as cursor:
        values = [
            (symbol, days[i], c * 0.99, c * 1.02, c * 0.98, c, c * adjust, volume)
            for i, volume in volumes.items()
            for c in [float(close[i])]
        ]
        cursor.executemany(UPSERT, values)
        cursor.execute(PENDING, [symbol, days[min(volumes)]])


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(30, 120), seed=st.integers(0, 10**6), data=st.data())
def test_an_incremental_run_equals_a_full_one_where_volumes_are_fractions_or_missing(url, n, seed, data):
    volume = st.none() | st.floats(0, 1e6)
    volumes = dict(enumerate(data.draw(st.lists(volume, min_size=n, max_size=n))))
    symbol = f"S{seed}_{n}"
    new = data.draw(st.integers(1, n - 1))
    changed = data.draw(st.dictionaries(st.integers(0, n - 1), volume, min_size=1, max_size=3))
    for some in ({i: volumes[i] for i in range(new)}, {i: volumes[i] for i in range(new, n)}, changed):
        put(url, symbol, n, some, seed=seed)
        compute(url)
    assert compute(url, full=True) == 0
    stored = ask(
        url,
        "SELECT f.volume, obv, volume_ratio, vwap, mfi_14 FROM features.ohlcv_features f"
        " JOIN features.volume_indicators USING (symbol, event_timestamp) WHERE symbol = %s ORDER BY event_timestamp",
        symbol,
    )
    for i, (kept, *features) in enumerate(stored):
        assert kept == (volumes | changed)[i]
        assert kept is not None or features == [None] * 4


def test_a_history_without_volumes_is_read_in_part_and_a_sum_goes_on_after_a_gap(url, monkeypatch):
    """No volume at all (A), none of late (B), one after a gap (C), one after a gap that is longer than the part (D)."""
    read = []
    computed = computing._Computation._computed
    monkeypatch.setattr(
        computing._Computation, "_computed", lambda self, c, s, n: read.append((list(s), n)) or computed(self, c, s, n)
    )
    n = 2000
    random = np.random.default_rng(5)
    some = dict(enumerate(map(float, random.lognormal(3, 2, n))))
    none = dict.fromkeys(range(n))
    volumes = {
        "A": none,
        "B": some | dict.fromkeys(range(1900, n)),
        "C": some | dict.fromkeys(range(1900, n - 1)),
        "D": some | dict.fromkeys(range(100, n - 1)),
    }
    for symbol, all_of_it in volumes.items():
        put(url, symbol, n, {i: all_of_it[i] for i in range(n - 1)})
    compute(url)
    for symbol, all_of_it in volumes.items():
        put(url, symbol, n, {n - 1: all_of_it[n - 1]})
    read.clear()
    compute(url)
    assert read == [(["A", "B", "C", "D"], SOURCE.rows_before), (["D"], None)]
    assert ask(url, "SELECT count(volume_sma_20), count(obv) FROM features.volume_indicators WHERE symbol = 'A'") == [
        (0, 0)
    ]
    last = "SELECT symbol, obv FROM features.volume_indicators WHERE event_timestamp = %s ORDER BY symbol"
    newest = datetime(2019, 1, 1, tzinfo=UTC) + timedelta(n - 1)
    parts = ask(url, last, newest)
    assert [obv is None for _, obv in parts] == [True, True, False, False]
    compute(url, full=True)
    assert ask(url, last, newest) == parts, "the very same sum, to the last bit"
    assert ask(url, "SELECT count(sma_200) FROM features.technical_indicators_ma WHERE symbol = 'A'") == [(n - 199,)]


def test_bytes_are_written_to_columns_of_their_type_only(url, tmp_path):
    """Eight bytes of a double are a bigint as well: a table that site.yml has not widened yet would take them."""
    load(url, [write(tmp_path / "A.csv", lines(30))])
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("ALTER TABLE features.ohlcv_features ALTER COLUMN volume TYPE bigint")
    with pytest.raises(LarderError, match=r"ohlcv_features has the column volume as bigint, and double precision is"):
        compute(url)
    assert ask(url, "SELECT count(*) FROM features.ohlcv_features") == [(0,)]
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("ALTER TABLE features.ohlcv_features ALTER COLUMN volume TYPE double precision")
    assert compute(url) == 30 * 6


def test_other_prices_compute_everything_anew_and_leave_the_bar_as_loaded(url, monkeypatch):
    """Adjusted by a constant: returns and oscillators stay, averages and ranges are scaled."""
    n = 260
    put(url, "A", n, dict.fromkeys(range(n), 1.5), adjust=0.25)
    compute(url)
    before = {view: ask(url, f"SELECT * FROM features.{view} ORDER BY event_timestamp") for view in VIEWS}
    monkeypatch.setenv("LARDER_INDICATOR_PRICES", "adjusted_close")
    assert compute(url) > 3 * n
    assert compute(url) == 0
    scaled = {"vwap", "macd", "macd_signal", "macd_histogram", "atr_14", "price_range", "body_size", "upper_shadow"}
    scaled |= {"lower_shadow", "std_20", "bb_upper", "bb_middle", "bb_lower", *VIEWS["technical_indicators_ma"]}
    for view, names in VIEWS.items():
        after = ask(url, f"SELECT * FROM features.{view} ORDER BY event_timestamp")
        for place, name in enumerate(names, start=2):
            was, is_ = (np.array([row[place] for row in rows], dtype=float) for rows in (before[view], after))
            factor = 0.25 if name in scaled else 1
            np.testing.assert_allclose(is_, was * factor, rtol=1e-6, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("audited", [True, False])
def test_where_pgaudit_is_on_nothing_is_copied_into_a_table_itself(url, tmp_path, monkeypatch, audited):
    """Such a COPY would end a server that has both: timescale/timescaledb#7667."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            f"ALTER DATABASE {connection.info.dbname} SET pgaudit.log = '{'ddl' if audited else 'none'}'"
        )
    copied = set()
    copy_in = tables.copy_in
    monkeypatch.setattr(tables, "copy_in", lambda c, table, rows: copied.add(table) or copy_in(c, table, rows))
    load(url, [write(tmp_path / "A.csv", lines(30))])
    assert compute(url) == 30 * 6
    assert {table.startswith("staged_") for table in copied} == {audited}


def values_of(url, view):
    features = ", ".join(VIEWS[view])
    rows = ask(url, f"SELECT {features} FROM features.{view} WHERE symbol <> 'C' ORDER BY symbol, event_timestamp")
    return np.array(rows, dtype=np.float64)


def test_two_corrections_before_a_compute_count_from_the_earlier(url, tmp_path):
    rows = lines(60)
    load(url, [write(tmp_path / "A.csv", rows)])
    compute(url)
    for i in (10, 40):
        load(url, [write(tmp_path / "A.csv", [rows[i].split(",")[0] + ",100,101,99,100,5"])])
    compute(url)
    assert compute(url, full=True) == 0


def test_values_are_null_where_the_history_is_short(url, tmp_path):
    load(url, [write(tmp_path / "A.csv", lines(30))])
    compute(url)
    assert ask(url, "SELECT count(sma_20), count(sma_50) FROM features.technical_indicators_ma") == [(11, 0)]
    assert ask(url, "SELECT count(cdl_engulfing), count(daily_return) FROM features.price_action") == [(28, 29)]


def test_only_symbols_whose_bars_changed_are_computed(url, tmp_path):
    load(url, [write(tmp_path / "A.csv", lines(30)), write(tmp_path / "B.csv", lines(30))])
    assert compute(url) == 2 * 30 * 6
    assert compute(url) == 0
    load(url, [write(tmp_path / "B.csv", lines(31))])
    assert compute(url) == 6
    assert ask(url, "SELECT symbol FROM features.pending_materialize ORDER BY 1") == [("A",), ("B",)]


def test_where_definitions_changed_every_symbol_is_computed_anew(url, tmp_path):
    """What another release of Larder, or of TA-Lib, has left in the tables."""
    load(url, [write(tmp_path / f"{name}.csv", lines(30)) for name in "AB"])
    compute(url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("UPDATE features.price_action SET price_range = -1")
        assert compute(url) == 0
        connection.execute("UPDATE features.computed_with SET fingerprint = 'of another release'")
        assert record.changed(connection, Formulas(REPO))
        assert compute(url) == 2 * 30
        assert not record.changed(connection, Formulas(REPO))
    assert ask(url, "SELECT count(*) FROM features.price_action WHERE price_range < 0") == [(0,)]
    assert ask(url, "SELECT symbol FROM features.pending_materialize ORDER BY 1") == [("A",), ("B",)]
    assert compute(url) == 0


def test_a_bar_that_is_loaded_during_a_compute_is_computed_next(url, tmp_path):
    load(url, [write(tmp_path / "A.csv", lines(30))])
    with psycopg.connect(url) as computing:
        computing.execute(statement(TAKE, SOURCE), [["A"]])
        loading = threading.Thread(target=load, args=[url, [write(tmp_path / "A.csv", lines(31))]])
        loading.start()
        time.sleep(0.5)
        assert computing.execute("SELECT count(*) FROM market_data.ohlcv_daily").fetchone() == (30,)
    loading.join()
    assert ask(url, "SELECT symbol, since::date::text FROM market_data.pending_compute") == [("A", "2024-01-31")]


def test_a_run_writes_its_metrics(url, tmp_path, credentials):
    incoming = tmp_path / "incoming"
    incoming.mkdir()
    write(incoming / "A.csv", [*lines(30), "2024-03-01,1,1,2,1,5"])
    before = time.time()
    pipeline.run(credentials, ["load", "compute"], [incoming], REPO, metrics_dir=tmp_path / "metrics")
    written = {name: metrics.read(tmp_path / "metrics", name) for name in metrics.HELP}
    assert written["larder_pipeline_success"] == 1
    assert before <= written["larder_pipeline_last_success_timestamp_seconds"] <= time.time()
    assert written["larder_pipeline_bars_changed"] == 30
    assert written["larder_rejected_bars"] == 1
    assert written["larder_newest_bar_timestamp_seconds"] == np.datetime64("2024-01-30").astype("datetime64[s]").astype(
        int
    )
    assert oct((tmp_path / "metrics/pipeline.prom").stat().st_mode)[-3:] == "644"

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP TABLE features.price_action")
    write(incoming / "A.csv", lines(31))
    with pytest.raises(LarderError, match=r"price_action"):
        pipeline.run(credentials, ["load", "compute"], [incoming], REPO, metrics_dir=tmp_path / "metrics")
    after = {name: metrics.read(tmp_path / "metrics", name) for name in metrics.HELP}
    assert after["larder_pipeline_success"] == 0
    last = "larder_pipeline_last_success_timestamp_seconds"
    assert after[last] == written[last]
    assert ask(url, "SELECT symbol FROM market_data.pending_compute") == [("A",)], (
        "the next run does what this one could not"
    )


def test_a_refused_file_stops_nothing_but_is_told(tmp_path, credentials):
    incoming = tmp_path / "incoming"
    incoming.mkdir()
    write(incoming / "A.csv", lines(30))
    write(incoming / "B.csv", ["x"], header="what,is,this\n")
    with pytest.raises(RefusedFileError):
        pipeline.run(credentials, ["load", "compute"], [incoming], REPO, metrics_dir=tmp_path)
    assert metrics.read(tmp_path, "larder_pipeline_success") == 1
    assert metrics.read(tmp_path, "larder_pipeline_files_refused") == 1
    assert metrics.read(tmp_path, "larder_pipeline_feature_rows_changed") == 180


def test_a_second_run_leaves_it_to_the_first(url, tmp_path, credentials):
    incoming = tmp_path / "incoming"
    incoming.mkdir()
    with psycopg.connect(url, autocommit=True) as first:
        first.execute("SELECT pg_advisory_lock(hashtextextended('larder run', 0))")
        with pytest.raises(BusyError, match="Another larder run is running"):
            pipeline.run(credentials, ["load"], [incoming], REPO, metrics_dir=tmp_path)
        # A session that is closed keeps its locks for a moment.
        first.execute("SELECT pg_advisory_unlock_all()")
    assert not (tmp_path / metrics.NAME).exists()
    pipeline.run(credentials, ["load"], [incoming], REPO)


def test_a_server_that_is_away_is_one_sentence_and_a_failed_run(tmp_path, credentials):
    (credentials.directory / "pipeline_url").write_text("postgresql://u:secret@127.0.0.1:1/feast")
    with pytest.raises(LarderError, match="PostgreSQL cannot be reached") as caught:
        pipeline.run(credentials, ["compute"], [], REPO, metrics_dir=tmp_path)
    assert "secret" not in caught.value.message
    assert "larder_pipeline_success 0" in (tmp_path / metrics.NAME).read_text()
