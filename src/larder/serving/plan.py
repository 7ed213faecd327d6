"""What a request means in the registry, worked out once: which fields of which Redis hashes, under which names.

Feast works that out on every request. Here Feast's own code says once per registry what a feature means; a plan is
made of that once per feature list. What a plan cannot do, Feast has to answer: on-demand views, aliased join keys,
other stores than Redis, values that need converting.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

from feast import FeatureStore, ValueType, metrics, utils
from feast.infra.key_encoding_utils import serialize_entity_key_prefix
from feast.infra.online_stores.helpers import _mmh3
from feast.infra.online_stores.redis import RedisOnlineStore, RedisType
from feast.types import Float64

from larder.serving.explain import explain_features
from larder.serving.failures import is_outage
from larder.serving.query import Query

# A read is answered whole up to a size that takes some milliseconds, and else in pieces of about two.
WHOLE_VALUES, PIECE_VALUES = 5000, 2000
# A row costs about as much as this many values.
ROW_WEIGHT = 6


class DeclinedError(Exception):
    """Feast's own endpoint has to answer; the text says why."""


@dataclass(frozen=True)
class View:
    """Where the values of a feature view are in a reply: the reply's group, the values' places and the event time's."""

    name: str
    group: int
    first: int
    last: int


@dataclass
class Group:
    """The views that share their join keys, and with them the hash of an entity: one HMGET reads them all."""

    join_keys: tuple[str, ...]
    prefix: bytes
    encoders: tuple[Callable[[Any], bytes], ...]
    fields: list[bytes] = field(default_factory=list)

    @cached_property
    def tail(self) -> bytes:
        """The fields as a command in Redis' protocol ends with them."""
        return b"".join(b"$%d\r\n%b\r\n" % (len(name), name) for name in self.fields)

    def keys(self, entities: Mapping[str, Sequence[Any]], project: bytes) -> list[bytes]:
        """Return the Redis key of each row."""
        columns = [map(encode, entities[name]) for name, encode in zip(self.join_keys, self.encoders, strict=True)]
        return [b"".join((self.prefix, *values, project)) for values in zip(*columns, strict=True)]


def _string(value: Any) -> bytes:
    try:
        data: bytes = value.encode()
    except (AttributeError, UnicodeEncodeError):
        raise DeclinedError("an entity's key is not a string") from None
    return struct.pack("<II", ValueType.STRING.value, len(data)) + data


