"""What a client may push, and how it gets into the stores.

The whole of a push is decoded and judged against the registry before anything is written: a refusal is one sentence
that says which column and row, what it holds and what is allowed. Rows are counted from 1. What cannot be stored as it
was sent, to the last digit, is refused.

The offline store is written first, in one transaction, then the online store. Where the second fails, the push is
repeated as it was: a row that is in the table already stays as it is, and an event time that is in Redis already is
passed over.
"""

import base64
import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pandas as pd
import psycopg
import pyarrow as pa
from anyio import CapacityLimiter, to_thread
from fastapi import Depends, FastAPI, Request, Response
from feast import FeatureStore, ValueType, metrics
from feast.data_source import DataSource, PushSource
from feast.errors import FeatureViewNotFoundException, PushSourceNotFoundException
from feast.feature_server import PushFeaturesRequest, WriteToFeatureStoreRequest
from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import PostgreSQLSource
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.permissions.action import AuthzedAction
from feast.permissions.security_manager import assert_permissions
from feast.permissions.server.rest import inject_user_details
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.type_map import python_values_to_proto_values
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from larder.serving.failures import is_json, sentence, shown, wrong_content_type
from larder.serving.turns import max_values

# What a push with `to` writes, and what Feast's permissions call it.
TARGETS = {
    "online": [AuthzedAction.WRITE_ONLINE],
    "offline": [AuthzedAction.WRITE_OFFLINE],
    "online_and_offline": [AuthzedAction.WRITE_ONLINE, AuthzedAction.WRITE_OFFLINE],
}
# Pushes that are worked on at once by one worker: more threads only keep the loop from the interpreter for longer.
AT_ONCE = 4
# PostgreSQL's indexes take no keys of more than 2,704 bytes, all columns of a key together.
LONGEST_KEY = 255
DEEPEST = 64
EARLIEST, LATEST = datetime(1900, 1, 1, tzinfo=UTC), datetime(2262, 1, 1, tzinfo=UTC)
# Smaller numbers are no times that anybody pushes, but dates such as 20261125, or counters.
FIRST_EPOCH = datetime(1980, 1, 1, tzinfo=UTC)
ORIGIN = datetime(1970, 1, 1, tzinfo=UTC)
# The units of epoch times: below which number, how many make a second.
UNITS = (("seconds", 10**11, 1), ("milliseconds", 10**14, 10**3), ("microseconds", 10**17, 10**6))
NANOSECONDS = ("nanoseconds", 10**20, 10**9)
DIGITS = re.compile(r"-?[0-9]{1,40}(\.[0-9]{1,40})?")
CLOCK = r"([01][0-9]|2[0-3])(:?[0-5][0-9](:?[0-5][0-9]([.,][0-9]+)?)?)?"
ISO = re.compile(rf"[0-9]{{4}}-?[0-9]{{2}}-?[0-9]{{2}}([Tt ]{CLOCK}(?P<zone>[Zz]|[+-][0-9]{{2}}(:?[0-9]{{2}})?)?)?")
ISO_KINDS = {True: "ISO 8601 with a zone", False: "ISO 8601 without a zone"}
TIMES = "ISO 8601, or epoch seconds, milliseconds, microseconds or nanoseconds from 1980 on"

# What a table asks of its rows, and the registry does not know: constraints, narrower types.
TABLE_REFUSES = (
    psycopg.IntegrityError,
    psycopg.errors.NumericValueOutOfRange,
    psycopg.errors.StringDataRightTruncation,
    psycopg.errors.ProgramLimitExceeded,
)
NO_ENTITY = Value(string_val=DUMMY_ENTITY_VAL)

Columns = dict[str, list[Any]]


class UnfitError(ValueError):
    """A value that is not what its column holds; the text says what that is."""


def refusal(detail: str, status: int = 422) -> HTTPException:
    return HTTPException(status, detail)


