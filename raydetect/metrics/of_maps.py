"""Ranking metrics over all pixels of anomaly maps, exact; an evaluation counts pixels in bins instead (`pixels.py`).

They hold all pixels in memory and sort them. Every pixel counts the same, so large defects weigh more than small ones;
`pro.aupro` gives every defect the same weight.
"""

from collections.abc import Sequence

import numpy as np

from raydetect.metrics.f1 import best_f1
from raydetect.metrics.roc import auroc, average_precision


def pixel_auroc(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> float:
    """`auroc` of all pixels.

    Args:
        maps: anomaly map (H, W) of every image, finite, higher = more anomalous.
        masks: mask (H, W) of every image, nonzero = anomalous; all zero for a normal image.

    Raises:
        ValueError: shapes differ, a class is missing, or a value is not finite.
    """
    return auroc(*_pixels(maps, masks))


def pixel_average_precision(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> float:
    """`average_precision` of all pixels; arguments and errors as `pixel_auroc`."""
    return average_precision(*_pixels(maps, masks))


def pixel_best_f1(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> tuple[float, float]:
    """`best_f1` of all pixels and its threshold; arguments and errors as `pixel_auroc`."""
    return best_f1(*_pixels(maps, masks))


def _pixels(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(labels, scores) of all pixels."""
    if len(maps) != len(masks) or not len(maps):
        raise ValueError(f"{len(maps)} maps and {len(masks)} masks; give one mask for each map, and at least one.")
    for number, (map_HW, mask_HW) in enumerate(zip(maps, masks, strict=True)):
        if np.shape(map_HW) != np.shape(mask_HW):
            raise ValueError(
                f"image {number}: the map has shape {np.shape(map_HW)} and its mask {np.shape(mask_HW)}; they must be "
                "equal."
            )
    labels_N = np.concatenate([(np.asarray(mask_HW) != 0).ravel() for mask_HW in masks])
    return labels_N, np.concatenate([np.asarray(map_HW).ravel() for map_HW in maps])
