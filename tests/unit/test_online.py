"""Planned reads against Feast's own endpoint, over one real Redis: the same status and the same values."""

import asyncio
import json
import math
import random
import shutil
import socket
import subprocess
import threading
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta

import pandas as pd
import pytest
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, PushSource, ValueType, types
from feast.feature_server import get_app
from feast.feature_server_utils import _value_to_native
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.on_demand_feature_view import on_demand_feature_view
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis
from starlette.responses import JSONResponse

from larder.serving import application, metrics, online
from larder.serving.answer import Answer, items, numbers
from larder.serving.hashes import Hashes
from larder.serving.plan import ENCODERS, ROW_WEIGHT, WHOLE_VALUES
from larder.serving.query import Query

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
LISTS = {f"{name}_list": types.Array(dtype) for name, dtype in SCALARS.items()}
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
        self.larder = application.create_app()
        self.lifespan = self.larder.router.lifespan_context(self.larder)
        runner.run(self.lifespan.__aenter__())
        self.stock = application.build(self.larder.store)
        self.feast_serve = get_app(FeatureStore(fs_yaml_file=directory / "feature_store.yaml"))

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

    async def planned(self, query):
        return b"".join(await self.larder.online.read(query, await self.larder.online.plan(query)))

    @property
    def port(self):
        return int(self.larder.store.config.online_store.connection_string.partition(",")[0].rpartition(":")[2])

    def get(self, path):
        status, who, body = self.ask(self.larder, "GET", path, content_type=None)
        return status, who, json.loads(body)

    def same(self, body, **options):
        """Ask both, compare, and return who answered and the answer."""
        status, who, answer = self.read(body, **options)
        stock_status, _, stock = self.ask(self.stock, "POST", online.PATH, body, **options)
        # Where FastAPI cannot write down what it found wrong, its 422 becomes a 400.
        assert status == stock_status or {status, stock_status} == {400, 422}, (answer, stock)
        if status == 200:
            assert column_texts(answer) == column_texts(stock)
        return status, who, json.loads(answer)

    def refreshed(self, body, status):
        """Wait until both have read the registry again, after which they answer with this status."""
        end = time.monotonic() + 60
        while {self.ask(app, "POST", online.PATH, body)[0] for app in (self.larder, self.stock)} != {status}:
            assert time.monotonic() < end
            self.runner.run(asyncio.sleep(0.2))


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


def read(items):
    """What the items of a JSON array are, to the sign of a zero and the point of a whole number."""
    return repr(json.loads(b"[%b]" % items))


def column_texts(answer):
    """The JSON of each column by its name: Feast's own order is that of a set."""
    found = json.loads(answer)
    names, results = found.pop("metadata")["feature_names"], found.pop("results")
    assert answer.startswith(b'{"results":[{"values":[')
    assert not found
    return {name: json.dumps(column) for name, column in zip(names, results, strict=True)}


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


def test_a_whole_number_of_a_feature_that_became_a_double_is_read_as_it_is(server):
    """Redis has what was written before the repository was applied until the next materialization, or push."""
    store = server.larder.store
    key = EntityKey(join_keys=["symbol"], entity_values=[Value(string_val="FORMER")])
    numbers = {"n0": 2**53, "n1": 0.5}
    row = {"n0": Value(int64_val=numbers["n0"]), "n1": Value(double_val=numbers["n1"])}
    view = store.get_feature_view("numbers")
    store._get_provider().online_write_batch(store.config, view, [(key, row, NOW, None)], None)
    _, _, answer = server.same({"features": refs("numbers")[:2], "entities": {"symbol": ["FORMER", "A"]}})
    values = [result["values"][0] for result in answer["results"]]
    assert dict(zip(answer["metadata"]["feature_names"], values, strict=True)) == {"symbol": "FORMER", **numbers}


@check
@given(planned())
def test_a_plan_answers_as_feast_does(server, body):
    status, who, _ = server.same(body)
    assert (status, who) == (200, "larder")


def columns_by_name(answer):
    """The columns by their names: the order is that of Feast's sets, another one in each process."""
    found = json.loads(answer)
    names, results = found.pop("metadata")["feature_names"], found.pop("results")
    assert not found
    return {name: [json.dumps(column) for n, column in zip(names, results, strict=True) if n == name] for name in names}


