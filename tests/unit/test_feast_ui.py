"""Feast's web interface as larder.serving.feast_ui has it: it shows the registry, and nothing changes by it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from feast import Entity, FeatureStore, FeatureView, Field, FileSource
from feast.types import Float64

from larder.serving import feast_ui

VIEW = "/api/v1/feature_views/prices?project=shop"


Ask = Callable[[str, str], tuple[int, bytes]]


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    config = tmp_path / "feature_store.yaml"
    config.write_text(
        f"project: shop\nprovider: local\nregistry: {tmp_path}/registry.db\nonline_store: null\n"
        "offline_store: {type: file}\nentity_key_serialization_version: 3\n"
    )
    symbol = Entity(name="symbol", join_keys=["symbol"])
    source = FileSource(path=str(tmp_path / "prices.parquet"), timestamp_field="time")
    view = FeatureView(
        name="prices",
        entities=[symbol],
        ttl=timedelta(days=1),
        schema=[Field(name="close", dtype=Float64, description="the last price")],
        source=source,
    )
    FeatureStore(fs_yaml_file=config).registry.apply_entity(symbol, "shop")
    FeatureStore(fs_yaml_file=config).registry.apply_feature_view(view, "shop")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    app = feast_ui.create_app()

    def ask(method: str, target: str) -> tuple[int, bytes]:
        path, _, query = target.partition("?")
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "http_version": "1.1", "scheme": "https", "method": method, "headers": []}
        scope |= {"path": path, "raw_path": path.encode(), "query_string": query.encode(), "root_path": ""}
        asyncio.run(app(scope, receive, send))
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)

    return ask


def test_the_registry_is_shown(ask: Ask) -> None:
    assert [project["id"] for project in json.loads(ask("GET", "/projects-list.json")[1])["projects"]] == ["shop"]
    assert json.loads(ask("GET", VIEW)[1])["spec"]["features"][0]["name"] == "close"
    assert b"<title>Feast Feature Store</title>" in ask("GET", "/")[1]
    assert ask("GET", "/health")[0] == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("DELETE", VIEW),
        ("DELETE", "/api/v1/entities/symbol?project=shop"),
        ("POST", "/api/v1/entities"),
        ("POST", "/api/v1/push"),
        ("POST", "/api/v1/registry/refresh"),
        ("PUT", VIEW),
        ("PATCH", VIEW),
        ("OPTIONS", VIEW),
        ("TRACE", VIEW),
    ],
)
def test_nothing_is_changed(ask: Ask, method: str, path: str) -> None:
    status, text = ask(method, path)
    assert (status, json.loads(text)) == (405, {"detail": "this interface changes nothing"})
    assert ask("GET", VIEW)[0] == 200


def test_no_data_is_shown(ask: Ask) -> None:
    status, text = ask("GET", "/api/v1/saved_datasets/data/training?project=shop")
    assert (status, json.loads(text)) == (404, {"detail": "this interface shows no data"})
