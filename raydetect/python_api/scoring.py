"""What a fitted model says about images: all in one pass, or one kind of result at a time."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from raydetect.artifacts.region_threshold import RegionThreshold
from raydetect.config import MAX_REGIONS, USUAL_LEVEL, DetectorSpec, FlagSpec
from raydetect.config.validation import validate
from raydetect.detectors._base import NotFittedError
from raydetect.errors import SpecError
from raydetect.fitting.fit_run import Fitted
from raydetect.metrics import conformal
from raydetect.python_api.caller_warnings import warn
from raydetect.python_api.in_process import Settings, running, score_inputs
from raydetect.python_api.inputs import InputImage, as_input_images
from raydetect.python_api.labelled import given_masks, measured
from raydetect.python_api.plotting import plotted
from raydetect.python_api.results import Result, Results, stacked
from raydetect.scoring.batches import Scored
from raydetect.scoring.regions import find_regions
from raydetect.storage import Storage
from raydetect.views.placement import placed

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Scoring:
    """The part of `Estimator` that scores images.

    Every method is a pass of its own over the images, and nothing is cached: call the model itself, as in
    `found = detector(images)`, for scores, p-values, labels and maps from a single one.

    Up to four images in a call are scored one at a time, several times as fast as a batch of 16, to which
    more images are padded. Processors add up in another order then, so scores may differ from those of a larger call or
    of a job in the last digits of a float32 (about 1e-6 of the score). `configure(batch_size=16)` always scores in
    batches of 16, with the same bits as jobs of that `batch_size`, whatever else is in the call.

    Attributes:
        spec: the algorithm and its parameters.
        settings: see `Estimator.configure`.
    """

    spec: DetectorSpec
    settings: Settings
    _fitted: Fitted | None
    _is_renamed: bool

    def __call__(self, images: Any, *, alpha: float | None = None, maps: bool = True, progress: bool = True) -> Results:
        """Scores, p-values, labels, anomaly maps and regions of images in one pass; see `Results`.

        Args:
            images: see `Estimator`.
            alpha: of labels and regions, as in `predict`.
            maps: whether to keep the anomaly maps, which take 4 bytes of memory for every pixel of all images.
            progress: see `Estimator.fit`.

        Raises:
            SpecError: too few images were held out for this alpha.
            NotFittedError, BadImagesError: as `predict_proba`.
        """
        threshold, calibration = self.threshold(alpha), self._require_calibrated().calibration
        region_threshold = RegionThreshold.of(calibration, FlagSpec(alpha=alpha), MAX_REGIONS).value
        inputs = as_input_images(images, Storage(self.settings.storage))
        rows = []
        for item, size_px in self._scored_inputs(inputs, progress):
            content = inputs[item.position].content
            label = int(item.image_score >= threshold)
            item = item.on_host() if maps or label else item
            where: tuple[Any, int] = ((), 0)
            if label and region_threshold is not None:
                where = find_regions(item.anomaly_map(), item.layout, region_threshold, MAX_REGIONS)
            result = Result(
                image=content if isinstance(content, str) else item.position,
                score=item.image_score,
                p_value=conformal.p_value(calibration.scores, item.image_score),
                label=label,
                height=size_px[0],
                width=size_px[1],
                regions=where[0],
                regions_left_out=where[1],
                map=placed(item.anomaly_map(), item.layout, size_px) if maps else None,
            )
            rows.append(result)
        return Results(rows, threshold)

    def predict_proba(self, images: Any, *, progress: bool = True) -> np.ndarray:
        """Raw image scores (N,) float32, higher = more anomalous. Neither clamped nor probabilities: see `p_values`.

        PyOD calls this `decision_function`; scikit-learn's `score_samples` has the opposite sign.

        Raises:
            NotFittedError: the model is not fitted.
            BadImagesError: images cannot be read or have no finite score; the error lists all of them.
        """
        return np.array([scored.image_score for scored, _ in self._scored(images, progress)], dtype=np.float32)

    def predict(self, images: Any, *, alpha: float | None = None, progress: bool = True) -> np.ndarray:
        """Predicted labels (N,) int64, 1 = anomalous. A normal image gets 1 with probability at most `alpha`.

        As in PyOD; scikit-learn's outlier detectors return -1 for outliers and 1 for the others.

        Args:
            images: see `Estimator`.
            alpha: None = 0.01, or the smallest that the calibration allows, which a warning says.
            progress: see `Estimator.fit`.

        Raises:
            SpecError: too few images were held out for this alpha.
            NotFittedError, BadImagesError: as `predict_proba`.
        """
        threshold = self.threshold(alpha)
        return (self.predict_proba(images, progress=progress).astype(np.float64) >= threshold).astype(np.int64)

    def score_samples(self, images: Any, *, progress: bool = True) -> np.ndarray:
        """`-predict_proba(images)`, (N,) float32: higher = more normal, as of scikit-learn's outlier detectors.

        Raises:
            NotFittedError, BadImagesError: as `predict_proba`.
        """
        return -self.predict_proba(images, progress=progress)

    def decision_function(self, images: Any, *, alpha: float | None = None, progress: bool = True) -> np.ndarray:
        """`threshold(alpha)` minus the image scores, (N,) float64: the sign of scikit-learn, negative for outliers.

        0 is an image at the threshold, which `predict` labels 1: `predict` is 1 exactly where this is <= 0. PyOD's
        `decision_function` is the other way round, higher for outliers and not shifted; that is `predict_proba`.

        Args:
            images: see `Estimator`.
            alpha: see `predict`.
            progress: see `Estimator.fit`.

        Raises:
            SpecError: too few images were held out for this alpha.
            NotFittedError, BadImagesError: as `predict_proba`.
        """
        threshold = self.threshold(alpha)
        return threshold - self.predict_proba(images, progress=progress).astype(np.float64)

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
        return stacked(maps)

    def evaluate(self, images: Any, y: Any, masks: Any = None, *, progress: bool = True) -> dict[str, float]:
        """Metrics of the model on labelled images, by the code of `raydetect evaluate`.

        Args:
            images: see `Estimator`.
            y: labels (N,) 0 (normal) and 1 (anomalous), both of them.
            masks: of every image its defect, to get pixel metrics too: an array (N, H, W), or a list of arrays (H, W),
                nonzero = anomalous, of paths, URIs or PIL images by the rules of jobs, and None where it is unknown.
                Those of normal images are not looked at.
            progress: see `Estimator.fit`.

        Returns:
            `image_auroc`, `image_ap`, `image_f1_max`, `image_fpr_at_95_tpr`; with masks, if the detector localises,
            the same of pixels (`pixel_auroc` ...), `aupro_0.3` and `aupro_0.05`, up to these false positive rates.
            All are in [0, 1]; `raydetect/evaluation/README.md` defines them. Maps and masks are compared at the size
            of the detector's input.

        Raises:
            SpecError: the labels or masks do not fit, or a label is missing.
            MaskError: a mask cannot be read or differs in size from its image.
            NotFittedError, BadImagesError: as `predict_proba`.
        """
        fitted, storage = self._require_fitted(), Storage(self.settings.storage)
        inputs = as_input_images(images, storage, y)
        given = None if masks is None else given_masks(masks, len(inputs), storage)
        with running(self.settings.num_threads, progress) as on_progress:
            return measured(fitted, inputs, given, self.settings, on_progress)

    def plot(self, image: Any, *, alpha: float | None = None) -> "Figure":
        """A matplotlib figure of one image: the picture with its regions, and the anomaly map on a fixed scale.

        The title has score, p-value and label. The scale is that of heatmaps, from the lowest value of held-out normal
        images to three times their range, so figures of one model can be compared. A notebook shows the figure; in a
        script, call its `savefig`.

        Args:
            image: uint8 array (H, W, 3) or (H, W), path, URI or PIL image.
            alpha: see `predict`.

        Raises:
            MissingPackageError: matplotlib is not installed.
            SpecError: not one image, or too few images were held out for this alpha.
            NotFittedError, BadImagesError: as `predict_proba`.
        """
        found = self([image], alpha=alpha, progress=False)
        fitted = self._require_fitted()
        given = as_input_images([image], Storage(self.settings.storage))[0]
        return plotted(given, found[0], found.threshold, fitted, Storage(self.settings.storage))

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
            warn(f"{self.spec.title}: {conformal.usual_level_text(len(scores))}.")
        return conformal.threshold_for(scores, level, "alpha")

    def _scored(self, images: Any, progress: bool) -> Iterator[tuple[Scored, tuple[int, int]]]:
        self._require_fitted()
        return self._scored_inputs(as_input_images(images, Storage(self.settings.storage)), progress)

    def _scored_inputs(self, inputs: list[InputImage], progress: bool) -> Iterator[tuple[Scored, tuple[int, int]]]:
        fitted = self._require_fitted()
        with running(self.settings.num_threads, progress) as on_progress:
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
