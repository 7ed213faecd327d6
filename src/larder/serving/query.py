"""What a client asks: a query, out of a request's body or its URL."""

import json
import math
from dataclasses import dataclass
from itertools import chain
from typing import Any

from feast.feature_server import GetOnlineFeaturesRequest
from pydantic import ValidationError
from starlette.datastructures import QueryParams

from larder.serving.failures import sentence, wrong_content_type

JSON = b"application/json"
PARAMETERS = {"features", "feature_service", "full_feature_names", "include_age", "max_age_s"}
# A value that Feast works out takes about ten times as long.
FEAST_WEIGHT = 10


class RefusedError(Exception):
    """The client's error; the text is for the client."""

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Query:
    """What a client asks: which features of which entities, and how old they may be; `versions` is for Feast alone."""

    entities: dict[str, list[Any]]
    features: tuple[str, ...]
    service: str
    full_names: bool
    include_age: bool
    max_age_s: float | None
    versions: bool

    @property
    def rows(self) -> int:
        return max(map(len, self.entities.values()), default=0)

    @classmethod
    def read(cls, written: bytes, content_type: bytes) -> "Query":
        """Return the query in a request's body, which is decoded as FastAPI does; RefusedError where it is none."""
        if content_type.partition(b";")[0].strip().lower() != JSON:
            raise RefusedError(wrong_content_type(content_type.decode("latin-1")), 415)
        try:
            body = json.loads(written)
        except json.JSONDecodeError as error:
            raise RefusedError(f"the body is no JSON: {error}") from None
        except (ValueError, RecursionError):
            raise RefusedError("the body is no JSON") from None
        return cls.of(body)

    @classmethod
    def of(cls, body: Any) -> "Query":
        """Return the query in a decoded body; RefusedError where it is none."""
        if type(body) is not dict:
            raise RefusedError("the body must be a JSON object", 422)
        max_age_s, include_age = body.get("max_age_s"), body.get("include_age", False)
        if max_age_s is not None and (type(max_age_s) not in (int, float) or not 0 < max_age_s < math.inf):
            raise RefusedError("max_age_s must be a number of seconds greater than 0")
        if type(include_age) is not bool:
            raise RefusedError("include_age must be true or false")
        # Feast converts what can be converted.
        try:
            asked = GetOnlineFeaturesRequest.model_validate(body)
        except ValidationError as error:
            raise RefusedError(sentence(error.errors(include_url=False, include_context=False)), 422) from None
        return cls(
            asked.entities,
            tuple(asked.features),
            asked.feature_service or "",
            asked.full_feature_names,
            include_age,
            max_age_s,
            asked.include_feature_view_version_metadata,
        )

    def refuse_age(self, why: str) -> None:
        """Refuse what Feast cannot answer; `why` is why it has to."""
        if self.include_age or self.max_age_s is not None:
            raise RefusedError(f"include_age and max_age_s cannot be answered here: {why}")

    def limit(self, most: int, width: int = 0, why: str = "") -> None:
        """Refuse what asks for too much.

        Args:
            most: how many values a request may ask for.
            width: how many values a row takes to answer, where that is known.
            why: why Feast has to answer; empty where it has not.
        """
        width = max(len(self.features), width)
        values = self.rows * width * (FEAST_WEIGHT if why else 1)
        if values > most:
            asked = f"{self.rows} rows x {width} features"
            if why:
                asked = f"{asked} it takes x {FEAST_WEIGHT}, because {why},"
            raise RefusedError(f"{asked} are {values} values, and a request may ask for {most}: ask in parts", 413)


def body_of(parameters: QueryParams) -> dict[str, Any]:
    """Return the body, but for its entities, that asks what a URL's query string does."""
    if unknown := sorted(parameters.keys() - PARAMETERS):
        raise RefusedError(f"{unknown[0]} is no parameter; there are {', '.join(sorted(PARAMETERS))}")
    listed = chain.from_iterable(part.split(",") for part in parameters.getlist("features"))
    body: dict[str, Any] = {"features": [name.strip() for name in listed if name.strip()], "entities": {}}
    if "feature_service" in parameters:
        body["feature_service"] = parameters["feature_service"]
    for name in ("full_feature_names", "include_age"):
        if name in parameters:
            if parameters[name].lower() not in ("true", "false"):
                raise RefusedError(f"{name} must be true or false")
            body[name] = parameters[name].lower() == "true"
    if "max_age_s" in parameters:
        try:
            body["max_age_s"] = float(parameters["max_age_s"])
        except ValueError:
            body["max_age_s"] = parameters["max_age_s"]
    if not (body["features"] or body.get("feature_service")):
        raise RefusedError("features=view:feature,… or feature_service=… says what to read")
    return body
