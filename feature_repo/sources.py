"""Where the view that is fed by push comes from. The sources of computed views follow from computed_views.yml."""

from feast import PushSource
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import PostgreSQLSource

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
