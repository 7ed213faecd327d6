"""The queries that Feast sends find their indexes and open only the chunks that they need."""

from __future__ import annotations

import json
import re

import pytest

# Enough that a sequential scan of a chunk is the wrong choice, and the planner knows it.
SYMBOLS, DAYS = 200, 1500

# Feast's materialization with pull_latest_features.
NEWEST_IN_WINDOW = """
SELECT symbol, daily_return FROM (
    SELECT symbol, daily_return, ROW_NUMBER() OVER (PARTITION BY symbol ORDER BY event_timestamp DESC) AS rank
    FROM features.price_action
    WHERE event_timestamp BETWEEN TIMESTAMPTZ '{newest}' - INTERVAL '7 days' AND TIMESTAMPTZ '{newest}'
) AS ranked WHERE rank = 1
"""
POINT_IN_TIME = """
SELECT * FROM (VALUES {entities}) AS entity (symbol, event_timestamp)
LEFT JOIN LATERAL (
    SELECT daily_return FROM features.price_action AS feature
    WHERE feature.symbol = entity.symbol AND feature.event_timestamp <= entity.event_timestamp
    AND feature.event_timestamp >= entity.event_timestamp - INTERVAL '7 days'
    ORDER BY feature.event_timestamp DESC LIMIT 1
) AS newest ON true
"""
NEWEST_PER_SYMBOL = """
SELECT * FROM unnest(ARRAY['S1', 'S2', 'S3']) AS entity (symbol)
CROSS JOIN LATERAL (
    SELECT daily_return FROM features.price_action AS feature
    WHERE feature.symbol = entity.symbol ORDER BY feature.event_timestamp DESC LIMIT 1
) AS newest
"""
RANGE = """
SELECT event_timestamp, daily_return FROM features.price_action
WHERE symbol = 'S7' AND event_timestamp >= '2021-03-01' AND event_timestamp < '2021-06-01' ORDER BY event_timestamp
"""


@pytest.fixture(scope="module")
def filled(query, superuser):
    rows = f"""
        INSERT INTO features.price_action (symbol, event_timestamp, daily_return)
        SELECT 'S' || symbol, '2020-01-01'::timestamptz + day * interval '1 day', random()
        FROM generate_series(0, {DAYS - 1}) AS day, generate_series(1, {SYMBOLS}) AS symbol
        ON CONFLICT DO NOTHING"""
    assert query("pipeline", rows).rc == 0
    superuser("ANALYZE features.price_action")


@pytest.fixture
def explain(filled, query):  # noqa: ARG001 -- the plans are those of a filled table
    """Return the names of the indexes that a query scans and the relations that it opens."""

    def run(sql):
        result = query("pipeline", f"EXPLAIN (ANALYZE, FORMAT JSON) {sql}")
        assert result.rc == 0, result.stderr
        scans = []

        def walk(node):
            # ChunkAppend is a Custom Scan: it names the hypertable, its children the chunks.
            if node["Node Type"].endswith("Scan") and node["Node Type"] != "Custom Scan" and node["Actual Loops"] > 0:
                scans.append(node)
            for child in node.get("Plans", []):
                walk(child)

        walk(json.loads(result.stdout)[0]["Plan"])
        # A chunk's index is named after the hypertable's.
        names = {
            re.sub(r"^(_hyper_\d+_\d+_chunk|\d+_\d+)_", "", scan["Index Name"])
            for scan in scans
            if "Index Name" in scan
        }
        read_whole = {scan["Relation Name"] for scan in scans if scan["Node Type"] == "Seq Scan"}
        assert not read_whole
        return names, {scan["Relation Name"] for scan in scans if "chunk" in scan.get("Relation Name", "")}

    return run


BY_TIME = {"price_action_event_timestamp_idx"}
# The primary key is an index on (symbol, event time) too; which of the two serves is the planner's business.
BY_SYMBOL_AND_TIME = {"price_action_symbol_event_timestamp_idx", "price_action_pkey"}


def test_the_table_has_several_chunks(filled, superuser):  # noqa: ARG001
    assert int(superuser("SELECT count(*) FROM show_chunks('features.price_action')")) >= 5


def test_materialization_reads_the_window_by_event_time_in_one_chunk(explain, query):
    newest = query("pipeline", "SELECT max(event_timestamp) FROM features.price_action").stdout.strip()
    indexes, chunks = explain(NEWEST_IN_WINDOW.format(newest=newest))
    assert indexes <= BY_TIME
    assert len(chunks) == 1


def test_a_point_in_time_join_opens_the_chunks_of_its_window(explain):
    entities = ", ".join(f"('S{n}', TIMESTAMPTZ '2021-05-{n:02}')" for n in range(1, 21))
    indexes, chunks = explain(POINT_IN_TIME.format(entities=entities))
    assert indexes <= BY_SYMBOL_AND_TIME
    assert len(chunks) == 1


def test_the_newest_row_of_a_symbol_is_found_in_the_newest_chunk(explain):
    indexes, chunks = explain(NEWEST_PER_SYMBOL)
    assert indexes <= BY_SYMBOL_AND_TIME
    assert len(chunks) == 1


def test_a_range_of_one_symbol_is_read_by_symbol_and_time(explain):
    indexes, chunks = explain(RANGE)
    assert indexes <= BY_SYMBOL_AND_TIME
    assert len(chunks) <= 2
