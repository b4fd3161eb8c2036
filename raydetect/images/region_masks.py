"""Reads the region of a view from a mask file."""

import io

from PIL import Image

from raydetect.errors import MemberError, SpecError
from raydetect.images.masks import mask_pixels
from raydetect.images.opening import DecodeRules
from raydetect.views.region import MAX_SIDE_PX, Region

MAX_BYTES = 1 << 20  # of its PNG in the record of an artifact


def region_of_mask(data: bytes, place: str) -> Region:
    """Reads a mask by the rules of defect masks: what counts there as a defect is looked at.

    Raises:
        SpecError: it is no mask, is empty or is too large.
    """
    try:
        looked_HW = mask_pixels(data, DecodeRules(MAX_SIDE_PX**2, True))
    except MemberError as error:
        raise SpecError(f"view.region: {place} is not a mask ({error}).") from None
    if not looked_HW.any():
        raise SpecError(f"view.region: {place} is black everywhere. Paint white where to look.")
    buffer = io.BytesIO()
    Image.fromarray(looked_HW).save(buffer, "PNG", optimize=True)
    if max(looked_HW.shape) > MAX_SIDE_PX or buffer.tell() > MAX_BYTES:
        raise SpecError(
            f"view.region: {place} has {looked_HW.shape[1]} x {looked_HW.shape[0]} px and {buffer.tell():,} bytes as "
            f"PNG; at most {MAX_SIDE_PX:,} px per side and {MAX_BYTES:,} bytes. Save it smaller: it is fitted to every "
            "picture."
        )
    return Region(png=buffer.getvalue())
