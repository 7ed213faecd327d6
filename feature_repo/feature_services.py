"""The sets of features that models ask for by name."""

from feast import FeatureService

from feature_views import market_features

trading_signals = FeatureService(
    name="trading_signals",
    features=[market_features[["close", "volume", "spread"]]],
    description="What the signal models read",
)
