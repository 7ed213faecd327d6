"""The computed views, as computed_views.yml has them, and the view that is fed by push."""

from datetime import timedelta
from pathlib import Path

from feast import FeatureView, Field
from feast.types import Float64

from entities import symbol
from larder.features.feast_views import computed_views
from sources import market_data_push_source

# Feast reads the names of this module.
globals().update(computed_views(Path(__file__).parent, [symbol]))

market_features = FeatureView(
    name="market_features",
    entities=[symbol],
    ttl=timedelta(days=1),
    schema=[
        Field(name="open", dtype=Float64),
        Field(name="high", dtype=Float64),
        Field(name="low", dtype=Float64),
        Field(name="close", dtype=Float64),
        Field(name="volume", dtype=Float64),
        Field(name="bid", dtype=Float64),
        Field(name="ask", dtype=Float64),
        Field(name="spread", dtype=Float64),
    ],
    source=market_data_push_source,
    tags={"category": "market", "origin": "push"},
    description="The newest quote, from POST /push",
)
