"""Fits and scores images given in Python with the code that jobs use: the same images give bit-identical results."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from PIL import Image
from pydantic import ConfigDict, Field

from raydetect.blocks.group import Group
from raydetect.config import STRICT, validate
from raydetect.detectors._base import Detector
from raydetect.detectors._registry import build_from
from raydetect.errors import SpecError
from raydetect.spec import FitSpec, StorageOptions
from raydetect.storage import Storage
from raydetect.worker.cache import CachedImage, ImageCache, ReadFacts
from raydetect.worker.given import BadImagesError, GivenImage, decode_given
from raydetect.worker.one_fit import Fitted, OneFit, Tick
from raydetect.worker.phases import Phases
from raydetect.worker.preprocess import Pixels
from raydetect.worker.score import Scored, score_batches

WHERE = "fit(images)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings for running a model in Python; none of them belongs to the algorithm."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:NUMBER")] = "cpu"
    threads: Annotated[int | None, Field(ge=1, description="CPU threads; none = torch's current number")] = None
    batch_size: Annotated[int, Field(ge=1, description="images in one forward pass when collecting and scoring")] = 16
    storage: Annotated[StorageOptions, Field(description="options for accessing URIs, as in a job file")] = field(
        default_factory=StorageOptions
    )

    def changed(self, values: dict[str, Any]) -> "Settings":
        """A copy with some settings changed.

        Raises:
            SpecError: a setting is unknown or invalid, or there is no GPU.
        """
        kept = {name: getattr(self, name) for name in self.__slots__ if name not in values}
        settings = validate(Settings, {**kept, **values}, "settings")
        if settings.device != "cpu" and not torch.cuda.is_available():
            raise SpecError(f"device: torch sees no GPU here for {settings.device!r}. Use device='cpu'.")
        return settings

    @property
    def num_threads(self) -> int:
        """CPU threads to use."""
        return self.threads or torch.get_num_threads()


def fit_given(spec: FitSpec, given: list[GivenImage], device: torch.device, tick: Tick) -> Fitted:
    """Fits in this process; writes nothing.

    Raises:
        SpecError: too few images, or the detector does not support what the job asks for.
        BadImagesError: images cannot be read; the error lists all of them.
    """
    image_size = build_from(spec.detector, spec.seed).params.image_size
    phases = Phases()
    with phases.phase("read"):
        cache = ImageCache(image_size)
        for image, pixels in decode_given(given, image_size, Storage(spec.storage), spec.resources.cpus_per_worker):
            assert pixels.image_HWC is not None
            cache.add(CachedImage(image.key, image.label, None), pixels.image_HWC)
            tick("read", 1, len(given))
    return OneFit(spec, None, Group(), cache, None, tick, device, WHERE, phases).fit(ReadFacts())


def score_given(
    detector: Detector, given: list[GivenImage], settings: Settings, tick: Tick
) -> Iterator[tuple[Scored, tuple[int, int]]]:
    """Yields the score and map of every image in order, with the image's original (height, width).

    Raises:
        BadImagesError: after the last image, if some cannot be read or have no finite score; the error lists them.
    """
    sizes: list[tuple[int, int]] = []
    bad: list[tuple[int, str, str]] = []
    for scored in score_batches(detector, _pixels(detector, given, settings, sizes), settings.batch_size):
        tick("score", 1, len(given))
        if math.isfinite(scored.image_score) and np.isfinite(scored.anomaly_map_HW).all():
            yield scored, sizes[scored.position]
        else:
            key = given[scored.position].key
            bad.append((scored.position, key, f"{key}: the detector returned a score or map that is not finite."))
    if bad:
        raise BadImagesError(bad, len(given))


def _pixels(
    detector: Detector, given: list[GivenImage], settings: Settings, sizes: list[tuple[int, int]]
) -> Iterator[Pixels]:
    """Yields the pixels of every image and appends its original size to `sizes`."""
    image_size, storage = detector.params.image_size, Storage(settings.storage)
    for _, pixels in decode_given(given, image_size, storage, settings.num_threads):
        sizes.append((pixels.height or 0, pixels.width or 0))
        yield pixels


def resized(anomaly_map_HW: np.ndarray, size_px: tuple[int, int]) -> np.ndarray:
    """Resizes a map to (height, width) by antialiased bilinear interpolation, as images are; no-op for equal sizes."""
    if anomaly_map_HW.shape == size_px:
        return anomaly_map_HW
    image = Image.fromarray(anomaly_map_HW.astype(np.float32))
    return np.asarray(image.resize(size_px[::-1], Image.Resampling.BILINEAR))
