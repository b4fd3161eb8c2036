"""The Python interface: `create_model(...).fit(images).predict(images)`, in this process, without Ray.

Fits and scores are bit-identical to those of jobs (`python_api/in_process.py`). `save` writes the artifact that
`raydetect score` reads.
"""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from raydetect.artifacts.replacement import refuse_existing
from raydetect.artifacts.store import load_artifact, save_artifact
from raydetect.config import AT_LEAST_2X, STRETCH, USUAL_LEVEL, DetectorSpec, FitSpec, FlagSpec, JpegScale, ViewSpec
from raydetect.config.validation import validate
from raydetect.detectors._base import NotFittedError
from raydetect.detectors._describe import call_text, full_params, plain_spec, spec_of_record, with_class_name
from raydetect.detectors._ensemble import learns_from_labels
from raydetect.detectors._registry import build_from
from raydetect.errors import SpecError
from raydetect.fitting.fit_run import Fitted
from raydetect.fitting.timings import torch_threads
from raydetect.metrics import conformal
from raydetect.progress import shown
from raydetect.python_api.in_process import Settings, fit_inputs, score_inputs
from raydetect.python_api.inputs import as_input_images, refuse_duplicates
from raydetect.scoring.batches import Scored
from raydetect.storage import Storage, normalise_uri
from raydetect.views.placement import placed

SHOW_AFTER_SECONDS = 2.0
NOT_SAVED = "not saved"


