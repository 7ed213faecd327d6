"""`larder join`: many entity rows in parts, whose rows are those of one join, however often it was ended."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from test_offline_store import FEATURES, KEYS, START, connection, database, fill, pytestmark, stores  # noqa: F401 -- it marks these tests, too  # noqa: F401 -- fixtures

from larder.cli import main

ROWS = 50
# Several rows of quotes may be the newest.
WANTED = [feature for feature in FEATURES if not feature.startswith(("pairs", "market", "quotes"))]


@pytest.fixture(scope="module")
def asked(stores, connection, tmp_path_factory):  # noqa: F811 -- fixtures
    """A directory with feature_store.yaml and entities.parquet, and the join of all rows at once."""
    random = np.random.default_rng(1)
    fill(connection, random, 60)
    place = tmp_path_factory.mktemp("join")
    config = stores[1].config
    settings = {"registry": config.registry_config, "online_store": config.online_config}
    settings |= {"project": config.project, "provider": "local", "offline_store": config.offline_config}
    (place / "feature_store.yaml").write_text(json.dumps(settings | {"entity_key_serialization_version": 3}))  # is YAML
    times = [START + pd.Timedelta(hours=int(random.integers(240))) for _ in range(ROWS)]
    rows = pa.table(
        {
            "k": [KEYS[random.integers(4)] for _ in range(ROWS)],
            "event_timestamp": pa.array(times, pa.timestamp("us", "UTC")),
            # pandas would make floats of them, in the second part only.
            "label": pa.array([*range(20), *[None] * 20, *range(10)], pa.int64()),
        }
    )
    pq.write_table(rows, place / "entities.parquet")
    frame = rows.to_pandas(types_mapper=pd.ArrowDtype)
    return place, stores[1].get_historical_features(frame, WANTED).to_arrow()


def join(place, directory, features=WANTED):
    arguments = [place / "entities.parquet", directory, *features, "--rows-at-once", "20"]
    given = ["--feature-store", place / "feature_store.yaml"]
    return CliRunner().invoke(main, list(map(str, ["join", *arguments, *given])))


def same(table, other):
    """NaN is like NaN."""
    return repr(table.to_pydict()) == repr(other.to_pydict())


def test_the_parts_hold_the_rows_of_one_join_in_their_order(asked, tmp_path):
    place, whole = asked
    result = join(place, tmp_path)
    assert result.exit_code == 0, result.output
    parts = sorted(tmp_path.glob("*.parquet"))
    assert [pq.ParquetFile(part).metadata.num_rows for part in parts] == [20, 20, 10]
    assert all(pq.read_schema(part).equals(whole.schema) for part in parts)
    assert same(pq.read_table(tmp_path), whole)


def test_a_join_that_was_ended_goes_on_where_it_was(asked, tmp_path):
    place, whole = asked
    join(place, tmp_path)
    kept, lost, _ = sorted(tmp_path.glob("*.parquet"))
    written = kept.stat().st_mtime_ns
    lost.rename(tmp_path / f".{lost.name}")
    with (tmp_path / f".{lost.name}").open("r+b") as half:
        half.truncate(100)
    assert join(place, tmp_path).exit_code == 0
    assert kept.stat().st_mtime_ns == written
    assert same(pq.read_table(tmp_path), whole)
    assert not [*tmp_path.glob(".*")]


def test_a_directory_with_parts_of_another_join_is_refused(asked, tmp_path):
    place, _ = asked
    assert join(place, tmp_path).exit_code == 0
    result = join(place, tmp_path, WANTED[:2])
    assert result.exit_code == 2
    assert "features differ" in result.output
    assert json.loads((tmp_path / "_request.json").read_text())["features"] == WANTED


def test_entity_rows_that_cannot_be_joined_are_refused_in_one_sentence(asked, tmp_path):
    place, _ = asked
    result = join(place, tmp_path, ["pairs:value"])
    assert result.exit_code == 2
    assert "The entity rows have no column 'n'" in result.output
    (tmp_path / "entities.parquet").write_text("no Parquet")
    (tmp_path / "feature_store.yaml").write_text("")
    result = join(tmp_path, tmp_path / "other")
    assert result.exit_code == 2
    assert "is not a Parquet file" in result.output
