"""The six daily views (42 features) and the view that is fed by push."""

from datetime import timedelta

from feast import FeatureView, Field
from feast.types import Float64, Int64

from entities import symbol
from sources import (
    ma_source,
    market_data_push_source,
    momentum_source,
    ohlcv_source,
    price_action_source,
    volatility_source,
    volume_source,
)

# Feast has one ttl per view and only point-in-time joins obey it: it is the offline TTL.
# The online TTL of one year is the Redis store's key_ttl_seconds in feature_store.yaml.
OFFLINE_TTL = timedelta(days=730)

ohlcv_features = FeatureView(
    name="ohlcv_features",
    entities=[symbol],
    ttl=OFFLINE_TTL,
    schema=[
        Field(name="open", dtype=Float64),
        Field(name="high", dtype=Float64),
        Field(name="low", dtype=Float64),
        Field(name="close", dtype=Float64),
        Field(name="volume", dtype=Float64),
        Field(name="adjusted_close", dtype=Float64, description="Close adjusted for splits and dividends"),
        Field(name="typical_price", dtype=Float64, description="(high + low + close) / 3"),
    ],
    source=ohlcv_source,
    tags={"category": "price", "origin": "market_data"},
    description="The daily bar",
)

technical_indicators_ma = FeatureView(
    name="technical_indicators_ma",
    entities=[symbol],
    ttl=OFFLINE_TTL,
    schema=[
        Field(name="sma_5", dtype=Float64),
        Field(name="sma_10", dtype=Float64),
        Field(name="sma_20", dtype=Float64),
        Field(name="sma_50", dtype=Float64),
        Field(name="sma_200", dtype=Float64),
        Field(name="ema_12", dtype=Float64),
        Field(name="ema_26", dtype=Float64),
        Field(name="ema_50", dtype=Float64),
    ],
    source=ma_source,
    tags={"category": "trend", "origin": "talib"},
    description="Simple and exponential moving averages of the close",
)

technical_indicators_momentum = FeatureView(
    name="technical_indicators_momentum",
    entities=[symbol],
    ttl=OFFLINE_TTL,
    schema=[
        Field(name="rsi_14", dtype=Float64),
        Field(name="macd", dtype=Float64, description="EMA 12 - EMA 26"),
        Field(name="macd_signal", dtype=Float64, description="EMA 9 of macd"),
        Field(name="macd_histogram", dtype=Float64, description="macd - macd_signal"),
        Field(name="stoch_k", dtype=Float64, description="Slow %K of 14 bars, smoothed by 3"),
        Field(name="stoch_d", dtype=Float64, description="SMA 3 of stoch_k"),
        Field(name="roc_10", dtype=Float64, description="Per cent"),
    ],
    source=momentum_source,
    tags={"category": "momentum", "origin": "talib"},
    description="Oscillators of the close and of the range",
)

technical_indicators_volatility = FeatureView(
    name="technical_indicators_volatility",
    entities=[symbol],
    ttl=OFFLINE_TTL,
    schema=[
        Field(name="atr_14", dtype=Float64),
        Field(name="bb_upper", dtype=Float64, description="bb_middle + 2 standard deviations"),
        Field(name="bb_middle", dtype=Float64, description="SMA 20 of the close"),
        Field(name="bb_lower", dtype=Float64, description="bb_middle - 2 standard deviations"),
        Field(name="bb_width", dtype=Float64, description="(bb_upper - bb_lower) / bb_middle"),
        Field(name="std_20", dtype=Float64, description="Population standard deviation of 20 closes"),
        Field(name="hist_volatility_20", dtype=Float64, description="Annualised, of 20 daily log returns"),
    ],
    source=volatility_source,
    tags={"category": "volatility", "origin": "talib"},
    description="How far prices move",
)

volume_indicators = FeatureView(
    name="volume_indicators",
    entities=[symbol],
    ttl=OFFLINE_TTL,
    schema=[
        Field(name="volume_sma_20", dtype=Float64),
        Field(name="volume_ratio", dtype=Float64, description="volume / volume_sma_20"),
        Field(name="obv", dtype=Float64),
        Field(name="vwap", dtype=Float64, description="Of the typical price over 20 bars"),
        Field(name="mfi_14", dtype=Float64),
    ],
    source=volume_source,
    tags={"category": "volume", "origin": "talib"},
    description="What volume says about price",
)

price_action = FeatureView(
    name="price_action",
    entities=[symbol],
    ttl=OFFLINE_TTL,
    schema=[
        Field(name="daily_return", dtype=Float64),
        Field(name="log_return", dtype=Float64),
        Field(name="price_range", dtype=Float64, description="high - low"),
        Field(name="body_size", dtype=Float64, description="abs(close - open)"),
        Field(name="upper_shadow", dtype=Float64, description="high - max(open, close)"),
        Field(name="lower_shadow", dtype=Float64, description="min(open, close) - low"),
        Field(name="is_green_candle", dtype=Int64, description="1 where close > open, else 0"),
        Field(name="cdl_engulfing", dtype=Int64, description="-100 bearish, 100 bullish, 0 neither"),
    ],
    source=price_action_source,
    tags={"category": "price_action", "origin": "computed"},
    description="The shape of the bar and its return",
)

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