class Estimator:
    """A detector or ensemble to fit and use in Python, created by `create_model` or `create_ensemble`.

    `images` is always an array (N, H, W, 3) or (N, H, W) of uint8, a list of such images of any sizes, of paths, URIs
    or PIL images, or a folder or glob of image files, which are taken in the order of their names. Images that cannot
    be read raise an error that lists all of them; they never get a score.

    Attributes:
        spec: the algorithm and its parameters.
        seed: of every random choice.
        settings: see `configure`.

    >>> from raydetect import create_model
    >>> images = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    >>> detector = create_model("patchcore", preset="smoke", weights="random").fit(images, holdout_ratio=0.5)
    >>> detector
    create_model('patchcore', preset='smoke', weights='random')
    >>> dark = images // 8
    >>> detector.predict(np.concatenate([images[:3], dark[:2]]), alpha=0.1)
    array([0, 0, 0, 1, 1])
    >>> detector.predict_proba(dark).shape, detector.predict_anomaly_map([dark[0], dark[1, :40]])[1].shape
    ((20,), (40, 64))
    """

    def __init__(self, spec: DetectorSpec, seed: int = 0) -> None:
        """Checks every parameter; loads no weights.

        Raises:
            SpecError: the name is unknown, or a parameter is unknown or invalid.
        """
        if not isinstance(seed, int) or seed < 0:
            raise SpecError(f"seed: is {seed!r}. Give a non-negative integer.")
        self.spec = plain_spec(spec, seed)
        self.seed = seed
        self.settings = Settings()
        self._fitted: Fitted | None = None
        self._is_renamed = False

    def configure(self, **settings: Any) -> "Estimator":
        """Changes how the model runs, and returns it.

        Args:
            **settings: `device`, `threads`, `batch_size`, `storage` (a mapping as in a job file); settings that are not
                given keep their values.

        >>> from raydetect import create_model
        >>> create_model("patchcore").configure(threads=2, batch_size=8).settings.batch_size
        8
        """
        self.settings = self.settings.changed(settings)
        if self._fitted is not None:
            self._fitted.detector.to(torch.device(self.settings.device))
        return self

    def fit(
        self,
        images: Any,
        y: Any = None,
        *,
        holdout_ratio: float | None = None,
        jpeg_scale: JpegScale = AT_LEAST_2X,
        view: ViewSpec | Mapping[str, Any] = STRETCH,
        progress: bool = True,
    ) -> "Estimator":
        """Fits on normal images and returns the model; replaces an earlier fit.

        Args:
            images: see the class.
            y: labels 0 (normal) and 1 (anomalous); None = all are normal. Anomalous images are ignored, unless the
                detector learns from them.
            holdout_ratio: share of the normal images held out to set thresholds, chosen by keyed hash. None = for a
                detector that trains nothing and fewer than 990 images, none is: each is scored by one of five fits that
                has not seen it, and the model is fitted on all; else 0.1.
            jpeg_scale: how JPEGs given by path or URI are decoded, now and whenever the model scores: "at_least_2x", at
                the smallest of 1/1, 1/2, 1/4 and 1/8 of their size that has at least twice the px of the input, or
                "full". Arrays and PIL images are taken as they are.
            view: which parts of an image the detector looks at and at which size, now and whenever the model scores;
                a mapping as in a job file, such as `{"tile": {"overlap": 32}}`.
            progress: whether to show the progress of a fit that takes more than two seconds.

        Raises:
            SpecError: the images or labels are invalid or too few.
            BadImagesError: images cannot be read; the error lists all of them.
        """
        inputs = as_input_images(images, Storage(self.settings.storage), y)
        refuse_duplicates(inputs)
        if learns_from_labels(build_from(self.spec, self.seed)) and all(image.label != 1 for image in inputs):
            raise SpecError(f"{self.spec.title}: needs labelled anomalous images. Call fit(images, y=labels).")
        spec = self._fit_spec(len(inputs), holdout_ratio, jpeg_scale, view)
        with torch_threads(spec.resources.cpus_per_worker), shown(progress, SHOW_AFTER_SECONDS) as on_progress:
            self._fitted = fit_inputs(spec, inputs, torch.device(self.settings.device), on_progress)
        self._is_renamed = False
        return self

    def predict_proba(self, images: Any, *, progress: bool = True) -> np.ndarray:
        """Raw image scores (N,) float32, higher = more anomalous. Neither clamped nor probabilities: see `p_values`.

        Raises:
            NotFittedError: the model is not fitted.
            BadImagesError: images cannot be read or have no finite score; the error lists all of them.
        """
        return np.array([scored.image_score for scored, _ in self._scored(images, progress)], dtype=np.float32)

    def predict(self, images: Any, *, alpha: float | None = None, progress: bool = True) -> np.ndarray:
        """Predicted labels (N,) int64, 1 = anomalous. A normal image gets 1 with probability at most `alpha`.

        Args:
            images: see the class.
            alpha: None = 0.01, or the smallest that the calibration allows, which a warning says.
            progress: see `fit`.

        Raises:
            SpecError: too few images were held out for this alpha.
            NotFittedError, BadImagesError: as `predict_proba`.
        """
        threshold = self.threshold(alpha)
        return (self.predict_proba(images, progress=progress).astype(np.float64) >= threshold).astype(np.int64)

    def p_values(self, images: Any, *, progress: bool = True) -> np.ndarray:
        """Conformal p-values (N,) float64: (1 + held-out normal images that score at least as high) / (held out + 1).

        Raises:
            NotFittedError, BadImagesError: as `predict_proba`.
        """
        scores_N = self.predict_proba(images, progress=progress).astype(np.float64)
        return conformal.p_values(self._held_out_scores(), scores_N)

    def predict_anomaly_map(self, images: Any, *, progress: bool = True) -> "np.ndarray | list[np.ndarray]":
        """Anomaly maps (N, H, W) float32, each at its image's original size; a list of arrays if sizes differ.

        A map is NaN where the view does not look. Uses 4 bytes of memory for every pixel of all images.

        Raises:
            NotFittedError, BadImagesError: as `predict_proba`.
        """
        scored = self._scored(images, progress)
        maps = [placed(item.anomaly_map(), item.layout, size_px) for item, size_px in scored]
        return np.stack(maps) if len({found.shape for found in maps}) == 1 else maps

    def threshold(self, alpha: float | None = None) -> float:
        """The lowest image score for which `predict` returns 1.

        Args:
            alpha: see `predict`.

        Raises:
            SpecError: too few images were held out for this alpha.
            NotFittedError: the model is not fitted.
        """
        flag, scores = validate(FlagSpec, {"alpha": alpha}, "predict"), self._held_out_scores()
        _, level = flag.smallest_p(len(scores)) or ("", 1.0)
        if alpha is None and level > USUAL_LEVEL:
            warnings.warn(f"{self.spec.title}: {conformal.usual_level_text(len(scores))}.", stacklevel=2)
        return conformal.threshold_for(scores, level, "alpha")

    def set_class_name(self, name: str) -> "Estimator":
        """Sets what the images show, such as "screw", for a detector that scores by text.

        A fitted detector uses the new name at once. Its thresholds were calibrated with the old name, so `predict`,
        `p_values` and `save` require another fit. An ensemble discards its fit, because its scale depends on the name.

        Raises:
            SpecError: no detector of the model scores by text.
        """
        spec = with_class_name(self.spec, name, self.seed)
        detector = None if self._fitted is None else self._fitted.detector
        if detector is not None and hasattr(detector, "set_class_name"):
            detector.set_class_name(name)
            self._is_renamed = True
        else:
            self._fitted = None
        self.spec = spec
        return self

    def save(self, uri: str, *, replace: bool = False) -> str:
        """Writes the artifact that `raydetect score` and `create_model.load` read, and returns its digest.

        Args:
            uri: folder of the artifact.
            replace: whether an artifact that is there already is replaced.

        Raises:
            NotFittedError: the model is not fitted.
            SpecError: an artifact is there already.
            StorageError: the artifact cannot be written.
        """
        fitted, target = self._require_calibrated(), normalise_uri(uri)
        facts = dict(fitted.facts)
        if facts.get("spec", {}).get("artifact") == NOT_SAVED:
            facts["spec"] = {**facts["spec"], "artifact": target}
        storage = Storage(self.settings.storage)
        if not replace:
            refuse_existing(target, storage, "save", "save(uri, replace=True)")
        return save_artifact(target, storage, self.spec.name, fitted.detector, fitted.calibration, facts)

    @classmethod
    def load(cls, uri: str, **settings: Any) -> "Estimator":
        """Loads a fitted model from an artifact written by `save` or by a job.

        Args:
            uri: folder of the artifact.
            **settings: see `configure`.

        Raises:
            ArtifactError: the artifact is missing, damaged, or a fleet.
        """
        storage = Storage(Settings().changed(settings).storage)
        artifact = load_artifact(normalise_uri(uri), storage)
        body = artifact.record.body
        model = cls(spec_of_record(body), body["seed"])
        model._fitted = Fitted(artifact.detector, artifact.record.calibration, artifact.record.preprocess, body)
        return model.configure(**settings)

    def get_params(self) -> dict[str, Any]:
        """All arguments of `create_model` or `create_ensemble`, with defaults filled in."""
        if not self.spec.ensemble:
            return full_params(self.spec.members[0], self.seed)
        specs = [{"name": m.name, "preset": m.preset, "params": m.params} for m in self.spec.ensemble]
        members = [Estimator(validate(DetectorSpec, spec, "member"), self.seed) for spec in specs]
        return {"members": members, "weights": self.spec.weights, "seed": self.seed}

    def __repr__(self) -> str:
        """The call that creates this model, with only the arguments that differ from the preset."""
        return call_text(self.spec, self.seed)

    def _fit_spec(
        self, count: int, holdout_ratio: float | None, jpeg_scale: str, view: ViewSpec | Mapping[str, Any]
    ) -> FitSpec:
        """The equivalent fit job, for the fitting code and for the record."""
        settings = self.settings
        gpus = 0 if settings.device == "cpu" else 1
        values = {
            "kind": "fit",
            "source": {"uri": f"{count} images given in Python"},
            "detector": self.spec,
            "artifact": NOT_SAVED,
            "storage": settings.storage,
            "seed": self.seed,
            "batch_size": settings.batch_size,
            "calibration": {"holdout_ratio": holdout_ratio},
            "preprocess": {"jpeg_scale": jpeg_scale},
            "view": view,
            "resources": {"cpus_per_worker": settings.num_threads, "gpus_per_worker": gpus},
        }
        return validate(FitSpec, values, "fit")

    def _scored(self, images: Any, progress: bool) -> Iterator[tuple[Scored, tuple[int, int]]]:
        fitted = self._require_fitted()
        inputs = as_input_images(images, Storage(self.settings.storage))
        with torch_threads(self.settings.num_threads), shown(progress, SHOW_AFTER_SECONDS) as on_progress:
            yield from score_inputs(fitted, inputs, self.settings, on_progress)

    def _require_fitted(self) -> Fitted:
        if self._fitted is None:
            raise NotFittedError(f"{self.spec.title}: is not fitted. Call fit(images), or create_model.load(uri).")
        return self._fitted

    def _require_calibrated(self) -> Fitted:
        fitted = self._require_fitted()
        if self._is_renamed:
            raise SpecError(
                f"{self.spec.title}: has a new class name since its fit, so its thresholds are invalid. Fit again."
            )
        return fitted

    def _held_out_scores(self) -> np.ndarray:
        return np.asarray(self._require_calibrated().calibration.scores, dtype=np.float64)
