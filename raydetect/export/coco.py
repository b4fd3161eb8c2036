"""Exports thresholded anomaly maps of a run as COCO annotations."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from raydetect import __version__
from raydetect.errors import SpecError
from raydetect.export.naming import file_name
from raydetect.export.outlines import MaskRegion, length_text, polygon, regions, run_lengths
from raydetect.report.pictures import Pictures, heatmap_style, map_scale
from raydetect.sinks.heatmaps import NORMAL_SHARE
from raydetect.sinks.rows import read_rows
from raydetect.storage import Scratch, whole_text

CLASS = {"id": 1, "name": "anomaly", "supercategory": "anomaly"}


def write_coco(pictures: Pictures, output: Path, threshold: float | None, polygons: bool) -> tuple[int, int]:
    """Writes a COCO file of all images with a stored anomaly map; one image is in memory at a time.

    Args:
        pictures: images and heatmaps of the run.
        output: the file to write.
        threshold: smallest map value of anomalous pixels; None = just above all pixels of held-out normal images.
        polygons: write outlines along pixel edges, which fill holes, instead of run lengths.

    Returns:
        Number of images and number of annotations.

    Raises:
        SpecError: the run stored no anomaly maps.
        StorageError: a part or map is missing or damaged, or the file cannot be written; an existing file stays.
    """
    require_maps(pictures)
    images = annotations = 0
    annotation_file = Scratch("outlines")
    with whole_text(output) as out:
        info = json.dumps(_info(pictures, threshold, polygons))
        out.write(f'{{"info": {info}, "licenses": [], "categories": [{json.dumps(CLASS)}], "images": [')
        for row, map_HW in _maps(pictures):
            images += 1
            out.write(_entry(images == 1, _image(images, row)))
            for region in regions(map_HW >= limit_of(pictures, row, threshold)):
                annotations += 1
                annotation = _annotation(annotations, images, region, polygons)
                annotation_file.append(_entry(annotations == 1, annotation).encode())
        out.write('\n], "annotations": [')
        for part in annotation_file.parts():
            out.write(part.decode())
        out.write("\n]}\n")
    return images, annotations


def require_maps(pictures: Pictures) -> None:
    """Refuses a run without stored anomaly maps.

    Raises:
        SpecError: the run stored overlays or no heatmaps.
    """
    selection = pictures.run["spec"]["sink"]["heatmaps"]
    if heatmap_style(pictures.run) != "map" or selection == "none":
        stored = "overlays" if selection != "none" else "no heatmaps"
        raise SpecError(
            f"{pictures.ledger.uri}: stores {stored}, but outlines need anomaly maps. Score with sink.style: map and "
            "sink.heatmaps: flagged or all."
        )


def limit_of(pictures: Pictures, row: Mapping[str, Any], threshold: float | None) -> float:
    """Returns the smallest map value of anomalous pixels in this image."""
    if threshold is not None:
        return threshold
    scale = map_scale(pictures.run, row["category"])
    return float(np.nextafter(scale.low + NORMAL_SHARE * (scale.high - scale.low), np.inf))


def sized(map_HW: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resizes a map to its image, bilinear between pixel centres; returns float32."""
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
    map_threshold = threshold if threshold is not None else "above the highest value of held-out normal images"
    return {
        "description": f"anomalies found by raydetect {__version__}, not labelled by people",
        "results": pictures.ledger.uri,
        "artifact": str(pictures.run["result"]["artifact"]),
        "map_threshold": map_threshold,
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


def _annotation(number: int, image: int, region: MaskRegion, polygons: bool) -> dict[str, Any]:
    height, width = region.mask_HW.shape
    lengths = {"size": [height, width], "counts": length_text(run_lengths(region.mask_HW))}
    return {
        "id": number,
        "image_id": image,
        "category_id": CLASS["id"],
        "segmentation": [polygon(region)] if polygons else lengths,
        "area": region.area_px,
        "bbox": list(region.box),
        "iscrowd": 0,
    }
