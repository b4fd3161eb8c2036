"""Hints on views: what pictures of these sizes lose with a view, and which settings keep it."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from raydetect.config import TileSpec, ViewSpec
from raydetect.views.view import View

OBLONG = 1.2  # ratio of the sides
MOST = 0.5  # share of the pictures that a hint must concern
LARGE = 4  # px of a picture for each px of the input, along a side
VARIED = 4  # ratio of the 90th to the 10th percentile of the long sides
FEW_LEVELS = 32  # of 256: an eighth of the range
LEFT_OUT = 0.1  # share of a picture
ROUND_PX = 32  # a suggested side is a multiple of this


def hints(sizes: Mapping[tuple[int, int], int], view: View, image_size: tuple[int, int]) -> list[str]:
    """Returns one sentence for each hint.

    Args:
        sizes: number of pictures by (width, height) in px, upright.
        view: how the detector looks at them.
        image_size: (height, width) in px of its input.
    """
    if not sizes:
        return []
    sizes_N2 = np.repeat(np.array(list(sizes), np.float64), list(sizes.values()), axis=0)
    found = [_varied(sizes_N2)]
    if not view.has_tiles:
        found += [
            _oblong(sizes_N2, view.spec, image_size),
            _large(sizes_N2, image_size),
            _left_out(sizes, view, image_size),
        ]
    return [hint for hint in found if hint]


def dark_hints(levels: Mapping[int, int]) -> list[str]:
    """Returns a sentence if most 16-bit grey pictures use little of their range, else nothing.

    Args:
        levels: number of 16-bit grey pictures by the levels of 256 that they span.
    """
    narrow = sum(count for spanned, count in levels.items() if spanned < FEW_LEVELS)
    if narrow <= MOST * sum(levels.values()):
        return []
    return [
        f"{narrow:,} of {sum(levels.values()):,} 16-bit grey images use less than an eighth of their range, which is "
        f"read as fewer than {FEW_LEVELS} of 256 levels; write them with the full range, or name their significant "
        "bits in the file (sBIT in a PNG, 12 bits in a TIFF), or state the values that they use in view.range."
    ]


def are_oblong(sizes_N2: np.ndarray) -> bool:
    """Whether most pictures are, of (width, height) in px each."""
    ratio_N = sizes_N2[:, 0] / sizes_N2[:, 1]
    return float(np.mean(np.maximum(ratio_N, 1 / ratio_N) > OBLONG)) > MOST


def are_large(sizes_N2: np.ndarray, image_size: tuple[int, int]) -> bool:
    """Whether most pictures, of (width, height) in px each, lose small defects in an input of (height, width) px."""
    height, width = image_size
    return float(np.mean((sizes_N2[:, 0] > LARGE * width) | (sizes_N2[:, 1] > LARGE * height))) > MOST


def _oblong(sizes_N2: np.ndarray, spec: ViewSpec, image_size: tuple[int, int]) -> str:
    ratio_N = sizes_N2[:, 0] / sizes_N2[:, 1]
    height, width = image_size
    if spec.resize != "stretch" or not are_oblong(sizes_N2) or max(height / width, width / height) > OBLONG:
        return ""
    middle = float(np.median(ratio_N))
    fitting = (height, _rounded(height * middle)) if middle >= 1 else (_rounded(width / middle), width)
    words = f"{middle:.2g} times as wide as high" if middle >= 1 else f"{1 / middle:.2g} times as high as wide"
    return (
        f"most images are oblong ({words}) and are squeezed to {width} x {height} px; view.resize: pad keeps their "
        f"ratio, and image_size: {list(fitting)} uses the whole input."
    )


def _large(sizes_N2: np.ndarray, image_size: tuple[int, int]) -> str:
    height, width = image_size
    if not are_large(sizes_N2, image_size):
        return ""
    middle = (round(float(np.median(sizes_N2[:, 0]))), round(float(np.median(sizes_N2[:, 1]))))
    overlap = min(image_size) // 4
    tiles = View(ViewSpec(tile=TileSpec(overlap=overlap)))
    half = View(replace(tiles.spec, scale=0.5))
    whole, quarter = (len(view.layout(middle, image_size).windows) for view in (tiles, half))
    return (
        f"most images ({middle[0]} x {middle[1]} px) are more than {LARGE} times as large as the input ({width} x "
        f"{height} px), where small defects vanish; view: {{tile: {{overlap: {overlap}}}}} looks at them in {whole:,} "
        f"tiles, and with scale: 0.5 in {quarter:,}."
    )


def _varied(sizes_N2: np.ndarray) -> str:
    low, high = (round(float(side)) for side in np.percentile(sizes_N2.max(axis=1), (10, 90)))
    if high <= VARIED * low:
        return ""
    return (
        f"the sizes of images vary (long sides from {low} to {high} px without the outer tenths), so that the same "
        "defect is large in some and small in others; fit images of each size on their own."
    )


def _left_out(sizes: Mapping[tuple[int, int], int], view: View, image_size: tuple[int, int]) -> str:
    total = 0.0
    for (width, height), count in sizes.items():
        left, upper, right, lower = view.layout((width, height), image_size).box
        total += count * (1 - (right - left) * (lower - upper) / (width * height))
    share = total / sum(sizes.values())
    if share <= LEFT_OUT:
        return ""
    setting = "view.crop" if view.spec.crop is not None else f"view.resize: {view.spec.resize}"
    return f"{setting} leaves out {share:.0%} of a picture on average; defects there are not found."


def _rounded(side: float) -> int:
    return max(1, round(side / ROUND_PX)) * ROUND_PX
