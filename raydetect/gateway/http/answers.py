"""Converts a request's images to members, and rows to response entries."""

import base64
import hashlib
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starlette.datastructures import FormData, UploadFile

from raydetect.config import Heatmaps
from raydetect.errors import MemberError
from raydetect.gateway.allowed_uris import Prefixes
from raydetect.gateway.backend import Busy
from raydetect.gateway.fetch import Fetcher
from raydetect.gateway.http.errors import Mistake
from raydetect.gateway.http.schemas import FoundRegion, Score, ScoreRequest
from raydetect.records import Answer, Member
from raydetect.storage import Storage, join_uri

FORM_FIELDS = {"images", "heatmaps", "store_heatmaps", "category"}
NAME_LETTERS = 200
LIMITS = re.compile(r"\bsource\.(max_pixels|max_image_bytes)\b")  # what a job sets in its source, a server in `limits`


@dataclass(frozen=True, slots=True)
class Wanted:
    """A scoring request, from either kind of body."""

    members: Sequence[Member]
    heatmaps: Heatmaps
    store: bool


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits on what one request may read by URI.

    Attributes:
        take: called with the number of bytes read; raises TooMany when the server's limit is reached.
        most: bytes of all images of the request together.
        until: monotonic time in seconds at which reading stops.
        ended: set when nobody waits for the images any more.
    """

    take: Callable[[int], None]
    most: int
    until: float
    ended: threading.Event


async def uploaded(form: FormData, max_image_bytes: int) -> Wanted:
    """Reads a request from a multipart form.

    Raises:
        Mistake: a part has an unknown name or value.
    """
    unknown = sorted({name for name, _ in form.multi_items()} - FORM_FIELDS)
    if unknown:
        raise Mistake(f"{unknown[0][:100]!r}: unknown part. Known: {', '.join(sorted(FORM_FIELDS))}.")
    files = form.getlist("images")
    if not files:
        raise Mistake("images: send at least one part with this name and a file.")
    if not all(isinstance(file, UploadFile) for file in files):
        raise Mistake("images: a part with this name is not a file. Give it a filename.")
    category = _text(form, "category", "") or None
    members = []
    for number, file in enumerate(files):
        assert isinstance(file, UploadFile)
        name = (file.filename or f"image-{number}")[:NAME_LETTERS]
        if (file.size or 0) > max_image_bytes:
            members.append(_bad(name, "too_many_bytes", f"more than {max_image_bytes:,} bytes.", category))
            continue
        members.append(Member(name, name, data=await file.read(), category=category))
    return Wanted(members, _heatmaps(form), _flag(form, "store_heatmaps"))


def named(body: ScoreRequest, allowed: Prefixes, fetcher: Fetcher, budget: Budget) -> Wanted:
    """Reads the images that a JSON body names.

    Raises:
        NotAllowed: a URI is outside the allowed prefixes.
        Busy: the server's byte limit is reached, or the request timed out.
        Mistake: the images together exceed the body limit.
    """
    uris = [allowed.check(image.uri, "images") for image in body.images]
    members, left = [], budget.most
    for image, uri in zip(body.images, uris, strict=True):
        if time.monotonic() > budget.until or budget.ended.is_set():
            raise Busy("the images took too long to read. Try again.")
        try:
            data = fetcher.read(uri)
            left -= len(data)
            if left < 0:
                raise Mistake(f"images: together they have more than {budget.most:,} bytes. Send fewer at a time.")
            budget.take(len(data))
            members.append(Member(image.uri, uri, data=data, category=image.category))
        except MemberError as error:
            members.append(_bad(image.uri, error.status, str(error), image.category))
    return Wanted(members, body.heatmaps, body.store_heatmaps)


def score_of(answer: Answer, heatmaps_uri: str | None, storage: Storage) -> Score:
    """Converts one answer to a response entry; stores its heatmap if a folder is given.

    Raises:
        StorageError: the heatmap cannot be written.
    """
    row, png, stored = answer.row, answer.heatmap, None
    if png is not None and heatmaps_uri is not None:
        stored = join_uri(heatmaps_uri, row.artifact[:16], f"{hashlib.sha256(png).hexdigest()}.png")
        storage.write(stored, png)
    inline = None if png is None or stored is not None else base64.b64encode(png).decode()
    return Score(
        name=row.key,
        status=row.status,
        error=LIMITS.sub(r"limits.\1", row.error.removeprefix(f"{row.key}: ")),
        width=row.width,
        height=row.height,
        image_score=row.image_score,
        p_value=row.p_value,
        threshold=row.threshold,
        flagged=row.flagged,
        artifact=row.artifact,
        category=row.category,
        heatmap_png=inline,
        heatmap_uri=stored,
        note=row.note,
        regions=None
        if row.regions is None
        else [FoundRegion.model_validate(r, from_attributes=True) for r in row.regions],
        regions_left_out=row.regions_left_out,
    )


def _bad(name: str, status: str, error: str, category: str | None) -> Member:
    return Member(name, name, status=status, error=f"{name}: {error}", category=category)


def _heatmaps(form: FormData) -> Heatmaps:
    text = _text(form, "heatmaps", "none")
    for known in ("none", "flagged", "all"):
        if text == known:
            return known
    raise Mistake(f"heatmaps: {text[:100]!r} is unknown. Known: none, flagged, all.")


def _flag(form: FormData, name: str) -> bool:
    text = _text(form, name, "false")
    if text not in ("true", "false"):
        raise Mistake(f"{name}: {text[:100]!r} is unknown. Known: true, false.")
    return text == "true"


def _text(form: FormData, name: str, default: str) -> str:
    values = form.getlist(name)
    if len(values) > 1 or any(not isinstance(value, str) for value in values):
        raise Mistake(f"{name}: send one text part with this name.")
    return str(values[0]) if values else default
