"""What is pushed arrives as it was sent, or is refused in one sentence and nothing is written.

The application and Redis are real; the offline store is a Parquet file here.
tests/integration/test_push_postgresql.py has the real one.
"""

import asyncio
import json
import logging
import math
import shutil
import socket
import subprocess
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta

import pandas as pd
import pyarrow.parquet
import pytest
from feast import (
    Entity,
    FeatureService,
    FeatureStore,
    FeatureView,
    Field,
    FileSource,
    PushSource,
    RequestSource,
    ValueType,
    types,
)
from feast.on_demand_feature_view import OnDemandFeatureView, on_demand_feature_view
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis import Redis

from larder.serving import application, push

CONFIG = """
project: trading
provider: local
registry: {{registry_type: sql, path: "sqlite:///{directory}/registry.db", cache_ttl_seconds: 60}}
offline_store: {{type: dask}}
online_store: {{type: redis, connection_string: "127.0.0.1:{port},socket_timeout=2,socket_connect_timeout=2"}}
entity_key_serialization_version: 3
"""
TIME = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
ISO = "2026-01-02T03:04:05.678901Z"
MICROSECOND = timedelta(microseconds=1)


def definitions(directory):
    symbol = Entity(name="symbol", join_keys=["symbol"], value_type=ValueType.STRING)
    desk = Entity(name="desk", join_keys=["desk_id"], value_type=ValueType.INT32)
    columns = {
        "symbol": ["S"],
        "event_timestamp": [TIME],
        "created": [TIME],
        "price": [1.0],
        "lots": [1],
        "venue": ["V"],
    }
    pd.DataFrame(columns).to_parquet(directory / "quotes.parquet")
    quotes = FileSource(
        name="quotes_file",
        path=str(directory / "quotes.parquet"),
        timestamp_field="event_timestamp",
        created_timestamp_column="created",
        field_mapping={"px": "price"},  # which Feast's file store does not honour: the file has a column `price`
    )
    other = FileSource(name="other_file", path=str(directory / "x.parquet"), timestamp_field="event_timestamp")
    source = PushSource(name="quotes_push", batch_source=quotes)
    types_source = PushSource(name="types_push", batch_source=other)

    def view(name, entities, source, /, **schema):
        fields = [Field(name=feature, dtype=dtype) for feature, dtype in schema.items()]
        return FeatureView(name=name, entities=entities, source=source, schema=fields)

    prices = view("prices", [symbol], source, price=types.Float64)
    sizes = view("sizes", [symbol], source, lots=types.Int64)
    all_types = view(
        "all_types",
        [symbol, desk],
        types_source,
        double=types.Float64,
        real=types.Float32,
        small=types.Int32,
        big=types.Int64,
        note=types.String,
        flag=types.Bool,
        raw=types.Bytes,
        when=types.UnixTimestamp,
        reals=types.Array(types.Float64),
        names=types.Array(types.String),
        nested=types.Map,
    )
    market = view("market", [], PushSource(name="market_push", batch_source=other), breadth=types.Float64)

    @on_demand_feature_view(sources=[prices], schema=[Field(name="twice", dtype=types.Float64)])
    def doubled(inputs: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"twice": inputs["price"] * 2})

    @on_demand_feature_view(
        sources=[RequestSource(name="side", schema=[Field(name="bump", dtype=types.Int64)]), prices],
        schema=[Field(name="bumped", dtype=types.Float64)],
    )
    def bumped(inputs: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"bumped": inputs["price"] + inputs["bump"]})

    services = [
        FeatureService(name="doubles", features=[doubled]),
        FeatureService(name="bumps", features=[bumped]),
    ]
    return [symbol, desk, source, types_source, prices, sizes, all_types, market, doubled, bumped, *services]


