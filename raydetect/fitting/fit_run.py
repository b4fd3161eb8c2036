"""Fits one detector on decoded images: hold out, collect or train, calibrate, write the artifact.

A collecting detector processes the images its worker has read; a trained one needs all images, which the workers
exchange. The result is the same for any number of workers.
"""

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any

import torch

from raydetect.artifacts.record import Calibration
from raydetect.artifacts.store import load_artifact, save_artifact, save_shared
from raydetect.blocks.coresets.group import Group
from raydetect.blocks.coresets.keyed_rows import FitState
from raydetect.config import HOLDOUT_RATIO, FitSpec, public_spec, result_settings
from raydetect.config.validation import differences, digest, to_plain
from raydetect.detectors._base import Detector
from raydetect.detectors._ensemble import Ensemble, learns_from_labels, parts
from raydetect.detectors._registry import build_from
from raydetect.errors import SpecError
from raydetect.fitting.calibrate import calibrate_each
from raydetect.fitting.checkpoints import Checkpoints
from raydetect.fitting.collect import collect
from raydetect.fitting.ensemble_scale import choose_scaling, set_scales
from raydetect.fitting.holdout import choose_folds, choose_holdout, choose_images, crosses, normal_keys
from raydetect.fitting.image_cache import CachedImage, ImageCache
from raydetect.fitting.reading.auxiliary import AuxiliaryImages, auxiliary_keys, require_auxiliary
from raydetect.fitting.reading.counts import ReadFacts
from raydetect.fitting.timings import Phases, measured_facts, merged_facts
from raydetect.fitting.train import Trainer
from raydetect.images.preprocess import Preprocess
from raydetect.records import FitReport
from raydetect.storage import Storage, join_uri, normalise_uri

