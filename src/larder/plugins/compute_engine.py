"""Feast's local compute engine, with a direct way from PostgreSQL to Redis for views that have nothing to compute.

In feature_store.yaml:

    batch_engine:
      type: larder.plugins.compute_engine.DirectComputeEngine
    materialization:
      pull_latest_features: true
      online_write_batch_size: 10000

It takes a view that way if its newest rows are pulled, its features are scalars, it has no transformation, aggregation
or validation, and it goes to Redis only. The online store then holds byte for byte what Feast would have written; rows
pass in batches, never all at once, and views are read and written side by side. All other views are Feast's, as is the
choice of the rows: pull_latest_from_table_or_query of whichever offline store is configured.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from feast.feature_view import FeatureView
from feast.infra.common.materialization_job import MaterializationJob, MaterializationJobStatus, MaterializationTask
from feast.infra.compute_engines.local.compute import LocalComputeEngine, LocalComputeEngineConfig
from feast.infra.compute_engines.local.job import LocalMaterializationJob
from feast.infra.online_stores.helpers import _mmh3, _redis_key
from feast.infra.online_stores.redis import RedisOnlineStore, _versioned_fv_name
from feast.infra.registry.base_registry import BaseRegistry
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.type_map import python_values_to_proto_values
from feast.utils import _get_column_names, _run_pyarrow_field_mapping
from feast.value_type import ValueType
from google.protobuf.timestamp_pb2 import Timestamp

from larder.plugins.offline_store import TimescaleRetrievalJob
from larder.plugins.online_store import RedisPrimaryOnlineStore

VIEWS_AT_ONCE = 2
# Without a setting, Feast writes a view in one batch.
ROWS_AT_ONCE = 10_000
SCALARS = frozenset(
    {
        ValueType.BOOL,
        ValueType.BYTES,
        ValueType.DOUBLE,
        ValueType.FLOAT,
        ValueType.INT32,
        ValueType.INT64,
        ValueType.STRING,
        ValueType.UNIX_TIMESTAMP,
    }
)
KEYS = frozenset({ValueType.INT32, ValueType.INT64, ValueType.STRING})
DOUBLE_VAL = b"\x29"  # field 5 of feast.types.Value, eight bytes


class DirectComputeEngineConfig(LocalComputeEngineConfig):  # type: ignore[misc] # Feast is untyped
    """As `type: local`, with this class as the type."""

    type: Literal["larder.plugins.compute_engine.DirectComputeEngine"] = (
        "larder.plugins.compute_engine.DirectComputeEngine"
    )


class DirectComputeEngine(LocalComputeEngine):  # type: ignore[misc] # Feast is untyped
    """See the module."""

    @property
    def supports_batch(self) -> bool:
        """Feast gives all views of a run at once."""
        return True

    def materialize(
        self, registry: BaseRegistry, tasks: MaterializationTask | list[MaterializationTask], **kwargs: Any
    ) -> list[MaterializationJob]:
        """Materialize some views side by side; a job for each, in their order, says how it went."""
        tasks = [tasks] if isinstance(tasks, MaterializationTask) else tasks
        if self._redis():
            # Feast makes the client when it is first asked for. Of two threads that ask at once each makes one, and the
            # one that is replaced closes its connections while the other thread still reads.
            self.online_store._get_client(self.repo_config.online_store)
        with ThreadPoolExecutor(VIEWS_AT_ONCE) as pool:
            return [*pool.map(lambda task: self._materialize_one(registry, task, **kwargs), tasks)]

    def _materialize_one(
        self, registry: BaseRegistry, task: MaterializationTask, **kwargs: Any
    ) -> LocalMaterializationJob:
        if not self._direct(task):
            return super()._materialize_one(registry, task, **kwargs)
        view = task.feature_view
        job_id = f"{view.name}-{task.start_time}-{task.end_time}"
        try:
            for rows in self._newest_rows(registry, task):
                self._write(view, rows)
        except Exception as error:  # Feast raises the first job's
            error.add_note(view.name)
            return LocalMaterializationJob(job_id=job_id, status=MaterializationJobStatus.ERROR, error=error)
        return LocalMaterializationJob(job_id=job_id, status=MaterializationJobStatus.SUCCEEDED)

    def _redis(self) -> bool:
        client = getattr(self.repo_config.online_store, "client", "redis")
        return type(self.online_store) in (RedisOnlineStore, RedisPrimaryOnlineStore) and client != "glide"

    def _direct(self, task: MaterializationTask) -> bool:
        view, config = task.feature_view, self.repo_config
        return bool(
            type(view) is FeatureView
            and self._redis()
            and config.materialization_config.pull_latest_features
            and config.entity_key_serialization_version == 3
            and task.only_latest
            and view.online
            and not view.offline
            and not view.stream_source
            and not any(
                getattr(view, name, None)
                for name in ("feature_transformation", "aggregations", "enable_validation", "filter", "source_views")
            )
            and all(feature.dtype.to_value_type() in SCALARS for feature in view.features)
            and view.entity_columns
            and all(column.dtype.to_value_type() in KEYS for column in view.entity_columns)
        )

    def _newest_rows(self, registry: BaseRegistry, task: MaterializationTask) -> Iterator[pa.RecordBatch]:
        view = task.feature_view
        entities = [registry.get_entity(name, task.project) for name in view.entities]
        keys, features, event_time, created = _get_column_names(view, entities)
        job = self.offline_store.pull_latest_from_table_or_query(
            config=self.repo_config,
            data_source=view.batch_source,
            join_key_columns=keys,
            feature_name_columns=features,
            timestamp_field=event_time,
            created_timestamp_column=created,
            start_date=task.start_time,
            end_date=task.end_time,
        )
        size = self.repo_config.materialization_config.online_write_batch_size or ROWS_AT_ONCE
        tables: Iterable[pa.Table] = job.stream() if isinstance(job, TimescaleRetrievalJob) else [job.to_arrow()]
        for table in tables:
            mapped = _run_pyarrow_field_mapping(table, view.batch_source.field_mapping or {})
            yield from mapped.combine_chunks().to_batches(max_chunksize=size)

    def _write(self, view: FeatureView, rows: pa.RecordBatch) -> None:
        """As RedisOnlineStore.online_write_batch, from columns."""
        config, store = self.repo_config, self.repo_config.online_store
        name = _versioned_fv_name(view, config)
        keys = _redis_keys(config.project, view, rows)
        times = rows[view.batch_source.timestamp_field].cast(pa.timestamp("us")).cast(pa.int64())
        columns = {f"_ts:{name}": [_timestamp(time) for time in times.to_pylist()]}
        for feature in view.features:
            columns[_mmh3(f"{name}:{feature.name}")] = _serialized(rows[feature.name], feature.dtype.to_value_type())
        hashes = [*zip(*columns.values(), strict=True)]
        with self.online_store._get_client(store).pipeline(transaction=False) as pipe:
            stored = [None] * len(keys)
            if not store.skip_dedup:
                for key in keys:
                    pipe.hmget(key, f"_ts:{name}")
                stored = [value for (value,) in pipe.execute()]
            for key, values, before in zip(keys, hashes, stored, strict=True):
                if before and _nanoseconds(values[0]) <= _nanoseconds(before):
                    continue
                pipe.hset(key, mapping=dict(zip(columns, values, strict=True)))
                if store.key_ttl_seconds:
                    pipe.expire(name=key, time=store.key_ttl_seconds)
            pipe.execute()


def _redis_keys(project: str, view: FeatureView, rows: pa.RecordBatch) -> list[bytes]:
    columns = view.entity_columns
    names = tuple(column.name for column in columns)
    kinds = tuple(column.dtype.to_value_type() for column in columns)
    values = zip(*(rows[name].to_pylist() for name in names), strict=True)
    return [_redis_key_of(project, names, kinds, row) for row in values]


@lru_cache(maxsize=100_000)  # the views of a run have the same keys
def _redis_key_of(project: str, names: tuple[str, ...], kinds: tuple[ValueType, ...], values: tuple[Any, ...]) -> bytes:
    protos = [python_values_to_proto_values([value], kind)[0] for value, kind in zip(values, kinds, strict=True)]
    key: bytes = _redis_key(project, EntityKey(join_keys=names, entity_values=protos))
    return key


@lru_cache(maxsize=1000)  # most keys have their newest row at the same time
def _timestamp(microseconds: int) -> bytes:
    seconds, rest = divmod(microseconds, 1_000_000)
    serialized: bytes = Timestamp(seconds=seconds, nanos=rest * 1000).SerializeToString()
    return serialized


def _nanoseconds(timestamp: bytes) -> int:
    nanoseconds: int = Timestamp.FromString(timestamp).ToNanoseconds()
    return nanoseconds


def _serialized(column: pa.Array, kind: ValueType) -> list[bytes]:
    """Each value as a serialized feast.types.Value; null and NaN are an empty one, as Feast has it."""
    values = column.to_numpy(zero_copy_only=False)
    if kind != ValueType.DOUBLE or not pa.types.is_float64(column.type):
        return [value.SerializeToString() for value in python_values_to_proto_values(values, kind)]
    packed = values.astype("<f8").tobytes()
    serialized = [DOUBLE_VAL + packed[place : place + 8] for place in range(0, len(packed), 8)]
    for place in np.flatnonzero(np.isnan(values)):
        serialized[place] = b""
    return serialized