class Server:
    """Larder's application, and what is in its stores."""

    def __init__(self, runner, directory, redis):
        self.runner, self.directory, self.redis = runner, directory, redis
        self.app = application.create_app()
        self.lifespan = self.app.router.lifespan_context(self.app)
        runner.run(self.lifespan.__aenter__())

    def close(self):
        self.runner.run(self.lifespan.__aexit__(None, None, None))

    def ask(self, path, body=None, content_type="application/json", method="POST"):
        sent = []
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        headers = [(b"content-type", content_type.encode())] if content_type else []
        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers}
        scope["client"] = ("::1", 1)

        async def receive():
            return {"type": "http.request", "body": data}

        async def send(message):
            sent.append(message)

        async def main():
            try:
                await self.app(scope, receive, send)
            except Exception as error:
                assert sent
                logging.getLogger("uvicorn.error").error("Exception in ASGI application", exc_info=error)

        self.runner.run(main())
        written = b"".join(m.get("body", b"") for m in sent[1:])
        return sent[0]["status"], json.loads(written) if written else None

    def push(self, df, source="quotes_push", **more):
        return self.ask("/push", {"push_source_name": source, "df": df, **more})

    def read(self, features, **entities):
        body = {"features": features, "entities": {name: [value] for name, value in entities.items()}}
        status, answer = self.ask("/get-online-features", body)
        assert status == 200, answer
        return dict(zip(answer["metadata"]["feature_names"], answer["results"], strict=True))

    def stored(self):
        """Everything that is in both stores."""
        online = {key: self.redis.hgetall(key) for key in self.redis.keys("*")}
        return online, (self.directory / "quotes.parquet").read_bytes()


@pytest.fixture(scope="module")
def redis():
    """A Redis without a file; Debian's package redis-tools has the server under another name."""
    binary = shutil.which("redis-server") or shutil.which("redis-check-rdb")
    assert binary, "these tests need Debian's package redis-tools"
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", ""]
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
    FeatureStore(fs_yaml_file=config).apply(definitions(directory))
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name in ("CREDENTIALS_DIRECTORY", "RUNTIME_DIRECTORY"):
            patch.setenv(name, str(directory))
        runner = stack.enter_context(asyncio.Runner())
        server = Server(runner, directory, redis)
        yield server
        server.close()


def quote(**columns):
    """A good frame of one row, but for what is given."""
    row = {"symbol": ["A"], "event_timestamp": [ISO], "created": [ISO], "price": [1.5], "lots": [7]}
    return {name: values for name, values in {**row, **columns}.items() if values is not None}


def typed(**columns):
    row = {
        "symbol": ["A"],
        "desk_id": [1],
        "event_timestamp": [ISO],
        "double": [1.5],
        "real": [0.5],
        "small": [1],
        "big": [2],
        "note": ["n"],
        "flag": [True],
        "raw": ["AP8="],
        "when": [ISO],
        "reals": [[1.0, 2]],
        "names": [["a"]],
        "nested": [{"a": 1}],
    }
    return row | columns


@pytest.mark.parametrize(
    "time",
    [
        "2026-01-02T03:04:05.678901Z",
        "2026-01-02T03:04:05.678901",
        "2026-01-02 03:04:05.678901+00:00",
        "2026-01-02t03:04:05,678901999z",
        "20260102T040405.678901+0100",
        "2026-01-01T21:04:05.678901-06",
        1767323045678901,
        1767323045678901.0,
        1767323045.678901,
        1767323045678.901,
        1767323045678901999,
        "1767323045678901",
        "1767323045.678901",
        "1767323045678901000",
    ],
)
def test_a_time_is_understood_in_every_notation(server, redis, time):
    redis.flushall()
    assert server.push(quote(event_timestamp=[time], created=[time])) == (200, None)
    price = server.read(["prices:price"], symbol="A")["price"]
    assert (price["values"], price["event_timestamps"]) == ([1.5], ["2026-01-02T03:04:05.678901Z"])


@pytest.mark.parametrize("time", [1795647157, 1795647157000, "1795647157", 1795647157.0])
def test_the_unit_of_an_epoch_follows_from_its_size(time):
    assert push.instant(push.moment(time)[1]) == "2026-11-25T22:52:37Z"


