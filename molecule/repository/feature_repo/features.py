"""A small repository of another kind: risk limits of accounts, one entity, one view, and one that is computed."""

from datetime import timedelta
from pathlib import Path

from feast import Entity, FeatureView, Field, ValueType
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import PostgreSQLSource
from feast.types import Float64, Int64, String

from larder.features.feast_views import computed_views

account = Entity(name="account", join_keys=["account_id"], value_type=ValueType.INT64)

account_limits = FeatureView(
    name="account_limits",
    entities=[account],
    ttl=timedelta(days=90),
    schema=[
        Field(name="max_notional", dtype=Float64),
        Field(name="tier", dtype=String),
        Field(name="breaches", dtype=Int64),
    ],
    source=PostgreSQLSource(name="account_limits", table="risk.account_limits", timestamp_field="valid_from"),
)

globals().update(computed_views(Path(__file__).parent, [account]))