ProgressCallback = Callable[[str, int, int | None], None]
"""Progress callback: phase name, increment, and the total over all workers (None if unknown).

The last word of the name is the unit that is counted, such as `collect images`.
"""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A fitted detector that has not been written yet.

    Attributes:
        detector: the fitted detector.
        calibrations: from held-out normal images, by category if each has its own; else one under None.
        preprocess: how its images were decoded.
        facts: other fields of the artifact's record.
        checkpoints: training checkpoints to delete once the artifact is committed.
        images: number of images by their use, of each category that has a calibration of its own.
    """

    detector: Detector
    calibrations: Mapping[str | None, Calibration]
    preprocess: Preprocess
    facts: Mapping[str, Any]
    checkpoints: tuple[Checkpoints, ...] = ()
    images: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def calibration(self) -> Calibration:
        """The only calibration."""
        return self.calibrations[None]


@dataclass(slots=True)
class FitRun:
    """The fit of one detector on decoded images.

    Attributes:
        spec: the job.
        uri: where the artifact is written; None = it is not written, and no training checkpoints are kept.
        group: the workers that fit the detector.
        cache: this worker's images.
        calibration_cache: images of the separate calibration archive; None = hold out a share of `cache`.
        on_progress: progress callback.
        device: torch device of this worker.
        where: the source, for messages.
        phases: measurements so far.
        auxiliary: images that train a detector instead of those of the source; None if it does not learn from any.
        crossed: from the fits that each left out some images; None before, and with held-out images.
        categories: names of all, sorted, if each gets a calibration of its own; () = all images together.
    """

    spec: FitSpec
    uri: str | None
    group: Group
    cache: ImageCache
    calibration_cache: ImageCache | None
    on_progress: ProgressCallback
    device: torch.device
    where: str
    phases: Phases
    auxiliary: AuxiliaryImages | None = None
    crossed: dict[str | None, Calibration] | None = None
    categories: tuple[str, ...] = ()

    def run(self, read: ReadFacts) -> FitReport | None:
        """Fits the detector; the first worker writes the artifact.

        Args:
            read: facts from reading the source, for the record.

        Returns:
            The report on the first worker, None on the others.

        Raises:
            SpecError: too few images, or the detector does not support what the job asks for.
        """
        assert self.uri is not None
        storage = Storage(self.spec.storage)
        if not self.group.rank:
            storage.require_writable(self.uri)
            storage.remove_leftovers(self.uri)
        fitted = self.fit(read)
        if self.group.rank:
            return None
        report = self._save(fitted, self.uri, storage)
        for checkpoints in fitted.checkpoints:
            checkpoints.clear()
        return report

    def _save(self, fitted: Fitted, uri: str, storage: Storage) -> FitReport:
        name, detector, facts = self.spec.detector.name, fitted.detector, fitted.facts
        if not self.categories:
            return FitReport(uri, save_artifact(uri, storage, name, detector, fitted.calibration, facts), facts)
        facts_of = {category: {**ReadFacts().plain(), "images": counts} for category, counts in fitted.images.items()}
        calibrations = {category: fitted.calibrations[category] for category in self.categories}
        artifact_digest = save_shared(uri, storage, name, detector, calibrations, facts, facts_of)
        return FitReport(uri, artifact_digest, {**facts, "categories": len(self.categories)})

    def fit(self, read: ReadFacts) -> Fitted:
        """Fits on every worker; writes nothing but training checkpoints.

        Raises:
            SpecError: too few images, or the detector does not support what the job asks for.
        """
        storage = Storage(self.spec.storage)
        detector, facts = self._detector(storage)
        require_auxiliary(self.spec, detector)
        detector.to(self.device)
        checkpoints: list[Checkpoints] = []
        with self.phases.phase("fit"):
            folds = self._folds(detector)
            held_out = self._held_out(folds)
            fit_keys = self._fit_keys([] if folds else held_out, learns_from_labels(detector))
            counts, counts_of = self._counts(fit_keys), self._counts_of_categories(fit_keys)
            self._require_labels(detector, fit_keys)
            trained = [
                self._run_phases(part, number, fit_keys, storage, checkpoints, not detector.scores_by_map, folds)
                for number, part in parts(detector)
            ]
        if isinstance(detector, Ensemble):
            with self.phases.phase("scale"):
                held_out = self._scale(detector, held_out, counts)
        with self.phases.phase("calibrate"):
            calibrations = self.crossed or self._calibrate(detector, [held_out], self._count(len(held_out)))
        sizes = {name: len(calibration.scores) for name, calibration in calibrations.items()}
        images_of = {name: {**counts_of[name], "held_out": sizes[name], "bad": 0} for name in self.categories}
        counts |= {"held_out": sum(sizes.values()), "bad": read.bad}
        if self.cache.preprocess.view.has_tiles:
            judged, images = set(held_out), self._calibration_images().images.values()
            counts["held_out_tiles"] = self._count(sum(image.image_key in judged for image in images))
        facts |= {
            **merged_facts(detector.facts(), trained),
            **measured_facts(self.spec, self.phases, self.group, counts),
            **read.plain(),
            "preprocess": self.cache.preprocess.recorded(),
        }
        if folds:
            facts["folds"] = len(folds)
        return Fitted(detector, calibrations, self.cache.preprocess, facts, tuple(checkpoints), images_of)

    def _run_phases(
        self,
        part: Detector,
        number: int | None,
        keys: list[str],
        storage: Storage,
        checkpoints: list[Checkpoints],
        all_patches: bool,
        folds: list[list[str]],
    ) -> dict[str, Any]:
        """Runs the phases of a detector or ensemble member; returns facts about its training."""
        name = "" if number is None else f"{self.spec.detector.members[number].name} {number + 1}: "
        facts: dict[str, Any] = {}
        normal = [key for key in keys if self.cache.images[key].label != 1]
        if part.info.labels == "none":
            keys = normal
        for phase in part.phases:
            if phase == "collect":
                self._collect(part, normal, name, all_patches, folds)
            elif self.spec.extend is None:  # what extends an artifact keeps its training
                trainer = self._trainer(part, number, keys, storage)
                losses = trainer.run(self._on_first(f"{name}train batches"))
                facts = {"losses": [round(x, 6) for x in losses], "resumed_epochs": trainer.resumed_epochs}
                if self.auxiliary is not None and trainer.cache is self.auxiliary.cache:
                    facts["auxiliary"] = self.auxiliary.facts(trainer.keys)
                checkpoints += [trainer.checkpoints] if trainer.checkpoints else []
        return facts

    def _scale(self, ensemble: Ensemble, held_out: list[str], counts: dict[str, int]) -> list[str]:
        """Sets the common scale from some of the held-out images and returns the others."""
        scaling, held_out = choose_scaling(held_out, self.spec.seed, self.group)
        counts["scaled"] = self._count(len(scaling))
        on_progress = self._phase_progress("scale images", counts["scaled"] * len(ensemble.members))
        set_scales(ensemble, self._calibration_images(), scaling, self.spec.batch_size, self.group, on_progress)
        return held_out

    def _detector(self, storage: Storage) -> tuple[Detector, dict[str, Any]]:
        """The detector before fitting, and the record's fields on its origin."""
        name = self.spec.detector.name
        fresh = build_from(self.spec.detector, self.spec.seed)
        if self.spec.extend is None:
            return fresh, {"weights": fresh.load_weights()}
        earlier = load_artifact(normalise_uri(self.spec.extend), storage)
        changed = differences(to_plain(earlier.detector.params), to_plain(fresh.params), "params")
        changed += differences(earlier.record.body["detector"], name, "detector")
        if changed:
            raise SpecError(
                f"{self.spec.extend}: was fitted with other settings ({'; '.join(changed)}). "
                "Extend it with the same detector."
            )
        entry = {
            "artifact": earlier.record.uri,
            "digest": earlier.record.digest,
            "images": earlier.record.body["images"],
        }
        lineage = [*earlier.record.body.get("lineage", []), entry]
        return earlier.detector, {"weights": earlier.record.body["weights"], "lineage": lineage}

    def _folds(self, detector: Detector) -> list[list[str]]:
        """This worker's normal images by the fit that leaves them out; none if images are held out."""
        count, seed, parts_here = self.spec.calibration.folds, self.spec.seed, self._parts(self.cache)
        if not crosses(self.spec, detector, min(self._count(len(keys)) for keys in parts_here.values())):
            return []
        each = [choose_folds(keys, count, seed, self.group, where) for where, keys in parts_here.items()]
        return [list(chain(*fold)) for fold in zip_longest(*each, fillvalue=())]

    def _held_out(self, folds: list[list[str]]) -> list[str]:
        """This worker's calibration keys, sorted."""
        if self.calibration_cache is not None:
            return sorted(chain(*self._parts(self.calibration_cache).values()))
        if folds:
            return normal_keys(self.cache)
        ratio, seed = self.spec.calibration.holdout_ratio or HOLDOUT_RATIO, self.spec.seed
        each = (choose_holdout(keys, ratio, seed, self.group, where) for where, keys in self._parts(self.cache).items())
        return sorted(chain(*each))

    def _parts(self, cache: ImageCache) -> dict[str, list[str]]:
        """This worker's normal images by what is calibrated on its own, under its name for messages."""
        if not self.categories:
            return {self.where: normal_keys(cache)}
        category = cache.categories()
        found: dict[str | None, list[str]] = {name: [] for name in self.categories}
        for key in normal_keys(cache):
            found.get(category[key], []).append(key)  # a calibration source may have further categories
        return {f"{self.where}: category {name!r}": keys for name, keys in found.items()}

    def _fit_keys(self, held_out: list[str], with_labels: bool) -> list[str]:
        """This worker's inputs to fit on, sorted; anomalous images only for detectors that learn from labels.

        Raises:
            SpecError: a detector that learns from labels would see tiles.
        """
        if with_labels and self.cache.preprocess.view.has_tiles:
            raise SpecError(
                f"view.tile: {self.spec.detector.title} learns from the labels of images, and most tiles of an "
                "anomalous image are normal. Remove tile, or use a detector that learns from normal images."
            )
        excluded = set(held_out) if self.calibration_cache is None else set()
        images = self.cache.images.values()
        return sorted(i.key for i in images if i.image_key not in excluded and (with_labels or i.label != 1))

    def _counts(self, fit_keys: list[str]) -> dict[str, int]:
        counts = _uses(self.cache.images.values(), set(fit_keys), self.cache.preprocess.view.has_tiles)
        return {name: self._count(count) for name, count in counts.items()}

    def _counts_of_categories(self, fit_keys: list[str]) -> dict[str, dict[str, int]]:
        """The same for each category with a calibration of its own."""
        inputs: dict[str | None, list[CachedImage]] = {name: [] for name in self.categories}
        for image in self.cache.images.values() if self.categories else ():
            inputs[image.category].append(image)
        chosen, has_tiles = set(fit_keys), self.cache.preprocess.view.has_tiles
        here = {name: _uses(inputs[name], chosen, has_tiles) for name in self.categories}
        total: dict[str, Counter[str]] = {name: Counter() for name in self.categories}
        for text in self.group.gather_bytes(json.dumps(here).encode()):
            for name, counts in json.loads(text).items():
                total[name].update(counts)
        return {name: dict(counts) for name, counts in total.items()}

    def _require_labels(self, detector: Detector, fit_keys: list[str]) -> None:
        if learns_from_labels(detector):
            anomalous = self._count(sum(self.cache.images[key].label == 1 for key in fit_keys))
            if not anomalous:
                raise SpecError(
                    f"{self.where}: {self.spec.detector.title} needs labelled anomalous images, and none of "
                    f"{self._count(len(fit_keys))} is labelled anomalous. Add some, and label them by {{defect}} or "
                    "{label} in source.pattern, a sidecar or a label column."
                )

    def _calibration_images(self) -> ImageCache:
        return self.cache if self.calibration_cache is None else self.calibration_cache

    def _collect(
        self, detector: Detector, normal: list[str], name: str, all_patches: bool, folds: list[list[str]]
    ) -> None:
        chosen = self._chosen(detector, normal)
        by_fold = [self._chosen(detector, self._without(normal, fold)) for fold in folds]
        everything = sorted(set(chosen).union(*by_fold))
        state = collect(
            detector,
            self.cache,
            everything,
            self.spec.batch_size,
            self.group,
            self.spec.max_bank_bytes // (2 if folds else 1),  # a fold's rows are a copy
            self._phase_progress(f"{name}collect images", self._count(len(everything))),
            all_patches,
        )
        if self.spec.extend is not None and self.group.rank == 0:
            detector.extend(state)
        state.agree()
        if folds:
            rounds = self._rounds(detector, state, folds, by_fold)
            self.crossed = self._calibrate(detector, rounds, self._count(sum(map(len, folds))))
        on_progress = self._on_first(f"{name}memory bank rows")
        detector.finish(state if everything == chosen else state.only(set(chosen)), on_progress)

    def _chosen(self, detector: Detector, normal: list[str]) -> list[str]:
        wanted = detector.num_collected()
        return normal if wanted is None else choose_images(normal, wanted, self.spec.seed, self.group)

    def _without(self, keys: list[str], fold: list[str]) -> list[str]:
        left_out = set(fold)
        return [key for key in keys if self.cache.images[key].image_key not in left_out]

    def _rounds(
        self, detector: Detector, state: FitState, folds: list[list[str]], by_fold: list[list[str]]
    ) -> Iterator[list[str]]:
        """Yields the images of each fold when the detector is fitted without them."""
        for number, (fold, fitted) in enumerate(zip(folds, by_fold, strict=True), 1):
            phase = f"memory bank for calibration ({number} of {len(folds)}) rows"
            detector.finish(state.only(set(fitted)), self._on_first(phase))
            yield fold

    def _calibrate(self, detector: Detector, rounds: Iterable[list[str]], total: int) -> dict[str | None, Calibration]:
        images, on_progress = self._calibration_images(), self._phase_progress("calibrate images", total)
        size, names = self.spec.batch_size, self.categories
        return calibrate_each(detector, images, rounds, size, self.group, on_progress, names)

    def _trainer(self, detector: Detector, number: int | None, keys: list[str], storage: Storage) -> Trainer:
        """Gives every worker all images and finds the checkpoints of an earlier run that was killed."""
        kind, cache = detector.info.auxiliary, self.cache
        if kind == "none":
            texts = self.group.gather_bytes(json.dumps(keys).encode())
            all_keys = sorted(key for text in texts for key in json.loads(text))
        else:
            assert self.auxiliary is not None
            cache = self.auxiliary.cache
            all_keys = auxiliary_keys(self.spec, kind, cache, self.group)
        cache.share_all(self.group)
        name = digest({"spec": result_settings(public_spec(self.spec)), "keys": all_keys, "member": number})[:16]
        checkpoints = None
        if self.uri is not None:
            checkpoints = Checkpoints(join_uri(self.uri, f"training-{name}"), storage, self.spec.checkpoint_epochs)
        return Trainer(detector, cache, all_keys, self.group, checkpoints)

    def _count(self, here: int) -> int:
        return int(self.group.sum(torch.tensor([here]))[0])

    def _phase_progress(self, phase: str, total: int) -> Callable[[int], None]:
        return lambda done: self.on_progress(phase, done, total)

    def _on_first(self, phase: str) -> Callable[[int, int], None]:
        """Progress callback of a step that all workers do together; only the first one reports it."""
        return lambda done, total: None if self.group.rank else self.on_progress(phase, done, total)


def _uses(inputs: Collection[CachedImage], fit_keys: set[str], has_tiles: bool) -> dict[str, int]:
    """Number of images by their use."""
    chosen = [image for image in inputs if image.key in fit_keys]
    fitted = {image.image_key for image in chosen}
    anomalous = {image.image_key for image in inputs if image.label == 1}
    tiles = {"fitted_tiles": len(chosen)} if has_tiles else {}
    return {"fitted": len(fitted), "labelled_anomalous_left_out": len(anomalous - fitted), **tiles}
