"""The Python interface: `create_model(...).fit(images).predict(images)`, in this process, without Ray.

Fits and scores are bit-identical to those of jobs (`python_api/in_process.py`). `save` writes the artifact that
`raydetect score` reads.
"""

import copy
from collections.abc import Mapping
from typing import Any, NoReturn

import torch

from raydetect.artifacts.replacement import refuse_existing
from raydetect.artifacts.store import load_artifact, save_artifact
from raydetect.config import AT_LEAST_2X, STRETCH, DetectorSpec, FitSpec, JpegScale, SourceSpec, ViewSpec
from raydetect.config.validation import to_plain, validate
from raydetect.detectors._describe import (
    call_text,
    changed_spec,
    full_params,
    plain_spec,
    spec_of_record,
    with_class_name,
)
from raydetect.detectors._ensemble import learns_from_labels
from raydetect.detectors._registry import build_from
from raydetect.errors import SpecError
from raydetect.fitting.fit_run import Fitted
from raydetect.python_api.in_process import Settings, fit_inputs, running
from raydetect.python_api.inputs import as_input_images, refuse_duplicates
from raydetect.python_api.scoring import Scoring
from raydetect.storage import Storage, normalise_uri

NOT_SAVED = "not saved"


class Estimator(Scoring):
    """A detector or ensemble to fit and use in Python, created by `create_model` or `create_ensemble`.

    `images` is always an array (N, H, W, 3) or (N, H, W) of uint8, a list of such images of any sizes, of paths, URIs
    or PIL images, or a folder or glob of image files, which are taken in the order of their names. Images that cannot
    be read raise an error that lists all of them; they never get a score.

    `detector(images)` gives scores, p-values, labels, maps and regions from one pass; every other method that scores is
    a pass of its own, and nothing is cached. `Scoring` describes them, and how few images are scored faster.

    Attributes:
        spec: the algorithm and its parameters.
        seed: of every random choice.
        settings: see `configure`.

    >>> import numpy as np
    >>> from raydetect import create_model
    >>> images = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    >>> detector = create_model("patchcore", preset="smoke", weights="random").fit(images, holdout_ratio=0.5)
    >>> detector
    create_model('patchcore', preset='smoke', weights='random')
    >>> dark = images // 8
    >>> detector.predict(np.concatenate([images[:3], dark[:2]]), alpha=0.1)
    array([0, 0, 0, 1, 1])
    >>> detector(dark[:2], alpha=0.1).labels
    array([1, 1])
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
        auxiliary: SourceSpec | Mapping[str, Any] | None = None,
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
            auxiliary: images for a detector that learns from others than those it scores, as a source of a job file,
                such as `{"uri": "others/", "pattern": "{category}/{name}"}`.
            progress: whether to show the progress of a fit that takes more than two seconds.

        Raises:
            SpecError: the images or labels are invalid or too few.
            BadImagesError: images cannot be read; the error lists all of them.
        """
        inputs = as_input_images(images, Storage(self.settings.storage), y)
        refuse_duplicates(inputs)
        if learns_from_labels(build_from(self.spec, self.seed)) and all(image.label != 1 for image in inputs):
            raise SpecError(f"{self.spec.title}: needs labelled anomalous images. Call fit(images, y=labels).")
        spec = self._fit_spec(len(inputs), holdout_ratio, jpeg_scale, view, auxiliary)
        with running(spec.resources.cpus_per_worker, progress) as on_progress:
            self._fitted = fit_inputs(spec, inputs, torch.device(self.settings.device), on_progress)
        self._is_renamed = False
        return self

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
        model._fitted = Fitted(artifact.detector, {None: artifact.record.calibration}, artifact.record.preprocess, body)
        return model.configure(**settings)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """All arguments of `create_model` or `create_ensemble` that have an effect together, with defaults filled in.

        Args:
            deep: for scikit-learn, which passes it; there are no nested parameters, so both give the same.
        """
        if not self.spec.ensemble:
            return full_params(self.spec.members[0], self.seed)
        specs = [{"name": m.name, "preset": m.preset, "params": m.params} for m in self.spec.ensemble]
        members = [Estimator(validate(DetectorSpec, spec, "member"), self.seed) for spec in specs]
        return {"members": members, "weights": self.spec.weights, "seed": self.seed}

    def set_params(self, **params: Any) -> "Estimator":
        """Changes parameters and returns the model, which has to be fitted again unless all of them have their values.

        Args:
            **params: of `create_model` but for its name; parameters that were stated before and have no effect with
                the new ones return to their defaults.

        Raises:
            SpecError: a parameter is unknown, invalid or without an effect, or the model is an ensemble.
        """
        if self.spec.ensemble and params:
            raise SpecError("set_params: an ensemble is made of its members. Change those and call create_ensemble.")
        now = {} if self.spec.ensemble else self.get_params()
        changed = {n: v for n, v in params.items() if n not in now or to_plain(v) != to_plain(now[n])}
        if "name" in changed:
            raise SpecError(f"set_params: the model is a {self.spec.name}. Call create_model({changed['name']!r}).")
        if not changed:
            return self
        seed = changed.pop("seed", self.seed)
        model = Estimator(changed_spec(self.spec, changed), seed)
        self.spec, self.seed = model.spec, model.seed
        self._fitted, self._is_renamed = None, False
        return self

    def __sklearn_clone__(self) -> "Estimator":
        """An unfitted model with the same parameters and settings, for `sklearn.base.clone`."""
        return self._with_fit(None)

    def __copy__(self) -> "Estimator":
        return self.__deepcopy__({})

    def __deepcopy__(self, memo: dict[int, Any]) -> "Estimator":
        """A model of its own, with a copy of the fit."""
        return self._with_fit(copy.deepcopy(self._fitted, memo))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuses to be pickled, since raydetect unpickles nothing: a pickle can run any code."""
        raise TypeError(
            f"{self.spec.title}: a model cannot be pickled. Call save(uri), and create_model.load(uri) where it is "
            "needed; with joblib, use threads."
        )

    def _with_fit(self, fitted: Fitted | None) -> "Estimator":
        model = Estimator(self.spec, self.seed)
        model.settings, model._fitted = self.settings, fitted
        model._is_renamed = self._is_renamed and fitted is not None
        return model

    def __repr__(self) -> str:
        """The call that creates this model, with only the arguments that differ from the preset."""
        return call_text(self.spec, self.seed)

    def _fit_spec(
        self,
        count: int,
        holdout_ratio: float | None,
        jpeg_scale: str,
        view: ViewSpec | Mapping[str, Any],
        auxiliary: SourceSpec | Mapping[str, Any] | None,
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
            "batch_size": settings.fit_batch_size,
            "calibration": {"holdout_ratio": holdout_ratio},
            "preprocess": {"jpeg_scale": jpeg_scale},
            "view": view,
            "auxiliary": auxiliary,
            "resources": {"cpus_per_worker": settings.num_threads, "gpus_per_worker": gpus},
        }
        return validate(FitSpec, values, "fit")