@settings(check, max_examples=300)
@given(requests() | planned())
def test_feast_serve_gives_the_same_values_and_refuses_the_same_requests(server, body):
    """Its refusals have other numbers and words: a client's mistake is often a 500 there, with internal text."""
    status, _, answer = server.read(body)
    feast_status, _, feast_answer = server.ask(server.feast_serve, "POST", online.PATH, body)
    assert (status == 200) == (feast_status == 200), (answer, feast_answer)
    if status == 200:
        assert columns_by_name(answer) == columns_by_name(feast_answer)


@check
@given(requests())
def test_any_request_is_answered_with_a_plan_as_without_one(server, body):
    server.same(body)


@check
@given(
    st.lists(st.sampled_from([*refs("prices", "numbers"), "price_change:change"]), unique=True, min_size=1),
    st.booleans(),
)
def test_the_results_are_in_the_order_asked(server, features, full):
    body = {"features": features, "entities": {"symbol": ["A"]}, "full_feature_names": full}
    asked = [ref.replace(":", "__") if full else ref.partition(":")[2] for ref in features]
    assert server.same(body)[2]["metadata"]["feature_names"] == ["symbol", *asked]


@pytest.mark.parametrize(
    ("service", "names"),
    [
        ("signals", ["close", "volume", *(f"n{i}" for i in range(8))]),
        ("computed", ["close", "change"]),
    ],
)
def test_the_results_of_a_service_are_in_the_service_s_order(server, service, names):
    answer = server.same({"feature_service": service, "entities": {"symbol": ["A"]}})[2]
    assert answer["metadata"]["feature_names"] == ["symbol", *names]


