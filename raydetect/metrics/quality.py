"""Mergeable summaries of a labelled archive by category and defect, from which evaluation computes its metrics.

Memory is bounded by the number of categories and defects, not of images: see `score_bins`. Image scores are exact up to
IMAGE_BINS distinct ones in each group. For the intervals of pixel metrics, images are assigned by a hash of their key
to BLOCKS blocks with coarse histograms of their own, which are resampled instead of images.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from raydetect.metrics.pixels import COLUMNS, pixels_of
from raydetect.metrics.score_bins import ScoreBins, ScoreBinsBuilder

IMAGE_BINS, PIXEL_BINS, BLOCK_BINS, BLOCKS = 1 << 18, 1 << 16, 1 << 11, 16


@dataclass(frozen=True, slots=True, order=True)
class ImageGroup:
    """Images of one category, label and kind of defect; "" where the archive gives none."""

    category: str
    label: int
    defect: str


@dataclass(slots=True)
class Summary:
    """Summary of one group: image scores, pixels, pixels by block, and number of images without a known mask."""

    images: ScoreBinsBuilder = field(default_factory=lambda: ScoreBinsBuilder(IMAGE_BINS))
    pixels: ScoreBinsBuilder = field(default_factory=lambda: ScoreBinsBuilder(PIXEL_BINS, COLUMNS))
    blocks: dict[int, ScoreBinsBuilder] = field(default_factory=dict)
    without_mask: int = 0

    def add(self, key: str, image: ScoreBins, pixels: ScoreBins | None) -> None:
        """Adds one image."""
        self.images.add(image)
        if pixels is not None:
            self.pixels.add(pixels)
            block = zlib.crc32(key.encode(errors="surrogateescape")) % BLOCKS
            self.blocks.setdefault(block, ScoreBinsBuilder(BLOCK_BINS, COLUMNS)).add(pixels)

    def take(self, other: "Summary") -> None:
        """Adds another summary; the order does not matter."""
        self.images.add(other.images.whole())
        self.pixels.add(other.pixels.whole())
        for number, block in other.blocks.items():
            self.blocks.setdefault(number, ScoreBinsBuilder(BLOCK_BINS, COLUMNS)).add(block.whole())
        self.without_mask += other.without_mask


@dataclass(slots=True)
class Quality:
    """Summaries of all groups."""

    groups: dict[ImageGroup, Summary] = field(default_factory=dict)

    def add(
        self,
        group: ImageGroup,
        key: str,
        image_score: float,
        map_HW: np.ndarray | None,
        mask_HW: np.ndarray | None,
        looked_HW: np.ndarray | None = None,
    ) -> None:
        """Adds one image.

        Args:
            group: the image's group.
            key: of the image; determines its block.
            image_score: raw.
            map_HW: anomaly map, None if pixels are not evaluated.
            mask_HW: of the map's size, None if unknown.
            looked_HW: the pixels that count; None = all.

        Raises:
            ValueError: a score or value is not finite, or the sizes differ.
        """
        image = ScoreBins.of(np.asarray([image_score]), IMAGE_BINS)
        pixels = None
        if map_HW is not None and mask_HW is not None:
            pixels = pixels_of(map_HW, mask_HW, PIXEL_BINS, looked_HW)
        summary = self.groups.setdefault(group, Summary())
        summary.add(key, image, pixels)
        summary.without_mask += map_HW is not None and mask_HW is None

    def merge(self, other: "Quality") -> "Quality":
        """Merges both into a new object; the order does not matter."""
        both = Quality()
        for part in (self, other):
            for group, summary in part.groups.items():
                both.groups.setdefault(group, Summary()).take(summary)
        return both

    @property
    def categories(self) -> list[str]:
        """Names of the categories, sorted."""
        return sorted({group.category for group in self.groups})

    def of(self, category: str, defect: str | None = None) -> "Quality":
        """The groups of a category; with `defect`, those of that defect and of all normal images."""
        return Quality(
            {
                group: summary
                for group, summary in self.groups.items()
                if group.category == category and (defect is None or group.label == 0 or group.defect == defect)
            }
        )

    def defects(self, category: str) -> list[str]:
        """Kinds of defect of a category, sorted."""
        return sorted({g.defect for g in self.groups if g.category == category and g.label == 1 and g.defect})

    def summaries(self, label: int | None = None) -> list[Summary]:
        """Summaries of one label or all, in order of their groups."""
        return [self.groups[group] for group in sorted(self.groups) if label is None or group.label == label]


def counted(quality: Quality) -> Mapping[str, int]:
    """Number of images of each label, and number without a mask."""
    return {
        "normal": sum(s.images.whole().total for s in quality.summaries(0)),
        "anomalous": sum(s.images.whole().total for s in quality.summaries(1)),
        "without_mask": sum(s.without_mask for s in quality.summaries()),
    }
