"""Feast's PostgreSQL offline store, and what it lacks in 0.67: pushes with `to: offline` or `online_and_offline`."""

from collections.abc import Callable
from typing import Any, Literal

import pyarrow as pa
from feast.feature_view import FeatureView
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres import (
    PostgreSQLOfflineStore,
    PostgreSQLOfflineStoreConfig,
)
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import PostgreSQLSource
from feast.infra.utils.postgres.connection_utils import _get_conn
from feast.repo_config import RepoConfig
from psycopg import sql


class TimescaleOfflineStoreConfig(PostgreSQLOfflineStoreConfig):  # type: ignore[misc] # Feast is untyped
    """As `type: postgres`, with this class as the type."""

    type: Literal["larder.offline_store.TimescaleOfflineStore"] = "larder.offline_store.TimescaleOfflineStore"


class TimescaleOfflineStore(PostgreSQLOfflineStore):  # type: ignore[misc] # Feast is untyped
    """PostgreSQL that also takes pushed rows."""

    @staticmethod
    def offline_write_batch(
        config: RepoConfig,
        feature_view: FeatureView,
        table: pa.Table,
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Insert pushed rows into the table of the view's batch source; a row that is there already stays as it is."""
        source = feature_view.batch_source
        if not isinstance(source, PostgreSQLSource) or not (target := source._postgres_options._table):
            raise TypeError(f"{feature_view.name}: a push to the offline store needs a PostgreSQLSource with a table.")
        known = {source.timestamp_field, source.created_timestamp_column, *feature_view.join_keys}
        columns = [c for c in table.column_names if c in known or c in {f.name for f in feature_view.features}]
        statement = sql.SQL("INSERT INTO {} ({}) VALUES ({}) ON CONFLICT DO NOTHING").format(
            sql.Identifier(*target.split(".")),
            sql.SQL(", ").join(map(sql.Identifier, columns)),
            sql.SQL(", ").join(sql.Placeholder() * len(columns)),
        )
        rows = zip(*(table[c].to_pylist() for c in columns), strict=True)
        with _get_conn(config.offline_store) as connection, connection.cursor() as cursor:
            cursor.executemany(statement, list(rows))
        if progress:
            progress(table.num_rows)
