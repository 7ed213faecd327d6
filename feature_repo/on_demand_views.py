"""Features that are computed when they are read."""

import pandas as pd
from feast import Field
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float64

from feature_views import market_features


@on_demand_feature_view(  # type: ignore[untyped-decorator] # Feast is untyped
    sources=[market_features],
    schema=[Field(name="price_change_pct", dtype=Float64)],
    tags={"category": "market", "origin": "on_demand"},
    description="Change since the open, in per cent",
)
def price_change(inputs: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"price_change_pct": (inputs["close"] - inputs["open"]) / inputs["open"] * 100})
