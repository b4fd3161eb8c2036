"""Decoded images of other categories, without the packages that archives need."""

from raydetect.fitting.image_cache import CachedImage, ImageCache
from raydetect.fitting.reading.auxiliary import AuxiliaryImages
from raydetect.fitting.reading.counts import ReadFacts
from raydetect.images.preprocess import Preprocess
from tests.builders.images import normal_image


def other_images(count: int, size_px: int) -> AuxiliaryImages:
    """Decoded normal images of two other categories."""
    cache = ImageCache(Preprocess((size_px, size_px)))
    for i in range(count):
        image = normal_image(70_000 + i, size_px)
        category, pixels = ("inverted", 255 - image) if i % 2 else ("turned", image.transpose(1, 0, 2))
        cache.add(CachedImage(f"{category}-{i:03d}", 0, category), pixels)
    return AuxiliaryImages(cache, ReadFacts())