FIRST, LAST = (push.FIRST_EPOCH - push.ORIGIN) // MICROSECOND, (push.LATEST - push.ORIGIN) // MICROSECOND
instants = st.integers(FIRST, LAST - 1)
zones = st.integers(-23 * 60, 23 * 60).map(lambda minutes: timedelta(minutes=minutes))


@settings(deadline=None)
@given(instants, zones)
def test_every_notation_of_an_instant_is_that_instant(micros, offset):
    naive = (push.ORIGIN + micros * MICROSECOND).replace(tzinfo=None)
    sign, minutes = "-" if offset < timedelta(0) else "+", abs(offset) // timedelta(minutes=1)
    zone = f"{sign}{minutes // 60:02}:{minutes % 60:02}"
    for notation in (
        naive.isoformat(),
        naive.isoformat() + "Z",
        (naive + offset).isoformat(" ") + zone,
        f"{micros // 10**6}.{micros % 10**6:06}",
        micros,
        str(micros),
        micros * 1000 + 999,
    ):
        assert push.moment(notation)[1] == micros


@settings(deadline=None)
@given(st.text() | st.integers() | st.floats() | st.from_regex(push.ISO, fullmatch=True) | st.from_regex(push.DIGITS))
def test_a_time_is_an_instant_in_range_or_unfit(value):
    try:
        kind, micros = push.moment(value)
    except push.UnfitError:
        return
    assert kind
    assert push.EARLIEST <= push.ORIGIN + timedelta(microseconds=micros) < push.LATEST


