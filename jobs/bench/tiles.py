"""What tiles cost: `python -m jobs.bench.tiles`.

One chunk of pictures is scored in tiles, and the same tiles as images of their own, by one detector in one process,
alternating and with equal batches. Both decode the same px from JPEG, with overlap the separate images more of them.
"""

import io
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from jobs.bench.record import alternate, ratio, write
from raydetect.artifacts.store import Artifact, load_artifact
from raydetect.config import FitSpec, ScoreSpec, parse_job
from raydetect.images.preprocess import Preprocess
from raydetect.local import jobs
from raydetect.records import Chunk, Member
from raydetect.scoring.scorer import Scorer
from raydetect.storage import Storage
from tests.builders.archives import pack
from tests.builders.images import normal_image

TILE_PX, SIDE_PX, OVERLAPS = 128, 1024, (0, 16)
PICTURES, BATCH, ROUNDS = 2, 16, 7
ROOT = "memory://tiles"


def encoded(picture: Image.Image) -> bytes:
    """A JPEG."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def large(number: int) -> Image.Image:
    """A picture of SIDE_PX made of small parts."""
    parts = [[normal_image(100 * number + 8 * y + x, 256) for x in range(4)] for y in range(4)]
    return Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in parts]))


def fitted(overlap: int) -> Artifact:
    """PatchCore on ResNet-18, fitted on the tiles of a few pictures."""
    pack(f"{ROOT}/normal", ".tar", [(f"{i}.jpg", encoded(large(i))) for i in range(4)], 1)
    params = {"weights": "random", "backbone": "resnet18", "image_size": [TILE_PX] * 2, "max_bank_vectors": 2000}
    values = {
        "kind": "fit",
        "source": {"uri": f"{ROOT}/normal"},
        "detector": {"name": "patchcore", "params": params},
        "artifact": f"{ROOT}/artifact",
        "preprocess": {"jpeg_scale": "full"},
        "view": {"tile": {"overlap": overlap}},
        "resources": {"cpus_per_worker": 1},
    }
    spec = parse_job(values, "fit")
    assert isinstance(spec, FitSpec)
    jobs.fit(spec, lambda *_: None)
    return load_artifact(spec.artifact, Storage())


def without_tiles(artifact: Artifact) -> Artifact:
    """The same detector for images of the tile's size."""
    body = {**artifact.record.body, "preprocess": {"jpeg_scale": "full"}}
    return replace(artifact, record=replace(artifact.record, body=body))


def scorer(artifact: Artifact) -> Scorer:
    """Scores without heatmaps in batches of BATCH, with one decoding thread."""
    values = {
        "kind": "score",
        "source": {"uri": ROOT},
        "artifact": f"{ROOT}/artifact",
        "sink": {"uri": f"{ROOT}/results", "heatmaps": "none"},
        "flag": {"threshold": 0.0},
        "batch_size": BATCH,
        "resources": {"cpus_per_worker": 1},
    }
    spec = parse_job(values, "score")
    assert isinstance(spec, ScoreSpec)
    return Scorer(artifact, spec)


def chunk(pictures: list[Image.Image]) -> Chunk:
    """A chunk of encoded pictures."""
    return Chunk(0, 0, True, tuple(Member(f"a#{i}", "a", data=encoded(p)) for i, p in enumerate(pictures)))


def measured(overlap: int) -> dict[str, Any]:
    """Seconds in tiles over seconds of as many separate images."""
    artifact = fitted(overlap)
    pictures = [large(50 + i) for i in range(PICTURES)]
    preprocess: Preprocess = artifact.record.preprocess
    windows = preprocess.layout((SIDE_PX, SIDE_PX)).windows
    boxes = [tuple(map(round, window.box)) for window in windows]
    apart = [picture.crop(box) for picture in pictures for box in boxes]  # type: ignore[arg-type]
    tiled, plain = scorer(artifact), scorer(without_tiles(artifact))
    whole, separate = chunk(pictures), chunk(apart)
    in_tiles, alone = alternate(lambda: tiled.score_chunk(whole), lambda: plain.score_chunk(separate), ROUNDS)
    return {
        "pictures": PICTURES,
        "tiles": len(apart),
        "tiles_per_second": round(len(apart) / median(in_tiles), 2),
        "images_per_second": round(len(apart) / median(alone), 2),
        "tiles_over_images": ratio(in_tiles, alone),
    }


def main() -> None:
    """Runs the benchmark and writes its results."""
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"picture_px": SIDE_PX, "tile_px": TILE_PX, "batch": BATCH}
    figures["overlaps"] = {str(overlap): measured(overlap) for overlap in OVERLAPS}
    write("tiles", "python -m jobs.bench.tiles", figures)


if __name__ == "__main__":
    main()
