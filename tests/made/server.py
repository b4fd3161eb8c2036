"""A server of its own thread: `raydetect serve --local` on a free port, around a small fitted detector."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raydetect import local
from raydetect.gateway.tokens import Tokens
from raydetect.serve_local import serve_here
from raydetect.spec import FitSpec, ServeSpec, parse_job
from tests.made.archives import mixed_files, normal_files, pack

PATCHCORE = {"backbone": "resnet18", "weights": "random", "image_size": [64, 64], "coreset_sampling_ratio": 0.05}
LIMITS = {"max_images": 12, "max_image_bytes": 1_000_000, "max_body_bytes": 2_000_000, "max_pixels": 4_000_000}
NOBODY = Tokens(())


def fit_small(folder: Path, name: str, seed: int = 0) -> str:
    """An artifact at `folder/models/name`, fitted on 24 images."""
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
    local.fit(spec, lambda *_: None)
    return uri


def serve_spec(folder: Path, **changes: Any) -> ServeSpec:
    """A served detector, `bottle`, of `fit_small`."""
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


@contextmanager
def running(spec: ServeSpec, tokens: Tokens = NOBODY) -> Iterator[str]:
    """The URL of a server that runs meanwhile."""
    stop, ready = threading.Event(), threading.Event()
    urls: list[str] = []

    def on_ready(url: str) -> None:
        urls.append(url)
        ready.set()

    def wait() -> None:
        stop.wait()

    serving = threading.Thread(target=serve_here, args=(spec, tokens, on_ready, wait))
    serving.start()
    try:
        assert ready.wait(60)
        yield urls[0]
    finally:
        stop.set()
        serving.join(30)
