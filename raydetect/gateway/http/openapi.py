"""The OpenAPI document: what FastAPI finds by itself, the bodies of the scoring endpoint, and examples."""

from typing import Any

from fastapi import FastAPI

from raydetect.gateway.http.examples import EXAMPLES
from raydetect.gateway.http.schemas import Problem, ScoreRequest

COMMON = (401, 403, 413, 421, 422, 429, 500, 503)
PROBLEMS = {
    400: "the body is neither a form nor text",
    401: "no token, or an unknown one",
    403: "the token has not the scope, or a URI is not below an allowed prefix",
    404: "nothing of that name is there",
    409: "another run writes there, or wrote there with other words",
    413: "more bytes or images than one request may have",
    415: "neither a form nor JSON",
    421: "the server is not called by that name",
    422: "the request cannot be meant",
    429: "too many requests or runs are in hand; see Retry-After",
    500: "something broke in the server",
    503: "cannot be answered just now; see Retry-After",
}
TOLD = {
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
                    "category": {"type": "string", "description": "which detector of a fleet scores them"},
                },
                "example": {"images": ["(bytes of 0007.png)"], "heatmaps": "flagged"},
            }
        },
    },
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Which refusals an endpoint has."""
    made: dict[int | str, dict[str, Any]] = {}
    for status in (*COMMON, *statuses):
        made[status] = {"model": Problem, "description": PROBLEMS[status]}
        if status in TOLD:
            made[status]["content"] = {"application/json": {"example": {"detail": TOLD[status]}}}
    return made


def describe_bodies(app: FastAPI) -> None:
    """Adds what endpoints read by themselves to the document, which is made once."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = plain()
            schemas = made.setdefault("components", {}).setdefault("schemas", {})
            schemas["ScoreRequest"] = ScoreRequest.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(schemas["ScoreRequest"].pop("$defs", {}))
            for name, example in EXAMPLES.items():  # FastAPI would leave their nulls out
                schemas[name]["examples"] = [example]
            app.openapi_schema = made
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]