NUL, HALF = "A\0", "A\ud800"
SOON = (datetime.now(UTC) + timedelta(days=1)).isoformat()
REFUSED = {
    "no rows": ({}, "df has no rows"),
    "empty lists": ({name: [] for name in quote()}, "df has no rows"),
    "a scalar": (quote(price=1.5) | {"price": 1.5}, "df.price is 1.5: a list with a value for each row"),
    "lengths": (quote(price=[1.0, 2.0]), "differ in length: symbol has 1, price 2"),
    "missing feature": (quote(price=None), "price is missing in df: prices and sizes needs it"),
    "missing key": (quote(symbol=None), "symbol is missing"),
    "missing time": (quote(event_timestamp=None), "event_timestamp is missing"),
    "missing created": (quote(created=None), "created is missing"),
    "unknown column": (quote(prise=[1.0]), "prise is no column of prices and sizes; there are symbol,"),
    "odd column": (quote(**{HALF: [1.0]}), '"A\\ud800" is no column'),
    "twice": (quote(px=[1.0]), "df has price more than once: px is its name in the table"),
    "null key": (quote(symbol=[None]), "symbol of row 1 is null: it takes string"),
    "empty key": (quote(symbol=[""]), 'symbol of row 1 is "": it takes a key of 1 to 255 bytes; it has 0'),
    "long key": (quote(symbol=["é" * 128]), "a key of 1 to 255 bytes; it has 256"),
    "number as key": (quote(symbol=[5]), "symbol of row 1 is 5: it takes a string"),
    "NUL": (quote(symbol=[NUL]), 'symbol of row 1 is "A\\u0000": it takes a string without NUL'),
    "half a character": (quote(symbol=[HALF]), 'symbol of row 1 is "A\\ud800": it takes a string of whole characters'),
    "string as number": (quote(price=["1.5"]), 'price of row 1 is "1.5": it takes a number'),
    "bool as number": (quote(price=[True]), "price of row 1 is true: it takes a number"),
    "nested": (quote(price=[[1.5]]), "price of row 1 is [1.5]: it takes a number"),
    "NaN": (quote(price=[math.nan]), "price of row 1 is NaN: it takes a finite number, or null"),
    "infinity": (quote(price=[-math.inf]), "price of row 1 is -Infinity: it takes a finite number, or null"),
    "beyond 2**53": (quote(price=[2**53 + 1]), "can hold exactly; 9007199254740992 is the nearest"),
    "beyond all": (quote(price=[10**400]), "price of row 1 is 1000"),
    "fraction": (quote(lots=[7.5]), "lots of row 1 is 7.5: it takes a whole number of 64 bits"),
    "beyond 64 bits": (quote(lots=[2**63]), "lots of row 1 is 9223372036854775808: it takes a whole number of 64 bits"),
    "rounded": (quote(lots=[2.0**60]), "it takes a whole number of 64 bits"),
    "bool as integer": (quote(lots=[False]), "lots of row 1 is false: it takes a whole number of 64 bits"),
    "nothing": (quote(price=[None], lots=[None]), "row 1 holds nothing: every feature of prices and sizes is null"),
    "future": (quote(event_timestamp=[SOON]), f"event_timestamp of row 1 is {json.dumps(SOON)}"),
    "future created": (quote(created=[SOON]), "which is in the future: it may be at most 60 s ahead"),
    "null time": (quote(event_timestamp=[None]), "event_timestamp of row 1 is null: it takes ISO 8601, or epoch"),
    "null created": (quote(created=[None]), "created of row 1 is null"),
    "words": (quote(event_timestamp=["now"]), 'event_timestamp of row 1 is "now": it takes ISO 8601, or epoch'),
    "infinite": (quote(event_timestamp=["infinity"]), "it takes ISO 8601"),
    "no such day": (quote(event_timestamp=["2026-02-30"]), 'is "2026-02-30": it takes ISO 8601'),
    "bool as time": (quote(event_timestamp=[True]), "event_timestamp of row 1 is true: it takes ISO 8601"),
    "NaN as time": (quote(event_timestamp=[math.nan]), "event_timestamp of row 1 is NaN: it takes ISO 8601"),
    "date as number": (quote(event_timestamp=[20260102]), "and as epoch seconds 1970-08-23T11:48:22Z"),
    "minute as number": (quote(event_timestamp=[202601020304]), "and as epoch milliseconds 1976-06-02"),
    "zero": (quote(event_timestamp=[0]), "and as epoch seconds 1970-01-01T00:00:00Z"),
    "negative": (quote(event_timestamp=[-1795647157]), "epoch seconds, milliseconds"),
    "long ago": (quote(event_timestamp=["1066-10-14T09:00:00Z"]), "it takes a time from 1900 to 2261"),
    "beyond calendars": (quote(event_timestamp=["9999-12-31T23:59:59-23:59"]), "it takes"),
    "beyond numbers": (quote(event_timestamp=[10**30]), "it takes a time before 2262"),
}


