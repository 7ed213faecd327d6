"""What features are about."""

from feast import Entity, ValueType

symbol = Entity(
    name="symbol",
    join_keys=["symbol"],
    value_type=ValueType.STRING,
    description="An instrument as its bars name it: AAPL.US, EURUSD",
)