def _integer(value_type: ValueType, layout: str, bits: int) -> Callable[[Any], bytes]:
    def encode(value: Any) -> bytes:
        if type(value) is not int or not -(1 << bits - 1) <= value < 1 << bits - 1:
            raise DeclinedError(f"an entity's key is not an integer of {bits} bits")
        return struct.pack(layout, value_type.value, bits // 8, value)

    return encode


# As feast.infra.key_encoding_utils does it.
ENCODERS: dict[ValueType, Callable[[Any], bytes]] = {
    ValueType.STRING: _string,
    ValueType.INT32: _integer(ValueType.INT32, "<IIi", 32),
    ValueType.INT64: _integer(ValueType.INT64, "<IIq", 64),
}


@dataclass(frozen=True)
class Feature:
    """What a feature means in the registry: the view that holds it, and its field in the view's Redis hash."""

    ref: str
    view: str
    keys: tuple[tuple[str, ValueType], ...]
    field: bytes
    is_double: bool


class Plan:
    """What one feature list (or service) means in one registry; `declined` says why Feast has to answer instead."""

    def __init__(self, project: str, refs: Sequence[str], full_names: bool) -> None:
        self.asked = False
        self.sampled = 0.0  # when the age of an answer was last noted
        self.project = project.encode()
        self.declined = ""
        self.key_types: dict[str, ValueType] = {}
        self.groups: list[Group] = []
        self.views: list[View] = []
        # By the number of the column: what it is called in a request, whether its values are doubles, and its view.
        self.refs: list[str] = []
        self.doubles: list[bool] = []
        self.view_of: list[int] = []
        # The names in the response, in the order asked, and how many values a row takes to answer.
        self.names = [ref.replace(":", "__", 1) if full_names else ref.partition(":")[2] for ref in refs]
        self.width = len(refs)
        self.order: list[int] = []

    def fill(self, features: Sequence[Feature]) -> None:
        """Read these features, which are in the order asked."""
        views: dict[str, list[Feature]] = {}
        for feature in features:
            views.setdefault(feature.ref.partition(":")[0], []).append(feature)
        for of_view in views.values():
            self._add(sorted(of_view, key=lambda feature: feature.ref))
        place = {ref: number for number, ref in enumerate(self.refs)}
        self.order = [place[feature.ref] for feature in features]
        weight = self.width + ROW_WEIGHT
        self.whole, self.step = WHOLE_VALUES // weight, max(1, PIECE_VALUES // weight)
        self.keys = dict.fromkeys(chain.from_iterable(group.join_keys for group in self.groups))

    def _add(self, features: list[Feature]) -> None:
        join_keys = tuple(name for name, _ in features[0].keys)
        number = next((n for n, group in enumerate(self.groups) if group.join_keys == join_keys), len(self.groups))
        if number == len(self.groups):
            self.key_types |= features[0].keys
            encoders = tuple(ENCODERS[value_type] for _, value_type in features[0].keys)
            self.groups.append(Group(join_keys, serialize_entity_key_prefix(list(join_keys), 3), encoders))
        fields = self.groups[number].fields
        first = len(fields)
        fields += [feature.field for feature in features]
        fields.append(f"_ts:{features[0].view}".encode())
        self.views.append(View(features[0].view, number, first, len(fields) - 1))
        self.refs += [feature.ref for feature in features]
        self.doubles += [feature.is_double for feature in features]
        self.view_of += [len(self.views) - 1] * len(features)

    def check(self, query: Query) -> None:
        """Raise DeclinedError where Feast has to answer the query."""
        entities = query.entities
        if self.declined:
            raise DeclinedError(self.declined)
        if query.versions:
            raise DeclinedError("the versions of views are asked for")
        if entities.keys() != self.keys.keys():
            raise DeclinedError("the entities are not the join keys of the views")
        if len({len(values) for values in entities.values()}) != 1 or not next(iter(entities.values())):
            raise DeclinedError("the entities have no rows, or not as many each")


class Planner:
    """The plans for one registry, as it is now."""

    def __init__(self, store: FeatureStore) -> None:
        self.store = store
        # What Feast has said of features, by the reference that clients use. It is no larger than the registry.
        self.known: dict[str, Feature] = {}

    def at_once(self, features: tuple[str, ...], service: str, full_names: bool) -> Plan | None:
        """Return a plan made of what is known; None where Feast has to be asked.

        Asking Feast takes half a millisecond for 42 features. A thread that does it again and again takes the
        interpreter from the event loop, so all others would feel a client who changes the list with each request.
        """
        known = [] if service else [feature for ref in features if (feature := self.known.get(ref))]
        if not features or len(known) < len(features):
            return None
        plan = Plan(self.store.project, features, full_names)
        if len(set(plan.names)) < len(plan.names):
            return None  # Feast says what is wrong with it
        plan.fill(known)
        return plan

    def ask(self, features: tuple[str, ...], service: str, full_names: bool) -> Plan:
        """Return a plan made by Feast's own code.

        Raises an HTTPException for what the registry does not have.
        """
        store = self.store
        try:
            wanted = store.get_feature_service(service, allow_cache=True) if service else list(features)
            (refs, on_demand, join_key_of, types, _, grouped, _, _, entityless) = utils._get_online_request_context(
                store.registry, store.project, wanted, full_names
            )
        except Exception as error:
            if not is_outage(error):
                explain_features(store, features, service, full_names=full_names)
            raise
        plan = Plan(store.project, refs, full_names)
        plan.key_types = dict(types)
        if on_demand:
            plan.width += sum(len(names) for _, names in grouped)
            plan.declined = f"{on_demand[0].name} is computed on demand"
        elif getattr(wanted, "precompute_online", False):
            plan.declined = f"the vectors of {service} are precomputed"
        elif entityless or any(view.projection.join_key_map for view, _ in grouped):
            plan.declined = "a view has no entity, or an alias for its join key"
        elif not all(types.get(join_key_of[name]) in ENCODERS for view, _ in grouped for name in view.entities):
            plan.declined = "an entity's key is neither a string nor an integer"
        else:
            known = {}
            for view, names in grouped:
                keys = tuple((key, types[key]) for key in sorted(join_key_of[name] for name in view.entities))
                doubles = {feature.name for feature in view.features if feature.dtype == Float64}
                for name in names:
                    ref, field = f"{view.projection.name_to_use()}:{name}", _mmh3(f"{view.name}:{name}")
                    known[ref] = Feature(ref, view.name, keys, field, name in doubles)
            if known.keys() == set(refs):
                plan.fill([known[ref] for ref in refs])
                if not service:  # whose views may have names of their own
                    self.known |= known
            else:
                plan.declined = "a feature's name is not the registry's"
        return plan


def left(store: FeatureStore) -> str:
    """Return why Feast's own endpoint has to answer every request of this store; empty where it need not."""
    server = store.config.feature_server
    if store.config.auth_config.type != "no_auth":
        return "Feast asks for permissions"
    if metrics._config.enabled or getattr(getattr(server, "audit_logging", None), "enabled", False) or store.mlflow:
        return "Feast counts or logs reads"
    return ""


def declined(store: FeatureStore) -> str:
    """Return why no request of this store can be planned; empty where they can."""
    config, online = store.config, store._get_provider().online_store
    reads_as_redis = RedisOnlineStore._read_features_per_fv_async
    if getattr(type(online), "_read_features_per_fv_async", None) is not reads_as_redis:
        return "the online store is not Redis"
    if config.online_store.redis_type == RedisType.redis_cluster:
        return "the online store is a Redis cluster"
    if config.entity_key_serialization_version != 3 or config.registry.enable_online_feature_view_versioning:
        return "the store has keys of another version, or views in versions"
    return ""
