"""Endpoints in one process with a small fitted detector: without a socket, or on a free port."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch

from raydetect.config import FitSpec, ServeSpec, parse_job
from raydetect.gateway.http.app import build_app
from raydetect.gateway.http.tokens import Tokens
from raydetect.local import jobs
from raydetect.local.serving import LocalBackend, serve_here
from tests.builders.archives import mixed_files, normal_files, pack
from tests.builders.images import encode, normal_image

PATCHCORE = {"backbone": "resnet18", "weights": "random", "image_size": [64, 64], "coreset_sampling_ratio": 0.05}
LIMITS = {"max_images": 12, "max_image_bytes": 1_000_000, "max_body_bytes": 2_000_000, "max_pixels": 4_000_000}
NOBODY = Tokens(())
SCORE = "/v1/detectors/bottle/score"


def fit_small(folder: Path, name: str, seed: int = 0) -> str:
    """Fits an artifact at `folder/models/name` on 24 images."""
    if not (folder / "normal").exists():
        pack(f"file://{folder}/normal", ".tar", normal_files(40), 2)
        pack(f"file://{folder}/open/mixed", ".tar", mixed_files(6, 2, masks=False), 3)
    uri = f"{folder}/models/{name}"
    values = {
        "kind": "fit",
        "source": {"uri": f"{folder}/normal"},
        "detector": {"name": "patchcore", "params": PATCHCORE},
        "artifact": uri,
        "calibration": {"holdout_ratio": 0.4},
        "seed": seed,
    }
    spec = parse_job(values, "fit")
    assert isinstance(spec, FitSpec)
    jobs.fit(spec, lambda *_: None)
    return uri


def make_place(folder: Path) -> Path:
    """Creates two artifacts, an archive and loose images in a folder."""
    fit_small(folder, "one")
    fit_small(folder, "two", seed=1)
    (folder / "open/loose").mkdir()
    (folder / "open/loose/a.png").write_bytes(encode(normal_image(7)))
    (folder / "secret.png").write_bytes(encode(normal_image(8)))
    (folder / "open/link.png").symlink_to(folder / "secret.png")
    return folder


def serve_spec(folder: Path, **changes: Any) -> ServeSpec:
    """A serve job with the detector `bottle` from `fit_small`."""
    values = {
        "kind": "serve",
        "detectors": {"bottle": {"artifact": f"{folder}/models/one", "flag": {"alpha": 0.1}}},
        "port": 0,
        "allow": {
            "sources": [f"{folder}/open", "http://127.0.0.1:1/images"],
            "sinks": [f"{folder}/results"],
            "artifacts": [f"{folder}/models"],
        },
        "heatmaps": f"{folder}/heatmaps",
        "batch_size": 4,
        "limits": LIMITS,
        **changes,
    }
    spec = parse_job(values, "serve")
    assert isinstance(spec, ServeSpec)
    return spec


@asynccontextmanager
async def client(spec: ServeSpec, tokens: Tokens = NOBODY) -> AsyncIterator[httpx.AsyncClient]:
    """Talks to the application without a socket."""
    app = build_app(spec, tokens, LocalBackend(spec))
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http:
        yield http


def files(*pictures: bytes) -> list[tuple[str, tuple[str, bytes, str]]]:
    """Parts of a multipart form."""
    return [("images", (f"{i}.png", data, "image/png")) for i, data in enumerate(pictures)]


def run(work: Any) -> Any:
    """Runs a coroutine and restores the number of torch threads."""
    threads = torch.get_num_threads()
    try:
        return asyncio.run(work)
    finally:
        torch.set_num_threads(threads)


@contextmanager
def running(spec: ServeSpec, tokens: Tokens = NOBODY, **bounds: float) -> Iterator[str]:
    """The URL of a server that runs meanwhile, with other `ConnectionLimits` of connections."""
    stop, ready = threading.Event(), threading.Event()
    urls: list[str] = []

    def on_ready(url: str, _: str) -> None:
        urls.append(url)
        ready.set()

    def wait() -> None:
        stop.wait()

    serving = threading.Thread(target=serve_here, args=(spec, tokens, on_ready, wait), kwargs=bounds)
    serving.start()
    try:
        assert ready.wait(60)
        yield urls[0]
    finally:
        stop.set()
        serving.join(30)
