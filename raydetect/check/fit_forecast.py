"""Forecasts how long a fit will take, by fitting on a few of its images and measuring each phase."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice

import torch

from raydetect.archives.open import open_archive
from raydetect.artifacts.fit_preprocess import FitRules
from raydetect.blocks.coresets.group import Group
from raydetect.check.bank_forecast import BankForecast, extrapolated
from raydetect.config import HOLDOUT_RATIO, FitSpec, source_storage
from raydetect.detectors._base import Detector
from raydetect.detectors._ensemble import learns_from_labels, parts
from raydetect.detectors._registry import build_from
from raydetect.errors import SpecError
from raydetect.fitting.calibrate import calibrate
from raydetect.fitting.holdout import crosses
from raydetect.fitting.image_cache import ImageCache
from raydetect.fitting.reading.images import read_images
from raydetect.fitting.timings import torch_threads
from raydetect.fitting.train import Trainer
from raydetect.planning.sampling import count_images
from raydetect.records import Chunk, Member
from raydetect.storage import Storage

MEASURED_IMAGES = 32


@dataclass(frozen=True, slots=True)
class FitForecast:
    """The forecast of a fit.

    Attributes:
        images: of the source.
        images_from: how their number was determined.
        inputs: of the network; more than the images if the view has tiles.
        measured: images that were read to measure the phases.
        seconds: of each phase for one worker like this machine, without the start of Ray and of workers.
        method: how the fit calibrates, `cross` or `holdout`.
    """

    images: int
    images_from: str
    inputs: int
    measured: int
    seconds: dict[str, float]
    method: str

    def total(self, num_workers: int) -> float:
        """Seconds for a number of workers, which share all phases but the loading of weights."""
        alone = self.seconds["load weights"]
        return alone + (sum(self.seconds.values()) - alone) / num_workers


def forecast_fit(spec: FitSpec) -> FitForecast:
    """Reads some images of the source, fits on them, and extrapolates to all.

    Reading, collecting, training and calibrating take as long for every image. The time of a memory bank has a part
    that grows with the number of rows and one that grows with its square, measured by banks of growing size.

    Raises:
        SpecError: the job cannot run as specified, or fits a fleet or extends an artifact.
    """
    if spec.per_category or spec.extend is not None:
        what = "per_category" if spec.per_category else "extend"
        raise SpecError(f"{what}: the time of such a fit is not forecast. Remove it to forecast a fit on all images.")
    if spec.auxiliary is not None:
        raise SpecError(
            "auxiliary: the time of a training on auxiliary images is not forecast. `raydetect fit` shows it."
        )
    archive = open_archive(spec.source, Storage(source_storage(spec, spec.source)))
    shards = archive.shards()
    images, how = count_images(archive, spec.source, tuple(shards))
    with torch_threads(spec.resources.cpus_per_worker):
        measuring = _Measuring(spec, images)
        measuring.read(member for shard in archive.shards() for member in archive.read(shard))
        return measuring.forecast(images, how)


class _Measuring:
    """A fit on a few images, phase by phase."""

    def __init__(self, spec: FitSpec, images: int) -> None:
        self.spec, self.images = spec, images
        self.seconds: dict[str, float] = {}
        self.device = torch.device("cuda" if spec.resources.gpus_per_worker else "cpu")
        self.detector = build_from(spec.detector, spec.seed)
        self.seconds["load weights"] = self._timed(self.detector.load_weights)
        self.detector.to(self.device)
        self.cache: ImageCache

    def read(self, members: Iterable[Member]) -> None:
        """Reads and decodes the first images.

        Raises:
            SpecError: fewer than two of them can be used.
        """
        chunk = Chunk(0, 0, True, tuple(islice(members, MEASURED_IMAGES)))

        def decode() -> None:
            threads = self.spec.resources.cpus_per_worker
            self.cache, _ = read_images([chunk], self.spec.source, FitRules(self.spec), threads, lambda _: None)

        began = time.perf_counter()
        decode()
        self.num_read = len({image.image_key for image in self.cache.images.values()})
        if self.num_read < 2:
            raise SpecError(
                f"source: {self.num_read} of the first {len(chunk.members)} images can be used, too few to measure a "
                "fit. `raydetect check` says why."
            )
        self._add("read", (time.perf_counter() - began) / self.num_read * self.images)
        if learns_from_labels(self.detector):  # labels take no time, but a training needs both
            for number, (key, image) in enumerate(self.cache.images.items()):
                self.cache.images[key] = replace(image, label=number % 2)

    def forecast(self, images: int, how: str) -> FitForecast:
        """Measures the other phases."""
        folds = self.spec.calibration.folds if crosses(self.spec, self.detector, images) else 0
        grown = images / self.num_read
        for _, part in parts(self.detector):
            for phase in part.phases:
                if phase == "collect":
                    self._collect(part, grown, folds)
                else:
                    self._train(part, grown)
        if len(parts(self.detector)) == 1:  # an ensemble is scored by its members
            self._calibrate(self.detector, folds)
        else:
            for _, part in parts(self.detector):
                self._calibrate(part, folds)
        inputs = round(len(self.cache.images) * grown)
        return FitForecast(images, how, inputs, self.num_read, self.seconds, "cross" if folds else "holdout")

    def _collect(self, part: Detector, grown: float, folds: int) -> None:
        keys = sorted(key for key, image in self.cache.images.items() if image.label != 1)
        most = part.num_collected()
        wanted = max(1, round(len(self.cache.images) * grown * (1 if most is None else min(1, most / self.images))))
        bank = BankForecast(part, self.cache, keys, self.spec.batch_size)
        self._add("collect", bank.seconds_per_input * wanted)
        measured = bank.measure(wanted, self.spec.max_bank_bytes)
        self._add("memory bank", extrapolated(measured, wanted))
        if folds:
            self._add("memory banks for calibration", extrapolated(measured, wanted * (1 - 1 / folds)) * folds)

    def _train(self, part: Detector, grown: float) -> None:
        trainer = Trainer(part, self.cache, sorted(self.cache.images), Group())
        per_image, epochs = trainer.measure(round(len(self.cache.images) * grown), self._timed)
        self._add("train", per_image * epochs * len(self.cache.images) * grown)

    def _calibrate(self, detector: Detector, folds: int) -> None:
        keys = sorted({image.image_key for image in self.cache.images.values()})
        ratio = self.spec.calibration.holdout_ratio or HOLDOUT_RATIO
        scored = self.images if folds else max(1, math.ceil(ratio * self.images))

        def score() -> None:
            calibrate(detector, self.cache, [keys], self.spec.batch_size, Group(), lambda _: None)

        self._add("calibrate", self._timed(score) / len(keys) * scored)

    def _add(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def _timed(self, work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began
