"""What clients are told of errors: what they sent, or that something broke; never files, keys or code behind it."""

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
from raydetect.gateway.allowed_uris import NotAllowed
from raydetect.gateway.backend import Busy, TooMany
from raydetect.gateway.http.limits import BROKE

log = logging.getLogger("raydetect.gateway")
OF_THE_REQUEST = (ArchiveError, MemberError, SpecError, TooManyBadRows)  # their words are about what the client named
HIDDEN = "what it names cannot be read or written; the server's log says more."
MISTAKES_TOLD = 10


class Mistake(Exception):
    """A request that cannot be meant: its text goes to the client with 422."""


def add_refusals(app: FastAPI) -> None:
    """Every error as `{"detail": one sentence}`."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(RaydetectError, _refused)
    app.add_exception_handler(Mistake, _meant_nothing)
    app.add_exception_handler(Exception, _broke)


def public_message(error: RaydetectError) -> tuple[int, str]:
    """Status and sentence for a client; what is kept from it goes to the log."""
    if isinstance(error, Busy):
        return (429 if isinstance(error, TooMany) else 503), str(error)
    if isinstance(error, NotAllowed):
        return 403, str(error)
    if isinstance(error, ResumeError):
        return 409, str(error)
    if isinstance(error, OF_THE_REQUEST):
        return 422, str(error)
    log.warning("%s: %s", type(error).__name__, error)
    return (422, HIDDEN) if isinstance(error, StorageError | ArtifactError) else (500, BROKE)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RaydetectError)
    status, detail = public_message(error)
    return JSONResponse({"detail": detail}, status, {"Retry-After": "1"} if isinstance(error, Busy) else None)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError | ValidationError)
    mistakes = []
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"] if part != "body")[:200]
        mistakes.append(f"{place}: {item['msg']}" if place else str(item["msg"]))
    return JSONResponse({"detail": "; ".join(mistakes[:MISTAKES_TOLD]) + "."}, 422)


async def _meant_nothing(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 422)


async def _broke(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": BROKE}, 500)