@pytest.mark.parametrize("features", [["prices:close", "positions:size"], ["numbers:n1", "prices:note", "desks:name"]])
def test_an_answer_in_pieces_is_the_answer_in_one(server, monkeypatch, features):
    rows = 20
    entities = {"symbol": [*SYMBOLS, "missing"] * 2, "desk_id": [*DESKS, 99] * 4}
    body = {"features": features, "entities": entities, "include_age": False}
    whole = server.same(body)
    assert len(whole[2]["results"][0]["values"]) == rows
    monkeypatch.setattr("larder.serving.plan.PIECE_VALUES", 1)
    monkeypatch.setattr("larder.serving.plan.WHOLE_VALUES", 1)
    monkeypatch.setattr(online, "PIECE_BYTES", 100)
    monkeypatch.setattr(online, "SMALL_READ", 0)
    monkeypatch.setattr(server.larder.online, "plans", {})
    asked, ask = [], Hashes.ask
    monkeypatch.setattr(Hashes, "ask", lambda self, commands, n: asked.append(n) or ask(self, commands, n))
    assert server.same(body) == whole
    assert len(asked) == rows
    ages = json.loads(server.read(body | {"include_age": True, "max_age_s": 10**9})[2])
    assert [len(column["ages_s"]) for column in ages["results"]] == [rows] * (2 + len(features))


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            {"features": ["prices:close", "prices:open"], "entities": {"symbol": ["A"] * 51}},
            "51 rows x 2 features are 102 values, and a request may ask for 100: ask in parts",
        ),
        (
            {"feature_service": "signals", "entities": {"symbol": ["A"] * 11}},
            "11 rows x 10 features are 110 values, and a request may ask for 100: ask in parts",
        ),
        (
            {"features": ["price_change:change"], "entities": {"symbol": ["A"] * 4}},
            (
                "4 rows x 5 features it takes x 10, because price_change is computed on demand, are 200 values,"
                " and a request may ask for 100: ask in parts"
            ),
        ),
        (
            {"features": ["prices:close"], "entities": {"symbol": [7] * 11}},
            (
                "11 rows x 1 features it takes x 10, because an entity's key is not a string, are 110 values,"
                " and a request may ask for 100: ask in parts"
            ),
        ),
    ],
)
def test_a_read_of_too_many_values_is_refused(server, monkeypatch, body, sentence):
    monkeypatch.setattr(server.larder.online, "most", 100)
    status, _, answer = server.read(body)
    assert (status, json.loads(answer)) == (413, {"detail": sentence})
    rows = body["entities"]["symbol"]
    assert server.read(body | {"entities": {"symbol": rows[: len(rows) // 2]}})[0] in (200, 400)


def test_a_read_of_one_entity_is_bounded_too(server, monkeypatch):
    monkeypatch.setattr(server.larder.online, "most", 1)
    assert server.get("/features/A?features=prices:close")[0] == 200
    assert server.get("/features/A?features=prices:close,prices:open")[0] == 413
    assert server.get("/features/A?feature_service=signals")[0] == 413


@pytest.mark.parametrize(
    ("features", "rows"),
    [(refs("numbers"), 12_000), (["prices:close"], 30_000), (refs("numbers"), 300)],
    ids=["many values", "many rows", "one piece"],
)
def test_a_read_holds_up_the_others_for_some_milliseconds(server, monkeypatch, features, rows):
    """That many values take; what else waits is served before the next ones."""
    entities = {"symbol": [f"S{n}" for n in range(rows)]}
    small = {"features": ["prices:close"], "entities": {"symbol": ["A"]}}
    pieces, add, larder = [], Answer.add, server.larder.online

    def noted(self, entities, replies, now):
        pieces.append(len(replies[0]) * (len(self.plan.refs) + ROW_WEIGHT))
        add(self, entities, replies, now)

    async def main():
        query = Query.of(small)
        plan = await larder.plan(query)
        large = asyncio.create_task(server.planned(Query.of({"features": features, "entities": entities})))
        between = 0
        while not large.done():
            await larder.read(query, plan)
            between += 1
        return json.loads(await large), between

    monkeypatch.setattr(Answer, "add", noted)
    answer, between = server.runner.run(main())
    assert [len(column["values"]) for column in answer["results"]] == [rows] * (1 + len(features))
    assert max(pieces) <= WHOLE_VALUES
    large = [values for values in pieces if values > 1 + ROW_WEIGHT]
    assert between >= len(large)
    assert len(large) >= sum(large) / WHOLE_VALUES


def test_what_feast_computes_is_computed_beside_the_event_loop_one_at_a_time(server, monkeypatch):
    body = {"features": ["price_change:change"], "entities": {"symbol": ["A"]}}
    threads, at_once, most = set(), 0, 0
    store, read = server.larder.store, server.larder.store.get_online_features

    def noted(*arguments, **options):
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        threads.add(threading.current_thread())
        try:
            return read(*arguments, **options)
        finally:
            at_once -= 1

    monkeypatch.setattr(store, "get_online_features", noted)

    async def main():
        scope = {"type": "http", "method": "POST", "path": online.PATH, "query_string": b"", "client": ("::1", 1)}
        scope["headers"] = [(b"content-type", b"application/json")]
        statuses = []

        async def receive():
            return {"type": "http.request", "body": json.dumps(body).encode()}

        async def send(message):
            statuses.append(message.get("status"))

        await asyncio.gather(*(server.larder(scope, receive, send) for _ in range(10)))
        return statuses

    assert server.runner.run(main()).count(200) == 10
    assert most == 1
    assert threading.main_thread() not in threads


def test_a_client_that_does_not_read_is_given_up_when_its_room_is_needed(server, monkeypatch):
    unsent = server.larder.online.unsent
    body = json.dumps({"features": refs("numbers"), "entities": {"symbol": ["A"] * 3000}}).encode()
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": online.PATH, "query_string": b"", "headers": headers}
    monkeypatch.setattr(online, "PIECE_BYTES", 1000)
    monkeypatch.setattr(unsent, "most", 5_000_000)

    async def receive():
        return {"type": "http.request", "body": body}

    async def main():
        never, held, whole = asyncio.Event(), [], []

        async def unread(message):
            if message["type"] == "http.response.body":
                held.append(message)
                await never.wait()

        async def read(message):
            whole.append(message)

        slow = [asyncio.create_task(server.larder(scope, receive, unread)) for _ in range(10)]
        await asyncio.wait(slow, return_when=asyncio.FIRST_COMPLETED)
        await server.larder(scope, receive, read)
        assert not whole[-1].get("more_body")
        while len(held) < len(slow):
            await asyncio.sleep(0.01)
        assert sum(unsent.bytes.values()) <= unsent.most
        assert 0 < len([task for task in slow if not task.done()]) < len(slow)
        monkeypatch.setattr(online, "SEND_SECONDS", 0)
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        assert not unsent.bytes

    server.runner.run(main())


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
@pytest.mark.parametrize("content_type", [b"application/json", b"application/json; charset=utf-8"])
def test_a_body_is_understood_as_feast_does(server, body, content_type):
    server.same(body, content_type=content_type)
    server.same({"features": ["prices:close"], "entities": {"symbol": ["A"]}}, content_type=content_type)


@pytest.mark.parametrize(("content_type", "held"), [(b"text/plain", 'is "text/plain"'), (None, "is missing")])
def test_a_body_that_is_not_said_to_be_json_is_refused(server, content_type, held):
    status, _, answer = server.read({"features": [], "entities": {}}, content_type=content_type)
    detail = f"Content-Type {held}: send JSON, with Content-Type: application/json"
    assert (status, json.loads(answer)) == (415, {"detail": detail})


@check
@given(
    st.lists(
        st.none()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.integers(-(2**63), 2**64 - 1)
        | st.text()
        | st.booleans()
    )
)
@example([1e-17, -0.0, 1e22, 5e-324, 2**64 - 1, "é\u2028\0", 0.1 + 0.2])
def test_json_says_what_starlettes_does(values):
    assert read(items(values)) == read(JSONResponse(values).body[1:-1])


@given(st.text() | st.integers(-(2**63), 2**63 - 1))
def test_a_key_is_feasts(key):
    of = {"string_val": key} if isinstance(key, str) else {"int64_val": key}
    encode = ENCODERS[ValueType.STRING if isinstance(key, str) else ValueType.INT64]
    assert encode(key) == serialize_entity_key(EntityKey(join_keys=["k"], entity_values=[Value(**of)]), 3)[13:]


def columns(answer):
    return dict(zip(answer["metadata"]["feature_names"], answer["results"], strict=True))


@pytest.fixture
def quotes(server):
    """Three symbols with a price of 1 s, 60 s and an hour ago; the service's names are of other views."""
    ages = {"now": 1, "minute": 60, "hour": 3600}
    store, view = server.larder.store, server.larder.store.get_feature_view("prices")
    rows = [
        (
            EntityKey(join_keys=["symbol"], entity_values=[Value(string_val=symbol)]),
            {"close": Value(double_val=age), "note": Value(null_val=0)},
            datetime.now(UTC) - timedelta(seconds=age),
            None,
        )
        for symbol, age in ages.items()
    ]
    Redis(port=server.port).flushall()
    store._get_provider().online_write_batch(store.config, view, rows, None)
    yield {"features": ["prices:close", "prices:note"], "entities": {"symbol": [*ages, "missing"]}}
    fill(store)


def test_ages_are_seconds_since_the_event_time(server, quotes):
    _, _, answer = server.read(quotes | {"include_age": True})
    close = columns(json.loads(answer))["close"]
    assert close.pop("ages_s") == [pytest.approx(1, abs=5), pytest.approx(60, abs=5), pytest.approx(3600, abs=5), None]
    assert columns(json.loads(answer))["symbol"].pop("ages_s") == [None] * 4
    assert columns(server.same(quotes)[2])["close"] == close


def test_a_client_that_does_not_ask_for_an_age_gets_feasts_answer(server, quotes):
    server.same(quotes)
    plain = server.read(quotes)
    assert server.read(quotes | {"include_age": False, "max_age_s": None}) == plain


def test_a_value_that_is_too_old_is_null_with_a_status(server, quotes):
    status, who, answer = server.read(quotes | {"max_age_s": 70})
    stock = columns(server.same(quotes)[2])
    assert (status, who) == (200, "larder")
    for name, values in {"close": [1.0, 60.0, None, None], "note": [None] * 4}.items():
        column = columns(json.loads(answer))[name]
        assert column["values"] == values
        assert column["statuses"] == ["PRESENT", "PRESENT", "OUTSIDE_MAX_AGE", "NOT_FOUND"]
        assert column["event_timestamps"] == stock[name]["event_timestamps"]
        assert "ages_s" not in column
    assert columns(json.loads(answer))["symbol"] == stock["symbol"]


def test_a_value_from_the_future_is_not_fresh(server, quotes):
    store, view = server.larder.store, server.larder.store.get_feature_view("prices")
    key = EntityKey(join_keys=["symbol"], entity_values=[Value(string_val="now")])
    moment = datetime.now(UTC) + timedelta(seconds=30)
    store._get_provider().online_write_batch(
        store.config, view, [(key, {"close": Value(double_val=2)}, moment, None)], None
    )
    asked = quotes | {"max_age_s": 70, "include_age": True}
    close = columns(json.loads(server.read(asked)[2]))["close"]
    assert (close["values"][0], close["statuses"][0]) == (None, "OUTSIDE_MAX_AGE")
    assert -31 < close["ages_s"][0] < 0


@pytest.mark.parametrize("features", [["price_change:change"], ["prices:close", "price_change:change"]])
def test_an_age_that_is_not_asked_for_is_as_if_it_were_not_there(server, features):
    body = {"features": features, "entities": {"symbol": ["A"]}}
    assert server.read(body | {"include_age": False, "max_age_s": None}) == server.read(body)
    assert server.read(body)[0] == 200


def test_the_limit_is_of_each_value(server, quotes):
    for max_age_s, fresh in ((0.001, 0), (30, 1), (70.5, 2), (10**400, 3)):
        answer = json.loads(server.read(quotes | {"max_age_s": max_age_s})[2])
        assert columns(answer)["close"]["statuses"].count("PRESENT") == fresh


@pytest.mark.parametrize("max_age_s", ["10", 0, -1, 0.0, math.nan, math.inf, True, [], {}])
def test_a_max_age_that_cannot_be_is_refused_in_one_sentence(server, max_age_s):
    body = {"features": ["prices:close"], "entities": {"symbol": ["A"]}, "max_age_s": max_age_s}
    detail = {"detail": "max_age_s must be a number of seconds greater than 0"}
    assert json.loads(server.read(body)[2]) == detail
    assert server.read(body)[0] == 400


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"features": ["price_change:change"], "entities": {"symbol": ["A"]}}, "price_change is computed on demand"),
        ({"features": ["prices:close"], "entities": {"symbol": [1]}}, "an entity's key is not a string"),
        ({"features": ["market:breadth"], "entities": {"symbol": ["A"]}}, "a view has no entity"),
        ({"features": ["prices:close"], "entities": {}}, "join keys"),
        ({"features": ["prices:close"], "entities": {"symbol": []}}, "no rows"),
    ],
)
@pytest.mark.parametrize("age", [{"max_age_s": 10}, {"include_age": True}])
def test_an_age_is_answered_or_refused_but_never_ignored(server, body, why, age):
    status, _, answer = server.read(body | age)
    assert status == 400
    assert why in json.loads(answer)["detail"]


