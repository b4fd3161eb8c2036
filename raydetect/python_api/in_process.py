"""Fits and scores images given in Python with the code that jobs use: the same images give bit-identical results."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from pydantic import ConfigDict, Field

from raydetect.artifacts.fit_preprocess import fit_preprocess
from raydetect.blocks.coresets.group import Group
from raydetect.config import FitSpec, StorageOptions
from raydetect.config.shared import BATCH_SIZE
from raydetect.config.validation import STRICT, validate
from raydetect.errors import SpecError
from raydetect.fitting.fit_run import FitRun, Fitted, ProgressCallback
from raydetect.fitting.image_cache import ImageCache
from raydetect.fitting.reading.counts import ReadFacts
from raydetect.fitting.timings import Phases, torch_threads
from raydetect.fitting.worker import read_auxiliary
from raydetect.images.decode import Pixels
from raydetect.local.jobs import read_source
from raydetect.progress.displays import shown
from raydetect.python_api.inputs import BadImagesError, InputImage, decode_inputs
from raydetect.records import Member
from raydetect.scoring.batches import Scored, score_batches
from raydetect.storage import Storage
from raydetect.views.hints import hints
from raydetect.views.windows import Input

WHERE = "fit(images)"
SHOW_AFTER_SECONDS = 2.0
SINGLY = 4  # images that take less time one by one than in a padded batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings for running a model in Python; none of them belongs to the algorithm."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:NUMBER")] = "cpu"
    threads: Annotated[int | None, Field(ge=1, description="CPU threads; none = torch's current number")] = None
    batch_size: Annotated[
        int | None,
        Field(
            ge=1,
            description="images in one forward pass when collecting and scoring; none = 16, and 1 for calls that score "
            "up to four images",
        ),
    ] = None
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

    @property
    def fit_batch_size(self) -> int:
        """Images in one forward pass of a fit."""
        return self.batch_size or BATCH_SIZE

    def score_batch_size(self, fitted: Fitted, images: int) -> int:
        """Images in one forward pass when scoring; batches are padded to it, so few images are scored singly."""
        if self.batch_size is not None:
            return self.batch_size
        return 1 if images <= SINGLY and fitted.preprocess.view.spec.tile is None else BATCH_SIZE


@contextmanager
def running(threads: int, progress: bool) -> Iterator[ProgressCallback]:
    """Yields a progress callback while torch uses `threads` threads; steps of more than two seconds are shown."""
    with torch_threads(threads), shown(progress, SHOW_AFTER_SECONDS) as on_progress:
        yield on_progress


def fit_inputs(spec: FitSpec, inputs: list[InputImage], device: torch.device, on_progress: ProgressCallback) -> Fitted:
    """Fits in this process; writes nothing.

    Raises:
        SpecError: too few images, or the detector does not support what the job asks for.
        BadImagesError: images cannot be read; the error lists all of them.
    """
    preprocess = fit_preprocess(spec)
    phases = Phases()
    with phases.phase("read"):
        cache, sizes = ImageCache(preprocess), Counter[tuple[int, int]]()
        decoded = decode_inputs(inputs, preprocess, Storage(spec.storage), spec.resources.cpus_per_worker)
        for image in inputs:
            pixels = cache.add_decoded(Member(image.key, image.key, label=image.label), decoded)
            sizes[pixels.width or 0, pixels.height or 0] += 1
            on_progress("read images", 1, len(inputs))
        auxiliary = None
        if spec.auxiliary is not None:
            auxiliary = read_auxiliary(spec, read_source(spec, spec.auxiliary), Group(), on_progress)
    read = ReadFacts(hints=tuple(hints(sizes, preprocess.view, preprocess.image_size)))
    return FitRun(spec, None, Group(), cache, None, on_progress, device, WHERE, phases, auxiliary).fit(read)


def score_inputs(
    fitted: Fitted, inputs: list[InputImage], settings: Settings, on_progress: ProgressCallback
) -> Iterator[tuple[Scored, tuple[int, int]]]:
    """Yields the score and map of every image in order, with the image's original (height, width).

    Raises:
        BadImagesError: after the last image, if some cannot be read or have no finite score; the error lists them.
    """
    sizes: list[tuple[int, int]] = []
    bad: list[tuple[int, str, str]] = []
    batch_size = settings.score_batch_size(fitted, len(inputs))
    for scored in score_batches(fitted.detector, _noted(fitted, inputs, settings, sizes), batch_size):
        on_progress("score images", 1, len(inputs))
        if scored.is_finite:
            yield scored, sizes[scored.position]
        else:
            key = inputs[scored.position].key
            bad.append((scored.position, key, f"{key}: the detector returned a score or map that is not finite."))
    if bad:
        raise BadImagesError(bad, len(inputs))


def _noted(
    fitted: Fitted, inputs: list[InputImage], settings: Settings, sizes: list[tuple[int, int]]
) -> Iterator[Input | Pixels]:
    """Yields what is decoded unchanged and appends the original size of every image to `sizes`."""
    storage = Storage(settings.storage)
    for item in decode_inputs(inputs, fitted.preprocess, storage, settings.num_threads):
        if isinstance(item, Pixels):
            sizes.append((item.height or 0, item.width or 0))
        yield item
