"""Error responses: what is wrong with the request, or that the server failed; never its files, keys or code."""

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from raydetect.errors import (
    ArchiveError,
    ArtifactError,
    MemberError,
    RaydetectError,
    ResumeError,
    SpecError,
    StorageError,
    TooManyBadRows,
)
from raydetect.gateway.allowed_uris import Malformed, NotAllowed
from raydetect.gateway.backend import Busy, TooMany
from raydetect.gateway.http.limits import INTERNAL_ERROR

log = logging.getLogger("raydetect.gateway")
CLIENT_ERRORS = (ArchiveError, MemberError, SpecError, TooManyBadRows)  # about what the client sent
HIDDEN = "a file that the request names cannot be read or written; see the server's log."
MISTAKES_SHOWN = 10


class Mistake(Exception):
    """An invalid request: its message is sent to the client with 422."""


def add_refusals(app: FastAPI) -> None:
    """Adds handlers that return every error as `{"detail": one sentence}`."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(RaydetectError, _refused)
    app.add_exception_handler(Mistake, _mistake)
    app.add_exception_handler(Exception, _internal_error)


def public_message(error: RaydetectError) -> tuple[int, str]:
    """Status and message for a client; details that it must not see go to the log."""
    if isinstance(error, Busy):
        return (429 if isinstance(error, TooMany) else 503), str(error)
    if isinstance(error, NotAllowed):
        return (422 if isinstance(error, Malformed) else 403), str(error)
    if isinstance(error, ResumeError):
        return 409, str(error)
    if isinstance(error, CLIENT_ERRORS):
        return 422, str(error)
    log.warning("%s: %s", type(error).__name__, error)
    return (422, HIDDEN) if isinstance(error, StorageError | ArtifactError) else (500, INTERNAL_ERROR)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RaydetectError)
    status, detail = public_message(error)
    return JSONResponse({"detail": detail}, status, {"Retry-After": "1"} if isinstance(error, Busy) else None)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError | ValidationError)
    mistakes = []
    for item in error.errors()[:MISTAKES_SHOWN]:
        path = ".".join(str(part) for part in item["loc"] if part != "body")[:200]
        mistakes.append(f"{path}: {item['msg']}" if path else str(item["msg"]))
    return JSONResponse({"detail": "; ".join(mistakes) + "."}, 422)


async def _mistake(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 422)


async def _internal_error(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": INTERNAL_ERROR}, 500)
