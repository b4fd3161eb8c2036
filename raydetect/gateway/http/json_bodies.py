"""JSON bodies: refused by their size before they are parsed, then parsed in threads; none delays other requests."""

from typing import TypeVar

from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from raydetect.config import LimitSpec
from raydetect.gateway.http.capacity import ThreadLane

Body = TypeVar("Body", bound=BaseModel)
KIND = "application/json"
THREADS = 2
MOST_MARKS, MARKS_PER_IMAGE = 4_000, 8  # a legal image has at most 4: {"uri": ..., "category": ...},
MARKS = (b",", b"[", b"{")


class JsonBodies:
    """Reads the JSON bodies of a server.

    An item of a list or object needs a comma or a bracket of its own, so their number, counted without parsing, limits
    the time and memory of a body. pydantic refuses nesting beyond 200.
    """

    def __init__(self, limits: LimitSpec) -> None:
        """Starts no threads yet."""
        self._most = MOST_MARKS + MARKS_PER_IMAGE * limits.max_images
        self._lane = ThreadLane("send JSON", THREADS, limits.max_requests)

    async def read(self, model: type[Body], request: Request) -> Body:
        """Returns the validated body of a request.

        Raises:
            HTTPException: it is of another type, or has too many items.
            RequestValidationError: it does not fit the model.
            TooMany: too many bodies wait to be parsed.
        """
        if kind_of(request) != KIND:
            raise HTTPException(415, f"send {KIND}.")
        data = await request.body()
        if sum(data.count(mark) for mark in MARKS) > self._most:
            raise HTTPException(413, f"the body has more than {self._most:,} commas and opening brackets. Send fewer.")
        return await self._lane.run(lambda: _parsed(model, data))


def kind_of(request: Request) -> str:
    """The content type of a request, in lower case and without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _parsed(model: type[Body], data: bytes) -> Body:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        mistakes = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError(mistakes) from None