@pytest.mark.parametrize("symbol", ["A", "C.US", "BTC/USD", "ÄÖ €", 'q"uo\\te', "missing"])
def test_one_entity_can_be_read_by_its_address(server, symbol):
    body = {"features": ["prices:close", "numbers:n1"], "entities": {"symbol": [symbol]}}
    path = f"/features/{symbol}"
    assert server.get(f"{path}?features=prices:close,numbers:n1") == (200, "larder", server.same(body)[2])
    assert server.get(f"{path}?features=prices:close&features=numbers:n1")[2] == server.same(body)[2]
    full = server.get(f"{path}?features=prices:close,numbers:n1&full_feature_names=true")
    assert full[2] == server.same(body | {"full_feature_names": True})[2]


@pytest.mark.usefixtures("quotes")
def test_everything_a_post_can_ask_can_be_typed(server):
    assert server.get("/features/hour?feature_service=signals")[2]["metadata"]["feature_names"][0] == "symbol"
    close = columns(server.get("/features/hour?features=prices:close&max_age_s=70&include_age=true")[2])["close"]
    assert (close["values"], close["statuses"]) == ([None], ["OUTSIDE_MAX_AGE"])
    assert close["ages_s"] == [pytest.approx(3600, abs=5)]
    assert server.get("/features/1?features=desks:limit")[1] == "larder"
    computed = server.get("/features/A?features=price_change:change")
    body = {"features": ["price_change:change"], "entities": {"symbol": ["A"]}}
    assert computed == (200, "feast", server.same(body)[2])


