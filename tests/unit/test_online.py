"""Planned reads against Feast's own endpoint, over one real Redis: the same status and the same bytes."""

import asyncio
import json
import math
import random
import shutil
import socket
import subprocess
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta


import pandas as pd
import pytest
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, PushSource, ValueType, types
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.on_demand_feature_view import on_demand_feature_view
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis
from starlette.responses import JSONResponse

from larder import online, serve

NOW = datetime.now(UTC).replace(microsecond=0)
SYMBOLS = ["A", "B", "C.US", "BTC/USD", "ÄÖ €", 'q"uo\\te', "", "only-prices", "only-types"]
DESKS = [1, 0, -7, 2**63 - 1]
CONFIG = """
project: trading
provider: local
registry: {{registry_type: sql, path: "sqlite:///{directory}/registry.db", cache_ttl_seconds: 1}}
offline_store: {{type: dask}}
online_store: {{type: redis, connection_string: "127.0.0.1:{port},socket_timeout=2,socket_connect_timeout=2"}}
entity_key_serialization_version: 3
"""
LISTS = {
    f"{name}_list": types.Array(dtype)
    for name, dtype in {
        "double": types.Float64,
        "float": types.Float32,
        "int32": types.Int32,
        "int64": types.Int64,
        "string": types.String,
        "bytes": types.Bytes,
        "bool": types.Bool,
        "unix_timestamp": types.UnixTimestamp,
    }.items()
}
SCALARS = {
    "double": types.Float64,
    "float": types.Float32,
    "int32": types.Int32,
    "int64": types.Int64,
    "string": types.String,
    "bytes": types.Bytes,
    "bool": types.Bool,
    "unix_timestamp": types.UnixTimestamp,
}
DOUBLES = [0.0, -0.0, 1.5, 806.19, 0.1, 1e-4, 9.9e-5, 5e-324, 1e15, 1e16, 1.7976931348623157e308, -2.5e-7]
NO_NUMBERS = [math.nan, math.inf, -math.inf]


def definitions(directory):
    source = FileSource(name="file", path=str(directory / "x.parquet"), timestamp_field="event_timestamp")
    push = PushSource(name="push", batch_source=source)
    symbol = Entity(name="symbol", join_keys=["symbol"], value_type=ValueType.STRING)
    desk = Entity(name="desk", join_keys=["desk_id"], value_type=ValueType.INT64)
    lot = Entity(name="lot", join_keys=["lot"], value_type=ValueType.INT32)
    day = Entity(name="day", join_keys=["day"], value_type=ValueType.UNIX_TIMESTAMP)

    def view(name, entities, ttl=None, /, **schema):
        fields = [Field(name=feature, dtype=dtype) for feature, dtype in schema.items()]
        return FeatureView(name=name, entities=entities, source=push, schema=fields, ttl=ttl)

    prices = view("prices", [symbol], open=types.Float64, close=types.Float64, volume=types.Int64, note=types.String)
    views = [
        prices,
        view("numbers", [symbol], timedelta(seconds=1), **{f"n{i}": types.Float64 for i in range(8)}),
        view("all_types", [symbol], **SCALARS, **LISTS, nested=types.Map),
        view("positions", [symbol, desk], size=types.Float64, close=types.Float64),
        view("desks", [desk], limit=types.Float64, name=types.String),
        view("lots", [lot], price=types.Float64),
        view("days", [day], holiday=types.Bool),
        view("market", [], breadth=types.Float64),
    ]

    @on_demand_feature_view(sources=[prices], schema=[Field(name="change", dtype=types.Float64)])
    def price_change(inputs: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"change": inputs["close"] - inputs["open"]})

    services = [
        FeatureService(name="signals", features=[prices[["close", "volume"]], views[1]]),
        FeatureService(name="renamed", features=[prices[["close"]].with_name("p"), views[3][["close"]]]),
        FeatureService(name="aliased", features=[prices[["close"]].with_join_key_map({"symbol": "benchmark"})]),
        FeatureService(name="computed", features=[prices[["close"]], price_change]),
        FeatureService(name="colliding", features=[prices, views[3]]),
    ]
    return [symbol, desk, lot, day, push, *views, price_change, *services]


