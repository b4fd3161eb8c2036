"""COCO annotations of the anomaly maps of a run, thresholded at one stated value."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from raydetect import __version__
from raydetect.errors import SpecError
from raydetect.export.naming import file_name
from raydetect.export.outlines import Region, length_text, polygon, regions, run_lengths
from raydetect.report.pictures import Pictures, heatmap_style, map_scale
from raydetect.sinks.heatmaps import NORMAL_SHARE
from raydetect.sinks.rows import read_rows
from raydetect.storage import Scratch, whole_text

CLASS = {"id": 1, "name": "anomaly", "supercategory": "anomaly"}


def write_coco(pictures: Pictures, output: Path, threshold: float | None, polygons: bool) -> tuple[int, int]:
    """Writes a COCO file of every image with a stored anomaly map; one image is in memory at a time.

    Args:
        pictures: of the run.
        output: the file.
        threshold: a pixel is anomalous from this value on; None = above all pixels of held-out normal images.
        polygons: outlines along pixel edges, which fill holes, instead of run lengths.

    Returns:
        Numbers of images and of annotations.

    Raises:
        SpecError: the run stored no anomaly maps.
        StorageError: a part or map is missing or damaged, or the file cannot be written; one that was there stays.
    """
    require_maps(pictures)
    images = annotations = 0
    kept = Scratch("outlines")
    with whole_text(output) as out:
        head = json.dumps(_info(pictures, threshold, polygons))
        out.write(f'{{"info": {head}, "licenses": [], "categories": [{json.dumps(CLASS)}], "images": [')
        for row, map_HW in _maps(pictures):
            images += 1
            out.write(_entry(images == 1, _image(images, row)))
            for found in regions(map_HW >= limit_of(pictures, row, threshold)):
                annotations += 1
                kept.append(_entry(annotations == 1, _annotation(annotations, images, found, polygons)).encode())
        out.write('\n], "annotations": [')
        for part in kept.parts():
            out.write(part.decode())
        out.write("\n]}\n")
    return images, annotations


def require_maps(pictures: Pictures) -> None:
    """Refuses a run whose heatmaps are no numbers.

    Raises:
        SpecError: it stored overlays, or nothing.
    """
    kept = pictures.run["spec"]["sink"]["heatmaps"]
    if heatmap_style(pictures.run) != "map" or kept == "none":
        stored = "overlays, which are pictures" if kept != "none" else "no heatmaps"
        raise SpecError(
            f"{pictures.ledger.uri}: stores {stored}, and outlines need anomaly maps. Score with sink.style: map and "
            "sink.heatmaps: flagged or all."
        )


def limit_of(pictures: Pictures, row: Mapping[str, Any], threshold: float | None) -> float:
    """From which value on a pixel of this image is anomalous."""
    if threshold is not None:
        return threshold
    scale = map_scale(pictures.run, row["category"])
    return float(np.nextafter(scale.low + NORMAL_SHARE * (scale.high - scale.low), np.inf))


def sized(map_HW: np.ndarray, width: int, height: int) -> np.ndarray:
    """The map at the size of its image, bilinear between pixel centres, float32."""
    picture = Image.fromarray(map_HW.astype(np.float32))
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))


def _maps(pictures: Pictures) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    for _, part, table in read_rows(pictures.ledger):
        if part.heatmaps:
            for row in table.to_pylist():
                map_HW = pictures.anomaly_map(row)
                if map_HW is not None:
                    yield row, sized(map_HW, row["width"], row["height"])


def _entry(first: bool, body: Mapping[str, Any]) -> str:
    return ("\n" if first else ",\n") + json.dumps(body, allow_nan=False)


def _info(pictures: Pictures, threshold: float | None, polygons: bool) -> dict[str, Any]:
    message = threshold if threshold is not None else "above the highest value of held-out normal images"
    return {
        "description": f"anomalies found by raydetect {__version__}, not labelled by people",
        "results": pictures.ledger.uri,
        "artifact": str(pictures.run["result"]["artifact"]),
        "map_threshold": message,
        "outlines": "polygons; holes are filled" if polygons else "run lengths",
    }


def _image(number: int, row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": number,
        "file_name": file_name(row["key"], row["image_uri"]),
        "width": row["width"],
        "height": row["height"],
        "key": row["key"],
        "coco_url": row["image_uri"],
        "product": row["category"],
        "image_score": row["image_score"],
        "flagged": row["flagged"],
    }


def _annotation(number: int, image: int, found: Region, polygons: bool) -> dict[str, Any]:
    height, width = found.mask_HW.shape
    lengths = {"size": [height, width], "counts": length_text(run_lengths(found.mask_HW))}
    return {
        "id": number,
        "image_id": image,
        "category_id": CLASS["id"],
        "segmentation": [polygon(found)] if polygons else lengths,
        "area": found.area_px,
        "bbox": list(found.box),
        "iscrowd": 0,
    }
