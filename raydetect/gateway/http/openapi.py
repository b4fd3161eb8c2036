"""The OpenAPI document: FastAPI's own, plus the bodies of the scoring endpoint and examples."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from raydetect.gateway.http.examples import EXAMPLES
from raydetect.gateway.http.schemas import NewArtifact, Problem, RunRequest, ScoreRequest

COMMON = (401, 403, 408, 413, 421, 422, 429, 500, 503)
PROBLEMS = {
    400: "the body is malformed",
    401: "missing or unknown token",
    403: "the token lacks the scope, or a URI is not below an allowed prefix",
    404: "not found",
    408: "the body came too slowly",
    409: "another run writes there, or wrote there with other settings",
    413: "too many bytes or images in one request",
    415: "the body is neither a form nor JSON",
    421: "unknown host name",
    422: "the request is invalid",
    429: "too many requests or runs in progress; see Retry-After",
    500: "internal server error",
    503: "cannot be answered right now; see Retry-After",
}
PROBLEM_EXAMPLES = {
    404: "no detector 'botle' is served. Did you mean 'bottle'? Known: bottle.",
    429: "128 requests are in flight. Try again.",
}
SCORE_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {"schema": {"$ref": "#/components/schemas/ScoreRequest"}},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["images"],
                "additionalProperties": False,
                "properties": {
                    "images": {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}},
                    "heatmaps": {"type": "string", "enum": ["none", "flagged", "all"], "default": "none"},
                    "store_heatmaps": {"type": "string", "enum": ["true", "false"], "default": "false"},
                    "category": {"type": "string", "description": "which detector of a fleet scores the images"},
                },
                "example": {"images": ["(bytes of 0007.png)"], "heatmaps": "flagged"},
            }
        },
    },
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Error responses of an endpoint, for its OpenAPI entry."""
    responses: dict[int | str, dict[str, Any]] = {}
    for status in (*COMMON, *statuses):
        responses[status] = {"model": Problem, "description": PROBLEMS[status]}
        if status in PROBLEM_EXAMPLES:
            responses[status]["content"] = {"application/json": {"example": {"detail": PROBLEM_EXAMPLES[status]}}}
    return responses


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI entry of a body that an endpoint reads itself."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe_bodies(app: FastAPI) -> None:
    """Adds the bodies that endpoints parse themselves, and examples, to the document; builds it once."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for model in (NewArtifact, RunRequest, ScoreRequest):
                schemas[model.__name__] = model.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas.update(schemas[model.__name__].pop("$defs", {}))
            for name, example in EXAMPLES.items():  # FastAPI would omit their nulls
                schemas[name]["examples"] = [example]
            app.openapi_schema = document
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]
