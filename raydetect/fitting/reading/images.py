"""Decodes the images of a fit into a cache, with the masks of their defects if a training needs them."""

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

from raydetect.artifacts.fit_preprocess import FitRules
from raydetect.config import SourceSpec
from raydetect.fitting.image_cache import ImageCache
from raydetect.fitting.reading.counts import ReadImages
from raydetect.images.decode import DecodePool, Pixels, decode_stream
from raydetect.images.masks.reading import MaskError, Masks, read_mask
from raydetect.images.opening import DecodeRules
from raydetect.images.preprocess import Preprocess
from raydetect.records import Chunk, Member
from raydetect.storage import Storage
from raydetect.views.view import Layout


def read_images(
    chunks: Iterable[Chunk],
    source: SourceSpec,
    rules: FitRules,
    threads: int,
    on_progress: Callable[[int], None],
    masks: Storage | None = None,
) -> tuple[ImageCache, ReadImages]:
    """Decodes all images of the chunks into a cache.

    Args:
        chunks: encoded images.
        source: settings of the source.
        rules: decoding rules of the fit.
        threads: number of decoding threads.
        on_progress: called with the number of images of each chunk.
        masks: gives access to the masks of defects, which are then kept too; None = they are not.

    Raises:
        BadMemberError: an image is bad and `on_bad_member` is `fail`.
        SpecError: a category has no region mask although the fit needs one.
        MaskError: masks are kept, and one of an anomalous image is missing or cannot be used.
    """
    cache, counts = ImageCache(rules.common, rules.of, has_masks=masks is not None), ReadImages()
    decode_rules = DecodeRules.of(source)
    mask_of = None if masks is None else partial(_mask_of, Masks(masks, decode_rules, source.max_image_bytes))
    with DecodePool(threads) as pool:
        for chunk in chunks:
            counts.note_chunk(chunk)
            groups: dict[Preprocess, list[Member]] = {}
            for member in chunk.members:
                groups.setdefault(rules.of(member.category), []).append(member)
            for preprocess, members in groups.items():
                decoded = decode_stream(members, decode_rules, preprocess, pool)
                for member in members:
                    if mask_of is None:
                        pixels = cache.add_decoded(member, decoded)
                    else:
                        pixels = cache.add_masked(member, decoded, mask_of)
                    counts.note(member, pixels, source)
            on_progress(len(chunk.members))
    return cache, counts


def _mask_of(masks: Masks, member: Member, layout: Layout, pixels: Pixels) -> np.ndarray:
    """The pixels of defects on the canvas of an image; none for an image that is not labelled anomalous."""
    if member.label == 1 and member.mask_uri is None:
        raise MaskError(
            f"{member.key}: is anomalous and has no mask. Add one, name it by mask_pattern, or leave the image out."
        )
    mask_HW = read_mask(member, layout, pixels, masks) if member.label == 1 else None
    return np.zeros(layout.canvas, bool) if mask_HW is None else mask_HW