def value(chance, name):
    """Return a random Value of a field, by the field's name where it names a type."""
    if chance.random() < 0.1:
        return chance.choice([Value(), Value(null_val=0)])
    number = chance.choice([*DOUBLES, chance.uniform(-1e3, 1e3), round(chance.uniform(1, 999), 2)])
    if chance.random() < 0.03:
        number = chance.choice(NO_NUMBERS)
    whole = chance.choice([0, 1, -1, 2**31 - 1, -(2**31)])
    words = chance.choice(["", "plain", "e-mail", "N.V.", "0.00001", 'q"\\/\b\f\n\r\t\x00\x1f\x7f', "Ω\u2028😀", "],["])
    one = {
        "double": number,
        "float": number if abs(number) < 1e30 or not math.isfinite(number) else 0.1,
        "int32": whole,
        "int64": chance.choice([whole, 2**63 - 1, -(2**63), 2**53 + 1]),
        "string": words,
        "bytes": words.encode() + b"\xff",
        "bool": chance.random() < 0.5,
        "unix_timestamp": whole,
    }
    if name.endswith("_list"):
        result, items = Value(), chance.randrange(4)
        getattr(result, f"{name}_val").SetInParent()
        getattr(result, f"{name}_val").val.extend([one[name.removesuffix("_list")]] * items)
        return result
    if name == "nested":
        result = Value()
        result.map_val.val["a"].double_val = number
        result.map_val.val[words].string_val = words
        return result
    kinds = {"volume": "int64", "note": "string", "name": "string", "holiday": "bool"}
    kind = name if name in SCALARS else kinds.get(name, "double")
    return Value(**{f"{kind}_val": one[kind]})


def fill(store):
    """Write random rows; some lack fields, some symbols lack views."""
    chance = random.Random(7)
    keys = {
        "symbol": [Value(string_val=symbol) for symbol in SYMBOLS],
        "desk_id": [Value(int64_val=desk) for desk in DESKS],
        "lot": [Value(int32_val=lot) for lot in (0, -1, 2**31 - 1)],
        "day": [Value(unix_timestamp_val=0)],
    }
    for view in store.registry.list_feature_views(store.project):
        rows = [EntityKey()]
        for key in view.join_keys:
            rows = [
                EntityKey(join_keys=[*row.join_keys, key], entity_values=[*row.entity_values, part])
                for row in rows
                for part in keys.get(key, [Value(string_val="")])  # no entity: a dummy
            ]
        data = []
        for row in rows:
            of = row.entity_values[0].string_val
            if (of == "only-prices" and view.name != "prices") or (of == "only-types" and view.name != "all_types"):
                continue
            features = {f.name: value(chance, f.name) for f in view.features if chance.random() < 0.95}
            age = timedelta(
                seconds=chance.choice([0, 5, 3600, 86_400 * 400]), microseconds=chance.choice([0, 1, 123000])
            )
            data.append((row, features, NOW - age, None))
        store._get_provider().online_write_batch(store.config, view, data, None)
    # The way users write, too.
    row = {"symbol": ["PUSHED"], "open": [1.0], "close": [2.5], "volume": [7], "note": ["n"], "event_timestamp": [NOW]}
    store.write_to_online_store("prices", pd.DataFrame(row))