def decoded(written: bytes) -> Any:
    """Return a request's JSON; unlike Python's own reader, refuse what has two meanings."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
            raise refusal(f"the body is ambiguous: {shown(twice)} stands in one object more than once", 400)
        return found

    try:
        return json.loads(written.decode("utf-8-sig"), object_pairs_hook=once)
    except UnicodeDecodeError as error:
        byte = f"byte {error.start + 1} is 0x{written[error.start]:02x}"
        raise refusal(f"the body is not UTF-8: {byte}", 400) from None
    except json.JSONDecodeError as error:
        where = f"at line {error.lineno}, column {error.colno}"
        raise refusal(f"the body is no JSON: {error.msg}, {where}", 400) from None
    except RecursionError:
        raise refusal("the body is nested too deeply", 400) from None
    except ValueError:
        raise refusal("the body holds a number with too many digits", 400) from None


def asked(model: type[BaseModel], written: bytes) -> Any:
    """Return the request that a body is, of Feast's own model: its fields, their types and defaults."""
    body = decoded(written)
    if type(body) is not dict:
        raise refusal(f"the body is {shown(body)}: an object with {', '.join(model.model_fields)}")
    if unknown := [name for name in body if name not in model.model_fields]:
        raise refusal(f"{shown(unknown[0])} is no field of the body; there are {', '.join(model.model_fields)}")
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise refusal(sentence(error.errors())) from None


def rows(df: Mapping[str, Any]) -> Columns:
    """Return the columns of a frame, which are lists of one length, one row at least."""
    for name, values in df.items():
        if type(values) is not list:
            raise refusal(f"df.{named(name)} is {shown(values)}: a list with a value for each row")
    lengths = {name: len(values) for name, values in df.items()}
    if not lengths or not any(lengths.values()):
        raise refusal("df has no rows: nothing to write")
    first, length = next(iter(lengths.items()))
    for name, other in lengths.items():
        if other != length:
            raise refusal(f"the columns of df differ in length: {named(first)} has {length}, {named(name)} {other}")
    if (values := len(df) * length) > (most := max_values()):
        raise refusal(
            f"{length} rows x {len(df)} columns are {values} values, and a push may hold {most}: push in parts", 413
        )
    return dict(df)


def named(column: str) -> str:
    return column if re.fullmatch(r"\w+", column, re.ASCII) else shown(column)


def moment(value: Any) -> tuple[str, int]:
    """Return what kind of time a value is, and its microseconds since 1970; the rest of a nanosecond is cut off."""
    if type(value) is str and not DIGITS.fullmatch(value):
        match = ISO.fullmatch(value)
        try:
            time = datetime.fromisoformat(value.upper() if match else "")
            aware = time if time.tzinfo else time.replace(tzinfo=UTC)
            since = aware - ORIGIN
        except (ValueError, OverflowError):
            raise UnfitError(TIMES) from None
        if not EARLIEST <= aware < LATEST:
            raise UnfitError(f"a time from {EARLIEST.year} to {LATEST.year - 1}")
        return ISO_KINDS[time.tzinfo is not None], since // timedelta(microseconds=1)
    if type(value) not in (int, float, str) or (type(value) is float and not math.isfinite(value)):
        raise UnfitError(TIMES)
    number = Decimal(repr(value) if type(value) is float else value)
    unit, _, per_second = next((unit for unit in UNITS if abs(number) < unit[1]), NANOSECONDS)
    micros = math.floor(number * 10**6 / per_second) if abs(number) < NANOSECONDS[1] else 2**63
    kind = f"epoch {unit}"
    if micros < (FIRST_EPOCH - ORIGIN) // timedelta(microseconds=1):
        read = f", and as {kind} {instant(micros)}" if micros >= 0 else ""
        raise UnfitError(f"{TIMES}{read}")
    if micros >= (LATEST - ORIGIN) // timedelta(microseconds=1):
        raise UnfitError(f"a time before {LATEST.year}")
    return kind, micros


def instant(micros: int) -> str:
    return (ORIGIN + timedelta(microseconds=micros)).isoformat().replace("+00:00", "Z")


