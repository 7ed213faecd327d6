"""The feature repository as Feast reads it, the tables it declares, and what the pipeline computes, agree."""

import sys
from pathlib import Path

import pytest
import yaml
from feast import Entity, FeatureService, FeatureView, OnDemandFeatureView, ValueType
from feast.types import Float64, Int64

from larder.features import definitions

REPO = Path(__file__).parents[2] / "feature_repo"
DEFINED = definitions.read(REPO)
VIEWS = {view.name: {feature.name: feature.type for feature in view.features} for view in DEFINED.views}
TABLES = {
    table["name"]: table for table in (*yaml.safe_load((REPO / "tables.yml").read_text())["tables"], *DEFINED.tables())
}
TYPES = {"double precision": Float64, "bigint": Int64}


@pytest.fixture(scope="module")
def objects():
    """Every Feast object of the repository, imported without a store, a secret or a feature_store.yaml."""
    modules = [path.stem for path in REPO.glob("*.py")]
    sys.path.insert(0, str(REPO))
    try:
        found = [value for name in modules for value in vars(__import__(name)).values()]
    finally:
        sys.path.remove(str(REPO))
        for name in modules:
            sys.modules.pop(name, None)
    return {
        kind: {o.name: o for o in found if type(o) is kind}
        for kind in (Entity, FeatureView, OnDemandFeatureView, FeatureService)
    }


def columns(table):
    return {c["name"]: c["type"] for c in TABLES[table]["columns"] if c["name"] not in ("symbol", "event_timestamp")}


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_is_what_is_computed_and_stored(objects, view):
    fields = {field.name: field.dtype for field in objects[FeatureView][view].schema if field.name != "symbol"}
    assert fields == {name: {"Int64": Int64, "Float64": Float64}[kind] for name, kind in VIEWS[view].items()}
    stored = columns(f"features.{view}")
    assert stored.pop("run_id") == "integer"
    assert fields == {name: TYPES[kind] for name, kind in stored.items()}
    assert objects[FeatureView][view].ttl.days == 730
    assert set(objects[FeatureView][view].tags) == {"category", "origin"}


def test_the_pushed_view_is_what_its_table_holds(objects):
    view = objects[FeatureView]["market_features"]
    fields = {field.name: field.dtype for field in view.schema if field.name != "symbol"}
    assert fields == {name: TYPES[kind] for name, kind in columns("market_data.quotes").items() if name != "created"}
    assert view.ttl.days == 1
    assert view.stream_source.name == "market_data_push_source"


def test_a_bar_may_have_no_volume_but_has_its_prices():
    nullable = [c["name"] for c in TABLES["market_data.ohlcv_daily"]["columns"] if c.get("nullable", True)]
    assert nullable == ["volume", "load_id"]


def test_the_repository_has_no_other_objects(objects):
    assert set(objects[FeatureView]) == {*VIEWS, "market_features"}
    assert set(objects[OnDemandFeatureView]) == {"price_change"}
    assert [f.name for f in objects[FeatureService]["trading_signals"].feature_view_projections[0].features] == [
        "close",
        "volume",
        "spread",
    ]
    assert {e.name: e.value_type for e in objects[Entity].values()} == {"symbol": ValueType.STRING}


def test_every_hypertable_has_the_indexes_that_feast_needs():
    for table in TABLES.values():
        if "hypertable" in table:
            assert table["primary_key"][:2] == ["symbol", "event_timestamp"]
            assert [index["columns"] for index in table["indexes"]] == [["event_timestamp DESC"]]