class Server:
    """Larder's application and Feast's own, side by side in one event loop."""

    def __init__(self, runner, directory):
        self.runner, self.directory = runner, directory
        self.larder = serve.create_app()
        self.lifespan = self.larder.router.lifespan_context(self.larder)
        runner.run(self.lifespan.__aenter__())
        # The bound method's object: the server behind the application.
        self.server = self.larder.routes[0].endpoint.__self__
        self.stock = serve.build(self.server.store)

    def close(self):
        self.runner.run(self.lifespan.__aexit__(None, None, None))

    def ask(self, app, method, path, body=None, content_type=b"application/json"):
        """Return the status, who answered and the body's bytes."""
        sent = []
        path, _, query = path.partition("?")
        scope = {"type": "http", "method": method, "path": path, "query_string": query.encode(), "client": ("::1", 1)}
        scope["headers"] = [(b"content-type", content_type)] if content_type else []
        data = body if isinstance(body, bytes) else json.dumps(body).encode()

        async def receive():
            return {"type": "http.request", "body": data if body is not None else b""}

        async def send(message):
            sent.append(message)

        async def main():
            try:
                await app(scope, receive, send)
            except Exception:
                assert sent  # Starlette answers, and raises again for the server's log

        self.runner.run(main())
        who = dict(sent[0]["headers"]).get(b"larder-answer", b"").decode()
        return sent[0]["status"], who, b"".join(m.get("body", b"") for m in sent[1:])

    def read(self, body, **options):
        return self.ask(self.larder, "POST", online.PATH, body, **options)

    def get(self, path):
        status, who, body = self.ask(self.larder, "GET", path, content_type=None)
        return status, who, json.loads(body)

    def same(self, body, **options):
        """Ask both, compare, and return who answered and the answer."""
        status, who, answer = self.read(body, **options)
        stock_status, _, stock = self.ask(self.stock, "POST", online.PATH, body, **options)
        assert (status, answer) == (stock_status, stock)
        return status, who, json.loads(answer)


@pytest.fixture(scope="module")
def redis():
    """A Redis without a file; Debian's package redis-tools has the server under another name."""
    binary = shutil.which("redis-server") or shutil.which("redis-check-rdb")
    assert binary, "these tests need Debian's package redis-tools"
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--enable-debug-command", "local"]
    with subprocess.Popen(["redis-server", *options], executable=binary, stdout=subprocess.DEVNULL) as process:
        client = Redis(port=port)
        for _ in range(100):
            try:
                client.ping()
                break
            except Exception:
                time.sleep(0.05)
        yield client
        process.terminate()


@pytest.fixture(scope="module")
def server(redis, tmp_path_factory):
    directory = tmp_path_factory.mktemp("store")
    config = directory / "feature_store.yaml"
    config.write_text(CONFIG.format(directory=directory, port=redis.connection_pool.connection_kwargs["port"]))
    store = FeatureStore(fs_yaml_file=config)
    store.apply(definitions(directory))
    fill(store)
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name in ("CREDENTIALS_DIRECTORY", "RUNTIME_DIRECTORY"):
            patch.setenv(name, str(directory))
        runner = stack.enter_context(asyncio.Runner())
        server = Server(runner, directory)
        yield server
        server.close()


def refs(*views):
    return [f"{view}:{feature}" for view in views for feature in FEATURES[view]]


FEATURES = {
    "prices": ["open", "close", "volume", "note"],
    "numbers": [f"n{i}" for i in range(8)],
    "all_types": [*SCALARS, *LISTS, "nested"],
    "positions": ["size", "close"],
    "desks": ["limit", "name"],
    "lots": ["price"],
    "days": ["holiday"],
    "market": ["breadth"],
}
SYMBOL_VIEWS = ("prices", "numbers", "all_types")
keys_of = {
    "symbol": st.sampled_from([*SYMBOLS, "missing", "PUSHED"]),
    "desk_id": st.sampled_from([*DESKS, 99]),
    "lot": st.sampled_from([0, -1, 2**31 - 1, 5]),
}


