"""What strangers send: requests made from the OpenAPI document, and broken images and forms."""

import asyncio
import random
from typing import Any

import httpx
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from raydetect.gateway.app import build_app
from raydetect.serve_local import LocalDesk
from tests.made.images import encode, normal_image
from tests.made.server import NOBODY, fit_small, serve_spec

FUZZED = 400
BOUNDARY = "cut-here"
CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The application around a small detector."""
    folder = tmp_path_factory.mktemp("fuzz")
    fit_small(folder, "one")
    spec = serve_spec(folder)
    return build_app(spec, NOBODY, LocalDesk(spec))


@pytest.fixture
def document(app: Any) -> Any:
    """What the application says of itself."""
    return schemathesis.openapi.from_asgi("/openapi.json", app, base_url="http://127.0.0.1")


schema = schemathesis.pytest.from_fixture("document")


@schema.parametrize()
def test_every_request_of_the_document_is_answered_as_it_says(case: Any) -> None:
    case.call_and_validate(checks=CHECKS, headers={"Host": "127.0.0.1"})


def mutated(data: bytes, dice: random.Random) -> bytes:
    """Bytes with some changed, cut, doubled or swapped."""
    broken = bytearray(data)
    for _ in range(dice.randint(1, 8)):
        place = dice.randrange(len(broken))
        kind = dice.randrange(4)
        if kind == 0:
            broken[place] = dice.randrange(256)
        elif kind == 1:
            del broken[place : place + dice.randint(1, 200)]
        elif kind == 2:
            broken[place:place] = broken[: dice.randint(1, 60)]
        else:
            broken = broken[: max(1, place)]
        if not broken:
            return b""
    return bytes(broken)


def form(picture: bytes) -> bytes:
    """A multipart body with one image."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n'
    return head.encode() + b"Content-Type: image/png\r\n\r\n" + picture + f"\r\n--{BOUNDARY}--\r\n".encode()


def test_broken_images_and_forms_break_nothing(app: Any) -> None:
    dice = random.Random(0)
    pictures = [encode(normal_image(i), kind) for i, kind in enumerate(("PNG", "JPEG", "BMP", "TIFF", "WEBP"))]

    async def work() -> set[int]:
        statuses = set()
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            for number in range(FUZZED):
                picture = dice.choice(pictures)
                body = form(mutated(picture, dice)) if number % 2 else mutated(form(picture), dice)
                headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
                answer = await client.post("/v1/detectors/bottle/score", content=body, headers=headers)
                assert answer.status_code in (200, 400, 422), (number, answer.status_code, answer.text[:300])
                assert isinstance(answer.json(), dict)
                statuses.add(answer.status_code)
        return statuses

    assert asyncio.run(work()) == {200, 400, 422}
