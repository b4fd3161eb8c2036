"""Fuzzing: requests generated from the OpenAPI document, and broken images and forms."""

import asyncio
import random
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from tests.builders.images import encode, normal_image
from tests.builders.server import fit_small, running, serve_spec

FUZZED, EXAMPLES = 1000, 40
BOUNDARY = "cut-here"
CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server with a small detector."""
    folder = tmp_path_factory.mktemp("fuzz")
    fit_small(folder, "one")
    with running(serve_spec(folder)) as found:
        yield found


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_responses_conform_to_the_openapi_document(url: str, mode: GenerationMode) -> None:
    seen = set()
    for found in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=EXAMPLES, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
        def check(case: Any) -> None:
            if mode is GenerationMode.POSITIVE and "name" in case.path_parameters:
                case.path_parameters["name"] = "bottle"  # other names only give 404
            case.call_and_validate(checks=CHECKS)

        with suppress(Unsatisfiable):  # no negative case exists
            check()
            seen.add(operation.label)
    assert "POST /v1/detectors/{name}/score" in seen and "POST /v1/archives" in seen, seen


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bytes with random replacements, deletions, insertions and truncations."""
    broken = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        position = rng.randrange(len(broken))
        kind = rng.randrange(4)
        if kind == 0:
            broken[position] = rng.randrange(256)
        elif kind == 1:
            del broken[position : position + rng.randint(1, 200)]
        elif kind == 2:
            broken[position:position] = broken[: rng.randint(1, 60)]
        else:
            broken = broken[: max(1, position)]
        if not broken:
            return b""
    return bytes(broken)


def form(picture: bytes) -> bytes:
    """A multipart body with one image."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n'
    return head.encode() + b"Content-Type: image/png\r\n\r\n" + picture + f"\r\n--{BOUNDARY}--\r\n".encode()


def test_broken_images_and_forms_cause_no_server_error(url: str) -> None:
    rng = random.Random(0)
    pictures = [encode(normal_image(i), kind) for i, kind in enumerate(("PNG", "JPEG", "BMP", "TIFF", "WEBP"))]

    async def work() -> set[int]:
        statuses = set()
        async with httpx.AsyncClient(base_url=url) as client:
            for number in range(FUZZED):
                picture = rng.choice(pictures)
                body = form(mutated(picture, rng)) if number % 2 else mutated(form(picture), rng)
                headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
                answer = await client.post("/v1/detectors/bottle/score", content=body, headers=headers)
                assert answer.status_code in (200, 400, 413, 422), (number, answer.status_code, answer.text[:300])
                assert isinstance(answer.json(), dict)
                statuses.add(answer.status_code)
        return statuses

    assert asyncio.run(work()) == {200, 400, 422}