@pytest.mark.parametrize(
    ("path", "status", "sentence"),
    [
        ("A", 400, "features=view:feature,… or feature_service=… says what to read"),
        ("A?features=", 400, "says what to read"),
        ("A?features=missing:close", 404, "missing"),
        ("A?features=prices:missing", 400, "missing"),
        ("A?features=nonsense", 400, "nonsense"),
        ("A?features=prices:close&max_age=1", 400, "max_age is no parameter"),
        ("A?features=prices:close&max_age_s=old", 400, "max_age_s must be a number of seconds greater than 0"),
        ("A?features=prices:close&include_age=maybe", 400, "include_age must be true or false"),
        ("A?features=positions:close", 400, "one entity has the keys desk_id, symbol here"),
        ("A?features=desks:limit", 400, "desk_id must be an integer"),
    ],
)
def test_a_wrong_address_is_refused_in_a_sentence(server, path, status, sentence):
    answer = server.get(f"/features/{path}")
    assert answer[0] == status
    assert sentence in json.dumps(answer[2], ensure_ascii=False)


def test_what_the_registry_gains_is_served_and_what_it_loses_is_refused(server):
    server.runner.run(asyncio.sleep(2))
    store = FeatureStore(fs_yaml_file=server.directory / "feature_store.yaml")
    gained = {"features": ["prices:close", "lots:gained"], "entities": {"symbol": ["A"], "lot": [0]}}
    lost = {"features": ["lots:price"], "entities": {"lot": [0]}}
    assert server.same(gained)[0] == 400
    assert server.same(lost)[:2] == (200, "larder")
    lots = store.get_feature_view("lots")
    source = store.get_data_source("push")
    schema = [Field(name="gained", dtype=types.Float64)]
    store.apply(FeatureView(name="lots", entities=[store.get_entity("lot")], source=source, schema=schema))
    server.refreshed(gained, 200)
    assert server.same(gained)[:2] == (200, "larder")
    assert server.same(lost)[0] == 400
    store.apply(lots)
    server.refreshed(lost, 200)
    assert server.same(lost)[:2] == (200, "larder")


