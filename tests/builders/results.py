"""Results directories made without a detector: rows with known scores of existing images."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from raydetect.config import parse_job, public_spec
from raydetect.records import Chunk, Receipt, Row
from raydetect.sinks.heatmaps import map_png, overlay_png
from raydetect.sinks.ledger import Ledger
from raydetect.sinks.parquet import ResultsSink
from raydetect.storage import Storage
from tests.builders.archives import tar_bytes
from tests.builders.images import defect_image, encode, normal_image
from tests.builders.ledgers import write_part
from tests.objectstore import ObjectStore

SCALE = {"low": 0.0, "high": 10.0}
THRESHOLD = 2.0
NO_DEFECT = np.zeros((96, 96), dtype=bool)
HOSTILE = (
    "<script>alert(1)</script>.png",
    '"><img src=x onerror=alert(2)>.png',
    "{{ 7 * 7 }}.png",
    "javascript:alert(3).png",
    "</style><b>&amp;.png",
    "=cmd|' /C calc'!A0.png",
)


def run_record(
    folder: str,
    num_shards: int,
    style: str = "overlay",
    fleet: Sequence[str] = (),
    storage: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """`run.json` of a scoring job on `folder/archive`."""
    values = {
        "kind": "score",
        "source": {"uri": f"{folder}/archive", "pattern": "{category}/test/{defect}/{name}"},
        "artifact": f"{folder}/artifact",
        "sink": {"uri": f"{folder}/results", "heatmaps": "all", "style": style},
        "flag": {"alpha": 0.05},
        "storage": dict(storage),
    }
    scale = {"categories": {name: SCALE for name in fleet}} if fleet else SCALE
    members = {"categories": {name: "d" * 64 for name in fleet}} if fleet else {}
    return {
        "kind": "score",
        "spec": public_spec(parse_job(values, "made")),
        "result": {"spec": {}, "artifact": "a" * 64, "archive": "b" * 64, **members},
        "num_shards": num_shards,
        "num_bytes": 12_345_678,
        "heatmap_scale": scale,
        "packages": {"torch": "2.14.1", "numpy": "2.3.1"},
    }


def simulated_map(mask: np.ndarray, strength: float) -> np.ndarray:
    """An anomaly map that is high on the mask, float32."""
    return (0.3 + strength * mask).astype(np.float32)


def make_results(
    folder: str, names: Sequence[Sequence[str]], style: str = "overlay", store: ObjectStore | None = None
) -> Ledger:
    """Writes an archive of tar shards with one image per name, and its results.

    Every third image has a defect and is flagged; the last file of each shard is not an image. The score of image n is
    1 + n / 100 if it is normal, else 3 + n / 100.
    """
    storage, options = (Storage(), {}) if store is None else (store.storage, store.settings)
    ledger = Ledger(f"{folder}/results", storage)
    ledger.begin(run_record(folder, len(names), style, storage=options))
    number = 0
    for shard, shard_names in enumerate(names):
        uri = f"{folder}/archive/part-{shard}.tar"
        files, rows, pictures = [], [], {}
        for position, name in enumerate(shard_names):
            broken = position == len(shard_names) - 1
            odd = number % 3 == 0
            image, mask = (
                defect_image(number, "blob") if odd else (normal_image(number), np.zeros((96, 96), dtype=bool))
            )
            files.append((name, b"no image" if broken else encode(image)))
            row = _row(uri, name, shard, number, odd, broken)
            rows.append(row)
            if not broken:
                pictures[position] = _picture(image, simulated_map(mask, 5.0), style)
            number += 1
        storage.write(uri, tar_bytes(files))
        part = write_part(ResultsSink(ledger.uri, storage), Chunk(shard, 0, True, ()), rows, pictures)
        ledger.write_receipt(
            Receipt(shard=shard, uri=uri, fingerprint="f", rows=len(rows), statuses=part.statuses, parts=(part,))
        )
    ledger.finish({"kind": "score", "heatmap_scale": SCALE, "heatmap_style": style})
    return ledger


def _picture(image: np.ndarray, anomaly_map: np.ndarray, style: str) -> bytes:
    low, high = SCALE["low"], SCALE["high"]
    return map_png(anomaly_map, low, high)[0] if style == "map" else overlay_png(image, anomaly_map, low, high)


def _row(uri: str, name: str, shard: int, number: int, odd: bool, broken: bool) -> Row:
    base = {"key": f"{uri}#{name}", "image_uri": f"tar://{name}::{uri}", "chunk": f"{shard:05d}-0000", "artifact": "a"}
    category = name.split("/", maxsplit=1)[0] if "/" in name else None
    if broken:
        return Row(**base, status="not_an_image", error=f"{uri}#{name}: no image format begins so.", category=category)
    return Row(
        **base,
        status="ok",
        width=96,
        height=96,
        image_score=(3.0 if odd else 1.0) + number / 100,
        p_value=0.01 if odd else 0.5,
        threshold=THRESHOLD,
        flagged=odd,
        label=int(odd),
        category=category,
        defect="blob" if odd else "good",
    )


def make_large_results(folder: str, shards: int, parts_each: int, rows_each: int) -> Ledger:
    """Writes results of `shards * parts_each * rows_each` rows for the same large image; one in 110 is flagged."""
    storage = Storage()
    storage.write(f"{folder}/archive/only.png", encode(normal_image(0, size_px=800)))
    ledger = Ledger(f"{folder}/results", storage)
    ledger.begin(run_record(folder, shards))
    sink = ResultsSink(ledger.uri, storage)
    for shard in range(shards):
        random = np.random.default_rng([17, shard])
        parts = [
            write_part(
                sink,
                Chunk(shard, number, number == parts_each - 1, ()),
                _many(folder, shard, number, rows_each, random),
                {},
            )
            for number in range(parts_each)
        ]
        statuses = {"ok": sum(part.statuses.get("ok", 0) for part in parts)}
        statuses["corrupt"] = sum(part.rows for part in parts) - statuses["ok"]
        receipt = Receipt(
            shard=shard,
            uri=f"{folder}/archive/part-{shard:05d}.tar",
            fingerprint="f",
            rows=sum(part.rows for part in parts),
            statuses=statuses,
            parts=tuple(parts),
        )
        ledger.write_receipt(receipt)
    ledger.finish({"kind": "score", "heatmap_scale": SCALE, "heatmap_style": "overlay"})
    return ledger


def _many(folder: str, shard: int, part: int, count: int, random: np.random.Generator) -> list[Row]:
    uri = f"{folder}/archive/part-{shard:05d}.tar"
    scores = random.gamma(4.0, 0.25, size=count)
    threshold = 2.9
    rows = []
    for i, score in enumerate(scores.tolist()):
        name = f"line{(shard + i) % 7}/test/good/{part:04d}{i:06d}.png"
        common: dict[str, Any] = {
            "key": f"{uri}#{name}",
            "image_uri": f"{folder}/archive/only.png",
            "chunk": f"{shard:05d}-{part:04d}",
            "artifact": "a",
            "category": name[:5],
        }
        if i % 1000 == 999:
            rows.append(Row(**common, status="corrupt", error=f"{uri}#{name}: JPEG data cannot be decoded."))
            continue
        rows.append(
            Row(
                **common,
                status="ok",
                width=256,
                height=256,
                image_score=score,
                p_value=0.5,
                threshold=threshold,
                flagged=score >= threshold,
            )
        )
    return rows


def names_of(count: int, categories: Sequence[str] = ("bolt", "plate")) -> list[list[str]]:
    """Image names of three shards, alternating between categories."""
    names = [f"{categories[i % len(categories)]}/test/x/{i:04d}.png" for i in range(count)]
    return [names[shard::3] for shard in range(3)]