@pytest.mark.parametrize("to", ["online", "offline", "online_and_offline"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_stored_as_it_is_is_refused_by_name(server, name, to):
    df, expected = REFUSED[name]
    df = {column: values * 1 for column, values in df.items()} if name == "a scalar" else dict(df)
    if to != "online" and df and name != "empty lists" and name != "lengths":
        df.setdefault("venue", ["X"])
    before = server.stored()
    status, answer = server.push(df, to=to)
    assert status == 422, answer
    assert answer.keys() == {"detail"}
    if to == "online":
        assert expected in answer["detail"]
    assert "\n" not in answer["detail"]
    assert server.stored() == before


@pytest.mark.parametrize("name", [name for name, (_, expected) in REFUSED.items() if "row 1" in expected])
def test_a_bad_row_is_named_and_its_good_neighbours_are_not_written(server, name):
    df, expected = REFUSED[name]
    good = quote(symbol=["GOOD"])
    if type(df["event_timestamp"][0]) in (int, float):
        good["event_timestamp"] = [1767323045]
    if type(df["created"][0]) in (int, float):
        good["created"] = [1767323045]
    if "T" in str(df["event_timestamp"][0]) and not str(df["event_timestamp"][0]).endswith("Z"):
        good["event_timestamp"] = ["2026-01-02T03:04:05+00:00"]
    before = server.stored()
    status, answer = server.push({column: good[column] + df[column] for column in df})
    assert (status, answer["detail"][:20]) == (422, expected.replace("row 1", "row 2")[:20])
    assert server.stored() == before


@pytest.mark.parametrize(
    ("one", "other", "kinds"),
    [
        (1767323045, ISO, ("epoch seconds in row 1", "ISO 8601 with a zone in row 2")),
        (1767323045, 1767323045000, ("epoch seconds in row 1", "epoch milliseconds in row 2")),
        (ISO, ISO[:-1], ("ISO 8601 with a zone in row 1", "ISO 8601 without a zone in row 2")),
    ],
)
def test_times_of_two_kinds_in_one_column_are_named(server, one, other, kinds):
    rows = quote(symbol=["A", "B"], event_timestamp=[one, other], created=[ISO, ISO], price=[1.0, 2.0], lots=[1, 2])
    status, answer = server.push(rows)
    assert status == 422
    assert all(kind in answer["detail"] for kind in kinds)


def test_a_time_may_be_as_far_ahead_as_the_variable_says(server, monkeypatch):
    def ahead(seconds):
        return [(datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()]

    assert server.push(quote(symbol=["AHEAD"], event_timestamp=ahead(30)))[0] == 200
    assert server.push(quote(symbol=["AHEAD"], event_timestamp=ahead(90)))[0] == 422
    monkeypatch.setenv("LARDER_PUSH_MAX_FUTURE_SECONDS", "0")
    assert server.push(quote(symbol=["AHEAD"], event_timestamp=ahead(30)))[0] == 422
    monkeypatch.setenv("LARDER_PUSH_MAX_FUTURE_SECONDS", "3600")
    assert server.push(quote(symbol=["AHEAD"], event_timestamp=ahead(90)))[0] == 200


def test_a_push_of_too_many_values_is_refused_whole(server, monkeypatch):
    columns = len(quote())
    monkeypatch.setenv("LARDER_MAX_VALUES", str(2 * columns))

    def rows(count):
        return {name: values * count for name, values in quote(symbol=["MANY"]).items()}

    assert server.push(rows(3)) == (
        413,
        {
            "detail": f"3 rows x {columns} columns are {3 * columns} values, and a push may hold {2 * columns}: "
            "push in parts"
        },
    )
    assert server.push(rows(2))[0] == 200


def deep(levels):
    value = 1
    for _ in range(levels):
        value = {"a": value}
    return value


BAD_TYPES = {
    "real": (1e39, "within the range of 32 bits"),
    "small": (2**31, "a whole number of 32 bits"),
    "desk_id": (2**31, "a whole number of 32 bits"),
    "note": (5, "a string"),
    "flag": (1, "true or false"),
    "raw": ("AP8", "bytes, as a string in base64"),
    "when": ("later", "ISO 8601"),
    "reals": ([1.0, None], "a list in which null would be a number"),
    "names": (["a\0"], 'a list in which "a\\u0000" would be a string without NUL'),
    "nested": ({"a": {"b\0": 1}}, "a string without NUL"),
    "nested deep": (deep(90), "a value that is nested at most 64 deep"),
}


@pytest.mark.parametrize("column", BAD_TYPES)
def test_every_type_refuses_what_it_does_not_hold(server, column):
    value, expected = BAD_TYPES[column]
    column = column.partition(" ")[0]
    before = server.stored()
    status, answer = server.push(typed(**{column: [value]}), source="types_push")
    assert status == 422, answer
    assert answer["detail"].startswith(f"{column} of row 1 is ")
    assert expected in answer["detail"]
    assert server.stored() == before


def test_every_type_is_read_as_it_was_pushed(server):
    row = {"double": 2**53, "real": 0.1, "small": -(2**31), "big": 2**63 - 1, "note": "é\u2028", "flag": False}
    row |= {"raw": "AP8=", "when": 1767323045, "reals": [1.5, 2], "names": [], "nested": {"a": 1, "b": "x"}}
    assert server.push(typed(symbol=["T"], **{k: [v] for k, v in row.items()}), source="types_push") == (200, None)
    read = server.read([f"all_types:{name}" for name in row], symbol="T", desk_id=1)
    values = {name: read[name]["values"][0] for name in row}
    assert values == row | {"real": pytest.approx(0.1, abs=1e-8), "when": "2026-01-02T03:04:05Z"} or values == row | {
        "real": pytest.approx(0.1, abs=1e-8)
    }


def test_integers_stay_exact_beside_nulls(server):
    rows = typed(**{name: values * 2 for name, values in typed().items()})
    rows |= {"symbol": ["N1", "N2"], "big": [2**53 + 1, None]}
    assert server.push(rows, source="types_push") == (200, None)
    assert server.read(["all_types:big"], symbol="N1", desk_id=1)["big"]["values"] == [2**53 + 1]
    assert server.read(["all_types:big"], symbol="N2", desk_id=1)["big"]["values"] == [None]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_value_is_read_as_it_was_pushed_or_refused_without_a_trace(server, redis, data):
    redis.flushall()
    anything = st.recursive(
        st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(),
        lambda part: st.lists(part, max_size=2) | st.dictionaries(st.text(max_size=3), part, max_size=2),
        max_leaves=4,
    )
    column = data.draw(st.sampled_from([*typed()]))
    value = data.draw(anything)
    status, answer = server.push(typed(**{column: [value]}), source="types_push")
    if status == 200:
        if column in ("double", "small", "big", "note", "flag", "reals", "names"):
            read = server.read([f"all_types:{column}"], symbol="A", desk_id=1)
            assert read[column]["values"] == [value]
    else:
        assert status == 422
        assert answer["detail"].startswith(f"{column} of row 1 is ")
        assert redis.dbsize() == 0


@settings(deadline=None, max_examples=80)
@given(
    st.binary()
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda part: (
            st.lists(part, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["push_source_name", "df", "to", "quotes_push", "symbol", "price", "allow_registry_cache"]
                ),
                part,
            )
        ),
    )
)
def test_any_body_is_refused_in_one_shape(server, body):
    status, answer = server.ask("/push", body)
    assert 400 <= status < 500
    assert answer.keys() == {"detail"}
    assert type(answer["detail"]) is str


@pytest.mark.parametrize(
    ("body", "status", "expected"),
    [
        (b"", 400, "the body is no JSON: Expecting value, at line 1, column 1"),
        (b'{"a": 1', 400, "the body is no JSON"),
        (b'{"a": "\xff"}', 400, "the body is not UTF-8: byte 8 is 0xff"),
        (b"[" * 100_000, 400, "the body is nested too deeply"),
        (b"1" * 5000, 400, "a number with too many digits"),
        (b'{"df": {"symbol": ["A"], "symbol": ["B"]}}', 400, '"symbol" stands in one object more than once'),
        (b"[]", 422, "the body is []: an object with push_source_name, df"),
        ({"df": {}}, 422, "push_source_name: Field required"),
        ({"push_source_name": 5, "df": quote()}, 422, "push_source_name is 5: Input should be a valid string"),
        ({"push_source_name": "quotes_push", "df": []}, 422, "df is []: Input should be a valid dictionary"),
        ({"push_source_name": "quotes_push", "df": quote(), "too": "x"}, 422, '"too" is no field of the body'),
        ({"push_source_name": "quotes_push", "df": quote(), "to": "x"}, 422, 'to is "x": online, offline, online_and'),
        (
            {"push_source_name": "x", "df": quote()},
            422,
            'is "x", which no view has; there are market_push, quotes_push',
        ),
    ],
)
def test_a_request_that_is_none_is_named(server, body, status, expected):
    before = server.stored()
    answer = server.ask("/push", body)
    assert answer[0] == status
    assert expected in answer[1]["detail"]
    assert server.stored() == before


def test_a_name_that_stands_twice_among_very_many_is_found(server):
    names = ",".join(f'"{number}":0' for number in range(100_000))
    status, answer = server.ask("/push", f'{{{names},"99999":0}}'.encode())
    assert (status, answer["detail"]) == (400, 'the body is ambiguous: "99999" stands in one object more than once')


@pytest.mark.parametrize("path", ["/push", "/write-to-online-store", "/get-online-features"])
@pytest.mark.parametrize("content_type", ["", "text/csv", "application/x-www-form-urlencoded"])
def test_a_body_of_another_type_is_a_415(server, path, content_type):
    status, answer = server.ask(path, {}, content_type=content_type)
    assert status == 415
    assert "send JSON, with Content-Type: application/json" in answer["detail"]


def test_a_push_is_in_both_stores_with_the_columns_that_are_no_features(server):
    for name, symbol in (("px", "TABLE"), ("price", "VIEW")):
        df = quote(price=None, symbol=[symbol], venue=["XETR"], lots=[9]) | {name: [42.5]}
        assert server.push(df, to="online_and_offline") == (200, None)
        read = server.read(["prices:price", "sizes:lots"], symbol=symbol)
        assert (read["price"]["values"], read["lots"]["values"]) == ([42.5], [9])
        table = pyarrow.parquet.read_table(server.directory / "quotes.parquet").to_pylist()
        assert [row for row in table if row["symbol"] == symbol] == [
            {
                "symbol": symbol,
                "event_timestamp": TIME,
                "created": TIME,
                "price": 42.5,
                "lots": 9,
                "venue": "XETR",
            }
        ]


def test_offline_every_column_of_the_table_is_needed_and_no_other(server):
    status, answer = server.push(quote(), to="offline")
    assert (status, answer["detail"]) == (422, "venue is missing in df: prices and sizes needs it")
    status, answer = server.push(quote(venue=["V"], other=[1]), to="offline")
    assert (status, answer["detail"].partition(";")[0]) == (422, "other is no column of the table of prices and sizes")
    status, answer = server.push(quote(venue=[5]), to="offline")
    assert (status, answer["detail"]) == (422, "venue of row 1 is 5: it takes a string")


def test_a_push_that_the_offline_store_fails_is_not_served(server, monkeypatch):
    before = server.stored()

    def fail(*_, **__):
        raise ConnectionResetError("s3cret host")

    with monkeypatch.context() as patch:
        patch.setattr(type(server.app.store._get_provider()), "ingest_df_to_offline_store", fail)
        answer = server.push(quote(symbol=["LATER"], venue=["V"]), to="online_and_offline")
    assert answer == (503, {"detail": "a store is not available"})
    assert server.stored() == before


def test_a_view_without_an_entity_is_pushed(server):
    assert server.push({"event_timestamp": [ISO], "breadth": [0.5]}, source="market_push") == (200, None)
    body = {"features": ["market:breadth"], "entities": {"x": [1]}}
    assert server.ask("/get-online-features", body)[1]["results"][-1]["values"] == [0.5]


def test_a_view_is_written_directly_by_the_same_rules(server):
    def write(view, **columns):
        df = {"symbol": ["W"], "event_timestamp": [ISO], "created": [ISO], "price": [3.5]} | columns
        return server.ask("/write-to-online-store", {"feature_view_name": view, "df": df})

    assert write("prices") == (200, None)
    assert server.read(["prices:price"], symbol="W")["price"]["values"] == [3.5]
    assert write("prices", price=["x"])[0] == 422
    assert write("prices", event_timestamp=[SOON])[0] == 422
    status, answer = write("missing")
    assert (status, answer["detail"].partition(";")[0]) == (404, 'feature_view_name is "missing", which is no view')
    assert write("doubled") == (422, {"detail": "doubled is computed when it is read, and cannot be written"})


READS = {
    "nothing": ({}, 422, "entities: Field required"),
    "no features": ({"entities": {"symbol": ["A"]}}, 400, "the request names nothing to read"),
    "no such service": (
        {"feature_service": "x", "entities": {}},
        404,
        'feature_service is "x"; there are bumps, doubles',
    ),
    "no feature": ({"features": ["price"], "entities": {}}, 400, '"price" is no feature: write view:feature'),
    "half a character": (
        {"features": ["\ud800:x"], "entities": {}},
        404,
        '"\\ud800:x" is of a view that does not exist',
    ),
    "no such view": ({"features": ["x:y"], "entities": {}}, 404, '"x:y" is of a view that does not exist'),
    "no such feature": ({"features": ["prices:y"], "entities": {}}, 400, '"prices:y" does not exist; prices has price'),
    "twice": ({"features": ["prices:price"] * 2, "entities": {"symbol": ["A"]}}, 400, '"price" is asked for more than'),
    "a version": ({"features": ["prices@v1:price"], "entities": {}}, 400, '"prices@v1:price" names a version'),
    "no entity": ({"feature_service": "doubles", "entities": {}}, 400, "entities has no symbol"),
    "other entity": ({"feature_service": "doubles", "entities": {"x": [1]}}, 400, "entities has no symbol"),
    "no request data": ({"feature_service": "bumps", "entities": {"symbol": ["A"]}}, 400, "entities has no bump"),
    "lengths": (
        {"feature_service": "bumps", "entities": {"symbol": ["A"], "bump": [1, 2]}},
        400,
        'entities needs lists of one length: "symbol" has 1, "bump" has 2',
    ),
    "half a key": (
        {"feature_service": "doubles", "entities": {"symbol": ["A", "\ud800"]}},
        400,
        '"symbol" of row 2 is "\\ud800": it takes string',
    ),
    "wrong type": (
        {"features": ["all_types:big"], "entities": {"symbol": ["A"], "desk_id": ["x"]}},
        400,
        '"desk_id" of row 1 is "x": it takes int32',
    ),
    "a scalar": ({"features": ["prices:price"], "entities": {"symbol": "A"}}, 422, 'entities.symbol is "A"'),
    "no JSON": (b"{", 400, "the body is no JSON"),
}


@pytest.mark.parametrize("name", READS)
def test_a_read_that_cannot_be_answered_is_explained(server, caplog, name):
    body, status, expected = READS[name]
    caplog.clear()
    answer = server.ask("/get-online-features", body)
    assert answer[0] == status, answer
    assert answer[1].keys() == {"detail"}
    assert expected in answer[1]["detail"]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize(
    ("method", "path", "status", "detail"),
    [
        ("GET", "/nowhere", 404, "Not Found"),
        ("PUT", "/push", 405, "Method Not Allowed"),
        ("POST", "/ready", 404, "Not Found"),
        ("DELETE", "/features/A", 404, "Not Found"),
        ("GET", "/features/A", 400, "features=view:feature,… or feature_service=… says what to read"),
        ("GET", "/v1/vector_stores/x", 404, "No vector store found with id 'x'"),
    ],
)
def test_an_error_has_one_shape_wherever_it_arises(server, method, path, status, detail):
    answer = server.ask(path, method=method)
    assert answer == (status, {"detail": detail})


def test_a_bug_in_an_on_demand_view_is_a_500_that_says_nothing(server, monkeypatch, caplog):
    server.push(quote(symbol=["BUG"]))

    def fail(*_, **__):
        raise ValueError("s3cret of the code")

    monkeypatch.setattr(OnDemandFeatureView, "transform_arrow", fail)
    answer = server.ask("/get-online-features", {"feature_service": "doubles", "entities": {"symbol": ["BUG"]}})
    assert answer == (500, {"detail": "internal error"})
    assert "s3cret of the code" in caplog.text
