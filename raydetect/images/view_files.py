"""Reads the files that a view names: the mask of its region, and the picture to align to."""

import io

from PIL import Image

from raydetect.config import ViewSpec
from raydetect.errors import MemberError, SpecError
from raydetect.images.masks.decoding import mask_pixels
from raydetect.images.opening import DecodeRules, Loaded, loaded_image
from raydetect.images.rasters.in_memory import of_view
from raydetect.images.rasters.opening import raster_for_windows
from raydetect.views.align import Alignment, reference_png, shrunk
from raydetect.views.region import MAX_SIDE_PX, Region
from raydetect.views.windows import grey_of

MAX_BYTES = 1 << 20  # of a mask's PNG in the record of an artifact
RULES = DecodeRules(MAX_SIDE_PX**2, True)


def region_of_mask(data: bytes, place: str) -> Region:
    """Reads a mask by the rules of defect masks: what counts there as a defect is looked at.

    Raises:
        SpecError: it is no mask, is empty or is too large.
    """
    try:
        looked_HW = mask_pixels(data, RULES)
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


def alignment_of(data: bytes, place: str, spec: ViewSpec) -> Alignment:
    """Reads the picture that others are aligned to; its EXIF orientation is applied.

    Args:
        data: the file.
        place: its URI, for messages.
        spec: the view, whose bands and range it is read by.

    Raises:
        SpecError: it is no picture, or shows nothing by which a shift could be told.
    """
    try:
        raster = raster_for_windows(data, RULES, spec)
        with loaded_image(data, RULES) if raster is None else raster.opened() as loaded:
            seen = of_view(loaded, data, spec) if isinstance(loaded, Loaded) else loaded
            png = reference_png(grey_of(seen.upright(), seen.size, shrunk(seen.size)))
    except MemberError as error:
        raise SpecError(f"view.align_to: {place} is not a picture ({error}).") from None
    except ValueError as error:
        raise SpecError(f"view.align_to: {place} {error}. Name a picture in which the part is clear to see.") from None
    return Alignment(png, spec.align_max)