def count_plans(server, monkeypatch):
    """Forget all plans; return the lists of the requests for which Feast is asked from now on."""
    asked = []
    ask = online.Planner.ask
    monkeypatch.setattr(online.Planner, "ask", lambda self, *key: asked.append(key) or ask(self, *key))
    server.larder.online.plans, server.larder.online.planner = {}, online.Planner(server.larder.online.store)
    return asked


def test_plans_are_made_once_and_not_without_end(server, monkeypatch):
    made = count_plans(server, monkeypatch)
    monkeypatch.setattr(online, "MAX_PLANS", 3)
    for _ in range(3):
        server.read({"features": ["prices:close"], "entities": {"symbol": ["A"]}})
    assert len(made) == 1
    for features in ([f"numbers:n{n}"] for n in range(8)):
        server.read({"features": features, "entities": {"symbol": ["A"]}})
        assert len(server.larder.online.plans) <= 3


def test_another_list_of_features_that_are_known_does_not_ask_feast(server, monkeypatch):
    asked = count_plans(server, monkeypatch)
    entities = {"symbol": ["A", "only-types"], "desk_id": [1, 0]}
    whole = ["numbers:n1", "prices:close", "numbers:n0", "prices:volume", "positions:size", "all_types:int32_list"]
    assert server.same({"features": whole, "entities": entities})[0] == 200
    assert len(asked) == 1
    chance = random.Random(3)
    for size in range(1, 7):
        for full_names in (False, True):
            features = chance.sample(whole, size)
            keys = ["symbol", "desk_id"] if "positions:size" in features else ["symbol"]
            body = {
                "features": features,
                "entities": {key: entities[key] for key in keys},
                "full_feature_names": full_names,
            }
            assert server.same(body)[:2] == (200, "larder")
    assert len(asked) == 1
    for wrong in (["prices:close", "prices:close"], ["prices:close", "prices:nothing"]):
        assert server.same({"features": wrong, "entities": entities})[0] in (400, 404)
    assert len(asked) == 3


