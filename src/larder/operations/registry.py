"""What Feast's SQL registry holds, compared with what was applied: objects that somebody deleted there are found."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import psycopg
from psycopg import sql

from larder.postgres import session

if TYPE_CHECKING:
    from feast import FeatureStore

# Feast's tables of what a repository defines, and the column of the object's name.
TABLES = {
    "entities": "entity_name",
    "data_sources": "data_source_name",
    "feature_views": "feature_view_name",
    "stream_feature_views": "feature_view_name",
    "on_demand_feature_views": "feature_view_name",
    "feature_services": "feature_service_name",
}
# Feast keeps the versions of a view by its name, and cannot create a view anew whose versions are there.
FORGET = """
DELETE FROM feature_view_version_history AS kept WHERE project_id = %s AND NOT EXISTS (
    SELECT FROM (
        SELECT project_id, feature_view_name FROM feature_views
        UNION ALL SELECT project_id, feature_view_name FROM stream_feature_views
        UNION ALL SELECT project_id, feature_view_name FROM on_demand_feature_views
    ) AS views WHERE (views.project_id, views.feature_view_name) = (kept.project_id, kept.feature_view_name)
)
"""


def objects(connection: psycopg.Connection, project: str) -> list[str]:
    """Every object of a project as `table name`."""
    found: list[str] = []
    for table, column in TABLES.items():
        query = sql.SQL("SELECT {} FROM {} WHERE project_id = %s").format(
            sql.Identifier(column), session.identifier(table)
        )
        try:
            found += [f"{table} {name}" for (name,) in connection.execute(query, [project])]
        except psycopg.errors.UndefinedTable:  # nothing was ever applied, or with another version of Feast
            continue
    return sorted(found)


def features(store: "FeatureStore") -> list[str]:
    """Every feature of a project as `view:feature`."""
    views = [*store.list_feature_views(), *store.list_on_demand_feature_views()]
    return sorted(f"{view.name}:{feature.name}" for view in views for feature in view.features)


def forget_versions(connection: psycopg.Connection, project: str) -> None:
    """Let the versions of views go that are no longer there, so that they can be applied again."""
    if connection.execute("SELECT to_regclass('feature_view_version_history')").fetchall()[0][0] is not None:
        connection.execute(FORGET, [project])


def named(lacking: Iterable[str]) -> str:
    """`feature_views a`, `feature_views b` → "feature view a, feature view b"."""
    return ", ".join(
        f"{table.replace('_', ' ').replace('ies', 'y').rstrip('s')} {name}"
        for table, _, name in (one.partition(" ") for one in lacking)
    )