def times(name: str, values: Sequence[Any], *, latest: datetime | None, nullable: bool = False) -> list[Any]:
    """Return a column of times in UTC.

    Args:
        name: of the column, for refusals.
        values: as they were sent, all of one kind: seconds beside milliseconds, or a time without a zone beside one
            with it, is somebody's mistake.
        latest: no time may be after it.
        nullable: whether there may be none.
    """
    first: tuple[str, int] | None = None
    found: list[datetime | None] = []
    for row, value in enumerate(values, 1):
        if value is None and nullable:
            found.append(None)
            continue
        try:
            kind, micros = moment(value)
        except UnfitError as allowed:
            raise refusal(f"{named(name)} of row {row} is {shown(value)}: it takes {allowed}") from None
        first = first or (kind, row)
        if kind != first[0]:
            mixed = f"{named(name)} holds {first[0]} in row {first[1]} and {kind} in row {row}"
            raise refusal(f"{mixed}: a column takes times of one kind")
        time = ORIGIN + timedelta(microseconds=micros)
        if latest and time > latest:
            read = "" if kind in ISO_KINDS.values() else f", {instant(micros)}"
            ahead = f"{named(name)} of row {row} is {shown(value)}{read}, which is in the future"
            raise refusal(
                f"{ahead}: it may be at most {max_future()} s ahead of the server's clock"
                " (feature_server_push_max_future_seconds)"
            )
        found.append(time)
    return found


def max_future() -> int:
    return int(os.environ.get("LARDER_PUSH_MAX_FUTURE_SECONDS", "60"))


