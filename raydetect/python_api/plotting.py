"""Draws one result with matplotlib, which is optional."""

from typing import TYPE_CHECKING, Any

import numpy as np

from raydetect.fitting.fit_run import Fitted
from raydetect.images.decode import decode_image
from raydetect.python_api.inputs import RULES, InputImage
from raydetect.python_api.optional_packages import optional
from raydetect.python_api.results import Result
from raydetect.sinks.heatmaps import NORMAL_SHARE, RAMP
from raydetect.storage import Storage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INSTALL = "pip install 'raydetect[plot]'"
LONGEST_PX = 1024
NAMED = 60  # characters of an image's name in the title
SIDE_INCHES, TITLE_INCHES, SCALE_INCHES = 3.6, 0.9, 1.2
OUTLINE, NOT_LOOKED_AT = "#00b7ff", "#9a9a9a"


def plotted(given: InputImage, result: Result, threshold: float, fitted: Fitted, storage: Storage) -> "Figure":
    """The picture with boxes around its regions, and the map beside it with its scale.

    Args:
        given: the image.
        result: what was found in it, with its map.
        threshold: of image scores.
        fitted: sets bands of the picture and the scale of the map.
        storage: for an image given by path or URI.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    pyplot = optional("matplotlib.pyplot", "plot", INSTALL)
    view = fitted.preprocess.view.spec
    picture = np.asarray(decode_image(given.member(storage, view).data or b"", RULES, LONGEST_PX, view))
    across = min(max(SIDE_INCHES * result.width / result.height, 2.0), 6.0)
    down = min(max(across * result.height / result.width, 1.2), SIDE_INCHES)
    figure: Figure = pyplot.figure(figsize=(2 * across + SCALE_INCHES, down + TITLE_INCHES), layout="constrained")
    pyplot.close(figure)  # or a notebook shows it twice: once as the open figure, once as the value of its cell
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    place = (-0.5, result.width - 0.5, result.height - 0.5, -0.5)  # regions are in px of the stored picture
    left.imshow(picture, extent=place)
    _outline(left, result)
    _draw_map(figure, right, result, place, fitted)
    for axes in (left, right):
        axes.set_xticks([])
        axes.set_yticks([])
    figure.suptitle(_title(result, threshold))
    return figure


def _title(result: Result, threshold: float) -> str:
    name = result.image.rpartition("/")[2] if isinstance(result.image, str) else ""
    name = name if len(name) <= NAMED else f"{name[: NAMED - 3]}..."
    word = "anomalous" if result.label else "not anomalous"
    numbers = f"score {result.score:.4g} (threshold {threshold:.4g}), p = {result.p_value:.3g}: {word}"
    return f"{name}\n{numbers}" if name else numbers


def _outline(axes: Any, result: Result) -> None:
    from matplotlib.patches import Rectangle

    for region in result.regions:
        corner = (region.x - 0.5, region.y - 0.5)
        axes.add_patch(Rectangle(corner, region.width, region.height, fill=False, edgecolor=OUTLINE, linewidth=1.5))
    others = f", {result.regions_left_out} more not drawn" if result.regions_left_out else ""
    count = len(result.regions)
    axes.set_title(f"{count} region{'' if count == 1 else 's'}{others}", fontsize="medium")


def _draw_map(figure: "Figure", axes: Any, result: Result, place: tuple[float, ...], fitted: Fitted) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    colours = [(position, (red / 255, green / 255, blue / 255)) for position, red, green, blue in RAMP]
    ramp = LinearSegmentedColormap.from_list("raydetect", colours).with_extremes(bad=NOT_LOOKED_AT)
    low, high = fitted.calibration.map_scale()
    high = low + 3 * NORMAL_SHARE * (high - low)
    shown = axes.imshow(result.map, cmap=ramp, vmin=low, vmax=high, extent=place, interpolation="nearest")
    axes.set_title(
        "anomaly map" if fitted.detector.info.localises else "map (does not locate defects)", fontsize="medium"
    )
    figure.colorbar(shown, ax=axes, extend="both")
