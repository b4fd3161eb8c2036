"""Chooses the settings of a fit and of a scoring for a source that was looked at."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from raydetect.archives.base import is_image_name
from raydetect.config import FEW_IMAGES, USUAL_LEVEL, StorageOptions, TileSpec, ViewSpec
from raydetect.first_jobs.folders import Folders, read_folders
from raydetect.first_jobs.job_text import JobText, Setting
from raydetect.first_jobs.machine import choose_backbone, cores, has_gpu, worker
from raydetect.first_jobs.survey import Survey
from raydetect.storage import join_uri
from raydetect.views.hints import are_large, are_oblong
from raydetect.views.view import View

IMAGE_SIZE = (256, 256)
MOST_TILES = 24  # of a picture; more take too long for a first try
SCALES = (1.0, 0.5, 0.25)
PATCHES = 1024  # of an input of IMAGE_SIZE
MANY_PATCHES = 200_000
LOCAL_BYTES = 512 << 20  # of a source that one process scores
BIT_DEPTHS = (10, 12, 14, 15)


@dataclass(frozen=True, slots=True)
class Looked:
    """A source with what its folders mean."""

    survey: Survey
    folders: Folders

    @classmethod
    def at(cls, survey: Survey) -> "Looked":
        """Reads its folders.

        Raises:
            SpecError: it has folders of bad parts and none of good ones.
        """
        where = ", ".join(survey.source.uris())
        names = [] if set(survey.formats) == {"parquet"} else survey.names
        return cls(survey, read_folders(names, where))

    @property
    def num_normal(self) -> int | None:
        """Images to fit on; None if they are in containers that were not read to the end."""
        if self.survey.images is None:
            return None
        if self.survey.has_labels and not self.folders.train:
            return sum(count for (label, _), count in self.survey.labels.items() if label != 1)
        return self.folders.num_normal if self.folders.train or self.survey.is_loose else self.survey.images


def fit_job(looked: Looked, artifact: str, storage: StorageOptions, detector: str | None = None) -> JobText:
    """The fit of a source's good images.

    Args:
        looked: the source.
        artifact: where the artifact goes.
        storage: of the job.
        detector: a name of `raydetect detectors`; None chooses.
    """
    view, inputs = _view(looked.survey)
    settings = [
        _fit_source(looked),
        _detector(looked, detector, inputs),
        view,
        Setting("artifact", artifact, f"the fitted detector is written to {artifact}"),
        _calibration(looked, detector),
        *_per_category(looked),
        *_storage(storage),
        worker(),
    ]
    title = "Fits a detector on the images of good parts. Check it with `raydetect check`, run it with `raydetect fit`."
    return JobText("fit", title, settings)


def score_job(
    looked: Looked,
    artifact: str,
    results: str,
    storage: StorageOptions,
    fitted: Looked | None = None,
    workers: int = 1,
) -> JobText:
    """The scoring of a source.

    Args:
        looked: the source.
        artifact: of the fit.
        results: where the results go.
        storage: of the job.
        fitted: the source of the fit, if it is known.
        workers: number of them.
    """
    settings = [
        _score_source(looked, fitted),
        Setting("artifact", artifact, f"the detector that the fit wrote to {artifact}"),
        Setting(
            "sink",
            {"uri": results, "heatmaps": "flagged"},
            f"rows, and heatmaps of flagged images, go to {results}",
        ),
        *([] if fitted is None else [_flag(fitted)]),
        *_storage(storage),
        worker(workers),
    ]
    title = "Scores images with the fitted detector. Run it with `raydetect score`; again, it resumes."
    return JobText("score", title, settings)


def workers_for(looked: Looked) -> int:
    """How many workers score a source: one for a small one, which this process scores, else one for two cores."""
    many = looked.survey.bytes > LOCAL_BYTES and not has_gpu()
    return max(1, cores() // 2) if many else 1


def _fit_source(looked: Looked) -> Setting:
    survey, folders = looked.survey, looked.folders
    uri = survey.source.uri
    if folders.is_top_normal and survey.is_loose:
        suffixes = sorted({"." + name.rpartition(".")[2] for name in survey.names if "/" not in name})
        globs = [join_uri(str(uri), f"*{suffix}") for suffix in suffixes if is_image_name(f"x{suffix}")]
        return Setting("source", {"uri": globs if len(globs) > 1 else globs[0]}, folders.why)
    if folders.normal_folder and survey.is_loose and isinstance(uri, str) and len(folders.categories) < 2:
        return Setting("source", {"uri": join_uri(uri, folders.normal_folder)}, folders.why)
    value: dict[str, Any] = {"uri": uri, **_pattern(folders, folders.train)}
    why = folders.why
    if folders.train is None and survey.has_labels:
        why = "labels inside of the files say which images are normal; the others are not fitted on"
    return Setting("source", value, why)


def _pattern(folders: Folders, pattern: str | None) -> dict[str, Any]:
    if pattern is None:
        return {}
    return {"pattern": pattern} | ({"normal_names": list(folders.normal_names)} if folders.normal_names else {})


def _score_source(looked: Looked, fitted: Looked | None) -> Setting:
    survey, folders = looked.survey, looked.folders
    uri = survey.source.uri
    value: dict[str, Any] = {"uri": uri, **_pattern(folders, folders.test)}
    if folders.mask:
        value["mask_pattern"] = folders.mask
    if fitted is not None and fitted.survey is survey:
        if folders.num_anomalous or (folders.test != folders.train):
            return Setting(
                "source", value, f"the same place; images in folders of bad parts: {folders.num_anomalous:,}"
            )
        return Setting(
            "source", value, "the images of the fit, to try it out; name the folder of new images here, for which it is"
        )
    labelled = f"; in folders of bad parts: {folders.num_anomalous:,}" if folders.num_anomalous else ""
    return Setting("source", value, f"the images to look at{labelled}")


def _detector(looked: Looked, name: str | None, inputs: int) -> Setting:
    if name not in (None, "patchcore"):
        return Setting("detector", {"name": name}, f"{name} was asked for; its parameters are those of its paper")
    backbone = choose_backbone()
    params: dict[str, Any] = {"backbone": backbone.name, "weights": backbone.weights}
    why = "patchcore, which is among the most accurate and needs no training: minutes instead of hours"
    patches = (looked.num_normal or looked.survey.read) * inputs * PATCHES
    if patches > MANY_PATCHES:
        params["coreset_sampling_ratio"] = 0.01
        why += f". It keeps 1 % of about {patches:,} patch embeddings, as PatchCore-1% in the paper, to be quick"
    other = "raydetect detectors --compare shows the others"
    return Setting("detector", {"name": "patchcore", "params": params}, f"{why}. {backbone.why}", other)


def _view(survey: Survey) -> tuple[Setting, int]:
    """The view, and how many inputs a picture becomes."""
    sizes_N2 = np.repeat(np.array(list(survey.sizes), np.float64), list(survey.sizes.values()), axis=0)
    value: dict[str, Any] = {}
    why, inputs = "pictures are resized to the input of 256 x 256 px as a whole", 1
    if are_large(sizes_N2, IMAGE_SIZE):
        middle = (round(float(np.median(sizes_N2[:, 0]))), round(float(np.median(sizes_N2[:, 1]))))
        scale, inputs = _tiles(middle)
        value = {"tile": {}} | ({"scale": scale} if scale < 1 else {})
        why = (
            f"pictures of {middle[0]:,} x {middle[1]:,} px are seen in {inputs} tiles of 256 x 256 px, because small "
            "defects vanish in one input"
        )
        if scale < 1:
            why += f"; they are reduced to {scale:g} first, which is quicker (more tiles see smaller defects)"
    elif are_oblong(sizes_N2):
        value = {"resize": "pad"}
        why = "most pictures are oblong; pad keeps the ratio of their sides"
    white = _white(survey)
    if white:
        value["range"] = [0, white]
        why += f". The brightest px of 16 bits is {survey.white:,}, so that {white:,} is white"
    return Setting("view", value or None, why), inputs


def _tiles(middle: tuple[int, int]) -> tuple[float, int]:
    for scale in SCALES:
        view = View(ViewSpec(tile=TileSpec(), scale=scale))
        count = len(view.layout(middle, IMAGE_SIZE).windows)
        if count <= MOST_TILES or scale == SCALES[-1]:
            return scale, count
    raise AssertionError("SCALES is not empty")


def _white(survey: Survey) -> int | None:
    """The stored value of white if pictures of 16-bit grey use few of their bits."""
    if not survey.white or survey.depths["16-bit grey"] < survey.depths.total():
        return None
    return next(((1 << bits) - 1 for bits in BIT_DEPTHS if survey.white < 1 << bits), None)


def _calibration(looked: Looked, detector: str | None) -> Setting:
    count = looked.num_normal
    if count is None or detector not in (None, "patchcore"):
        return Setting("calibration", None, "the default: by folds if there are few images, else a tenth is held out")
    if count < FEW_IMAGES:
        why = f"{count:,} good images are few, so each is scored by one of five fits that has not seen it"
        return Setting("calibration", {"method": "cross", "folds": 5}, why)
    return Setting("calibration", {"method": "holdout"}, f"of {count:,} good images, a tenth is enough to calibrate on")


def _flag(fitted: Looked) -> Setting:
    count = fitted.num_normal
    why = "the default: about 1 % of good parts are flagged"
    if count is not None and count < FEW_IMAGES and count + 1 < 1 / USUAL_LEVEL:
        why = f"the default: with {count:,} good images, about {1 / (count + 1):.1%} of good parts are flagged"
    return Setting("flag", None, why, "flag: {alpha: 0.05}")


def _per_category(looked: Looked) -> list[Setting]:
    folders = looked.folders
    if len(folders.categories) > 1:
        why = f"each of {len(folders.categories)} categories gets a detector of its own"
        other = "per_category: calibration   # one detector of all categories, with a threshold for each"
        return [Setting("per_category", True, why, other)]
    if folders.loose_groups:
        why = f"one detector for all {len(folders.loose_groups)} folders; if they are different products, use instead"
        other = 'per_category: true   # and in source, pattern: "{category}/{name}"'
        return [Setting("per_category", None, why, other)]
    return []


def _storage(options: StorageOptions) -> list[Setting]:
    stated = {name: value for name, value in options.public().items() if value}
    return (
        [Setting("storage", stated, "as given on the command line; keys come from the environment")] if stated else []
    )
