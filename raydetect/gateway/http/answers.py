"""Images of a request to members, and rows to answers."""

import base64
import hashlib
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
from raydetect.gateway.http.schemas import Score, ScoreRequest
from raydetect.records import Answer, Member
from raydetect.storage import Storage, join_uri

FORM_FIELDS = {"images", "heatmaps", "store_heatmaps", "category"}
NAME_LETTERS = 200


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request for scores, however it was sent."""

    members: Sequence[Member]
    heatmaps: Heatmaps
    store: bool


@dataclass(frozen=True, slots=True)
class Budget:
    """What one request may read by URI.

    Attributes:
        take: told of bytes that are held from now on; raises TooMany when there is no room.
        most: bytes of all its images together.
        until: monotonic time in seconds after which nobody waits for them.
    """

    take: Callable[[int], None]
    most: int
    until: float


async def uploaded(form: FormData, max_image_bytes: int) -> Wanted:
    """The request of a multipart form.

    Raises:
        Mistake: a part has a name or value that is not known.
    """
    unknown = sorted({name for name, _ in form.multi_items()} - FORM_FIELDS)
    if unknown:
        raise Mistake(f"{unknown[0][:100]!r}: unknown part. Known: {', '.join(sorted(FORM_FIELDS))}.")
    files = form.getlist("images")
    if not files:
        raise Mistake("images: send at least one part of this name, with a file.")
    if not all(isinstance(file, UploadFile) for file in files):
        raise Mistake("images: a part of this name holds no file. Give it a filename.")
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
    """The request of a JSON body; reads its images.

    Raises:
        NotAllowed: a URI outside of what may be read.
        Busy: their bytes have no room, or the request was given up.
        Mistake: together they have more bytes than a body may have.
    """
    uris = [allowed.check(image.uri, "images") for image in body.images]
    members, left = [], budget.most
    for image, uri in zip(body.images, uris, strict=True):
        if time.monotonic() > budget.until:
            raise Busy("the images took too long to read. Try again.")
        try:
            data = fetcher.read(uri)
            left -= len(data)
            if left < 0:
                raise Mistake(f"images: together they have more than {budget.most:,} bytes. Name fewer at a time.")
            budget.take(len(data))
            members.append(Member(image.uri, uri, data=data, category=image.category))
        except MemberError as error:
            members.append(_bad(image.uri, error.status, str(error), image.category))
    return Wanted(members, body.heatmaps, body.store_heatmaps)


def score_of(answer: Answer, heatmaps_uri: str | None, storage: Storage) -> Score:
    """One image's entry; stores its heatmap when a folder is given.

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
        error=row.error.removeprefix(f"{row.key}: "),
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
        raise Mistake(f"{name}: send one part of text of this name.")
    return str(values[0]) if values else default
