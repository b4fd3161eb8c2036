"""Load generator of the endpoint benchmark: `python -m jobs.bench.load one|many|small|fuzz URL COUNT` prints JSON."""

import asyncio
import json
import random
import sys
import time
from typing import Any

import httpx
import numpy as np

from jobs.bench.job import SIZE_PX
from tests.builders.images import encode, normal_image
from tests.gateway.test_gateway_fuzz import BOUNDARY, form, mutated

BATCH, AT_ONCE = 16, 8
SMALL_PX = 64
NAME, SMALL = "line", "small"


def pictures(count: int, size_px: int) -> list[bytes]:
    """Generated images as PNGs."""
    return [encode(normal_image(i, size_px)) for i in range(count)]


async def ask(url: str, requests: int, per_request: int, at_once: int, size_px: int) -> dict[str, Any]:
    """Sends requests, `at_once` concurrently; returns rate, latencies, counts by status and of wrong scores."""
    name = SMALL if size_px == SMALL_PX else NAME
    files = [("images", (f"{i}.png", data, "image/png")) for i, data in enumerate(pictures(per_request, size_px))]
    pending, seconds, statuses = iter(range(requests)), list[float](), dict[int, int]()
    expected: list[float] = []
    wrong = 0

    async def once(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post(f"{url}/v1/detectors/{name}/score", files=files)

    async def worker(client: httpx.AsyncClient) -> None:
        nonlocal wrong
        for _ in pending:
            start = time.perf_counter()
            response = await once(client)
            seconds.append(time.perf_counter() - start)
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
            wrong += response.status_code == httpx.codes.OK and not np.allclose(
                scores_of(response), expected, rtol=1e-6
            )

    async with httpx.AsyncClient(timeout=120) as client:
        expected += scores_of(await once(client))
        start = time.perf_counter()
        await asyncio.gather(*(worker(client) for _ in range(at_once)))
        elapsed = time.perf_counter() - start
    p50, p99 = np.percentile(seconds, [50, 99]) * 1000
    return {
        "images_per_second": round(requests * per_request / elapsed, 2),
        "p50_ms": round(p50, 1),
        "p99_ms": round(p99, 1),
        "statuses": statuses,
        "wrong_scores": wrong,
    }


def scores_of(response: httpx.Response) -> list[float]:
    """Image scores of a response."""
    return [entry["image_score"] for entry in response.json()["results"]]


async def fuzz(url: str, requests: int) -> dict[str, Any]:
    """Sends broken images and forms; returns counts by status."""
    rng, statuses = random.Random(requests), dict[int, int]()
    good = [encode(normal_image(i, SMALL_PX), kind) for i, kind in enumerate(("PNG", "JPEG", "BMP", "TIFF", "WEBP"))]
    headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    async with httpx.AsyncClient(timeout=120) as client:
        for number in range(requests):
            picture = rng.choice(good)
            body = form(mutated(picture, rng)) if number % 2 else mutated(form(picture), rng)
            response = await client.post(f"{url}/v1/detectors/{SMALL}/score", content=body, headers=headers)
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
    return {"statuses": statuses}


if __name__ == "__main__":
    mode, url, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    work = {
        "one": lambda: ask(url, count, 1, 1, SIZE_PX),
        "many": lambda: ask(url, count, BATCH, AT_ONCE, SIZE_PX),
        "small": lambda: ask(url, count, 1, AT_ONCE, SMALL_PX),
        "fuzz": lambda: fuzz(url, count),
    }
    print(json.dumps(asyncio.run(work[mode]())))