def test_a_refresh_plans_again_what_was_asked_for_and_forgets_the_rest(server, monkeypatch):
    made = count_plans(server, monkeypatch)
    bodies = {name: {"features": [f"prices:{name}"], "entities": {"symbol": ["A"]}} for name in ("open", "close")}
    for body in bodies.values():
        server.read(body)
    server.larder.online.refresh()
    assert made == [((f"prices:{name}",), "", False) for name in ("open", "close", "open", "close")]
    server.read(bodies["close"])
    assert len(made) == 4, "the refresh has planned it"
    server.larder.online.refresh()
    assert made[4:] == [(("prices:close",), "", False)], "nobody asked for the other one"


def test_the_readiness_check_reads_as_clients_do(server, monkeypatch):
    assert server.get("/ready")[:1] == (200,)

    async def fail(*_):
        raise OSError

    monkeypatch.setattr(Hashes, "ask", fail)
    assert server.get("/ready")[2]["status"] == "no online store"


def test_a_redis_that_does_not_answer_is_a_504_and_its_return_is_noticed(server, redis):
    body = {"features": ["prices:close"], "entities": {"symbol": ["A"] * 3}}
    before = server.read(body)
    assert before[0] == 200
    redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    assert server.read(body) == before  # one dropped connection is replaced
    redis.execute_command("CLIENT", "PAUSE", "2500", "ALL")
    started = time.monotonic()
    status, _, answer = server.read(body)
    assert (status, json.loads(answer)) == (504, {"detail": "a store did not answer in time"})
    assert time.monotonic() - started < 5
    time.sleep(1)
    assert server.read(body) == before


def test_a_reply_that_is_an_error_spoils_no_later_read(server, redis):
    key = serialize_entity_key(EntityKey(join_keys=["symbol"], entity_values=[Value(string_val="bad")]), 3) + b"trading"
    redis.set(key, "not a hash")
    body = {"features": ["prices:close"], "entities": {"symbol": ["A", "bad", "B"]}}
    assert server.read(body)[0] == server.ask(server.stock, "POST", online.PATH, body)[0] == 500
    redis.delete(key)
    for symbol in SYMBOLS:
        server.same({"features": ["prices:close"], "entities": {"symbol": [symbol]}})


def test_reads_side_by_side_do_not_mix(server):
    symbols = [*SYMBOLS, "missing"]
    bodies = [{"features": ["prices:close"], "entities": {"symbol": [symbol]}} for symbol in symbols] * 10
    read = server.planned

    async def together():
        return await asyncio.gather(*(read(Query.of(body)) for body in bodies))

    alone = {body["entities"]["symbol"][0]: server.read(body)[2] for body in bodies[: len(symbols)]}
    answers = server.runner.run(together())
    assert answers == [alone[body["entities"]["symbol"][0]] for body in bodies]


def test_a_redis_that_refuses_connections_is_a_503_at_once(server, monkeypatch):
    body = {"features": ["prices:close"], "entities": {"symbol": ["A"]}}
    before = server.read(body)
    line = server.larder.online.hashes.line
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        with monkeypatch.context() as patch:
            patch.setitem(line.client.connection_pool.connection_kwargs, "port", nobody.getsockname()[1])
            line.close()
            started = time.monotonic()
            assert server.read(body)[0] == 503
            assert server.get("/ready")[0] == 503
            assert time.monotonic() - started < 2
    assert server.read(body) == before


def test_a_client_that_gives_up_takes_no_other_ones_reply(server):
    queries = [Query.of({"features": ["prices:close"], "entities": {"symbol": [symbol]}}) for symbol in ("A", "B")]

    async def given_up():
        first = asyncio.create_task(server.planned(queries[0]))
        await asyncio.sleep(0)
        first.cancel()
        return await server.planned(queries[1])

    alone = server.runner.run(server.planned(queries[1]))
    replies = server.larder.online.hashes.line.replies
    for _ in range(5):
        assert server.runner.run(given_up()) == alone
    assert server.larder.online.hashes.line.replies is replies


# An integer of 50 bits is as long as a double.
NINE_BYTES = [Value(int64_val=2**50 + n) for n in range(3)] + [Value(string_val="seven b")] + [Value(double_val=1.5)]
MIXED = [*NINE_BYTES, *(value(random.Random(n), name) for n, name in enumerate([*SCALARS, *LISTS, "nested"] * 5))]
raws = st.sampled_from([None, *(one.SerializeToString() for one in MIXED)])


