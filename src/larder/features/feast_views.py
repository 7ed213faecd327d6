"""The Feast objects of a repository's computed views."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from feast import Entity, FeatureView, Field
from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import PostgreSQLSource
from feast.types import Float64, Int64

from larder.errors import ConfigError
from larder.features import definitions

TYPES = {"Float64": Float64, "Int64": Int64}


def computed_views(repository: Path, entities: Sequence[Entity]) -> dict[str, FeatureView]:
    """A feature view by its name for each one of computed_views.yml, about the entity whose join key its source has.

    Feast reads a module's names: `globals().update(computed_views(Path(__file__).parent, [symbol]))`.
    """
    try:
        declared = definitions.read(repository)
    except definitions.DefinitionError as error:
        raise ConfigError(str(error)) from None
    by_key = {entity.join_key: entity for entity in entities}
    views = {}
    for view in declared.views:
        source = declared.sources[view.source]
        if source.key not in by_key:
            raise ConfigError(f"{definitions.FILE}: {view.name} is about {source.key}, the join key of no entity.")
        views[view.name] = FeatureView(
            name=view.name,
            entities=[by_key[source.key]],
            # Feast has one ttl per view and only point-in-time joins obey it: it is the offline TTL. The online TTL is
            # the Redis store's key_ttl_seconds in feature_store.yaml.
            ttl=timedelta(days=view.ttl_days),
            schema=[Field(name=f.name, dtype=TYPES[f.type], description=f.description) for f in view.features],
            source=PostgreSQLSource(
                name=f"{view.name}_source",
                table=view.table,
                timestamp_field=source.time,
                description=f"{view.table}, computed from {view.source}",
            ),
            tags=dict(view.tags),
            description=view.description,
        )
    return views
