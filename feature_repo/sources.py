"""Where features come from: one hypertable per view, declared in tables.yml."""

from feast import PushSource
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import PostgreSQLSource


def daily(view: str) -> PostgreSQLSource:
    """The hypertable that `larder compute` fills for one view."""
    return PostgreSQLSource(
        name=f"{view}_source",
        table=f"features.{view}",
        timestamp_field="event_timestamp",
        description=f"features.{view}, one row per symbol and trading day",
    )


ohlcv_source = daily("ohlcv_features")
ma_source = daily("technical_indicators_ma")
momentum_source = daily("technical_indicators_momentum")
volatility_source = daily("technical_indicators_volatility")
volume_source = daily("volume_indicators")
price_action_source = daily("price_action")

quotes_source = PostgreSQLSource(
    name="quotes_source",
    table="market_data.quotes",
    timestamp_field="event_timestamp",
    created_timestamp_column="created",
    description="Every quote that was pushed",
)

market_data_push_source = PushSource(
    name="market_data_push_source",
    batch_source=quotes_source,
    description="Quotes from POST /push",
)
