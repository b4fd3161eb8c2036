"""Evaluates a fitted model on labelled images and masks given in Python, with the code of evaluation jobs."""

import io
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from raydetect.config import SourceSpec
from raydetect.errors import SpecError
from raydetect.evaluation.labelled_images import EvaluationOutcome, evaluate_decoded
from raydetect.fitting.fit_run import Fitted, ProgressCallback
from raydetect.images.decode import Pixels
from raydetect.images.masks.reading import Masks
from raydetect.metrics.figures import image_figures, pixel_figures
from raydetect.metrics.quality import Quality
from raydetect.python_api.in_process import Settings
from raydetect.python_api.inputs import RULES, InputImage, decode_inputs, netpbm
from raydetect.records import Member
from raydetect.storage import Storage, normalise_uri
from raydetect.views.windows import Input

KINDS = "an array (N, H, W), or a list of arrays (H, W), of paths, URIs or PIL images, and None where it is unknown"


class GivenMasks(Masks):
    """Reads the masks that were given, by their position.

    Attributes:
        uris: of every image that of its mask; None = unknown.
    """

    def __init__(self, masks: list[Any], storage: Storage) -> None:
        """Checks the masks' types; opens no file.

        Raises:
            SpecError: one is of another type.
        """
        super().__init__(storage, RULES, SourceSpec(uri="").max_image_bytes)
        self._in_memory: dict[str, Any] = {}
        self.uris = [self._uri(mask, position) for position, mask in enumerate(masks)]

    def _uri(self, mask: Any, position: int) -> str | None:
        if mask is None:
            return None
        if isinstance(mask, str | os.PathLike):
            return normalise_uri(os.fspath(mask))
        is_array = isinstance(mask, np.ndarray) and mask.ndim == 2 and mask.dtype.kind in "buif" and mask.size
        if not is_array and not isinstance(mask, Image.Image):
            shape = f" with shape {mask.shape}" if isinstance(mask, np.ndarray) else ""
            raise SpecError(f"masks[{position}]: is of type {type(mask).__name__}{shape}. Give {KINDS}.")
        uri = f"mask#{position:06d}"
        self._in_memory[uri] = mask
        return uri

    def _read(self, uri: str) -> bytes:
        mask = self._in_memory.get(uri)
        if mask is None:
            return super()._read(uri)
        if isinstance(mask, np.ndarray):
            return netpbm(np.where(mask != 0, 255, 0).astype(np.uint8))
        buffer = io.BytesIO()
        mask.save(buffer, "PNG")
        return buffer.getvalue()


def given_masks(masks: Any, count: int, storage: Storage) -> GivenMasks:
    """The masks of `count` images.

    Raises:
        SpecError: they are of other types, or their number differs.
    """
    try:
        found = list(masks)
    except TypeError:
        raise SpecError(f"masks: is of type {type(masks).__name__}. Give {KINDS}.") from None
    if isinstance(masks, str | bytes) or len(found) != count:
        number = "one" if isinstance(masks, str | bytes) else f"{len(found)}"
        raise SpecError(f"masks: {number} for {count} images. Give one for each, None where it is unknown.")
    return GivenMasks(found, storage)


def measured(
    fitted: Fitted,
    inputs: list[InputImage],
    masks: GivenMasks | None,
    settings: Settings,
    on_progress: ProgressCallback,
) -> dict[str, float]:
    """The metrics by name; those of pixels only with masks.

    Raises:
        SpecError: a label is missing.
        MaskError: a mask cannot be used.
        BadImagesError: images cannot be read; the error lists them.
    """
    uris = [None] * len(inputs) if masks is None else masks.uris
    members = [Member(i.key, i.key, label=i.label, mask_uri=uri) for i, uri in zip(inputs, uris, strict=True)]
    found = EvaluationOutcome(Quality())
    decoded = _counted(
        decode_inputs(inputs, fitted.preprocess, Storage(settings.storage), settings.num_threads),
        len(inputs),
        on_progress,
    )
    batch_size = settings.score_batch_size(fitted, len(inputs))
    try:
        evaluate_decoded(fitted.detector, members, decoded, found, masks, batch_size)
        figures = {**image_figures(found.quality, 0, 0), **pixel_figures(found.quality, 0, 0)}
    except ValueError as error:
        raise SpecError(f"evaluate: {error}") from None
    return {name: figure.estimate.value for name, figure in figures.items()}


def _counted(decoded: Iterator[Input | Pixels], total: int, on_progress: ProgressCallback) -> Iterator[Input | Pixels]:
    for item in decoded:
        if isinstance(item, Pixels):
            on_progress("evaluate", 1, total)
        yield item
