"""Exports the regions of rows, or thresholded anomaly maps, as COCO annotations."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from raydetect import __version__
from raydetect.errors import SpecError
from raydetect.export.naming import file_name
from raydetect.export.outlines import MaskRegion, length_text, polygons_of, regions, run_lengths
from raydetect.export.row_regions import boxes_of, outlines_of
from raydetect.report.pictures import Pictures, heatmap_style, map_scale, region_threshold
from raydetect.sinks.heatmaps import NORMAL_SHARE
from raydetect.sinks.rows import read_rows
from raydetect.sinks.run_progress import has_regions
from raydetect.storage import Scratch, whole_text
from raydetect.views.view import Layout

CLASS = {"id": 1, "name": "anomaly", "supercategory": "anomaly"}


def write_coco(pictures: Pictures, output: Path, threshold: float | None, polygons: bool) -> tuple[int, int]:
    """Writes a COCO file of all images with regions or a stored anomaly map; one image is in memory at a time.

    Args:
        pictures: images and heatmaps of the run.
        output: the file to write.
        threshold: smallest map value of anomalous pixels; None = the regions of the rows, or for a run without them
            just above all pixels of held-out normal images.
        polygons: write outlines along pixel edges, which fill holes, instead of run lengths.

    Returns:
        Number of images and number of annotations.

    Raises:
        SpecError: the run has neither regions nor anomaly maps.
        StorageError: a part or map is missing or damaged, or the file cannot be written; an existing file stays.
    """
    require_maps(pictures, threshold)
    found = _row_regions(pictures) if threshold is None and has_regions(pictures.run) else _cut(pictures, threshold)
    images = annotations = 0
    annotation_file = Scratch("outlines")
    with whole_text(output) as out:
        info = json.dumps(_info(pictures, threshold, polygons))
        out.write(f'{{"info": {info}, "licenses": [], "categories": [{json.dumps(CLASS)}], "images": [')
        for row, masks in found:
            images += 1
            out.write(_entry(images == 1, _image(images, row)))
            for mask, facts in masks:
                annotations += 1
                annotation = {**_annotation(annotations, images, mask, polygons), **facts}
                annotation_file.append(_entry(annotations == 1, annotation).encode())
        out.write('\n], "annotations": [')
        for part in annotation_file.parts():
            out.write(part.decode())
        out.write("\n]}\n")
    return images, annotations


def require_maps(pictures: Pictures, threshold: float | None) -> None:
    """Refuses a run without stored anomaly maps, unless the regions of its rows are wanted.

    Raises:
        SpecError: the run stored overlays or no heatmaps.
    """
    selection = pictures.run["spec"]["sink"]["heatmaps"]
    if not _has_maps(pictures) and (threshold is not None or not has_regions(pictures.run)):
        way = ", or leave out --map-threshold for the regions of rows" if has_regions(pictures.run) else ""
        stored = "overlays" if selection != "none" else "no heatmaps"
        raise SpecError(
            f"{pictures.ledger.uri}: stores {stored}, but outlines need anomaly maps. Score into another sink.uri with "
            f"sink.style: map and sink.heatmaps: flagged or all{way}."
        )


def limit_of(pictures: Pictures, row: Mapping[str, Any], threshold: float | None) -> float:
    """Returns the smallest map value of anomalous pixels in this image."""
    if threshold is not None:
        return threshold
    scale = map_scale(pictures.run, row["category"])
    return float(np.nextafter(scale.low + NORMAL_SHARE * (scale.high - scale.low), np.inf))


def placed(map_HW: np.ndarray, layout: Layout) -> np.ndarray:
    """Resizes a map to its place in the picture, bilinear between pixel centres; returns float32, -inf elsewhere."""
    left, upper, right, lower = (round(side) for side in layout.box)
    resized = Image.fromarray(map_HW.astype(np.float32)).resize(
        (right - left, lower - upper), Image.Resampling.BILINEAR
    )
    stored_HW = np.full(layout.picture[::-1], -np.inf, np.float32)
    stored_HW[upper:lower, left:right] = np.asarray(resized)
    return stored_HW


Masks = Iterable[tuple[MaskRegion, dict[str, Any]]]


def _cut(pictures: Pictures, threshold: float | None) -> Iterator[tuple[dict[str, Any], Masks]]:
    """Rows with a stored map, and the masks of its pixels from a threshold on."""
    for _, part, table in read_rows(pictures.ledger):
        for row in table.to_pylist() if part.heatmaps else ():
            map_HW = pictures.anomaly_map(row)
            if map_HW is not None:
                stored_HW = placed(*pictures.located(row, map_HW))
                yield row, ((mask, {}) for mask in regions(stored_HW >= limit_of(pictures, row, threshold)))


def _row_regions(pictures: Pictures) -> Iterator[tuple[dict[str, Any], Masks]]:
    """Rows that have regions or a stored map, and the masks of their regions."""
    has_maps = _has_maps(pictures)
    for _, _, table in read_rows(pictures.ledger):
        for row in table.to_pylist():
            map_HW = pictures.anomaly_map(row) if has_maps else None
            if map_HW is None:
                masks = boxes_of(row)
            else:
                limit = region_threshold(pictures.run, row["category"]) or 0.0
                scale = map_scale(pictures.run, row["category"])
                masks = outlines_of(row, *pictures.located(row, map_HW), limit, scale)
            if row["regions"] is not None or map_HW is not None:
                yield row, zip(masks, map(_facts, row["regions"] or ()), strict=True)


def _facts(region: Mapping[str, Any]) -> dict[str, Any]:
    return {"score": region["peak_score"], "peak": [region["peak_x"], region["peak_y"]]}


def _has_maps(pictures: Pictures) -> bool:
    return heatmap_style(pictures.run) == "map" and pictures.run["spec"]["sink"]["heatmaps"] != "none"


def _entry(first: bool, body: Mapping[str, Any]) -> str:
    return ("\n" if first else ",\n") + json.dumps(body, allow_nan=False)


def _info(pictures: Pictures, threshold: float | None, polygons: bool) -> dict[str, Any]:
    usual = (
        "region_threshold of run.json" if has_regions(pictures.run) else "above the highest value of held-out images"
    )
    outlines = "polygons; holes are filled" if polygons else "run lengths"
    return {
        "description": f"anomalies found by raydetect {__version__}, not labelled by people",
        "results": pictures.ledger.uri,
        "artifact": str(pictures.run["result"]["artifact"]),
        "map_threshold": usual if threshold is None else threshold,
        "outlines": outlines if _has_maps(pictures) else "boxes, since the run stored no anomaly maps",
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
        "regions_left_out": row["regions_left_out"],
    }


def _annotation(number: int, image: int, region: MaskRegion, polygons: bool) -> dict[str, Any]:
    height, width = region.mask_HW.shape
    lengths = {"size": [height, width], "counts": length_text(run_lengths(region.mask_HW))}
    return {
        "id": number,
        "image_id": image,
        "category_id": CLASS["id"],
        "segmentation": polygons_of(region) if polygons else lengths,
        "area": region.area_px,
        "bbox": list(region.box),
        "iscrowd": 0,
    }