@st.composite
def planned(draw):
    """Requests that a plan can answer."""
    full = draw(st.booleans())
    views = draw(st.sets(st.sampled_from(["prices", "numbers", "all_types", "positions", "desks", "lots"]), min_size=1))
    if not full and {"prices", "positions"} <= views:
        views.remove("positions")
    every = refs(*sorted(views))
    features = draw(st.lists(st.sampled_from(every), unique=True, min_size=1))
    views = {ref.partition(":")[0] for ref in features}
    names = {
        "symbol": views & {*SYMBOL_VIEWS, "positions"},
        "desk_id": views & {"positions", "desks"},
        "lot": views & {"lots"},
    }
    rows = draw(st.integers(1, 12))
    entities = {
        name: draw(st.lists(keys_of[name], min_size=rows, max_size=rows))
        for name in draw(st.permutations(sorted(name for name, used in names.items() if used)))
    }
    return {"features": features, "entities": entities, "full_feature_names": full}


anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just([]) | st.just({"a": 1})


@st.composite
def requests(draw):
    """Requests of any kind, most of them with something that Feast refuses or has to see to."""
    known = refs(*FEATURES)
    reference = st.sampled_from(
        [*known, "price_change:change", "missing:close", "prices:missing", "nonsense", "prices@v1:close", ""]
    )
    key = st.one_of(*keys_of.values()) | anything
    body = {
        "features": draw(st.lists(reference, max_size=4) | anything),
        "entities": draw(
            st.dictionaries(
                st.sampled_from(["symbol", "desk_id", "desk", "lot", "day", "benchmark", "unknown", "__dummy_id"]),
                st.lists(key, min_size=1, max_size=1) | st.lists(key, max_size=3) | anything,
                max_size=3,
            )
            | anything
        ),
        "feature_service": draw(
            st.none()
            | st.sampled_from(["signals", "renamed", "aliased", "computed", "colliding", "missing", ""])
            | anything
        ),
        "full_feature_names": draw(st.booleans() | anything),
        "include_feature_view_version_metadata": draw(st.booleans()),
        "unknown_field": 1,
    }
    for name in draw(st.sets(st.sampled_from(sorted(body)))):
        del body[name]
    return body


check = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@check
@given(planned())
def test_a_plan_answers_as_feast_does(server, body):
    status, who, _ = server.same(body)
    assert (status, who) == (200, "larder")


@check
@given(requests())
def test_any_request_is_answered_as_feast_does(server, body):
    server.same(body)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("service", "who"),
    [("signals", "larder"), ("renamed", "larder"), ("aliased", "feast"), ("computed", "feast"), ("colliding", "")],
)
def test_a_feature_service_is_answered_as_feast_does(server, service, who, full):
    entities = {"symbol": ["A", "missing", "A"]}
    if service in ("renamed", "colliding"):
        entities["desk_id"] = [1, 1, 0]
    if service == "aliased":
        entities = {"benchmark": ["A", "B"]}
    answer = server.same({"feature_service": service, "entities": entities, "full_feature_names": full})
    if answer[0] == 200:
        assert answer[1] == (who or "larder")
    else:
        assert service in ("renamed", "colliding")
        assert not full


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b"\xef\xbb\xbf{}",
        '{"features":["prices:close"],"entities":{"symbol":["A"]}}'.encode("utf-16"),
    ],
)
@pytest.mark.parametrize("content_type", [b"application/json", b"application/json; charset=utf-8", b"text/plain", None])
def test_a_body_is_understood_as_feast_does(server, body, content_type):
    server.same(body, content_type=content_type)
    server.same({"features": ["prices:close"], "entities": {"symbol": ["A"]}}, content_type=content_type)


@check
@given(
    st.lists(st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.text() | st.booleans())
)
def test_json_is_starlettes(values):
    assert online.text(values) == JSONResponse(values).body


@given(st.text() | st.integers(-(2**63), 2**63 - 1))
def test_a_key_is_feasts(key):
    of = {"string_val": key} if isinstance(key, str) else {"int64_val": key}
    encode = online.ENCODERS[ValueType.STRING if isinstance(key, str) else ValueType.INT64]
    assert encode(key) == serialize_entity_key(EntityKey(join_keys=["k"], entity_values=[Value(**of)]), 3)[13:]
