"""The cards of a report: an image, its overlay and its row, small enough to embed in the page."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from raydetect.archives.base import split_key
from raydetect.errors import MemberError, RaydetectError
from raydetect.report.pictures import Pictures, missing_reason
from raydetect.report.region_pictures import needed_px, regions_text, with_boxes, zoomed
from raydetect.sinks.ledger import Totals

SIDE_PX, QUALITY = 360, 78
DRAWN_PX = 1024  # the longest side of an image over which a heatmap is drawn
CLOSE_UPS = 4  # of an image on the page
MOST_CARDS = 500
EQUAL_P_VALUES = 3  # equal lowest p-values of the gallery that are explained
JPEG_URI = "data:image/jpeg;base64,"


@dataclass(frozen=True, slots=True)
class Card:
    """One image of the gallery.

    Attributes:
        place: rank; 1 is the most anomalous.
        name: member name, without its container.
        shard: URI of the container or folder.
        product: the category, unless it is part of the name.
        image: data URI of a thumbnail with the boxes of the regions, "" if there is none.
        overlay: the same with the heatmap overlaid.
        zoom: data URI of the strongest region, enlarged, "" if there is none or close-ups are stored.
        close_ups: data URIs of the stored close-ups of the first regions.
        regions: describes the regions, "" if there are none.
        note: the reason if a picture is missing, else "".
    """

    place: int
    name: str
    shard: str
    category: str
    product: str
    defect: str
    label: int | None
    flagged: bool
    image_score: float
    p_value: float | None
    size: str
    image: str
    overlay: str
    zoom: str
    close_ups: Sequence[str]
    regions: str
    note: str


def cards(rows: Sequence[Mapping[str, Any]], pictures: Pictures) -> list[Card]:
    """One card per row, in the order of the rows; images are read container by container."""
    card_by_index: dict[int, Card] = {}
    for index in sorted(range(len(rows)), key=lambda i: (rows[i]["image_uri"].partition("::")[2], i)):
        card_by_index[index] = _card(index + 1, rows[index], pictures)
    return [card_by_index[index] for index in range(len(rows))]


def gallery_notes(shown: Sequence[Card], totals: Totals, uri: str) -> list[str]:
    """What to know of the gallery: how many images it leaves out, and why p-values may be equal.

    Args:
        shown: the cards.
        totals: of the run.
        uri: of the results directory.
    """
    notes = []
    scored = totals.rows - totals.bad_rows
    if len(shown) < scored:
        left_out = max(totals.flagged - sum(card.flagged for card in shown), 0)
        flagged = f"; {left_out:,} flagged images are not among them" if left_out else ""
        notes.append(
            f"The {len(shown):,} most anomalous of {scored:,} scored images{flagged}. More: raydetect report {uri} "
            f"--pictures {min(MOST_CARDS, scored)}. All: raydetect export {uri} --as folder."
        )
    lowest = min((card.p_value for card in shown if card.p_value is not None), default=None)
    equal = sum(card.p_value == lowest for card in shown)
    if lowest is not None and equal >= EQUAL_P_VALUES:
        notes.append(
            f"{equal:,} of them have p = {lowest:.3g}. A p-value is a share of the normal images that the detector was "
            "calibrated on; with N of them, none is less than 1 / (N + 1). Scores tell such images apart."
        )
    return notes


def _card(place: int, row: Mapping[str, Any], pictures: Pictures) -> Card:
    notes: list[str] = []
    image = overlay = None
    regions, stored = row["regions"] or (), (row["width"], row["height"])
    zoom, close_ups = "", _close_ups(row, pictures, notes)
    try:
        enlarges = bool(regions) and not close_ups
        longest_px = needed_px(regions, stored, DRAWN_PX) if enlarges else DRAWN_PX
        image = pictures.decoded(pictures.encoded(row["image_uri"]), longest_px)
        zoom = data_uri(zoomed(image, regions, stored)) if enlarges else ""
        image.thumbnail((DRAWN_PX, DRAWN_PX))
    except (MemberError, RaydetectError) as error:
        notes.append(f"No image: {missing_reason(error)}")
    try:
        overlay = pictures.overlay(row, image)
    except RaydetectError as error:
        notes.append(f"No heatmap: {missing_reason(error)}")
    shard, name = split_key(row["key"], row["image_uri"])
    size = f"{row['width']} x {row['height']} px" if row["width"] else ""
    return Card(
        place=place,
        name=name or shard,
        shard=shard,
        category=row["category"] or "",
        product=row["category"] if row["category"] and row["category"] not in name.split("/") else "",
        defect=row["defect"] or "",
        label=row["label"],
        flagged=bool(row["flagged"]),
        image_score=row["image_score"],
        p_value=row["p_value"],
        size=size,
        image=data_uri(image, regions, stored),
        overlay=data_uri(overlay, regions, stored),
        zoom=zoom,
        close_ups=close_ups,
        regions=regions_text(row),
        note=" ".join(notes),
    )


def _close_ups(row: Mapping[str, Any], pictures: Pictures, notes: list[str]) -> list[str]:
    """Data URIs of the stored close-ups; appends the reason to `notes` if they cannot be read."""
    try:
        return [_jpeg(picture) for picture in pictures.close_ups(row, CLOSE_UPS)]
    except RaydetectError as error:
        notes.append(f"No close-ups: {missing_reason(error)}")
        return []


def data_uri(
    picture: Image.Image | None, regions: Sequence[Mapping[str, Any]] = (), stored: tuple[int, int] = (1, 1)
) -> str:
    """A JPEG thumbnail with the boxes of regions as a data URI; "" for None.

    Args:
        picture: the upright picture at any size.
        regions: of its row, in px of the stored picture.
        stored: (width, height) of the stored picture in px.
    """
    if picture is None:
        return ""
    return _jpeg(with_boxes(picture, regions, stored, SIDE_PX))


def _jpeg(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return JPEG_URI + base64.b64encode(buffer.getvalue()).decode()