def as_feast_does(columns):
    written = [[_value_to_native(Value.FromString(raw or b"")) for raw in column] for column in columns]
    return [read(JSONResponse(column).body[1:-1]) for column in written]


doubles = st.sampled_from([None, b"", *(Value(double_val=n).SerializeToString() for n in [*DOUBLES, *NO_NUMBERS])])


@check
@given(st.integers(1, 5).flatmap(lambda rows: st.lists(st.lists(raws, min_size=rows, max_size=rows), max_size=5)))
@example([[one.SerializeToString()] for one in NINE_BYTES[:1]])
def test_values_that_are_no_doubles_are_not_taken_for_doubles(columns):
    assert [read(column) for column in numbers(columns)] == as_feast_does(columns)


@check
@given(st.integers(1, 5).flatmap(lambda rows: st.lists(st.lists(doubles, min_size=rows, max_size=rows), max_size=5)))
def test_numbers_nulls_and_what_is_no_number_are_told_apart(columns):
    assert [read(column) for column in numbers(columns)] == as_feast_does(columns)


def counts():
    """Every sample of the metrics that is not 0, without those of buckets and of Feast."""
    families = text_string_to_metric_families(metrics.exposition().decode())
    samples = [sample for family in families for sample in family.samples if sample.name.startswith("larder_")]
    return {
        (sample.name, *sample.labels.values()): sample.value
        for sample in samples
        if not sample.name.endswith(("_bucket", "_created", "_sum"))
    }


def test_metrics_count_reads_by_result_and_who_answered_rows_plans_and_round_trips(server, monkeypatch):
    monkeypatch.setattr(server.larder.online, "refresh", lambda: None)  # each second, it plans what was asked for
    body = {"features": ["prices:close", "numbers:n1"], "entities": {"symbol": ["A", "B", "missing"]}}
    server.larder.online.plans.clear()
    server.larder.online.planner.known.clear()
    before = counts()
    for _ in range(3):
        assert server.read(body)[0] == 200
    assert server.read({"feature_service": "computed", "entities": {"symbol": ["A"]}})[:2] == (200, "feast")
    assert server.read({**body, "features": ["prices:none"]})[0] == 400
    assert server.get("/features/A?features=prices:open")[0] == 200
    assert server.get("/ready")[0] == 200
    after = counts()
    added = {key: value - before.get(key, 0) for key, value in after.items() if value != before.get(key, 0)}
    ages = {key: value for key, value in added.items() if key[0] == "larder_served_age_seconds_count"}
    assert ages.keys() == {("larder_served_age_seconds_count", view) for view in ("prices", "numbers")}
    assert {key: value for key, value in added.items() if key not in ages} == {
        ("larder_request_seconds_count", "larder", "read", "200"): 4,
        ("larder_request_seconds_count", "feast", "read", "200"): 1,
        ("larder_request_seconds_count", "", "read", "400"): 1,
        ("larder_request_seconds_count", "", "other", "200"): 1,
        ("larder_rows_total",): 11,
        ("larder_plans_total", "feast"): 5,
        ("larder_redis_seconds_count",): 5,
    }


def test_the_age_of_what_is_served_is_that_of_the_data(server, monkeypatch):
    monkeypatch.setattr(server.larder.online, "refresh", lambda: None)  # each second, it plans anew

    def total():
        families = text_string_to_metric_families(metrics.exposition().decode())
        samples = [sample for family in families for sample in family.samples]
        return {s.labels["view"]: s.value for s in samples if s.name == "larder_served_age_seconds_sum"}

    row = {"symbol": ["AGED"], "open": [1.0], "close": [2.5], "volume": [7], "note": ["n"]}
    stale = pd.DataFrame(row | {"event_timestamp": [NOW - timedelta(days=3)]})
    server.larder.store.write_to_online_store("prices", stale)
    server.larder.online.plans.clear()
    before = total().get("prices", 0)
    body = {"features": ["prices:close"], "entities": {"symbol": ["AGED", "missing"]}}
    begun = time.monotonic()
    for _ in range(5):  # of those within a second, one counts
        assert server.read(body)[0] == 200
    counted = (total()["prices"] - before) / (3 * 86_400)
    assert counted == pytest.approx(round(counted), abs=0.01)
    assert 1 <= round(counted) <= 1 + (time.monotonic() - begun)
