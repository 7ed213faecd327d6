"""What a client got wrong in a read that Feast could not answer.

Feast raises a ValueError, a KeyError or an AssertionError for a client's mistakes as for its own bugs. A read that
failed is therefore compared with the registry: where the request is wrong, the client is told what is; where nothing is
wrong with it, the error was the server's.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute
from feast import FeatureStore, ValueType, utils
from feast.errors import FeastObjectNotFoundException
from feast.feature_server import GetOnlineFeaturesRequest
from feast.type_map import python_values_to_proto_values
from starlette.exceptions import HTTPException

from larder.serving.failures import is_outage, shown

PATH = "/get-online-features"


def explain_features(store: FeatureStore, features: Sequence[str], service: str | None, *, full_names: bool) -> None:
    """Raise an HTTPException if a list of features, or the name of a service, asks for what is not there."""
    registry, project = store.registry, store.project
    if service:
        try:
            registry.get_feature_service(service, project, allow_cache=True)
        except FeastObjectNotFoundException:
            known = ", ".join(sorted(s.name for s in registry.list_feature_services(project, allow_cache=True)))
            raise HTTPException(404, f"feature_service is {shown(service)}; there are {known or 'none'}") from None
        return
    if not features:
        raise HTTPException(400, "the request names nothing to read: features or feature_service says what")
    names = []
    for feature in features:
        try:
            view_name, version, name = utils._parse_feature_ref(feature)
        except ValueError:
            raise HTTPException(400, f"{shown(feature)} is no feature: write view:feature") from None
        if version is not None and not getattr(registry, "enable_online_versioning", False):
            raise HTTPException(400, f"{shown(feature)} names a version, and the views have none")
        try:
            view = registry.get_any_feature_view(view_name, project, allow_cache=True)
        except FeastObjectNotFoundException:
            raise HTTPException(404, f"{shown(feature)} is of a view that does not exist") from None
        if name not in {known.name for known in view.features}:
            known = ", ".join(known.name for known in view.features)
            raise HTTPException(400, f"{shown(feature)} does not exist; {view_name} has {known}")
        names.append(feature if full_names else name)
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice:
        way_on = "" if full_names else ": full_feature_names tells features of one name apart"
        raise HTTPException(400, f"{shown(twice)} is asked for more than once{way_on}")


def explain_entities(
    store: FeatureStore, features: Any, entities: Mapping[str, Sequence[Any]], *, full_names: bool
) -> None:
    """Raise an HTTPException if entities are not those of the features, which there are."""
    _, _, join_key_of, types, _, _, _, needed, entityless = utils._get_online_request_context(
        store.registry, store.project, features, full_names
    )
    given = {join_key_of.get(name, name) for name in entities}
    for name in (*types, *sorted(needed)):
        if name not in given and not entityless:
            raise HTTPException(400, f"entities has no {name}, which the features need")
    lengths = {name: len(values) for name, values in entities.items()}
    if len(set(lengths.values())) != 1:
        held = ", ".join(f"{shown(name)} has {length}" for name, length in lengths.items()) or "it is empty"
        raise HTTPException(400, f"entities needs lists of one length: {held}")
    for name, values in entities.items():
        kind = types.get(join_key_of.get(name, name), ValueType.UNKNOWN)
        for row, value in enumerate(values, 1):
            wrong = isinstance(value, list | dict) or (value is None and kind != ValueType.UNKNOWN)
            try:
                python_values_to_proto_values([value], kind)[0].SerializeToString()
            except Exception:  # Feast's converters raise whatever they meet, and touch nothing but the value
                wrong = True
            if wrong:
                wanted = "a value of one type" if kind == ValueType.UNKNOWN else kind.name.lower()
                raise HTTPException(400, f"{shown(name)} of row {row} is {shown(value)}: it takes {wanted}")


def explain(store: FeatureStore, request: GetOnlineFeaturesRequest) -> None:
    """Raise an HTTPException if a request is wrong."""
    service, full_names = request.feature_service, request.full_feature_names
    explain_features(store, request.features, service, full_names=full_names)
    features = store.get_feature_service(service, allow_cache=True) if service else request.features
    explain_entities(store, features, request.entities, full_names=full_names)


def add_to(app: FastAPI, store: FeatureStore) -> None:
    """Let Feast's endpoint explain what it cannot answer."""
    route = next(route for route in app.routes if isinstance(route, APIRoute) and route.path == PATH)
    answer = route.endpoint

    async def get_online_features(request: GetOnlineFeaturesRequest) -> Any:
        try:
            return await answer(request)
        except HTTPException:
            raise
        except Exception as error:
            if not is_outage(error):
                await run_in_threadpool(explain, store, request)
            raise

    app.router.routes.remove(route)
    app.add_api_route(PATH, get_online_features, methods=["POST"], dependencies=route.dependencies)