def whole(bits: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        # Beyond 2**53 a number with a point, or an exponent, may stand for its neighbour.
        if type(value) is float and value.is_integer() and abs(value) <= 2**53:
            value = int(value)
        if type(value) is not int or not -(1 << bits - 1) <= value < 1 << bits - 1:
            raise UnfitError(f"a whole number of {bits} bits")
        return value

    return check


def real(layout: str, bits: int) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        if type(value) not in (int, float):
            raise UnfitError("a number")
        try:
            stored: float = struct.unpack(layout, struct.pack(layout, value))[0]
        except (OverflowError, struct.error):
            raise UnfitError(f"a number within the range of {bits} bits") from None
        if not math.isfinite(stored):
            raise UnfitError("a finite number, or null")
        if type(value) is int and stored != value:
            raise UnfitError(f"a number that a float of {bits} bits can hold exactly; {stored:.0f} is the nearest")
        return float(value)

    return check


def truth(value: Any) -> bool:
    if type(value) is not bool:
        raise UnfitError("true or false")
    return value


def text(value: Any) -> str:
    if type(value) is not str:
        raise UnfitError("a string")
    sound(value)
    return value


def sound(value: Any, depth: int = 0) -> None:
    """Refuse a value that holds, however deep, what cannot be stored."""
    if depth > DEEPEST:
        raise UnfitError(f"a value that is nested at most {DEEPEST} deep")
    if type(value) is str:
        if "\0" in value:
            raise UnfitError("a string without NUL")
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise UnfitError("a string of whole characters; a lone surrogate is half a character")
    elif type(value) is float and not math.isfinite(value):
        raise UnfitError("finite numbers")
    elif type(value) is list:
        for item in value:
            sound(item, depth + 1)
    elif type(value) is dict:
        for pair in value.items():
            sound(list(pair), depth + 1)


def octets(value: Any) -> bytes:
    """Return the bytes that a read gives as this string."""
    try:
        return base64.b64decode(text(value).encode(), validate=True)
    except (ValueError, UnfitError):
        raise UnfitError("bytes, as a string in base64") from None


# By the type of a feature: which field of Feast's Value holds it, and what may stand in JSON for it.
SCALARS: dict[ValueType, tuple[str, Callable[[Any], Any]]] = {
    ValueType.STRING: ("string_val", text),
    ValueType.INT32: ("int32_val", whole(32)),
    ValueType.INT64: ("int64_val", whole(64)),
    ValueType.FLOAT: ("float_val", real("<f", 32)),
    ValueType.DOUBLE: ("double_val", real("<d", 64)),
    ValueType.BOOL: ("bool_val", truth),
    ValueType.BYTES: ("bytes_val", octets),
}
LISTS = {ValueType[f"{kind.name}_LIST"]: check for kind, (_, check) in SCALARS.items()}


def checker(kind: ValueType) -> Callable[[Any], Any]:
    """Return what makes of a value in JSON one of a type, or raises UnfitError."""
    if kind in SCALARS:
        return SCALARS[kind][1]

    def items(value: Any) -> list[Any]:
        if type(value) is not list:
            raise UnfitError("a list")
        for item in value:
            try:
                LISTS[kind](item)
            except UnfitError as allowed:
                raise UnfitError(f"a list in which {shown(item)} would be {allowed}") from None
        return [LISTS[kind](item) for item in value]

    def convertible(value: Any) -> Any:
        sound(value)
        try:
            python_values_to_proto_values([value], kind)
        except Exception:  # Feast's converters raise whatever they meet, and touch nothing but the value
            raise UnfitError(f"what Feast takes for {kind.name}") from None
        return value

    return items if kind in LISTS else convertible


def checked(name: str, values: Sequence[Any], kind: ValueType, *, key: bool = False) -> list[Any]:
    """Return a column as Python values of a type; null is none."""
    if kind == ValueType.UNIX_TIMESTAMP:
        return times(name, values, latest=None, nullable=not key)
    check, found = checker(kind), []
    for row, value in enumerate(values, 1):
        try:
            if value is None and key:
                raise UnfitError(f"{kind.name.lower()}: a row has its keys")
            fit = None if value is None else check(value)
            if key and type(fit) is str and not 1 <= len(fit.encode()) <= LONGEST_KEY:
                raise UnfitError(f"a key of 1 to {LONGEST_KEY} bytes; it has {len(fit.encode())}")
        except UnfitError as allowed:
            raise refusal(f"{named(name)} of row {row} is {shown(value)}: it takes {allowed}") from None
        found.append(fit)
    return found


def protos(values: Sequence[Any], kind: ValueType) -> list[Value]:
    """Return checked values as Feast stores them."""
    if kind == ValueType.UNIX_TIMESTAMP:
        seconds = [None if value is None else (value - ORIGIN) // timedelta(seconds=1) for value in values]
        return [Value() if second is None else Value(unix_timestamp_val=second) for second in seconds]
    if kind in SCALARS:
        field = SCALARS[kind][0]
        return [Value() if value is None else Value(**{field: value}) for value in values]
    found: list[Value] = python_values_to_proto_values(values, kind)
    return found


def entity_columns(view: Any) -> list[Any]:
    """Return the columns of a view's keys, without the one that stands for none: Feast shows that, or does not."""
    return [column for column in view.entity_columns if column.name != DUMMY_ENTITY_ID]


class Frame:
    """The rows of one request, in the names of the views that they are for, judged."""

    def __init__(self, df: Mapping[str, Any], views: Sequence[Any], source: DataSource | None) -> None:
        """Judge rows for the views that they feed, which share a batch source; None where a view has none."""
        self.views = views
        self.source = source
        self.mapping: Mapping[str, str] = (source.field_mapping if source else None) or {}
        self.columns = self.rename(rows(df))
        self.keys = {column.name: column.dtype.to_value_type() for view in views for column in entity_columns(view)}
        self.features = {
            view.name: {feature.name: feature.dtype.to_value_type() for feature in view.features} for view in views
        }
        self.times = (
            [name for name in (source.timestamp_field, source.created_timestamp_column) if name] if source else []
        )
        # Columns of the table that are no features, by their types, and all columns of the table in its order.
        self.others: dict[str, ValueType] = {}
        self.table: list[str] = []
        self.values: Columns = {}

    def rename(self, columns: Columns) -> Columns:
        """Return columns by the names that the views have for them: those of the table may be given, too."""
        found: Columns = {}
        for name, values in columns.items():
            mapped = self.mapping.get(name, name)
            if mapped in found:
                raise refusal(f"df has {named(mapped)} more than once: {named(name)} is its name in the table")
            found[mapped] = values
        return found

    def judge(self) -> "Frame":
        """Refuse what cannot be stored as it is; keep the rest as Python values."""
        latest = datetime.now(UTC) + timedelta(seconds=max_future())
        kinds = {**self.others, **{name: kind for view in self.features.values() for name, kind in view.items()}}
        self.require([*self.keys, *self.times, *kinds])
        if unknown := [name for name in self.columns if name not in {*self.keys, *self.times, *kinds}]:
            known = ", ".join(map(named, dict.fromkeys([*self.keys, *self.times, *kinds])))
            raise refusal(f"{named(unknown[0])} is no column of {self.what()}; there are {known}")
        for name, kind in self.keys.items():
            self.values[name] = checked(name, self.columns[name], kind, key=True)
        for name in self.times:
            self.values[name] = times(name, self.columns[name], latest=latest)
        for view in self.features.values():
            for name, kind in view.items():
                self.values[name] = checked(name, self.columns[name], kind)
        for name, kind in self.others.items():
            self.values[name] = checked(name, self.columns[name], kind)
        self.refuse_empty_rows()
        self.refuse_vectors_of_other_lengths()
        return self

    def require(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.columns:
                raise refusal(f"{named(name)} is missing in df: {self.what()} needs it")

    def what(self) -> str:
        return " and ".join(sorted(view.name for view in self.views))

    def refuse_vectors_of_other_lengths(self) -> None:
        for field in (field for view in self.views for field in view.features if field.vector_index):
            for row, vector in enumerate(self.values.get(field.name, ()), 1):
                if vector is not None and field.vector_length and len(vector) != field.vector_length:
                    held = f"{named(field.name)} of row {row} has {len(vector)} numbers"
                    raise refusal(f"{held}: it takes vectors of {field.vector_length}")

    def refuse_empty_rows(self) -> None:
        """Refuse rows that say nothing: Feast would drop a frame of them without a word."""
        features = [self.values[name] for view in self.features.values() for name in view]
        for row, values in enumerate(zip(*features, strict=True), 1):
            if all(value is None for value in values):
                raise refusal(f"row {row} holds nothing: every feature of {self.what()} is null")

    def online(self, store: FeatureStore, view: Any) -> None:
        """Write the rows of one view to the online store, where a newer row stays."""
        assert self.source
        moments = self.values[self.source.timestamp_field]
        keys = sorted(column.name for column in entity_columns(view))
        parts = zip(*(protos(self.values[name], self.keys[name]) for name in keys), strict=True)
        entities = [EntityKey(join_keys=keys, entity_values=values) for values in parts]
        if not keys:
            entities = [EntityKey(join_keys=[DUMMY_ENTITY_ID], entity_values=[NO_ENTITY])] * len(moments)
        features = self.features[view.name]
        values = zip(*(protos(self.values[name], kind) for name, kind in features.items()), strict=True)
        named_values = [dict(zip(features, row, strict=True)) for row in values]
        created = self.values.get(self.source.created_timestamp_column, [None] * len(moments))
        data = list(zip(entities, named_values, moments, created, strict=True))
        store._get_provider().online_write_batch(store.config, view, data, progress=None)

    def add_table(self, store: FeatureStore) -> None:
        """Learn the columns of the batch source: all of them have to be there, and no other."""
        assert self.source
        if isinstance(self.source, PostgreSQLSource) and not self.source._postgres_options._table:
            raise refusal(f'{self.what()} reads a query offline, and can be pushed "to": "online" alone')
        provider, kind_of = store._get_provider(), self.source.source_datatype_to_feast_value_type()
        described = provider.get_table_column_names_and_types_from_data_source(store.config, self.source)
        types = {self.mapping.get(name, name): kind for name, kind in described}
        self.table = [*types]
        self.require(types)
        features = {name for view in self.features.values() for name in view}
        for name in self.columns:
            if name not in types:
                raise refusal(f"{named(name)} is no column of the table of {self.what()}; there are {', '.join(types)}")
        known = {*self.keys, *self.times, *features}
        self.others = {name: kind_of(kind) for name, kind in types.items() if name not in known}

    def offline(self, store: FeatureStore) -> None:
        """Write the rows to the table of the batch source; a row that is there already stays as it is."""
        kinds = {name: kind for view in self.features.values() for name, kind in view.items()} | self.others | self.keys
        arrays = {}
        for name in self.table:
            values = self.values[name]
            if kinds.get(name) in (ValueType.MAP, ValueType.STRUCT, ValueType.JSON):  # its columns are of type jsonb
                values = [v if v is None or type(v) is str else json.dumps(v) for v in values]
            arrays[self.in_table(name)] = pa.array(values)
        try:
            store._get_provider().ingest_df_to_offline_store(self.views[0], pa.table(arrays))
        except TABLE_REFUSES as error:
            said = error.diag
            why = said.constraint_name or (said.column_name and f"{said.column_name}: null") or said.message_primary
            raise refusal(f"the table of {self.what()} does not take these rows: {why}") from None

    def in_table(self, name: str) -> str:
        return next((column for column, mapped in self.mapping.items() if mapped == name), name)


def push(store: FeatureStore, request: PushFeaturesRequest) -> None:
    """Write the rows of a push to all views of its source."""
    if request.to not in TARGETS:
        raise refusal(f"to is {shown(request.to)}: {', '.join(TARGETS)}")
    try:
        found = store._fvs_for_push_source_or_raise(request.push_source_name, request.allow_registry_cache)
    except PushSourceNotFoundException:
        known = sorted(
            source.name
            for source in store.list_data_sources(allow_cache=request.allow_registry_cache)
            if isinstance(source, PushSource)
        )
        there = f"there are {', '.join(known)}" if known else "there is none"
        raise refusal(f"push_source_name is {shown(request.push_source_name)}, which no view has; {there}") from None
    views = sorted(found, key=lambda view: str(view.name))
    for view in views:
        assert_permissions(resource=view, actions=TARGETS[request.to])
    frame = Frame(request.df, views, views[0].batch_source)
    if request.to != "online":
        frame.add_table(store)
    frame.judge()
    if request.to != "online":
        frame.offline(store)
    if request.to != "offline":
        for view in views:
            frame.online(store, view)
    metrics.track_push(request.push_source_name, request.to)


def write(store: FeatureStore, request: WriteToFeatureStoreRequest) -> None:
    """Write rows to one view of the online store."""
    name, cached = request.feature_view_name, request.allow_registry_cache
    try:
        view = store.registry.get_any_feature_view(name, store.project, allow_cache=cached)
    except FeatureViewNotFoundException:
        known = ", ".join(sorted(view.name for view in store.list_all_feature_views(allow_cache=cached)))
        raise refusal(f"feature_view_name is {shown(name)}, which is no view; there are {known}", 404) from None
    assert_permissions(resource=view, actions=TARGETS["online"])
    if isinstance(view, OnDemandFeatureView):
        write_computed(store, view, request)
        return
    Frame(request.df, [view], view.batch_source).judge().online(store, view)


def write_computed(store: FeatureStore, view: OnDemandFeatureView, request: WriteToFeatureStoreRequest) -> None:
    """Let Feast compute what it stores of an on-demand view, from inputs that are judged."""
    if not view.write_to_online_store:
        raise refusal(f"{view.name} is computed when it is read, and cannot be written")
    frame = Frame(request.df, [view], None)
    inputs = [
        field
        for part in (*view.source_request_sources.values(), *view.source_feature_view_projections.values())
        for field in (part.schema if hasattr(part, "schema") else part.features)
    ]
    if request.transform_on_write:
        frame.features = {view.name: {}}
        frame.others = {field.name: field.dtype.to_value_type() for field in inputs}
    # Feast stamps what it computes itself: times that come with the inputs are passed over.
    frame.columns = {name: frame.columns[name] for name in frame.columns if name not in ("event_timestamp", "created")}
    frame.judge()
    store.write_to_online_store(
        view.name,
        df=pd.DataFrame(frame.values),
        allow_registry_cache=request.allow_registry_cache,
        transform_on_write=request.transform_on_write,
    )


def add_to(app: FastAPI, store: FeatureStore) -> None:
    """Let these endpoints take the place of Feast's own."""
    endpoints: dict[str, tuple[type[BaseModel], Callable[[FeatureStore, Any], None], bytes]] = {
        "/push": (PushFeaturesRequest, push, b""),
        "/write-to-online-store": (WriteToFeatureStoreRequest, write, b"null"),
    }
    app.router.routes[:] = [route for route in app.routes if getattr(route, "path", "") not in endpoints]
    # Beside the loop: decoding and judging a push is work, and both stores may let it wait.
    limiter = CapacityLimiter(AT_ONCE)

    def add(path: str, model: type[BaseModel], work: Callable[[FeatureStore, Any], None], done: bytes) -> None:
        def answer(written: bytes) -> None:
            work(store, asked(model, written))

        async def endpoint(request: Request) -> Response:
            content_type = request.headers.get("content-type", "")
            if not is_json(content_type):
                raise refusal(wrong_content_type(content_type), 415)
            with metrics.track_request_latency(path):
                await to_thread.run_sync(answer, await request.body(), limiter=limiter)
            return Response(done, media_type="application/json" if done else None)

        app.add_api_route(path, endpoint, methods=["POST"], dependencies=[Depends(inject_user_details)])

    for path, (model, work, done) in endpoints.items():
        add(path, model, work, done)
