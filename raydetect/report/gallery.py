"""The cards of a report: an image, its overlay and what its row says, small enough to stand in the page itself."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from raydetect.archives.base import split_key
from raydetect.errors import MemberError, RaydetectError
from raydetect.report.pictures import Pictures, why_not

SIDE_PX, QUALITY = 360, 78
DRAWN_PX = 1024  # the longest side of an image over which a heatmap is drawn
JPEG_URI = "data:image/jpeg;base64,"


@dataclass(frozen=True, slots=True)
class Card:
    """One image of the gallery.

    Attributes:
        place: 1 for the most anomalous.
        name: of the member, without its container.
        shard: URI of the container or folder.
        product: the category, where the name does not tell it.
        image: data URI of a small picture, "" when there is none.
        overlay: the same with the heatmap drawn over it.
        note: why a picture is missing, else "".
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
    note: str


def cards(rows: Sequence[Mapping[str, Any]], pictures: Pictures) -> list[Card]:
    """A card for every row, in their order; images are read container by container."""
    made: dict[int, Card] = {}
    for place in sorted(range(len(rows)), key=lambda i: (rows[i]["image_uri"].partition("::")[2], i)):
        made[place] = _card(place + 1, rows[place], pictures)
    return [made[place] for place in range(len(rows))]


def _card(place: int, row: Mapping[str, Any], pictures: Pictures) -> Card:
    notes: list[str] = []
    image = overlay = None
    try:
        image = pictures.decoded(pictures.encoded(row["image_uri"]), DRAWN_PX)
    except (MemberError, RaydetectError) as error:
        notes.append(f"No image: {why_not(error)}")
    try:
        overlay = pictures.overlay(row, image)
    except RaydetectError as error:
        notes.append(f"No heatmap: {why_not(error)}")
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
        image=data_uri(image),
        overlay=data_uri(overlay),
        note=" ".join(notes),
    )


def data_uri(picture: Image.Image | None) -> str:
    """A small JPEG as data URI; "" for none."""
    if picture is None:
        return ""
    small = picture.copy()
    small.thumbnail((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=QUALITY)
    return JPEG_URI + base64.b64encode(buffer.getvalue()).decode()
